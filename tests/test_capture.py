"""What a GPU's graph may hold, seen without one: no operation asks for a value between its launches.

Captures themselves are in test_cuda_native.py. Inside a Triton operator there is nothing but allocation, views and
launches (test_triton.py: test_no_torch_arithmetic); what CUDA C++ calls of the runtime is listed here.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import h2ot_kernels as h2ot
from h2ot_kernels import backend

from . import every_op

ROOT = Path(__file__).parent.parent
RUNTIME = {"cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetErrorString", "cudaGetLastError"}
RUNTIME |= {"cudaFuncGetAttributes", "cudaLaunchKernelEx"}
ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Asked(TorchDispatchMode):
    """Operators that hand a tensor's values to the host, or a result whose size depends on them."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.namespace)
        if ASKS & set(func.tags):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ask", [torch.Tensor.item, torch.Tensor.nonzero, bool, lambda x: x[x > 0]])
def test_what_asks_is_seen(ask):
    with Asked() as mode:
        ask(torch.ones(1))
    assert len(mode.asked) == 1


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_no_operation_asks_for_a_value(name, monkeypatch):
    """Forward and backward; what Python does is the same on "cuda" as on "cpp". Triton's kernels are not run."""
    calls = [(op, call) for op, call in every_op.calls() if backend.can_run(op, name, "cpu")[0]]
    if not calls:
        pytest.skip(backend.can_run("gather_tokens", name, "cpu")[1])
    if name == "triton":
        launch = "triton.runtime.interpreter.InterpretedFunction.__getitem__"
        monkeypatch.setattr(launch, lambda kernel, grid: lambda *given, **named: None)
    given = every_op.inputs(600)
    for op, call in calls:
        with Asked() as mode:
            every_op.results(call, h2ot, given, backend=name)
        assert "h2ot_kernels" in mode.seen, op
        assert not mode.asked, op


def test_what_the_cuda_library_calls_of_the_runtime():
    """Launches and questions to the host's side only: no copy, no allocation, nothing that waits."""
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert {name for text in sources for name in re.findall(r"\b(cuda[A-Z]\w+)\(", text)} == RUNTIME
