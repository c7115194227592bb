"""tests/driver with this machine's kernels: the bits that torch's operators give, on every instruction set."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import h2ot_kernels
from h2ot_kernels import _C

from . import driver
from .test_torch import samples

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The driver on the installed library, which is quicker to build than the kernels are."""
    made = tmp_path_factory.mktemp("driver") / "driver"
    folders = [Path(h2ot_kernels.__file__).parent, Path(torch.__file__).parent / "lib"]
    found = [flag for folder in folders for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    source = driver.ROOT / "tests" / "driver" / "driver.cpp"
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{driver.ROOT / 'csrc'}", source, "-o", made]
    libraries = ["-lh2ot_kernels_cpu", "-Wl,--no-as-needed,--allow-shlib-undefined", "-ltorch_cpu"]
    subprocess.run([*command, *found, *libraries], check=True)
    return made


@pytest.mark.parametrize("capability", _C.runnable_capabilities().split(","))
def test_operators_give_the_same_bits_as_in_torch(capability, program):
    _C.set_capability(capability)
    called = set()
    with driver.Driver(program, capability) as running:
        assert running.capability == capability
        for op, arguments in [*samples(), backward()]:
            name = op.default.name().removeprefix("h2ot_kernels::")
            given = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            expected, ours = (results(function, *given) for function in (op, getattr(running, name)))
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), name
            called.add(name)
    assert called == set(driver.OPERATORS)


def backward():
    query, key, value, grad = (torch.randn(2, n, 8) for n in (5, 3, 3, 5))
    return torch.ops.h2ot_kernels.recover_attention_backward, (grad, query, key, value, 2, 0.5)


def results(function, *arguments):
    """What the operator gives; of one without a result the last argument, `out`."""
    result = function(*arguments)
    if result is None:
        return (arguments[-1].clone(),)
    return result if isinstance(result, tuple) else (result,)


def test_wrong_values_damage_and_unknown_kernels_are_errors(program):
    index, x = torch.tensor([[0, 9]]), torch.randn(1, 9, 4)
    with driver.Driver(program) as running:
        with pytest.raises(IndexError, match="gather"):
            running.gather_tokens(x, index, None, 1, 1)
        with pytest.raises(IndexError, match="ascending"):
            running.scatter_tokens(x[:, :2], torch.tensor([[3, 3]]), 9, 1, 1)
        short = driver.Out((1, 8), torch.float64)  # of nine scores
        with pytest.raises(AssertionError, match="band"):
            running.call("motion", x, 0, 1, 9, 1, 4, *x[:, :, None].stride(), short)
        assert running.prune_motion(x[:, :, None], 9, None).tolist() == [list(range(9))]
    unknown = b"guess".ljust(driver.NAME_BYTES, b"\0") + struct.pack("<3q", 0, 0, 0)
    for argument, call, named in (("vax", b"", b"vax"), (_C.capability(), unknown, b"guess")):
        done = subprocess.run([program, argument], input=call, capture_output=True, check=False)
        assert done.returncode == 2
        assert named in done.stderr
