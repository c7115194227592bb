"""./dev gpu on a machine without a GPU: the refusal, and the stages' bookkeeping with commands that need none."""

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bench import gpu

ROOT = Path(__file__).resolve().parents[1]


def test_the_stages(tmp_path):
    planned = gpu.stages(tmp_path)
    assert {"memcheck", "racecheck", "initcheck", "guard bands"} <= {stage.name for stage in planned}
    assert sum(stage.seconds for stage in planned[:5]) < gpu.SECONDS <= 540  # what every other leans on
    assert {stage.name for stage in planned if stage.kept} >= {"case list", "memcheck", "benchmarks", "hosts", "patch"}
    slow, left = {}, gpu.SECONDS - 100.0  # after a slow build every stage takes what it may
    for i, stage in enumerate(planned):
        slow[stage.name] = min(stage.seconds, gpu.share(stage, planned[i + 1 :], left))
        assert stage.kept <= slow[stage.name] <= left
        left -= slow[stage.name]
    assert gpu.share(planned[5], planned[6:], 20.0) == 20.0  # what is kept is not more than there is


def test_a_stage_ends_with_the_time_of_the_command(tmp_path):
    sleeps = gpu.Stage("sleeps", 60, (sys.executable, "-c", "import threading; threading.Event().wait()"))
    late = gpu.run(sleeps, tmp_path, left=gpu.LEAST - 1)
    assert (late.state, late.seconds) == ("not run", 0)
    assert "--stage 'sleeps'" in late.tail


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process that is not its own: Linux")
def test_a_stage_takes_along_what_it_has_started(tmp_path):
    child = "import os, threading; print(os.getpid(), flush=True); threading.Event().wait()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = gpu.run(gpu.Stage("watches", 2, (sys.executable, "-c", parent)), tmp_path)
    assert outcome.state == "out of time (2 s)"
    child = int((tmp_path / "watches.log").read_text().split()[0])
    with contextlib.suppress(ProcessLookupError):  # gone already
        ended, _, _ = select.select([os.pidfd_open(child)], [], [], 20)
        assert ended


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
    outcomes = [gpu.run(stage, logs) for stage in planned]
    assert [o.state for o in outcomes] == ["failed (3)", "out of time (1 s)", "not run", "passed"]
    gpu.write(outcomes, tmp_path, logs, {"device": "none", "date": "today"})
    summary = (tmp_path / "summary.md").read_text()
    assert "| fails | failed (3) |" in summary
    assert "no-such-program is not on the PATH" in summary
    assert json.loads((tmp_path / "env.json").read_text())["device"] == "none"
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert "logs/works.log" in archive.getnames()


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
    [ "$H2OT_KERNELS_CUDA" = {builds} ] ;;
  *bench.gpu*) echo "$*" >>calls ;;
  *) echo 3.12 2.11 ;;
esac
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="./dev is a bash script")
@pytest.mark.parametrize(("builds", "built"), [(1, ["build 1 90"]), (0, ["build 1 90", "build 0 90"])])
def test_dev_builds_for_the_device_and_goes_on_without_the_cuda_library(tmp_path, builds, built):
    for name in ("dev", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc/a.h", "csrc/cpu/a.cpp", "h2ot_kernels/_C.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, text in (("python3", PYTHON.format(builds=builds)), ("nvcc", "#!/bin/sh\n"), ("c++", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python3")}
    command = ["bash", tmp_path / "dev", "gpu", "--stage", "memcheck"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *builds_made, last = (tmp_path / "calls").read_text().splitlines()
    assert builds_made == built
    assert re.fullmatch(r"-m bench.gpu --spent \d+ --stage memcheck", last)
    assert ("going on without it" in done.stderr) == (builds == 0)
