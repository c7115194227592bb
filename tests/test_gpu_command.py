"""./dev gpu on a machine without a GPU: the refusal, and the stages' bookkeeping with commands that need none."""

import asyncio
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import h2ot_kernels
from bench import bench_dropin, bench_hosts, gpu, run
from h2ot_kernels import backend

ROOT = Path(__file__).resolve().parents[1]


def granted(planned, left, seconds):
    """(of each stage the seconds that it may take; those left, when each group took seconds(its first stage))"""
    given, groups = {}, gpu.groups(planned)
    for i, group in enumerate(groups):
        for stage in group:
            given[stage.name] = min(stage.seconds, gpu.share(stage, groups[i + 1 :], left))
        left -= max(seconds(stage, given[stage.name]) for stage in group)
    return given, left


def test_the_stages(tmp_path):
    planned = gpu.stages(tmp_path)
    names = [stage.name for stage in planned]
    assert len(set(names)) == len(names)
    assert {"guard bands", "racecheck of operations", "racecheck of plans"} <= set(names)
    assert sum(stage.seconds for stage in planned[:3]) < gpu.SECONDS <= 540  # what every other leans on
    unkept = {stage.name for stage in planned if not stage.kept}
    assert unkept == {"device", "environment"}
    slow, left = granted(planned, gpu.SECONDS - 100.0, lambda stage, given: given)  # after a slow build
    assert left >= 0
    for stage in planned:
        assert stage.kept <= slow[stage.name]
    assert gpu.share(planned[5], gpu.groups(planned[6:]), 20.0) == 20.0  # what is kept is not more than there is


def test_nothing_that_is_timed_runs_beside_another(tmp_path):
    (together,) = (group for group in gpu.groups(gpu.stages(tmp_path)) if len(group) > 1)
    assert not [stage.name for stage in together if any(part.startswith("bench.") for part in stage.command)]
    assert {"gpu tests", "guard bands", "memcheck of plans"} <= {stage.name for stage in together}


# Seconds on an H100 and an H200 (bench/results); of those side by side the longest, with room for what shares the
# device with it, and of benchmarks a second for each case.
MEASURED = {"build": 60, "device": 1, "environment": 5, "every operation": 46, "gpu tests": 60, "case list": 110}
MEASURED |= {"asked sizes": 51, "hosts": 30, "patch": 25, "compiled rivals": 29, "benchmarks": 145}


def test_what_was_measured_on_a_gpu_fits(tmp_path):
    """All but the end of the last stage, which takes what is left."""
    planned = gpu.stages(tmp_path)
    assert [group[0].name for group in gpu.groups(planned)] == list(MEASURED)[1:]
    given, left = granted(planned, gpu.SECONDS - MEASURED["build"], lambda stage, _: MEASURED.get(stage.name, 0))
    for name, seconds in list(MEASURED.items())[1:-1]:
        assert given[name] >= seconds, name
    assert given["benchmarks"] >= 0.8 * MEASURED["benchmarks"]


