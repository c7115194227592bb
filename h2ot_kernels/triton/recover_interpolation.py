"""Interpolation in time, forward and backward: one kernel each, no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implement
from ..library import allocating, declare_custom, into_out
from ..recover_interpolation import BACKWARD, FORWARD, transposed
from .common import divide, launch, narrow, widen
from .gather import merge_axes


@triton.jit
def _count_up_to(index_row, step, frame, K, STEPS: tl.constexpr):
    """How many entries of an ascending index row are at most frame."""
    low = tl.zeros_like(frame)
    high = low + K
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_range = low < high
        upto = open_range & (tl.load(index_row + middle * step, open_range, 0) <= frame)
        low = tl.where(upto, middle + 1, low)
        high = tl.where(open_range & ~upto, middle, high)
    return low


@triton.jit
def _position(index_row, step, frame, K, F, like, NEAREST: tl.constexpr, STEPS: tl.constexpr):
    """(before, after, weight of after, of like's dtype) of a frame; index_row None: spread evenly."""
    if index_row is None:
        span = tl.maximum(frame * 0 + F - 1, 1)
        before = frame * (K - 1) // span
        past = frame * (K - 1) % span
        after = tl.minimum(before + 1, K - 1)
    else:
        before = tl.maximum(_count_up_to(index_row, step, frame, K, STEPS) - 1, 0)
        after = tl.minimum(before + 1, K - 1)
        start = tl.load(index_row + before * step)
        past = tl.where(before == after, 0, tl.maximum(frame - start, 0))
        span = tl.maximum(tl.load(index_row + after * step) - start, 1)
    if NEAREST:
        weight = (2 * past > span).to(like.dtype)
    else:
        weight = divide(past.to(like.dtype), span.to(like.dtype))
    return before, after, weight


@triton.jit
def _feature_offset(column, sizes, steps, AXES: tl.constexpr):
    """Where element `column` of the flattened trailing axes stands."""
    offset = tl.zeros_like(column)
    for axis in tl.static_range(AXES - 1, -1, -1):
        offset += column % sizes[axis] * steps[axis]
        column = column // sizes[axis]
    return offset


# Bytes: x once (twice from L2), out once. Floor: those at the copy bandwidth.
@triton.jit
def interpolate_kernel(
    x, index, out, rows, F, K, S, sizes, steps, x_b, x_k, index_b, index_k,
    AXES: tl.constexpr, NEAREST: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out [B F, S]: (1 - w) x[before] + w x[after], weights of 0 reading nothing. NaN where an index used is wrong."""
    columns = tl.cdiv(S, INNER)
    row = (tl.program_id(0) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % columns).to(tl.int64) * INNER + tl.arange(0, INNER)
    inside = (row < rows)[:, None] & (column < S)[None, :]
    row = tl.minimum(row, rows - 1)
    like = widen(tl.zeros([1], x.dtype.element_ty))
    frame = row % F
    index_row = index
    if index is not None:
        index_row = index + row // F * index_b
    before, after, weight = _position(index_row, index_k, frame, K, F, like, NEAREST, STEPS)
    at = (row // F * x_b)[:, None] + _feature_offset(column, sizes, steps, AXES)[None, :]
    first = widen(tl.load(x + at + (before * x_k)[:, None], inside, 0))
    second = widen(tl.load(x + at + (after * x_k)[:, None], inside, 0))
    weight = weight[:, None]
    value = tl.where(weight == 1, second, first * (1 - weight) + second * weight)
    value = tl.where(weight == 0, first, value)
    if index is not None:
        start, end = tl.load(index_row + before * index_k), tl.load(index_row + after * index_k)
        good = (start >= 0) & (start < F) & (end >= 0) & (end < F)
        value = tl.where(good[:, None], value, float("nan"))
    tl.store(out + row[:, None] * S + column[None, :], narrow(value, out.dtype.element_ty), inside)


# Bytes: grad twice (each frame lies between two kept ones; once from cache), grad_x once.
# Floor: once each at the copy bandwidth.
@triton.jit
def interpolate_backward_kernel(
    grad, index, grad_x, rows, F, K, S, sizes, steps, grad_b, grad_f, index_b, index_k,
    AXES: tl.constexpr, NEAREST: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """grad_x [B K, S]: each kept frame sums the contiguous range of frames that read it, in ascending order."""
    columns = tl.cdiv(S, INNER)
    row = (tl.program_id(0) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % columns).to(tl.int64) * INNER + tl.arange(0, INNER)
    inside = (row < rows)[:, None] & (column < S)[None, :]
    row = tl.minimum(row, rows - 1)
    position = row % K
    left, right = tl.maximum(position - 1, 0), tl.minimum(position + 1, K - 1)
    # The frames strictly between the neighbours; the first and the last kept one also hold the frames outside.
    if index is None:
        span = tl.maximum(F - 1, 1).to(tl.int64)
        begin = tl.where(position == 0, 0, (left * span) // tl.maximum(K - 1, 1))
        end = tl.where(position == K - 1, F, ((right * span) // tl.maximum(K - 1, 1)) + 1)
        index_row = index
    else:
        index_row = index + row // K * index_b
        begin = tl.where(position == 0, 0, tl.maximum(tl.load(index_row + left * index_k), 0))
        end = tl.where(position == K - 1, F, tl.minimum(tl.load(index_row + right * index_k) + 1, F))
    like = widen(tl.zeros([1], grad.dtype.element_ty))
    total = tl.zeros([ROWS, INNER], like.dtype)
    at = grad + (row // K * grad_b)[:, None] + _feature_offset(column, sizes, steps, AXES)[None, :]
    longest = tl.max(end - begin, 0)
    for i in range(longest):
        frame = begin + i
        there = frame < end
        frame = tl.where(there, frame, 0)
        before, after, weight = _position(index_row, index_k, frame, K, F, like, NEAREST, STEPS)
        share = tl.where(before == position, 1 - weight, 0) + tl.where(after == position, weight, 0)
        reads = there & (share != 0)
        value = widen(tl.load(at + (frame * grad_f)[:, None], inside & reads[:, None], 0))
        total += value * tl.where(reads, share, 0)[:, None]
    tl.store(grad_x + row[:, None] * S + column[None, :], narrow(total, grad_x.dtype.element_ty), inside)


def interpolate_tile(S: int) -> dict[str, int]:
    """Frames and elements per program: 1024 together, wide where the features are.

    >>> interpolate_tile(51)
    {'ROWS': 16, 'INNER': 64, 'num_warps': 4}
    """
    inner = next((width for width in (4, 64) if width >= S), 256)
    return {"ROWS": 1024 // inner, "INNER": inner, "num_warps": 4}


def _run(kernel, x: Tensor, index: Tensor | None, nearest: bool, F: int, K: int, out: Tensor) -> None:
    if out.numel() == 0:
        return
    rows = x.shape[0] * out.shape[1]
    S = out.numel() // rows
    config = interpolate_tile(S)
    axes = merge_axes(list(x.shape), list(x.stride()), 1)[2:] or [(1, 0, False)]
    index_strides = (0, 0) if index is None else (index.stride(0) if index.shape[0] > 1 else 0, index.stride(1))
    launch(
        kernel,
        (triton.cdiv(rows, config["ROWS"]) * triton.cdiv(S, config["INNER"]),),
        x, index, out, rows, F, K, S, tuple(axis[0] for axis in axes), tuple(axis[1] for axis in axes),
        x.stride(0), x.stride(1), *index_strides,
        AXES=len(axes),
        NEAREST=nearest,
        STEPS=K.bit_length(),
        **config,
    )  # fmt: skip


def recover_interpolate_out(x: Tensor, index: Tensor | None, num_frames: int, nearest: bool, out: Tensor) -> None:
    _run(interpolate_kernel, x, index, nearest, num_frames, x.shape[1], out)


def recover_interpolate_backward_out(
    grad: Tensor, index: Tensor | None, num_kept: int, nearest: bool, out: Tensor
) -> None:
    _run(interpolate_backward_kernel, grad, index, nearest, grad.shape[1], num_kept, out)


recover_interpolate = allocating(FORWARD["fake"], recover_interpolate_out)
recover_interpolate_backward = allocating(BACKWARD["fake"], recover_interpolate_backward_out)


_ops = torch.ops.h2ot_kernels
implement(
    "recover_interpolate",
    "triton",
    declare_custom(
        "recover_interpolate_triton",
        function=recover_interpolate,
        **FORWARD,
        backward=transposed(lambda *args: _ops.recover_interpolate_backward_triton(*args)),
    ),
)
implement(
    "recover_interpolate_out",
    "triton",
    declare_custom("recover_interpolate_out_triton", function=recover_interpolate_out, **into_out(FORWARD)),
)
declare_custom(
    "recover_interpolate_backward_triton",
    function=recover_interpolate_backward,
    **BACKWARD,
    backward=transposed(lambda *args: _ops.recover_interpolate_triton(*args)),
)
