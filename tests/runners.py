"""What runs an operation in a test: a backend, and for the C++ backend an instruction set."""

import os
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from h2ot_kernels import _C, backend

PTX = os.environ.get("H2OT_KERNELS_PTX")
TRITON_ON_CPU = f"its PTX for sm_{PTX}, in tests/ptx" if PTX else "interpreted"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Runner:
    backend: str
    device: str
    capability: str | None = None

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and backend.interpreting()

    @property
    def simulated(self) -> bool:
        """Whether a GPU's kernels run on the CPU, interpreted or as PTX: too slow for large cases."""
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return self.capability or self.backend

    def __call__(self, function, *args, **kwargs):
        """function(*args, backend=...) with tensors moved to the runner's device and results back to the CPU."""
        result = self.run(function, *args, **kwargs)
        if isinstance(result, tuple):
            return type(result)(*(x.cpu() for x in result))
        return result.cpu()

    def run(self, function, *args, **kwargs):
        """The same with results left where they are."""
        if self.capability:
            _C.set_capability(self.capability)

        def there(x):
            return x.to(self.device) if isinstance(x, torch.Tensor) else x

        args = [there(x) for x in args]
        return function(*args, backend=self.backend, **{name: there(x) for name, x in kwargs.items()})

    def assert_fills_out(self, function, *args, **kwargs):
        """function(out=...) gives the bits that it gives without, in out itself, and writes nothing beside it."""
        expected, band = self.run(function, *args, **kwargs), 37  # odd: out begins where no allocation does
        memory = torch.full((expected.numel() + 2 * band,), 7, dtype=expected.dtype, device=self.device)
        out = memory[band : band + expected.numel()].view(expected.shape)
        with torch.no_grad():
            assert self.run(function, *args, out=out, **kwargs) is out
        assert out.stride() == expected.stride()
        assert torch.equal(out.contiguous().view(torch.uint8), expected.view(torch.uint8))
        assert (memory[:band] == 7).all()
        assert (memory[memory.numel() - band :] == 7).all()


def _candidates():
    for capability in _C.runnable_capabilities().split(","):
        yield Runner("cpp", "cpu", capability)
    yield Runner("triton", DEVICE)
    if DEVICE == "cuda":  # a torch with CUDA loads the library without a device, too
        yield Runner("cuda", DEVICE)
    yield Runner("reference", "cpu")


def runners(op: str) -> list:
    """pytest parameters: every runner that can run op here."""
    ready = [runner for runner in _candidates() if backend.can_run(op, runner.backend, runner.device)[0]]
    return [pytest.param(runner, id=str(runner)) for runner in ready]


def available() -> list[str]:
    """One line per backend: how it runs here, or why not."""
    lines = []
    for name, device in (("cpp", "cpu"), ("triton", DEVICE), ("cuda", DEVICE)):
        ok, reason = backend.can_run("gather_tokens", name, device)
        lines.append(f"{name}: {TRITON_ON_CPU if name == 'triton' and DEVICE == 'cpu' and ok else reason}")
    if DEVICE == "cpu":
        lines.append("tests marked gpu are deselected: this machine has no CUDA device")
    return lines


class Recorder(TorchDispatchMode):
    """The operators that run within it, by name."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.tails = []  # where the rows of each call of recover_tail lie

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        if func.name() == "h2ot_kernels::recover_tail":
            self.tails.append(args[1].data_ptr())
        return func(*args, **(kwargs or {}))
