"""The choice of a backend: a pure predicate with reasons, named backends that raise, no silent fallback."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import h2ot_kernels as h2ot
from h2ot_kernels import _C, backend

from .runners import DEVICE


def test_predicate_gives_reasons():
    assert h2ot.can_run("gather_tokens", "cpp", "cpu") == (True, "cpp kernel on cpu")
    ok, reason = h2ot.can_run("gather_tokens", "cpp", "cuda")
    assert not ok
    assert reason == "tensors are on cuda, not cpu"
    assert h2ot.can_run("gather_tokens", "reference", "mps")[0]
    if torch.version.cuda is None:
        ok, reason = h2ot.can_run("score_tokens", "cuda", "cuda")
        assert not ok
        assert "has no CUDA" in reason
    assert h2ot.can_run("score_variant", "cpp", "cpu")[0]
    assert h2ot.can_run("score_variant", "triton", DEVICE) == h2ot.can_run("score_tokens", "triton", DEVICE)
    assert h2ot.can_run("assign_by_parent", "triton", DEVICE) == (False, "assign_by_parent has no triton kernel")
    with pytest.raises(ValueError, match="op: got 'nothing'"):
        h2ot.can_run("nothing", "cpp", "cpu")


def test_every_operation_has_a_cpp_kernel_and_a_reference():
    for op, implementations in backend._implementations.items():
        assert {"cpp", "reference"} <= set(implementations), op


def test_override_order():
    assert backend.chosen_backend("gather_tokens", "cpu") == "cpp"
    with h2ot.use_backend("reference"):
        assert backend.chosen_backend("gather_tokens", "cpu") == "reference"
        with h2ot.use_backend("cpp"):
            assert backend.chosen_backend("gather_tokens", "cpu") == "cpp"
        with pytest.raises(RuntimeError, match="cuda: tensors are on cpu"):
            h2ot.gather_tokens(torch.zeros(1, 2, 1), torch.tensor([[0]]), backend="cuda")
    assert backend.chosen_backend("gather_tokens", "cpu") == "cpp"
    with pytest.raises(ValueError, match="backend"), h2ot.use_backend("fast"):
        pass


@pytest.mark.parametrize(("name", "outcome"), [("reference", "reference"), ("", "cpp"), ("fast", "got 'fast'")])
def test_environment_variable(name, outcome):
    code = "from h2ot_kernels import backend; print(backend.chosen_backend('select_tokens', 'cpu'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "H2OT_KERNELS_BACKEND": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in run.stdout + run.stderr


@pytest.mark.parametrize("name", ["", "avx51", *_C.runnable_capabilities().split(",")])
def test_capability_of_the_environment(name):
    run = subprocess.run(
        [sys.executable, "-c", "from h2ot_kernels import _C; print(_C.capability())"],
        env=os.environ | {"H2OT_KERNELS_CAPABILITY": name},
        capture_output=True,
        text=True,
        check=False,
    )
    runnable = _C.runnable_capabilities().split(",")
    if name == "avx51":
        assert f"H2OT_KERNELS_CAPABILITY: got 'avx51', wanted one of {', '.join(runnable)}" in run.stderr
        assert run.returncode == 1
    else:
        assert run.stdout.split() == [name or runnable[0]]


def test_explain_and_report(monkeypatch):
    text = h2ot.explain("prune_cluster", torch.zeros(1))
    assert text.splitlines()[0] == "prune_cluster on cpu: cpp"
    assert len(text.splitlines()) == 1 + len(backend.BACKENDS)
    assert h2ot.explain("recover_pose").splitlines()[0] == "recover_pose on cpu: cpp"
    monkeypatch.setenv("H2OT_KERNELS_TILES", "0")
    report = h2ot.env_report()
    assert report["torch"] == torch.__version__
    assert report["h2ot_kernels"] == h2ot.__version__
    assert report["packages"]["numpy"] == np.__version__
    assert report["environment"]["H2OT_KERNELS_TILES"] == "0"
    assert report["cpu_capability"] in report["cpu_capabilities"]
    assert report["cpu_capabilities"][-1] in ("portable", "neon")


def test_capability_override():
    plainest = _C.runnable_capabilities().split(",")[-1]
    _C.set_capability(plainest)
    assert _C.capability() == plainest
    with pytest.raises(ValueError, match="capability 'sse9' cannot run here"):
        _C.set_capability("sse9")
    assert _C.capability() == plainest


def test_a_library_that_cannot_be_loaded_is_a_reason_and_a_warning(tmp_path, monkeypatch):
    (tmp_path / "libbroken.so").write_text("no library")
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    with pytest.warns(UserWarning, match="libbroken.so cannot be loaded"):
        assert "cannot be loaded" in backend.load_library("broken")
    assert "is not built" in backend.load_library("absent")
