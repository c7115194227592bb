"""FTP-Pose: shapes and tokens of every place to prune at, equality over backends, its input, its benchmark."""

import json

import numpy as np
import pytest
import torch

import h2ot_kernels as h2ot
import h2ot_kernels.onnx
from bench import bench_ftp_pose
from h2ot_kernels import hosts
from h2ot_kernels.hosts.ftp_pose import keypoints, load_frames

TINY = {
    "image_size": (64, 48),
    "channels": 32,
    "depth": 3,
    "num_heads": 2,
    "num_joints": 5,
    "head_channels": 16,
    "k": 3,
}
FRAMES = torch.randn(2, 3, 3, 64, 48, generator=torch.Generator().manual_seed(3))
PLACES = [0, 1, 2, "encoder"]


def tiny(**given):
    torch.manual_seed(0)
    return hosts.build("ftp_pose", **{**TINY, **given}).eval()


@pytest.mark.parametrize("prune_at", PLACES)
@pytest.mark.parametrize("epsilon", [0.3, 0.5, 0.9])
def test_shapes_and_kept_tokens(prune_at, epsilon):
    model = tiny(epsilon=epsilon, prune_at=prune_at)
    heatmaps, index = model(FRAMES, return_index=True)
    assert heatmaps.shape == (2, 5, 16, 12)
    kept = {0.3: 9, 0.5: 6, 0.9: 2}[epsilon]  # of 4 x 3 tokens: 12 - floor(12 epsilon)
    assert model.kept_per_frame == kept
    assert index.shape == ((2, 3 * kept) if prune_at == "encoder" else (6, kept))
    assert (index.diff(dim=1) > 0).all()
    assert keypoints(heatmaps).shape == (2, 5, 3)


@pytest.mark.parametrize("prune_at", PLACES)
def test_samples_are_independent_and_backends_agree(prune_at):
    model = tiny(prune_at=prune_at)
    heatmaps, index = model(FRAMES, return_index=True)
    with h2ot.use_backend("reference"):
        expected, kept = model(FRAMES, return_index=True)
    assert torch.equal(index, kept)
    torch.testing.assert_close(heatmaps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(FRAMES[1:]), heatmaps[1:], rtol=1e-5, atol=1e-5)


def test_the_baseline_prunes_nothing_and_its_parameters_are_those_of_the_pruned_model():
    baseline, pruned = tiny(epsilon=0), tiny(epsilon=0.5, prune_at=1)
    assert {name: value.shape for name, value in baseline.state_dict().items()} == {
        name: value.shape for name, value in pruned.state_dict().items()
    }
    expected, index = baseline(FRAMES, return_index=True)
    assert index is None
    assert not torch.allclose(pruned(FRAMES), expected, atol=1e-4)
    pruned.set_pruning(0, "encoder")
    torch.testing.assert_close(pruned(FRAMES), expected)
    names = [
        f"vit.blocks.0.{name}.weight" for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    ]
    assert set(names) <= set(baseline.state_dict())


def test_flops_fall_with_epsilon_and_with_earlier_pruning():
    model, flops = tiny(), {}
    for prune_at in PLACES:
        for epsilon in (0, 0.3, 0.5, 0.9):
            model.set_pruning(epsilon, prune_at)
            flops[prune_at, epsilon] = hosts.count_flops(model, "total")
        own = [flops[prune_at, epsilon] for epsilon in (0, 0.3, 0.5, 0.9)]
        assert own == sorted(set(own), reverse=True)
    assert len({flops[place, 0] for place in PLACES}) == 1
    assert [flops[place, 0.5] for place in PLACES] == sorted(flops[place, 0.5] for place in PLACES)


@pytest.mark.parametrize("prune_at", [1, "encoder"])
def test_every_parameter_gets_a_gradient(prune_at):
    model = tiny(prune_at=prune_at).train()
    model(FRAMES).square().mean().backward()
    without = [
        name for name, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()
    ]
    assert without == []