def test_the_commands_of_the_benchmarks_are_understood(tmp_path, capsys, monkeypatch):
    """Their options, up to the device that is not here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    modules = {"bench.run": run, "bench.bench_hosts": bench_hosts, "bench.bench_dropin": bench_dropin}
    commands = [stage.command for stage in gpu.stages(tmp_path) if stage.command[2:3] and stage.command[2] in modules]
    assert len(commands) == 5
    for command in commands:
        with pytest.raises(SystemExit):
            modules[command[2]].main(list(command[3:]))
        assert "sees no CUDA device here" in capsys.readouterr().err


def timed(seconds):
    return {"p10": seconds, "p50": seconds, "p90": seconds, "p99": seconds, "first": None, "calls": 3}


def test_the_summary_says_what_was_measured_in_this_run(tmp_path):
    """Against the last row of each case; rows of an earlier run in the same folder do not count."""
    times = {"official": 4e-4, "official, graph": 1e-4, "ours": 1e-4, "ours, graph": 2e-5, "ours, graph, cold L2": 4e-5}
    row = {"op": "prune_step", "shape": {"B": 4}, "kind": "smooth", "dtype": "bfloat16", "gpu_size": True}
    row |= {"device": "a GPU", "torch": "2.11", "best_flops": 8e14, "launch_seconds": 2e-6, "replay_seconds": 8e-6}
    row |= {"verdict": {"agreement_official": 0.5, "agreement_ours": 1.0}, "floor": 1e-5, "checked": "everything"}
    row |= {"shares_of_floor": {"ours": 0.1, "ours, graph": 0.5, "ours, graph, cold L2": 0.25}}
    row |= {"timings": {rival: timed(value) for rival, value in times.items()}, "date": "2026-05-05"}
    row |= {"peak_bytes": {"official": 300, "ours": 100}}
    compiled = row | {"timings": row["timings"] | {"compile": timed(3e-4)}, "peak_bytes": {}}
    old = row | {"op": "forgotten", "date": "2026-01-01"}
    other = row | {"shape": {"B": 5}, "gpu_size": False, "floor": None, "shares_of_floor": {}}
    wrong = row | {"op": "wrong", "timings": {}, "floor": None}
    patch = {"op": "dropin_hot_mixste", "shape": {"B": 4}, "dtype": "float32", "is_right": True, "date": "2026-05-05"}
    patch |= {"timings": {"unpatched": timed(0.02), "patched": timed(0.01)}, "speed_up": 2.0}
    model = {"model": "h2ot_mixste", "whose": "ours", "mode": "inference", "batch": 1, "dtype": "float32"}
    model |= {"over_official": 1.5, "over_official_graph": None, "seconds": 0.005, "graph_seconds": 0.004}
    model |= {"frames_per_second": 48600, "graph_frames_per_second": 60750, "date": "2026-05-05"}
    model |= {"of_baseline": {"frames_per_second": 1.8}}
    lines = [json.dumps(found) + "\n" for found in (old, row, other, wrong, compiled, patch)]
    lines.insert(2, '{"op": "cut off' + lines[0])  # as the next stage leaves it
    (tmp_path / "results.jsonl").write_text("".join(lines) + '{"op": "cut off')
    (tmp_path / "hosts.jsonl").write_text(json.dumps(model) + "\n")
    (tmp_path / "logs").mkdir()
    gpu.write([], tmp_path, tmp_path / "logs", {"device": "a GPU", "date": "2026-05-04"})
    summary = (tmp_path / "summary.md").read_text()
    for shown in (
        "bfloat16 800 TFLOP/s",
        "a launch 2.0 us, the replay of a graph 8.0 us",
        "| prune_step B 4 smooth bfloat16 | 4.00x | 20.00x | 5.00x | 3.00x | 15.00x | 400.0 | 100.0 | 100.0 | 20.0 "
        "| 10.0 | 10 % | 50 % | 25 % | - | 0.500 / 1.000 | everything |",
        "| prune_step B 5 smooth bfloat16 | 4.00x | 20.00x | 5.00x | - | - | 400.0 | 100.0 | 100.0 | 20.0 | - "
        "| - | - | - | 3.0x |",
        "| wrong B 4 smooth bfloat16 | WRONG, not timed |",
        "| h2ot_mixste | 1 | float32 | 1.50x | - | 5.00 | 4.00 | 48600 | 60750 | 1.80x | - |",
        "| 4 | float32 | 20.00 | 10.00 | 2.00x |",
    ):
        assert shown in summary, shown
    assert "forgotten" not in summary
    assert summary.index("What is asked of a GPU") < summary.index("Hosts") < summary.index("Other sizes")
    widths = {line.count("|") for line in summary.splitlines() if line.startswith("| prune_step")}
    assert len(widths) == 1


def test_a_stage_ends_with_the_time_of_the_command(tmp_path):
    sleeps = gpu.Stage("sleeps", 60, (sys.executable, "-c", "import threading; threading.Event().wait()"))
    late = asyncio.run(gpu.run(sleeps, tmp_path, left=gpu.LEAST - 1))
    assert (late.state, late.seconds) == ("not run", 0)
    assert "--stage 'sleeps'" in late.tail


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process that is not its own: Linux")
def test_a_stage_takes_along_what_it_has_started(tmp_path):
    child = "import os, threading; print(os.getpid(), flush=True); threading.Event().wait()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = asyncio.run(gpu.run(gpu.Stage("watches", 2, (sys.executable, "-c", parent)), tmp_path))
    assert outcome.state == "out of time (2 s)"
    child = int((tmp_path / "watches.log").read_text().split()[0])
    with contextlib.suppress(ProcessLookupError):  # gone already
        ended, _, _ = select.select([os.pidfd_open(child)], [], [], 20)
        assert ended


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for processes that are not its own: Linux")
def test_an_interrupted_command_stops_all_that_run(tmp_path):
    """One that ends when it is asked, beside one that does not."""
    code = f"""
