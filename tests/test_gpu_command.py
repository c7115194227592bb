"""./dev gpu on a machine without a GPU: the refusal, and the stages' bookkeeping with commands that need none."""

import json
import sys
import tarfile

import pytest
import torch

from bench import gpu


def test_stages_keep_to_nine_minutes(tmp_path):
    planned = gpu.stages(tmp_path)
    assert sum(stage.seconds for stage in planned) <= 540
    assert {"memcheck", "racecheck", "initcheck", "guard bands"} <= {stage.name for stage in planned}


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
    gpu.write(outcomes, tmp_path, {"device": "none", "date": "today"})
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
    assert "wanted some of environment" in capsys.readouterr().err