def test_frames_from_files_and_arrays(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    paths = [tmp_path / f"{t}.png" for t in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    frames = load_frames(paths, (64, 48))
    assert frames.shape == (1, 3, 3, 64, 48)
    assert torch.equal(load_frames(list(pixels), (64, 48)), frames)
    torch.testing.assert_close(load_frames([image / 255 for image in pixels], (64, 48)), frames, rtol=0, atol=1e-5)
    white = load_frames([np.ones((8, 8, 3))] * 3, (64, 48))[0, 0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))
    assert tiny()(frames).shape == (1, 5, 16, 12)

    paths[1].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"frames\[1\]: .*1.png is no image"):
        load_frames(paths)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="1.png"):
        load_frames(paths)


GOOD = np.zeros((4, 4, 3), np.uint8)
BAD = {  # rows of the table in bad_calls.py
    "epsilon": (lambda: tiny(epsilon=1.0), ValueError, "epsilon: got 1.0, wanted 0 to below 1"),
    "epsilon type": (lambda: tiny(epsilon="half"), TypeError, "epsilon: got str"),
    "place": (lambda: tiny(prune_at="head"), ValueError, "prune_at: got 'head', wanted one of 'encoder'"),
    "block": (lambda: tiny(prune_at=3), ValueError, r"prune_at: got 3, wanted 0 to 2 \(the last block\)"),
    "size": (lambda: tiny(size="huge"), ValueError, "size: got 'huge'"),
    "image size": (lambda: tiny(image_size=(60, 48)), ValueError, "image_size: got .60, 48., wanted multiples"),
    "patch size": (lambda: tiny(patch_size=8), ValueError, "patch_size: got 8, wanted 16"),
    "heads": (lambda: tiny(num_heads=3), ValueError, "num_heads: got 3"),
    "no heads": (lambda: tiny(num_heads=0), ValueError, "num_heads: got 0, wanted 1 or more"),
    "frames dtype": (
        lambda: tiny()(FRAMES.double()),
        TypeError,
        "frames: got dtype torch.float64, wanted torch.float32",
    ),
    "unknown": (lambda: tiny(width=3), TypeError, "width: no argument of FTPPose"),
    "frames rank": (lambda: tiny()(FRAMES[0]), ValueError, "frames: got shape"),
    "frames shape": (lambda: tiny()(FRAMES[..., :32]), ValueError, "frames: got shape"),
    "two frames": (lambda: load_frames([GOOD] * 2), ValueError, "frames: got 2, wanted 3 images"),
    "grey frame": (lambda: load_frames([GOOD, GOOD[..., 0], GOOD]), ValueError, r"frames\[1\]: got shape \[4, 4\]"),
    "frame dtype": (lambda: load_frames([GOOD.astype(np.int64)] * 3), TypeError, r"frames\[0\]: got dtype"),
    "frame type": (lambda: load_frames([3, GOOD, GOOD]), TypeError, r"frames\[0\]: got int, wanted a file or an array"),
}


def test_the_benchmark_prints_a_table_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_ftp_pose, "ARGUMENTS", {"small": TINY})
    out = tmp_path / "ftp.jsonl"
    threads = str(torch.get_num_threads())
    arguments = ["--epsilons", "0", "0.5", "--seconds", "0.01", "--threads", threads, "--out", str(out)]
    assert bench_ftp_pose.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prune_at"] for row in rows] == [None, *PLACES]
    assert rows[0]["speed_up"] == 1
    assert rows[1]["flops"] < rows[0]["flops"]
    assert rows[1]["speed_up"] == pytest.approx(rows[0]["timing"]["p50"] / rows[1]["timing"]["p50"])
    assert (tmp_path / "ftp.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "prune_at epsilon kept" in text
    assert "1.938x is reached by" in text
    monkeypatch.setattr(bench_ftp_pose, "is_right", lambda *given: False)
    assert bench_ftp_pose.main([*arguments, "--prune-at", "1"]) == 1
    assert "WRONG" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_ftp_pose.main(["--epsilons", "1"])


def test_runs_in_onnxruntime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, path = tiny(epsilon=0.5, depth=2, prune_at=1), tmp_path / "ftp_pose.onnx"
    h2ot_kernels.onnx.export(model, (FRAMES,), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for frames in (FRAMES[:1], torch.cat([FRAMES, FRAMES[:1] + 1])):
        heatmaps = torch.from_numpy(session.run(None, {"input_0": frames.numpy()})[0])
        with torch.inference_mode():
            torch.testing.assert_close(heatmaps, model(frames), rtol=1e-4, atol=1e-5)