import signal, sys, torch
import h2ot_kernels
from bench import gpu
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may ignore it
child = "import os, signal, threading; {{}}print(os.getpid(), flush=True); threading.Event().wait()"
deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN); "
torch.cuda.is_available, h2ot_kernels.env_report = lambda: True, dict
gpu.LEAST = 1
gpu.stages = lambda out: [
    gpu.Stage(name, 60, (sys.executable, "-c", child.format(how)), beside=True)
    for name, how in (("ends", ""), ("stays", deaf))
]
gpu.main(["--out", {str(tmp_path)!r}])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    pids = []
    while len(pids) < 2:
        assert command.poll() is None, command.stderr.read().decode()
        pids = [int(log.read_text().split()[0]) for log in tmp_path.glob("*/*.log") if log.read_text().endswith("\n")]
    ends = [os.pidfd_open(pid) for pid in pids]
    command.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in command.communicate(timeout=30)[1]
    assert set(select.select(ends, [], [], 0)[0]) == set(ends)


def test_a_failing_stage_does_not_stop_the_others(tmp_path):
    def python(name, code, seconds=20, needs=None):
        return gpu.Stage(name, seconds, (sys.executable, "-c", code), needs)

    logs = tmp_path / "logs"
    logs.mkdir()
    planned = [
        python("fails", "print('why'); raise SystemExit(3)"),
        python("hangs", "import threading; threading.Event().wait()", seconds=1),
        python("missing", "", needs="no-such-program"),
        python("works", "print('fine')"),
    ]
    outcomes = [asyncio.run(gpu.run(stage, logs)) for stage in planned]
    assert [o.state for o in outcomes] == ["failed (3)", "out of time (1 s)", "not run", "passed"]
    gpu.write(outcomes, tmp_path, logs, {"device": "none", "date": "today"})
    summary = (tmp_path / "summary.md").read_text()
    assert "| fails | failed (3) |" in summary
    assert "no-such-program is not on the PATH" in summary
    assert json.loads((tmp_path / "env.json").read_text())["device"] == "none"
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert "logs/works.log" in archive.getnames()


@pytest.fixture
def made_up_gpu(monkeypatch):
    monkeypatch.setattr(backend, "why_no_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(h2ot_kernels, "env_report", lambda: {"device": "a GPU"})


def test_rows_that_no_table_can_show_do_not_stop_the_stages(tmp_path, monkeypatch, made_up_gpu):
    row = json.dumps({"verdict": {}, "date": "9999"}) + "\n"
    codes = {"measures": f"open({str(tmp_path / 'results.jsonl')!r}, 'w').write({row!r})", "works": "print('fine')"}
    planned = [gpu.Stage(name, 20, (sys.executable, "-c", code)) for name, code in codes.items()]
    monkeypatch.setattr(gpu, "stages", lambda out: planned)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    summary = (tmp_path / "summary.md").read_text()
    assert "| works | passed |" in summary
    assert "KeyError" in summary


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_stages_that_may_run_side_by_side_do(tmp_path, monkeypatch, made_up_gpu):
    """Each end of the pipe waits for the other."""
    os.mkfifo(tmp_path / "pipe")
    planned = [
        gpu.Stage(way, 20, (sys.executable, "-c", f"open({str(tmp_path / 'pipe')!r}, '{way}')"), beside=True)
        for way in "rw"
    ]
    monkeypatch.setattr(gpu, "stages", lambda out: planned)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    summary = (tmp_path / "summary.md").read_text()
    assert "| r | passed |" in summary
    assert "| w | passed |" in summary


@pytest.mark.parametrize(
    ("reason", "nvcc", "state", "code"),
    [
        (None, True, "passed", 0),
        ("libh2ot_kernels_cuda.so is not built", True, "failed", 1),
        ("torch 2.13 has no CUDA", False, "not run", 0),
    ],
)
def test_says_where_the_cuda_library_is_missing(tmp_path, monkeypatch, made_up_gpu, reason, nvcc, state, code):
    """The other stages pass over it."""
    log = tmp_path / "log"
    log.write_text("score.cu(3): error: no\n" + "ninja\n" * 30 + "it stopped\n")
    monkeypatch.setattr(gpu.cuda_library, "__defaults__", (log,))
    monkeypatch.setattr(backend, "why_no_cuda", lambda: reason)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if nvcc else None)
    works = gpu.Stage("works", 20, (sys.executable, "-c", "print('fine')"))
    monkeypatch.setattr(gpu, "stages", lambda out: [works])
    assert gpu.main(["--out", str(tmp_path)]) == code
    summary = (tmp_path / "summary.md").read_text()
    assert f"| CUDA library | {state} |" in summary
    assert "| works | passed |" in summary
    assert (reason or "loaded") in summary
    for line in ("score.cu(3): error: no", "it stopped"):
        assert (line in summary) == (state == "failed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here: ./dev gpu would run")
