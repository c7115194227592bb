"""The choice of a backend: a pure predicate with reasons, named backends that raise, no silent fallback."""

import os
import subprocess
import sys
import threading

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
    assert h2ot.can_run("recover_pose", "cpp", "cpu") == h2ot.can_run("recover_tail", "cpp", "cpu")
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


def test_blocks_that_overlap_leave_nothing():
    """A enters, B enters, A leaves, B leaves: the last one entered counts as long as it is open."""
    entered, left, seen = threading.Event(), threading.Event(), []

    def first():
        with h2ot.use_backend("reference"):
            entered.wait()
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    while backend._override != "reference":
        pass
    with h2ot.use_backend("cpp"), h2ot.use_backend("reference"), h2ot.use_backend("cpp"):
        entered.set()
        left.wait()
        seen.append(backend.chosen_backend("gather_tokens", "cpu"))
    thread.join()
    assert seen == ["cpp"]
    assert backend._override is None
    assert not backend._entered
    one, other = h2ot.use_backend("reference"), h2ot.use_backend("cpp")
    one.__enter__()
    other.__enter__()
    other.__exit__(None, None, None)
    assert backend._override == "reference"
    one.__exit__(None, None, None)
    assert backend._override is None


def test_a_graph_may_enter_a_block():
    def run(x):
        with h2ot.use_backend("reference"):
            return h2ot.select_tokens(x, 2)

    x = torch.randn(1, 5)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))
    assert backend._override is None


ALL = "80 86 87 89 90a 100 120"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (ALL, (7, 5), False),
        (ALL, (8, 0), True),
        (ALL, (8, 8), True),
        (ALL, (9, 0), True),
        (ALL, (10, 3), True),
        (ALL, (11, 0), False),
        (ALL, (12, 0), True),
        (ALL, (12, 1), True),
        (ALL, (13, 0), True),
        ("90a", (8, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("80 90a", (10, 0), False),
        ("86", (8, 0), False),
        ("86", (8, 9), True),
        ("86", (9, 0), True),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
        ("80-virtual", (9, 0), True),
        ("native", (7, 5), True),
        ("", (9, 0), True),
    ],
)
def test_which_devices_the_cuda_library_has_code_for(architectures, capability, runs):
    reason = backend.why_no_code(architectures, capability)
    expected = f"the CUDA library has no code for sm_{capability[0]}{capability[1]}, only for {architectures}"
    assert reason == (None if runs else expected)


def test_a_device_without_code_is_a_reason_and_another_backend_runs(monkeypatch):
    """Known from the moment that torch begins to use its GPUs."""
    later = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_lazy_call", later.append)
    for name in ("why_no_cuda", "why_no_triton"):
        monkeypatch.setattr(backend, name, lambda: None)
    monkeypatch.setattr(backend, "triton_device", lambda: "cuda")
    monkeypatch.setattr(backend, "_implementations", {"some": {name: object() for name in backend.BACKENDS}})
    monkeypatch.setattr(backend, "_resolved", {})
    backend.resolve_all()
    assert backend._resolved["some", "cuda", None] is backend._implementations["some"]["cuda"]
    monkeypatch.setattr(torch.cuda._tls, "is_initializing", True, raising=False)  # as when torch calls what is queued
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (7, 5))[device])
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_architectures": ALL})
    later.pop()()
    assert backend._resolved["some", "cuda", None] is backend._implementations["some"]["triton"]
    assert ("some", "cuda", "cuda") not in backend._resolved
    reason = f"the CUDA library has no code for sm_75, only for {ALL}"
    assert h2ot.can_run("some", "cuda", "cuda") == (False, reason)


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


@pytest.mark.parametrize("name", ["BACKEND", "CAPABILITY", "TILES", "TRITON_LAUNCH"])
def test_a_wrong_environment_ends_the_command_line_in_one_line(name):
    run = subprocess.run(
        [sys.executable, "-m", "h2ot_kernels", "explain", "gather_tokens"],
        env=os.environ | {f"H2OT_KERNELS_{name}": "absent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith(f"h2ot_kernels: H2OT_KERNELS_{name}: got 'absent', wanted ")


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


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TILES", "", ""),
        ("TILES", "0", ""),
        ("TILES", "1", ""),
        ("TILES", "off", "got 'off', wanted 0 or 1"),
        ("TRITON_LAUNCH", "", ""),
        ("TRITON_LAUNCH", "ordinary", ""),
        ("TRITON_LAUNCH", "Ordinary", "got 'Ordinary', wanted ordinary or nothing"),
    ],
)
def test_words_of_the_environment(name, value, said):
    given = os.environ | {f"H2OT_KERNELS_{name}": value}
    run = subprocess.run([sys.executable, "-c", "import h2ot_kernels"], env=given, capture_output=True, check=False)
    assert (run.returncode == 0) == (not said)
    assert said in run.stderr.decode()


def test_explain_and_report(monkeypatch):
    text = h2ot.explain("prune_cluster", torch.zeros(1))
    assert text.splitlines()[0] == "prune_cluster on cpu: cpp"
    assert len(text.splitlines()) == 2 + len(backend.BACKENDS)
    assert text.endswith("  with scale, exclude_self or the Gaussian density: cpp")
    assert h2ot.explain("assign_clusters").endswith("  with parent: cpp")
    monkeypatch.delitem(backend._implementations["assign_by_parent"], "cpp")
    assert "\n  with parent: assign_by_parent cannot run on cpu (cpp: " in h2ot.explain("assign_clusters")
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


def test_a_build_for_another_python_is_a_reason(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.why_no_cpp.__wrapped__().startswith(
        f"h2ot_kernels._C is not built for {sys.implementation.cache_tag}"
    )


def test_a_library_that_cannot_be_loaded_is_a_reason_and_a_warning(tmp_path, monkeypatch):
    (tmp_path / "libbroken.so").write_text("no library")
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    with pytest.warns(UserWarning, match="libbroken.so cannot be loaded"):
        assert "cannot be loaded" in backend.load_library("broken")
    assert "is not built" in backend.load_library("absent")
