"""Gather with embedding and layout in one pass, and its scatter: one kernel, one launch each."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Size, Tensor

from ..backend import implement
from ..gather import GATHER, SCATTER, gather_backward, scatter_backward
from ..library import allocating, declare_custom, into_out
from .common import launch, narrow, widen


@triton.jit
def _search(index_row, index_step, frame, K, STEPS: tl.constexpr):
    """The position of frame in an ascending index row (which may end in -1: padding), and whether it is there."""
    low = tl.zeros_like(frame)
    high = low + K
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        value = tl.load(index_row + middle * index_step, low < high, 0)
        below = (value < frame) & (value != -1)
        low = tl.where((low < high) & below, middle + 1, low)
        high = tl.where((low < high) & ~below, middle, high)
    there = low < K
    return low, there & (tl.load(index_row + low * index_step, there, -1) == frame)


@triton.jit
def _source(index_row, index_step, position, limit, SEARCH: tl.constexpr):
    """Which frame of the input stands at `position` of the output, and whether there is one.

    Gathering (SEARCH 0): the value of the index, in 0 .. limit - 1. Scattering: the position of the frame in the index.
    """
    if SEARCH:
        return _search(index_row, index_step, position, limit, SEARCH)
    else:
        frame = tl.load(index_row + position * index_step)
        return frame, (frame >= 0) & (frame < limit)


# Bytes: rows x inner elements read and written once, + the index (8 K a row), + the embedding (from L2). No products.
# Floor: those bytes at the copy bandwidth.
@triton.jit
def gather_kernel(
    x, index, embed, out,
    sizes, steps,  # of the row axes, outermost (the batch) first
    rows, inner, inner_step, frame_step,
    limit,  # frames in x; scattering: K
    rows_per_index, index_row_step, index_step, embed_row_step, embed_step, C,
    AXES: tl.constexpr, FRAME: tl.constexpr, SEARCH: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out [rows, inner], contiguous. FRAME: which row axis holds frames, -1: the inner axis. SEARCH > 0: scatter."""
    columns = tl.cdiv(inner, INNER)
    pid = tl.program_id(0)
    row = (pid // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (pid % columns).to(tl.int64) * INNER + tl.arange(0, INNER)
    row_inside = row < rows
    inside = row_inside[:, None] & (column < inner)[None, :]
    offset = tl.zeros([ROWS], tl.int64)
    position = tl.zeros([ROWS], tl.int64)
    rest = tl.where(row_inside, row, 0)
    for axis in tl.static_range(AXES - 1, -1, -1):
        coordinate = rest % sizes[axis]
        rest = rest // sizes[axis]
        if axis == FRAME:
            position = coordinate
        else:
            offset += coordinate * steps[axis]
        if axis == 0:
            index_row = index + coordinate // rows_per_index * index_row_step
    if FRAME < 0:
        position = tl.where(inside, column[None, :], 0)
        frame, found = _source(index_row[:, None], index_step, position, limit, SEARCH)
        source = offset[:, None] + frame * frame_step
    else:
        frame, found = _source(index_row, index_step, position, limit, SEARCH)
        position, found = position[:, None], found[:, None]
        source = (offset + frame * frame_step)[:, None] + column[None, :] * inner_step
    value = tl.load(x + source, inside & found, 0)
    if not SEARCH:
        nothing = tl.full([1, 1], float("nan"), tl.float32)
        if embed is None:  # padding
            nothing = tl.where(frame == -1 if FRAME < 0 else (frame == -1)[:, None], 0.0, nothing)
        value = tl.where(found, value, nothing.to(value.dtype))
    if embed is not None:
        added = tl.load(embed + position * embed_row_step + (column % C)[None, :] * embed_step, inside, 0)
        value = narrow(widen(value) + widen(added), out.dtype.element_ty)
    tl.store(out + row[:, None] * inner + column[None, :], value, inside)


def merge_axes(size: list[int], stride: list[int], frame_axis: int) -> list[tuple[int, int, bool]]:
    """(size, stride, holds frames) of the output's axes, those that lie behind one another in the input merged.

    The batch (axis 0) and the frame axis stay alone; axes of size 1 fall away.

    >>> merge_axes([2, 4, 5, 8], [360, 40, 8, 1], 1)
    [(2, 360, False), (4, 40, True), (40, 1, False)]
    """
    merged: list[tuple[int, int, bool]] = []
    for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
        alone = axis in (0, frame_axis)
        if length == 1 and not alone:
            continue
        if len(merged) > 1 and not alone and not merged[-1][2] and merged[-1][1] == step * length:
            merged[-1] = (merged[-1][0] * length, step, False)
        else:
            merged.append((length, step, axis == frame_axis))
    return merged


def tile(inner: int) -> dict[str, int]:
    """Rows and columns of one program's tile: 2048 elements, wide where the inner axis is.

    >>> tile(512), tile(3)
    ({'ROWS': 8, 'INNER': 256, 'num_warps': 4}, {'ROWS': 512, 'INNER': 4, 'num_warps': 4})
    """
    columns = next((width for width in (4, 16, 64) if inner <= width), 256)
    return {"ROWS": 2048 // columns, "INNER": columns, "num_warps": 4}


class _Walk(NamedTuple):
    """How `gather_kernel` walks over its output: arguments that shapes and strides alone decide."""

    programs: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    rows: int
    inner: int
    inner_step: int
    frame_step: int
    constants: dict[str, int]


@functools.lru_cache(maxsize=1024)
def _walk(size: Size, stride: tuple[int, ...], from_dim: int, to_dim: int) -> _Walk:
    """size: of the output; stride: of the input, whose frames lie on from_dim and go to to_dim."""
    moved = list(stride)
    frame_step = moved.pop(from_dim)
    moved.insert(to_dim, frame_step)
    *axes, (inner, inner_step, frames_inside) = merge_axes(list(size), moved, to_dim)
    rows = size.numel() // inner
    constants = {
        "AXES": len(axes),
        "FRAME": -1 if frames_inside else next(i for i, axis in enumerate(axes) if axis[2]),
        **tile(inner),
    }
    programs = triton.cdiv(rows, constants["ROWS"]) * triton.cdiv(inner, constants["INNER"])
    sizes, steps = tuple(axis[0] for axis in axes), tuple(axis[1] for axis in axes)
    return _Walk(programs, sizes, steps, rows, inner, inner_step, frame_step, constants)


def _move(x: Tensor, index: Tensor, embed: Tensor | None, from_dim: int, to_dim: int, out: Tensor, scatter: bool):
    if out.numel() == 0:
        return
    walk, limit = _walk(out.shape, x.stride(), from_dim, to_dim), x.shape[from_dim]
    launch(
        gather_kernel,
        (walk.programs,),
        x, index, embed, out,
        walk.sizes, walk.steps, walk.rows, walk.inner, walk.inner_step, walk.frame_step, limit,
        x.shape[0] // index.shape[0], *index.stride(),
        *(embed.stride() if embed is not None else (0, 0)), out.shape[-1],
        SEARCH=limit.bit_length() if scatter else 0,
        **walk.constants,
    )  # fmt: skip


def gather_tokens_out(x: Tensor, index: Tensor, pos_embed: Tensor | None, dim: int, out_dim: int, out: Tensor) -> None:
    _move(x, index, pos_embed, dim, out_dim, out, scatter=False)


def scatter_tokens_out(grad: Tensor, index: Tensor, num_frames: int, dim: int, out_dim: int, out: Tensor) -> None:
    _move(grad, index, None, out_dim, dim, out, scatter=True)


gather_tokens = allocating(GATHER["fake"], gather_tokens_out)
scatter_tokens = allocating(SCATTER["fake"], scatter_tokens_out)


_gather = declare_custom(
    "gather_tokens_triton",
    function=gather_tokens,
    **GATHER,
    backward=gather_backward(lambda *args: _scatter(*args)),
)
_scatter = declare_custom(
    "scatter_tokens_triton",
    function=scatter_tokens,
    **SCATTER,
    backward=scatter_backward(lambda *args: _gather(*args)),
)
implement("gather_tokens", "triton", _gather)
implement(
    "gather_tokens_out",
    "triton",
    declare_custom("gather_tokens_out_triton", function=gather_tokens_out, **into_out(GATHER)),
)
