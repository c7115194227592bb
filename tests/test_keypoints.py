"""Keypoint files: what is read, how it is repaired and normalised, and that anything else is one clear error."""

import json
import pickle
import zipfile

import numpy as np
import pytest

from h2ot_kernels.__main__ import main
from h2ot_kernels.demo.keypoints import KeypointError, cut_windows, fill_missing, join_windows, make_clip, read_clip
from h2ot_kernels.demo.skeleton import walking_clip

from .cases import CLIPS

T = 12


@pytest.fixture
def points():
    return np.random.default_rng(0).uniform(100, 900, (T, 17, 2)).astype(np.float32)


def annotation(image, score=None, shift=0.0, visible=2):
    joints = [[100 + 10 * j + shift, 200 + 5 * j + shift, visible] for j in range(17)]
    person = {"image_id": image, "keypoints": [v for joint in joints for v in joint]}
    return person if score is None else {**person, "score": score}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_single_array(tmp_path, points, suffix):
    path = tmp_path / f"clip{suffix}"
    np.save(path, points) if suffix == ".npy" else np.savez(path, anything=points)
    clip = read_clip(path)
    np.testing.assert_array_equal(clip.points, points)
    assert clip.unit == "px"
    assert clip.joints_3d is None
    # No image size: the bounding box of the clip fills -1 .. 1 along its longer side, without distortion.
    assert np.abs(clip.normalised).max() == pytest.approx(1)
    spread = np.ptp(points, (0, 1))
    np.testing.assert_allclose(np.ptp(clip.normalised, (0, 1)), spread / spread.max() * 2, rtol=1e-5)


@pytest.mark.parametrize("key", ["keypoints_2d", "positions_2d"])
def test_pixels_are_normalised_by_the_image(tmp_path, points, key):
    path = tmp_path / "clip.npz"
    np.savez(path, **{key: points}, image_wh=[1000, 800], fps=50.0, joints_3d_cam=np.ones((T, 17, 3)), other=3)
    clip = read_clip(path)
    expected = points / 1000 * 2 - [1, 800 / 1000]
    np.testing.assert_allclose(clip.normalised, expected, atol=1e-6)
    assert clip.fps == 50
    assert clip.joints_3d.shape == (T, 17, 3)


def test_normalised_keypoints_are_kept_and_give_pixels_back(tmp_path, points):
    norm = (points / 1000 * 2 - [1, 0.8]).astype(np.float32)
    np.savez(tmp_path / "with.npz", keypoints_2d_norm=norm, image_wh=[1000, 800])
    np.savez(tmp_path / "without.npz", keypoints_2d_norm=norm, fps=30)
    clip = read_clip(tmp_path / "with.npz")
    np.testing.assert_array_equal(clip.normalised, norm)
    np.testing.assert_allclose(clip.points, points, atol=1e-3)
    assert read_clip(tmp_path / "without.npz").unit == "half image widths"


def test_coco_takes_the_best_person_of_each_image_in_natural_order(tmp_path):
    path = tmp_path / "people.json"
    people = [annotation("img10.jpg", 0.9, 10), annotation("img2.jpg", 0.2, 99), annotation("img2.jpg", 0.8, 2)]
    path.write_text(json.dumps(people))
    clip = read_clip(path)
    assert clip.num_frames == 2
    # Right hip: COCO 12 is Human3.6M 1; the pelvis is the mean of both hips, COCO 11 and 12.
    np.testing.assert_allclose(clip.points[:, 1], [[222, 262], [230, 270]])
    np.testing.assert_allclose(clip.points[:, 0], [[217, 259.5], [225, 267.5]])


def test_coco_object_gives_the_image_size_and_unseen_joints_are_filled(tmp_path):
    path = tmp_path / "people.json"
    people = [annotation(i, shift=2.0 * i) for i in range(3)]
    people[1]["keypoints"][3 * 12 : 3 * 13] = [0, 0, 0]
    path.write_text(json.dumps({"images": [{"width": 640, "height": 480}], "annotations": people}))
    clip = read_clip(path)
    np.testing.assert_allclose(clip.points[1, 1], [222, 262])
    np.testing.assert_allclose(clip.normalised[1, 1], [222 / 320 - 1, 262 / 320 - 0.75], rtol=1e-5)
    assert clip.repaired == 3  # the right hip, and pelvis and spine that are made of it


def test_missing_points_are_filled_in_time():
    points = np.tile(np.arange(4.0)[:, None, None], (1, 3, 2))
    points[1, 0] = np.nan
    points[3, 1, 0] = np.inf
    points[:, 2] = np.nan
    filled, count = fill_missing(points, "clip")
    np.testing.assert_array_equal(filled[:, 0, 0], [0, 1, 2, 3])  # linear in between
    np.testing.assert_array_equal(filled[:, 1, 0], [0, 1, 2, 2])  # held at the end
    np.testing.assert_array_equal(filled[:, 2], filled[:, :2].mean(1))  # never seen: the mean of the others
    assert count == 1 + 1 + 4


