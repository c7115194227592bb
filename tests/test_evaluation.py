"""Errors, flip and windows against their definitions; data files in every layout that is read, and bad ones."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from h2ot_kernels import evaluation, hosts
from h2ot_kernels.__main__ import main as command_line
from h2ot_kernels.evaluation.human36m import IMAGE_SIZES, OF_32
from h2ot_kernels.evaluation.run import _frame_windows
from h2ot_kernels.linear import Linear
from h2ot_kernels.modes import in_eval_mode

from .host_cases import SIZES, small

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data"


def rotation(seed):
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return turn * torch.linalg.det(turn)


def test_mpjpe_is_the_mean_distance():
    pose = torch.zeros(2, 3, 3)
    other = pose.clone()
    other[0, 1] = torch.tensor([3.0, 0.0, 4.0])
    assert evaluation.mpjpe(pose, other).tolist() == pytest.approx([5 / 3, 0])


@pytest.mark.parametrize("seed", range(5))
def test_p_mpjpe_sees_no_similarity(seed):
    pose = torch.randn(4, 17, 3, dtype=torch.float64)
    moved = 0.3 * pose @ rotation(seed) + torch.tensor([1.0, -2.0, 3.0])
    assert evaluation.p_mpjpe(moved, pose).max() < 1e-12
    mirrored = moved * torch.tensor([-1.0, 1.0, 1.0])
    assert evaluation.p_mpjpe(mirrored, pose).min() > 0.1


def test_p_mpjpe_is_the_best_similarity():
    """No small turn, stretch or shift of the aligned pose comes nearer in the squared sense that is minimised."""
    g = torch.Generator().manual_seed(1)
    pose, other = torch.randn(2, 6, 3, generator=g, dtype=torch.float64)
    u, s, vh = torch.linalg.svd((pose - pose.mean(0)).mT @ (other - other.mean(0)))
    sign = torch.tensor([1.0, 1.0, torch.linalg.det(u @ vh).sign()], dtype=torch.float64)
    turned = (pose - pose.mean(0)) @ (u * sign) @ vh
    best = turned * ((s * sign).sum() / turned.square().sum()) + other.mean(0)
    assert evaluation.p_mpjpe(pose, other) == pytest.approx((best - other).norm(dim=-1).mean().item())
    for _ in range(20):
        step = torch.linalg.matrix_exp(
            1e-3 * (noise := torch.randn(3, 3, generator=g, dtype=torch.float64)) - 1e-3 * noise.mT
        )
        shifted = (best - best.mean(0)) @ step * (1 + 1e-3 * noise[0, 0]) + best.mean(0) + 1e-3 * noise[0]
        assert (shifted - other).square().sum() > (best - other).square().sum()


def test_a_prediction_without_extent_stays_a_point():
    target = torch.randn(17, 3)
    expected = (target - target.mean(0)).norm(dim=-1).mean()
    assert evaluation.p_mpjpe(torch.ones(17, 3), target) == pytest.approx(expected.item(), rel=1e-5)


def test_flip_is_its_own_inverse_and_exchanges_the_sides():
    pose = torch.randn(2, 17, 3)
    flipped = evaluation.flip(pose)
    assert torch.equal(evaluation.flip(flipped), pose)
    assert torch.equal(flipped[:, 4], pose[:, 1] * torch.tensor([-1.0, 1.0, 1.0]))
    assert torch.equal(flipped[:, 0, 1:], pose[:, 0, 1:])


class Copies(nn.Module):
    """A host whose poses are its keypoints, which remembers what it was given."""

    def __init__(self, channels=2, pipeline="seq2seq"):
        super().__init__()
        self.in_shape = (5, 17, channels)
        self.hourglass = hosts.build("mixste", num_frames=5, channels=8, depth=1, pipeline=pipeline).hourglass
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, x, index=None, *, return_index):
        self.seen.append(x)
        pose = nn.functional.pad(x[..., :2], (0, 1))
        return (pose if self.hourglass.pipeline == "seq2seq" else pose[:, 2:3]), ()


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 13])
@pytest.mark.parametrize("pipeline", ["seq2seq", "seq2frame"])
@pytest.mark.parametrize("with_flip", [False, True])
def test_windows_give_back_every_frame(frames, pipeline, with_flip):
    keypoints = torch.randn(frames, 17, 2)
    model = Copies(pipeline=pipeline)
    lifted = evaluation.lift(model, keypoints, with_flip=with_flip, batch=2)
    torch.testing.assert_close(lifted, nn.functional.pad(keypoints, (0, 1)))
    assert all(len(x) <= 2 for x in model.seen)


def test_frame_windows_repeat_the_ends():
    keypoints, model = torch.randn(3, 17, 2), Copies(3, "seq2frame")
    evaluation.lift(model, keypoints, with_flip=False)
    (x,) = model.seen
    assert torch.equal(x[0, :, :, :2], keypoints[[0, 0, 0, 1, 2]])
    assert torch.equal(x[2, :, :, :2], keypoints[[0, 1, 2, 2, 2]])
    assert (x[..., 2] == 1).all()


def test_a_window_of_an_even_number_of_frames_has_its_own_at_the_centre():
    windows = _frame_windows(torch.arange(4.0).view(4, 1, 1), 4)
    assert windows.flatten(1).tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3], [2, 3, 3, 3]]


@pytest.mark.parametrize("name", ["hot_mixste", "h2ot_motionagformer", "tpc_mhformer"])
def test_the_mirrored_pass_keeps_the_same_frames(name):
    model = small(name, **({"pipeline": "seq2frame"} if name in hosts.SEQ2FRAME else {})).float().eval()
    keypoints = torch.randn(27, 17, 2, generator=torch.Generator().manual_seed(0))
    asked = []
    choose = model.hourglass._select
    model.hourglass._select = lambda *given: asked.append(1) or choose(*given)
    lifted = evaluation.lift(model, keypoints[:27], batch=27)
    assert lifted.shape == (27, 17, 3)
    assert len(asked) == len(model.hourglass.stages)


def test_every_module_is_in_the_mode_it_was_in():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    model = Copies()
    model.parts = nn.ModuleList(
        [nn.Linear(1, 1), nn.Dropout().eval(), nn.Sequential(nn.Linear(1, 1)).eval(), Frozen(1)]
    )
    model.parts[2][0].train()
    modes = [module.training for module in model.modules()]
    video = evaluation.Video("x", "x", torch.randn(6, 17, 2), torch.randn(6, 17, 3))
    evaluation.evaluate(model, [video])
    assert [module.training for module in model.modules()] == modes
    model.eval()
    with in_eval_mode(model):
        assert not model.training
    assert not any(module.training for module in model.modules())

    def fails(*given, **named):
        assert not model.training
        raise RuntimeError("within")

    model.train().forward = fails
    with pytest.raises(RuntimeError, match="within"):
        evaluation.lift(model, video.keypoints)
    assert model.training


def test_packed_weights_outlive_a_video_of_a_model_in_eval_mode():
    model, video = small("h2ot_mixste").float().eval(), torch.randn(27, 17, 2)
    evaluation.lift(model, video)
    kept = {layer: layer._kept for layer in model.modules() if isinstance(layer, Linear) and layer._kept}
    assert kept
    evaluation.lift(model, video)
    assert all(layer._kept is was for layer, was in kept.items())


def write_dataset(folder, *, world):
    """Two subjects, two takes of one action and one of another, four cameras; poses of 32 joints in the world."""
    rng = np.random.default_rng(0)
    quaternions = rng.standard_normal((4, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    cameras = [{"orientation": q, "translation": rng.standard_normal(3)} for q in quaternions]
    positions_2d, positions_3d, expected = {}, {}, {}
    for subject in ("S9", "S11"):
        positions_2d[subject], positions_3d[subject] = {}, {}
        for action, T in (("Walking 1", 7), ("Walking 2", 5), ("Posing", 6)):
            pose = rng.standard_normal((T, 32, 3))
            in_camera = [(pose - c["translation"]) @ matrix(c["orientation"]) for c in cameras]
            positions_2d[subject][action] = [rng.uniform(0, 1000, (T + 1, 17, 2)).astype(np.float32) for _ in cameras]
            positions_3d[subject][action] = pose if world else [p[:, list(OF_32)] for p in in_camera]
            expected[subject, action] = [p[:, list(OF_32)] for p in in_camera]
    entries = {"cameras": np.array({"S9": cameras, "S11": cameras})} if world else {}
    np.savez_compressed(folder / "2d.npz", positions_2d=np.array(positions_2d), metadata=np.array({"num_joints": 17}))
    np.savez_compressed(folder / "3d.npz", positions_3d=np.array(positions_3d), **entries)
    return positions_2d, expected


def matrix(q):
    """The rotation matrix of a unit quaternion (w, x, y, z), as points @ matrix.T turns them."""
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@pytest.mark.parametrize("world", [False, True])
def test_human36m_files(tmp_path, world):
    positions_2d, expected = write_dataset(tmp_path, world=world)
    videos = evaluation.read_videos(tmp_path / "2d.npz", tmp_path / "3d.npz")
    assert len(videos) == 2 * 3 * 4
    assert {video.action for video in videos} == {"Walking", "Posing"}
    for video in videos:
        subject, rest = video.name.split(" ", 1)
        action, camera = rest.rsplit(" camera ", 1)
        pose = expected[subject, action][int(camera)]
        np.testing.assert_allclose(video.poses, pose, atol=1e-5)
        w, h = IMAGE_SIZES[int(camera)]
        points = positions_2d[subject][action][int(camera)][: len(pose)]
        np.testing.assert_allclose(video.keypoints, points / w * 2 - [1, h / w], atol=1e-5)
    assert all(video.poses is None for video in evaluation.read_videos(tmp_path / "2d.npz", subjects=("S9",)))


def test_scores_are_means_over_frames_and_then_over_actions():
    pose = torch.zeros(4, 17, 3)
    model = Copies()
    videos = []
    for action, T, error in (("a", 1, 0.001), ("a", 3, 0.002), ("b", 2, 0.005)):
        keypoints = torch.full((T, 17, 2), error)
        keypoints[..., 1] = 0
        videos.append(evaluation.Video("video", action, keypoints, pose[:T] + 7))
    scores = evaluation.evaluate(model, videos, with_flip=False)
    assert [(score.action, score.frames) for score in scores] == [("a", 4), ("b", 2), ("mean", 6)]
    # The root counts among the joints, and is right by definition.
    share = 16 / 17
    assert [score.mpjpe for score in scores] == pytest.approx([1.75 * share, 5 * share, 3.375 * share], rel=1e-4)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_are_read_as_data_only(tmp_path, capsys):
    np.savez(tmp_path / "evil.npz", positions_2d=np.array({"S9": Evil()}))
    with pytest.raises(ValueError, match="evil.npz: positions_2d cannot be read: .*builtins.print"):
        evaluation.read_videos(tmp_path / "evil.npz")
    assert capsys.readouterr().out == ""
    assert pickle.dumps(Evil())  # it is a pickle that others would run


def test_bad_files_say_what_is_wrong(tmp_path):
    write_dataset(tmp_path, world=False)
    keypoints, poses = tmp_path / "2d.npz", tmp_path / "3d.npz"
    with pytest.raises(ValueError, match="positions_2d has no S5; it has S9, S11"):
        evaluation.read_videos(keypoints, poses, ("S9", "S5"))
    with pytest.raises(ValueError, match="has no positions_2d; it has positions_3d.npy"):
        evaluation.read_videos(poses, keypoints)
    with pytest.raises(ValueError, match="has 4 cameras, got 1 image sizes"):
        evaluation.read_videos(keypoints, poses, image_sizes=((1000, 1000),))
    np.savez(
        tmp_path / "world.npz",
        positions_3d=np.array(
            {s: {a: np.zeros((6, 17, 3)) for a in ("Walking 1", "Walking 2", "Posing")} for s in ("S9", "S11")}
        ),
    )
    with pytest.raises(ValueError, match="is in world coordinates, and `cameras` does not say where"):
        evaluation.read_videos(keypoints, tmp_path / "world.npz")
    (tmp_path / "broken.npz").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match="broken.npz: positions_2d cannot be read"):
        evaluation.read_videos(tmp_path / "broken.npz")
    with pytest.raises(ValueError, match=r"wanted one built with pipeline=\"seq2frame\""):
        evaluation.lift(small("tpc_mixste"), torch.zeros(3, 17, 2))
    with pytest.raises(ValueError, match="has no 3D poses"):
        evaluation.evaluate(Copies(), [evaluation.Video("x", "x", torch.zeros(3, 17, 2), None)])
    with pytest.raises(ValueError, match=r"predicted: got shape \[17, 2\]"):
        evaluation.mpjpe(torch.zeros(17, 2), torch.zeros(17, 3))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"S9": {"Walk": None}}, "S9 Walk is NoneType, wanted the keypoints of each camera"),
        ({"S9": {"Walk": 5}}, "S9 Walk is int, wanted the keypoints of each camera"),
        ({"S9": {"Walk": {"a": np.zeros((3, 17, 2))}}}, "S9 Walk is dict, wanted the keypoints of each camera"),
        ({"S9": {1: [np.zeros((3, 17, 2))]}}, "positions_2d of S9 has the action 1, wanted its name as text"),
        ({"S9": {"Walk": [None]}}, r"S9 Walk camera 0 is object \[\], wanted finite numbers"),
        ({"S9": {"Walk": [np.zeros((0, 17, 2))]}}, r"S9 Walk camera 0 is float64 \[0, 17, 2\], .*, T at least 1"),
        ({"S9": {"Walk": [[[1.0], [1.0, 2.0]]]}}, r"S9 Walk camera 0 is no array: .*, wanted numbers \[T, J, 2\]"),
    ],
)
def test_odd_trees_say_what_is_wrong(tree, message, tmp_path):
    np.savez(tmp_path / "odd.npz", positions_2d=np.array(tree, dtype=object))
    with pytest.raises(evaluation.human36m.DataFileError, match=f"odd.npz: {message}"):
        evaluation.read_videos(tmp_path / "odd.npz", subjects=("S9",))


def test_a_host_that_lifts_no_keypoints_is_refused(capsys):
    model = hosts.build("ftp_pose", image_size=(64, 48), channels=32, depth=2, num_heads=2)
    with pytest.raises(ValueError, match="model: got FTPPose, wanted a host that lifts keypoints"):
        evaluation.lift(model, torch.zeros(3, 17, 2))
    assert command_line(["evaluate", "--model", "ftp_pose", "--checkpoint", "absent", "--keypoints", "absent"]) == 2
    assert "--model: got 'ftp_pose', which lifts no keypoints, wanted one of mixste" in capsys.readouterr().err


def test_clips():
    """Real motion: a host whose error is known, because its weights are 0."""
    if not CLIPS.exists():
        pytest.skip(f"the motion clips are not on this machine: {CLIPS}")
    model = small("h2ot_motionbert").float().eval()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    video = evaluation.read_clip_video(CLIPS / "cmu_12_01_60fps.npz")
    (score, mean) = evaluation.evaluate(model, [video])
    relative = video.poses - video.poses[:, :1]
    assert score.mpjpe == pytest.approx(1000 * relative.norm(dim=-1).mean().item(), rel=1e-5)
    assert 100 < score.p_mpjpe < score.mpjpe
    assert score.frames == mean.frames == 250


def test_command_line(tmp_path, capsys, monkeypatch):
    write_dataset(tmp_path, world=True)
    model = small("tpc_mhformer").float()
    size = {**SIZES["mhformer"], "stages": {1: 9}}
    monkeypatch.setitem(hosts.HOSTS, "tpc_mhformer", (hosts.MHFormer, {**hosts.HOSTS["tpc_mhformer"][1], **size}))
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "m.pth")
    arguments = ["evaluate", "--model", "tpc_mhformer", "--checkpoint", str(tmp_path / "m.pth"), "--json"]
    arguments += ["--keypoints", str(tmp_path / "2d.npz")]
    assert command_line([*arguments, "--poses", str(tmp_path / "3d.npz"), "--subjects", "S11"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["action"], row["frames"]) for row in rows] == [("Posing", 24), ("Walking", 48), ("mean", 72)]
    assert all(math.isfinite(row["mpjpe"]) and row["p_mpjpe"] < row["mpjpe"] for row in rows)
    assert command_line([*arguments, "--poses", str(tmp_path / "2d.npz")]) == 2
    assert "has no positions_3d" in capsys.readouterr().err
