"""The main job end to end, on small hosts: the screen, the files, the exit codes."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo's pictures need matplotlib")
pytest.importorskip("rich", reason="the demo's screen needs rich")

import h2ot_kernels as h2ot
from h2ot_kernels import hosts
from h2ot_kernels.__main__ import main
from h2ot_kernels.demo import models, pruners, screen
from h2ot_kernels.demo.keypoints import make_clip
from h2ot_kernels.demo.skeleton import walking_clip
from python_ref import official_mixste

SMALL = {"channels": 32, "depth": 4}
STAGES = {"hot_mixste": {3: 81}, "tpc_mixste": {3: 61}, "h2ot_mixste": {1: 121, 2: 81}}


def build_small(build, name):
    stages = {"stages": STAGES[name]} if name in STAGES else {}
    return build(name, **SMALL, **stages)


@pytest.fixture
def small_hosts(monkeypatch):
    monkeypatch.setattr(hosts, "build", functools.partial(build_small, hosts.build))
    monkeypatch.setattr(official_mixste, "build", functools.partial(build_small, official_mixste.build))


def demo(tmp_path, *arguments):
    return main(["demo", "--device", "cpu", "--seconds", "1", "--out", str(tmp_path / "out"), *arguments])


def saved(tmp_path, num_frames=300, **arrays):
    clip = walking_clip(num_frames)
    np.savez(tmp_path / "clip.npz", keypoints_2d=clip.points, image_wh=[1000, 1000], **arrays)
    return str(tmp_path / "clip.npz")


def strict_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_default_run(tmp_path, capsys, small_hosts):
    assert demo(tmp_path) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar where there is no terminal
    report = strict_json(tmp_path / "out" / "report.json")
    assert report["clip"]["name"] == "made-up walker"
    for said in ("CPU:", "torch", "backends built: cpp (ran here)", "cuda never ran on this machine", "random weights"):
        assert said in printed.out
    assert max(map(len, printed.out.splitlines()[:-1])) <= screen.WIDTH
    assert len(printed.out.splitlines()) < 60  # one screen

    assert len(report["operations"]) == 12
    for row in report["operations"]:
        assert row["op"] in printed.out
        assert row["is_right"]
        assert row["verdict"]["agreement_ours"] >= row["verdict"]["agreement_official"]
        assert row["verdict"]["error"] <= row["verdict"]["bound"]
        assert row["timings"]["official"]["p50"] > 0
    assert [row["name"] for row in report["models"]] == list(models.DEFAULT)
    for row in report["models"]:
        assert row["name"] in printed.out
        assert row["deviation"] < 1e-4
        assert row["over_unpruned"] > 0
    assert report["models"][3]["tokens"] == [243, 121, 81]
    assert {row["pruner"] for row in report["recovery"]} == {"cluster", "sampler", "motion", "attention"}
    assert all(row["unit"] == "mm" for row in report["recovery"])

    with np.load(tmp_path / "out" / "poses.npz") as poses:
        assert set(poses.files) == {"window_starts", *models.DEFAULT, *(f"{name}_kept" for name in STAGES)}
        for name in models.DEFAULT:
            assert poses[name].shape == (report["frames_lifted"][name], 17, 3)
            assert np.isfinite(poses[name]).all()
        assert poses["tpc_mixste_kept"].shape[1] == 61
        assert (np.diff(poses["hot_mixste_kept"], axis=1) > 0).all()
    for name in ("motion.png", "decision_graph.png", "recovery.png"):
        content = (tmp_path / "out" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 20_000


def test_a_clip_without_3d_is_measured_in_pixels(tmp_path, capsys, small_hosts):
    assert demo(tmp_path, "--input", saved(tmp_path), "--model", "h2ot_mixste") == 0
    report = strict_json(tmp_path / "out" / "report.json")
    assert {row["unit"] for row in report["recovery"]} == {"px"}
    assert "mean 2D joint distance" in capsys.readouterr().out
    (row,) = report["models"]
    assert row["over_unpruned"] > 0  # mixste was timed for it, and is not shown
    assert report["clip"]["frames"] == 300
    assert report["clip"]["windows"] == 2


def test_a_checkpoint_is_used(tmp_path, capsys, small_hosts):
    torch.manual_seed(3)
    model = hosts.build("hot_mixste")
    torch.save(
        {"model_pos": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "a.pth"
    )
    arguments = ["--input", saved(tmp_path, 100), "--model", "hot_mixste", "--checkpoint", str(tmp_path / "a.pth")]
    assert demo(tmp_path, *arguments) == 0
    assert "random weights" not in capsys.readouterr().out
    x = models.model_windows(model, walking_clip(100), torch.device("cpu"))
    with torch.inference_mode():
        expected = model.eval()(x)[0, :100]
    with np.load(tmp_path / "out" / "poses.npz") as poses:
        np.testing.assert_allclose(poses["hot_mixste"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "gpt"], "unknown gpt; wanted some of mixste"),
        (["--checkpoint", "absent.pth"], "name one with --model"),
        (["--checkpoint", "absent.pth", "--model", "mixste"], "absent.pth"),
        (["--input", "absent.npz"], "absent.npz: no such file"),
        (["--device", "cuda"], "sees no CUDA device"),
    ],
)
def test_bad_arguments(tmp_path, capsys, small_hosts, monkeypatch, arguments, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo(tmp_path, *arguments) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.out == ""


def test_a_checkpoint_that_does_not_fit(tmp_path, capsys, small_hosts):
    torch.save({"head.1.weight": torch.zeros(3, 32)}, tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    assert demo(tmp_path, "--model", "mixste", "--checkpoint", str(tmp_path / "part.pth")) == 2
    assert "Temporal_pos_embed" in capsys.readouterr().err
    assert demo(tmp_path, "--model", "mixste", "--checkpoint", str(tmp_path / "text.pth")) == 2
    assert "text.pth" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(tmp_path, capsys, small_hosts):
    (tmp_path / "out").write_text("")
    assert demo(tmp_path) == 2
    assert "out" in capsys.readouterr().err


def test_other_joints_are_refused_before_anything_is_timed(tmp_path, capsys, small_hosts):
    np.save(tmp_path / "hand.npy", np.random.default_rng(0).random((50, 21, 2)))
    assert demo(tmp_path, "--input", str(tmp_path / "hand.npy")) == 2
    assert "has 21 joints, the models need 17" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_operation_is_shown_untimed_and_fails(tmp_path, capsys, small_hosts, monkeypatch):
    genuine = h2ot.assign_clusters
    monkeypatch.setattr(h2ot, "assign_clusters", lambda x, index: genuine(x, index).roll(1, -1))
    assert demo(tmp_path, "--input", saved(tmp_path), "--model", "mixste") == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("assign_clusters"))
    assert "WRONG" in line
    row = next(r for r in strict_json(tmp_path / "out" / "report.json")["operations"] if r["op"] == "assign_clusters")
    assert row["timings"] == {}
    assert row["speed_up"] is None


def test_a_wrong_model_is_not_timed(small_hosts, monkeypatch):
    def shifted(name):
        model = build(name)
        model.head.register_forward_hook(lambda *_: _[-1] + 0.1)
        return model

    build = official_mixste.build
    monkeypatch.setattr(official_mixste, "build", shifted)
    device, clip = torch.device("cpu"), walking_clip(243)
    (found,) = models.measure({"mixste": models.build_ours("mixste", None, device)}, clip, device, seconds=0)
    assert found.deviation == pytest.approx(0.1, abs=1e-3)
    assert not found.is_right
    assert found.timings == {}
    assert found.frames_per_second("ours") is None


@pytest.mark.parametrize("name", models.DEFAULT)
def test_poses_of_short_and_long_clips(small_hosts, name):
    device = torch.device("cpu")
    model = models.build_ours(name, None, device)
    for num_frames in (30, 243, 300):
        poses, kept = models.lift(model, walking_clip(num_frames), device, seconds=float("inf"))
        assert poses.shape == (num_frames, 17, 3)
        assert (kept is None) == (name == "mixste")
    assert models.lift(model, walking_clip(600), device, seconds=0)[0].shape[0] == 243


def test_recovery_error_is_zero_when_all_frames_are_kept():
    clip = walking_clip(500)
    found = pruners.measure(clip, 243, torch.device("cpu"), kept=(27, 243))
    for recovery in found:
        assert recovery.error[27].shape == (500,)
        assert recovery.mean(243) < 1e-9
        assert recovery.mean(27) > 0.1
        assert recovery.row()["worst_frame"][27] >= recovery.mean(27)


def test_recovery_error_by_hand():
    """A point that moves evenly is recovered exactly by the sampler; a kink is missed by the height of the chord."""
    line = np.linspace(0, 1, 9)[:, None, None] * np.array([3.0, 4.0])
    even = pruners.measure(make_clip("line", line, image_wh=(10, 10)), 9, torch.device("cpu"), kept=(3,))
    assert next(r for r in even if r.pruner == "sampler").mean(3) == pytest.approx(0, abs=1e-12)
    kink = line * 0
    kink[2] = [3.0, 4.0]
    bent = pruners.measure(make_clip("kink", kink, image_wh=(10, 10)), 9, torch.device("cpu"), kept=(3,))
    assert next(r for r in bent if r.pruner == "sampler").mean(3) == pytest.approx(5 / 9)


def test_env_and_explain(capsys):
    assert main(["env"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__
    assert main(["explain", "gather_tokens"]) == 0
    assert capsys.readouterr().out.startswith("gather_tokens on cpu")
    assert main(["explain", "gather_tokens", "--device", "cuda"]) in (0, 2)
    said = capsys.readouterr()
    assert "gather_tokens on cuda" in said.out or "gather_tokens cannot run on cuda" in said.err
    assert main(["explain", "sort"]) == 2
    assert "wanted one of" in capsys.readouterr().err


def test_the_command_line_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "h2ot_kernels", "demo", "--input", str(tmp_path / "absent.json")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "absent.json" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--seconds", "0"], ": --seconds: got 0"),
        (["demo", "--seconds", "nan"], ": --seconds: got nan"),
        (
            ["demo", "--checkpoint", "absent.pt"],
            ": --checkpoint: fits one model, got 0 named models; name one with --m",
        ),
        (["demo", "--checkpoint", "absent.pt", "--model", "mixste"], ": absent.pt: No such file or directory\n"),
        (["demo", "--model", "absent"], "--model: unknown absent"),
        (["demo", "--model", "mixste", "ftp_pose"], ": --model: got 'ftp_pose', which lifts no keypoints, want"),
        (
            ["evaluate", "--model", "absent", "--checkpoint", "a", "--keypoints", "b"],
            ": --model: got 'absent', wanted o",
        ),
        (["evaluate", "--model", "mixste", "--checkpoint", "absent.pt", "--keypoints", "b"], ": absent.pt: No such"),
        (["evaluate", "--model", "mixste", "--checkpoint", "a", "--keypoints", "b", "--batch", "0"], "--batch: got 0"),
        (["explain", "absent"], "op: got 'absent'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_nobody_reads_is_no_error(buffered):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "h2ot_kernels", "env"]
    finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (141, "")


@pytest.mark.parametrize("command", ["demo", "evaluate"])
def test_a_named_backend_that_cannot_run_is_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr(h2ot.backend, "_from_environment", "cuda")
    given = {"demo": [], "evaluate": ["--model", "mixste", "--checkpoint", "a", "--keypoints", "b"]}
    assert main([command, "--device", "cpu", *given[command]]) == 2
    shown = capsys.readouterr().err
    assert "cannot run on cpu (cuda: tensors are on cpu" in shown
    assert shown.count("\n") == 1