def test_refuses_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "nothing"])
    assert "wanted some of device, environment" in capsys.readouterr().err


PYTHON = """#!/bin/sh
case "$*" in
  *"version_info <"* | *"version.cuda is None"*) ;;
  *get_device_capability*) echo 90 ;;
  *setup.py*)
    echo "build $H2OT_KERNELS_CUDA $H2OT_KERNELS_CUDA_ARCHITECTURES" >>calls
    echo "said of $H2OT_KERNELS_CUDA"
    [ "$H2OT_KERNELS_CUDA" = {builds} ] || exit 1
    [ "$H2OT_KERNELS_CUDA" = 0 ] || echo new >h2ot_kernels/libh2ot_kernels_cuda.so ;;
  *bench.gpu*) echo "$*" >>calls ;;
  *) echo 3.12 2.11 ;;
esac
"""


@pytest.fixture
def dev_gpu(tmp_path):
    """./dev gpu --stage memcheck in a tree of its own, after a build of the CUDA library; its Python is made up."""
    for name in ("dev", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc/a.h", "csrc/cpu/a.cpp", "h2ot_kernels/_C.so", "h2ot_kernels/libh2ot_kernels_cuda.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "h2ot_kernels" / "__init__.py", tmp_path / "h2ot_kernels")

    def run_it(builds, *arguments, code=0):
        """(its builds and what it then ran, stderr). builds: what H2OT_KERNELS_CUDA must be for a build to succeed."""
        for name, text in (("python3", PYTHON.format(builds=builds)), ("nvcc", "#!/bin/sh\n"), ("c++", "#!/bin/sh\n")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "calls").write_text("")
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python3")}
        command = ["bash", tmp_path / "dev", *(arguments or ("gpu", "--stage", "memcheck"))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return (tmp_path / "calls").read_text().splitlines(), done.stderr

    return run_it


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="./dev is a bash script")


@needs_bash
@pytest.mark.parametrize(("builds", "built"), [(1, ["build 1 90"]), (0, ["build 1 90", "build 0 90"])])
def test_dev_builds_for_the_device_and_goes_on_without_the_cuda_library(tmp_path, dev_gpu, builds, built):
    (*builds_made, last), said = dev_gpu(builds)
    assert builds_made == built
    assert re.fullmatch(r"-m bench.gpu --spent \d+ --stage memcheck", last)
    assert ("going on without it" in said) == (builds == 0)
    assert (tmp_path / "build" / "log").read_text() == "said of 1\n"  # what bench.gpu shows of it


@needs_bash
def test_dev_builds_again_only_where_the_cuda_library_is_gone(tmp_path, dev_gpu):
    assert [len(dev_gpu(builds=1)[0]) for _ in range(2)] == [2, 1]
    (tmp_path / "h2ot_kernels" / "libh2ot_kernels_cuda.so").unlink()
    assert len(dev_gpu(builds=1)[0]) == 2


@needs_bash
@pytest.mark.parametrize("command", ["setup", "lint", "wheel", "docs"])
def test_dev_passes_over_no_argument(dev_gpu, command):
    assert dev_gpu(0, command, "--fix", code=1) == ([], f"dev: '{command}' takes no arguments, got: --fix\n")
