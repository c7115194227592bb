"""What `./dev gpu` leans on, tried without a GPU: the list of calls for sanitizers, and the guard bands; and fences."""

import ctypes
import shutil
import signal
import subprocess
import sys

import pytest

import h2ot_kernels as h2ot
from h2ot_kernels import backend

from . import every_op, every_plan, fence, guard
from .runners import DEVICE


def test_every_operation_is_right_on_every_backend_that_runs():
    made, wrong = every_op.run(DEVICE, many=40)
    assert made >= len(list(every_op.calls()))
    assert wrong == []
    named = {op.removesuffix("_out") for op in backend._implementations}  # both forms are called under one name
    assert {op for op, _ in every_op.calls()} == named


def test_every_small_plan_is_right_here_too(monkeypatch):
    small = [case for case in every_plan.CASES if case.N <= 65]
    monkeypatch.setattr(every_plan, "CASES", small)
    assert every_plan.run("cpu") == (len(small), [])
    for case in small:
        every_plan.check(case, "cpu")


def test_a_plan_whose_calls_do_not_agree_is_seen(monkeypatch):
    monkeypatch.setattr(every_plan, "CASES", every_plan.CASES[:1])
    monkeypatch.setattr(h2ot, "assign_clusters", lambda x, index, **given: index)
    (said,) = every_plan.run("cpu")[1]
    assert "AssertionError: labels" in said


def test_a_wrong_result_is_seen(monkeypatch):
    def wrong_sum(m, t, **b):
        return (m.merge_tokens(t["weight"][..., None], t["labels"], 9, **b) + bool(b),)

    monkeypatch.setattr(every_op, "calls", lambda: iter([("merge_tokens", wrong_sum)]))
    assert every_op.main(["--device", DEVICE]) == 1


def test_a_call_that_fails_does_not_stop_the_others(monkeypatch):
    def fails(m, t, **b):
        if b:
            raise ArithmeticError("of the\ndevice")
        return (t["weight"],)

    monkeypatch.setattr(every_op, "calls", lambda: iter([("merge_tokens", fails), ("merge_tokens", fails)]))
    made, wrong = every_op.run(DEVICE, many=40)
    assert made == len(wrong) >= 2
    assert wrong[0].endswith("ArithmeticError: of the device")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_guard_bands_see_a_byte_beside_the_buffer(tmp_path):
    library = guard.build(tmp_path, "c++", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{guard.HERE / 'host'}")
    loaded = ctypes.CDLL(str(library))
    loaded.guard_malloc.restype = ctypes.c_void_p
    loaded.guard_malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    loaded.guard_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    for offset, wanted in ((0, 0), (99, 0), (100, 1), (-1, 2)):
        buffer = loaded.guard_malloc(100, 0, None)
        assert bytes((ctypes.c_ubyte * 100).from_address(buffer)) == b"\xff" * 100
        ctypes.c_ubyte.from_address(buffer + offset).value = 1
        loaded.guard_free(buffer, 100, 0, None)
        assert guard.counters(library)[1] == wanted
    assert guard.counters(library)[0] == 4


EVERY_OP = """
from h2ot_kernels.triton import score
from tests.every_op import run
score.SMALL = 36  # 40 tokens are streamed, 33 are not
print(*run("cpu", many=40))
"""
PAST_THE_END = """
import ctypes, torch
x = torch.ones(100)
print(ctypes.c_float.from_address(x.data_ptr() + 4 * {index}).value)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None or DEVICE != "cpu",
    reason="needs Linux and a C compiler, and Triton's interpreter, which is for machines without a GPU",
)
def test_no_operation_leaves_a_tensor_triton_included(tmp_path):
    """Triton's interpreted loads and stores among them: the page behind each buffer stops what touches it."""
    environment = fence.environment(fence.build(tmp_path)) | {"TRITON_INTERPRET": "1"}

    def run(*command):
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)

    assert run("-c", PAST_THE_END.format(index=99)).stdout == "1.0\n"
    assert run("-c", PAST_THE_END.format(index=100)).returncode == -signal.SIGSEGV
    done = run("-c", EVERY_OP)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    made, wrong = done.stdout.split(maxsplit=1)
    assert int(made) > len(list(every_op.calls()))
    assert wrong == "[]\n"