def test_a_clean_clip_is_not_touched(points):
    filled, count = fill_missing(points, "clip")
    assert filled is points
    assert count == 0


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("absent.npz", None, "no such file"),
        ("clip.txt", lambda p: p.write_text("1 2 3"), "unknown file type '.txt'"),
        ("folder.npz", lambda p: p.mkdir(), "not a file"),
        ("empty.npz", lambda p: p.write_bytes(b""), "cannot be read"),
        ("empty.npy", lambda p: p.write_bytes(b""), "cannot be read"),
        ("garbage.npz", lambda p: p.write_bytes(b"PK\x03\x04 not a zip"), "cannot be read"),
        ("garbage.npy", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00garbage"), "cannot be read"),
        (
            "header.npy",  # what numpy's own tokenizer refuses
            lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x02\x00{\n"),
            "cannot be read",
        ),
        ("pickle.npy", lambda p: p.write_bytes(pickle.dumps([1])), "pickled"),
        ("text.npz", lambda p: p.write_text("no array"), "it is no file of numpy's, or holds pickled"),
        ("object.npy", lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True), "pickled"),
        ("object.npz", lambda p: np.savez(p, positions_2d=np.array({"S1": 1}, dtype=object)), "it holds pickled"),
        ("renamed.npz", lambda p: np.save(p.open("wb"), np.zeros((2, 17, 2))), "single .npy array"),
        ("foreign.npz", lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "x"), "wanted"),
        ("nothing.npz", lambda p: np.savez(p), "holds nothing"),
        ("names.npz", lambda p: np.savez(p, a=np.zeros(3), b=np.zeros(3)), "holds a, b"),
        ("shape.npy", lambda p: np.save(p, np.zeros((5, 17))), "shape [5, 17], wanted [T, J, 2]"),
        ("noframes.npy", lambda p: np.save(p, np.zeros((0, 17, 2))), "shape [0, 17, 2]"),
        ("three.npy", lambda p: np.save(p, np.zeros((5, 17, 3))), "wanted [T, J, 2]"),
        ("text.npy", lambda p: np.save(p, np.full((2, 17, 2), "a")), "wanted numbers"),
        ("complex.npy", lambda p: np.save(p, np.zeros((2, 17, 2), complex)), "wanted numbers"),
        ("nan.npy", lambda p: np.save(p, np.full((2, 17, 2), np.nan)), "no frame holds a finite keypoint"),
        ("wh.npz", lambda p: np.savez(p, keypoints_2d=np.ones((2, 17, 2)), image_wh=[0, 5]), "image_wh is [0, 5]"),
        ("fps.npz", lambda p: np.savez(p, keypoints_2d=np.ones((2, 17, 2)), fps="fast"), "fps is 'fast'"),
        (
            "3d.npz",
            lambda p: np.savez(p, keypoints_2d=np.ones((2, 17, 2)), joints_3d_cam=np.ones((3, 17, 3))),
            "3D joints have shape [3, 17, 3], wanted [2, 17, 3]",
        ),
        ("broken.json", lambda p: p.write_text("[{"), "cannot be read"),
        ("binary.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        ("deep.json", lambda p: p.write_text("[" * 100_000), "nested too deeply"),
        ("number.json", lambda p: p.write_text("3"), "not a list of objects"),
        ("none.json", lambda p: p.write_text("[]"), "no annotation"),
        ("lacks.json", lambda p: p.write_text('[{"image_id": 1}]'), "annotation 0 has no keypoints"),
        ("short.json", lambda p: p.write_text('[{"image_id": 1, "keypoints": [1, 2, 3]}]'), "are 3, wanted 17 * 3"),
        ("words.json", lambda p: p.write_text(json.dumps([{"image_id": 1, "keypoints": ["a"] * 51}])), "wanted 17 * 3"),
        ("score.json", lambda p: p.write_text(json.dumps([annotation(1, score="high")])), "score of annotation 0"),
        ("huge.json", lambda p: p.write_text(json.dumps([annotation(1, visible=10**400)])), "beyond float64"),
        ("unseen.json", lambda p: p.write_text(json.dumps([annotation(1, visible=0)])), "no frame holds a finite"),
    ],
)
def test_malformed_files_are_one_clear_error(tmp_path, capsys, name, write, says):
    path = tmp_path / name
    if write:
        write(path)
    with pytest.raises(KeypointError) as caught:
        read_clip(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert main(["demo", "--input", str(path), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out


@pytest.mark.parametrize(("frames", "starts"), [(5, [0]), (10, [0]), (20, [0, 10]), (23, [0, 10, 13])])
def test_windows_cover_the_clip_and_join_back(frames, starts):
    clip = np.arange(frames * 2.0).reshape(frames, 2)
    windows = cut_windows(clip, 10)
    assert windows.shape == (len(starts), 10, 2)
    for window, start in zip(windows, starts, strict=True):
        expected = clip[np.minimum(np.arange(start, start + 10), frames - 1)]  # short clips: the last frame again
        np.testing.assert_array_equal(window, expected)
    np.testing.assert_array_equal(join_windows(windows, frames), clip)


def test_the_made_up_walker_is_smooth_with_a_still_stretch():
    clip = walking_clip(300)
    assert clip.points.shape == (300, 17, 2)
    assert clip.joints_3d.shape == (300, 17, 3)
    step = np.abs(np.diff(clip.joints_3d, axis=0)).max((1, 2))
    assert 30 < (step == 0).sum() < 80
    assert step.max() < 0.1  # metres in a sixtieth of a second
    bones = np.linalg.norm(clip.joints_3d[:, [1, 2, 4, 5, 11, 14]] - clip.joints_3d[:, [2, 3, 5, 6, 12, 15]], axis=-1)
    np.testing.assert_allclose(bones, np.broadcast_to(bones[:1], bones.shape), atol=1e-9)
    assert (clip.points > 0).all()
    assert (clip.points < 1000).all()


def test_float32_overflow_counts_as_missing():
    points = np.ones((3, 17, 2))
    points[1, 4, 0] = 1e300
    clip = make_clip("big", points)
    assert clip.repaired == 1
    assert np.isfinite(clip.normalised).all()


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")
def test_real_clips():
    for path in sorted(CLIPS.glob("*.npz")):
        clip = read_clip(path)
        with np.load(path) as raw:
            np.testing.assert_allclose(clip.normalised, raw["keypoints_2d_norm"], atol=1e-5)
        assert (clip.joints_3d is None) == path.stem.endswith("pxround")
        assert clip.fps == 60
