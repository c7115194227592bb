"""What every Triton stem shares: launching, rounding and products, with all that differs in Triton's interpreter."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..backend import interpreting
from . import repeated

INTERPRETED = tl.constexpr(interpreting())


class Launch(NamedTuple):
    """One kernel launch: the grid, the runtime arguments, and what is compiled in."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Within the block every launch is noted in the list that is yielded; on meta tensors nothing else happens."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """kernel[grid](...) on the device of the first argument, a tensor, on the current stream. An empty grid launches
    nothing."""
    if 0 in grid:
        return
    # All registers of a thread: left alone, ptxas caps some kernels at 64, 128 or 168 and spills what lies above.
    constants.setdefault("maxnreg", 255)
    # A product contracted into one sum and not into the other: threads that share a result would hold different bits.
    constants.setdefault("enable_fp_fusion", False)
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants))
    first = arguments[0]
    if first.is_meta:
        return
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            repeated.launch(kernel, grid, first.get_device(), arguments, constants)
    elif first.is_cuda:
        repeated.launch(kernel, grid, first.get_device(), arguments, constants)
    else:
        kernel[grid](*arguments, **constants)


@functools.cache
def has_tensor_memory(device: torch.device) -> bool:
    """Whether Triton keeps the results of products in tensor memory there: compute capability 10 (B200, B300)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def pow2(n: int, low: int = 1, high: int | None = None) -> int:
    """The smallest power of two that is at least n, within low .. high (powers of two themselves).

    >>> pow2(5), pow2(3, low=16), pow2(900, high=512)
    (8, 16, 512)
    """
    size = max(low, 1 << max(n - 1, 0).bit_length())
    return size if high is None else min(size, high)


def per_step(size: int, interpreted: int) -> int:
    """Elements of a loop's step: more in the interpreter, whose time goes by operations and not by elements."""
    return interpreted if interpreting() else size


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """value rounded to dtype, to nearest even: the interpreter truncates float32 to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        single = value.to(tl.float32)
        bits = single.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        single = tl.where(single == single, rounded.to(tl.float32, bitcast=True), single)
        return single.to(tl.bfloat16)
    else:
        return value.to(dtype)


@triton.jit
def widen(value):
    """float32 of any narrower type, float64 of itself."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def number(value, dtype: tl.constexpr):
    """A float argument of a kernel, declared tl.float64 there so that none of its digits is lost, as dtype."""
    return tl.full([], value, dtype)


@triton.jit
def product(a, b, total):
    """total + a b: float32 as three TF32 products, 16-bit types exactly, float64 (few columns of a) without tl.dot."""
    if a.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="tf32x3")
    elif INTERPRETED:  # a bfloat16 product is wrong there
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def divide(a, b):
    """a / b to the nearest: `/` is only approximate for float32 on a GPU."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def modulo(program, count):
    """program % count of numbers that are not negative, for what is multiplied by a tile's size.

    LLVM knows the range of `%`, so that the product cannot overflow; then it may compute it beside another shift in one
    64-bit register, where that one runs over into it (seen with Triton 3.6; tests/aot.py looks for it in the PTX).
    """
    return program - program // count * count


@triton.jit
def is_last(counter, expected):
    """Whether this program is the last of `expected` that come here; what the others stored before is visible to it."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
