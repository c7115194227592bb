"""Selection by rank counting: no sort, no floating-point comparison, the index ascending at once; motion scores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implement
from ..library import declare_custom
from ..select import MOTION, SELECT
from .common import launch, modulo, per_step, pow2

ONE_PROGRAM = 1024  # tokens up to which one program ranks a sample
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)


@triton.jit
def selection_key(score, valid, keep, keep_row, keep_step, M, column):
    """int64 keys in the order of selection: kept, then valid by score (float64), then masked ones."""
    score = tl.where(score == 0, 0.0, score)  # -0 and 0 tie
    bits = score.to(tl.int64, bitcast=True)
    key = tl.where(valid & (score == score), bits ^ ((bits >> 63) & HIGHEST), LOWEST)
    if keep is not None:
        at = keep + keep_row
        for _ in range(M):
            key = tl.where(column == tl.load(at), HIGHEST, key)
            at += keep_step
    return key


@triton.jit
def ranks(keys, key, column, N, CHUNK: tl.constexpr):
    """How many of the N stored keys come before each of these: larger ones, and equal ones of a lower column."""
    rank = tl.zeros(key.shape, tl.int32)
    for first in range(0, N, CHUNK):
        other = first + tl.arange(0, CHUNK)
        value = tl.load(keys + other, other < N, LOWEST)
        before = (value[None, :] > key[:, None]) | (
            (value[None, :] == key[:, None]) & (other[None, :] < column[:, None])
        )
        rank += tl.sum((before & (other < N)[None, :]).to(tl.int32), 1)
    return rank


@triton.jit
def write_selected(keys, key, N, K, out, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The ascending index of the K first of N <= WIDTH keys, which stand in memory at keys and in key."""
    column = tl.arange(0, WIDTH)
    kept = (ranks(keys, key, column, N, CHUNK) < K) & (column < N)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(out + place, column.to(tl.int64), kept)


# Bytes: 8 N read, 8 N + 8 K written per sample; N^2 integer comparisons. Floor: the launch.
@triton.jit
def select_kernel(
    score, mask, keep, keys, out,
    N, K, score_b, score_n, mask_b, mask_n, keep_b, keep_m, M,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per sample of up to WIDTH tokens."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < N
    valid = inside
    if mask is not None:
        valid &= tl.load(mask + b * mask_b + column.to(tl.int64) * mask_n, inside, 0) != 0
    value = tl.load(score + b * score_b + column.to(tl.int64) * score_n, inside, 0).to(tl.float64)
    key = selection_key(value, valid, keep, b * keep_b, keep_m, M, column)
    tl.store(keys + b * N + column, key, inside)
    tl.debug_barrier()
    write_selected(keys + b * N, key, N, K, out + b * K, WIDTH, CHUNK)


# Bytes: 8 N read and written. Floor: the launch.
@triton.jit
def key_kernel(
    score, mask, keep, keys, N, score_b, score_n, mask_b, mask_n, keep_b, keep_m, M, ROWS: tl.constexpr
):  # fmt: skip
    """keys [B, N] of scores."""
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    column = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    inside = column < N
    valid = inside
    if mask is not None:
        valid &= tl.load(mask + b * mask_b + column.to(tl.int64) * mask_n, inside, 0) != 0
    value = tl.load(score + b * score_b + column.to(tl.int64) * score_n, inside, 0).to(tl.float64)
    key = selection_key(value, valid, keep, b * keep_b, keep_m, M, column)
    tl.store(keys + b * N + column, key, inside)


# N^2 integer comparisons per sample over all programs; keys from L2. Floor: those at the integer rate.
@triton.jit
def rank_kernel(keys, kept, N, K, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """kept [B, N]: whether fewer than K keys of the sample come before."""
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    column = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    key = tl.load(keys + b * N + column, column < N, LOWEST)
    tl.store(kept + b * N + column, ranks(keys + b * N, key, column, N, CHUNK) < K, column < N)


# Bytes: N read, 8 K written per sample. Floor: the launch.
@triton.jit
def compact_kernel(kept, out, N, K, CHUNK: tl.constexpr):
    """The ascending index of the kept tokens of one sample."""
    b = tl.program_id(0).to(tl.int64)
    before = 0
    for first in range(0, N, CHUNK):
        column = first + tl.arange(0, CHUNK)
        flag = tl.load(kept + b * N + column, column < N, 0).to(tl.int32)
        place = before + tl.cumsum(flag, 0) - 1
        tl.store(out + b * K + place, column.to(tl.int64), flag != 0)
        before += tl.sum(flag, 0)


# Bytes: pose once (each frame twice, the second time from cache). Floor: those at the copy bandwidth.
@triton.jit
def motion_kernel(pose, score, F, J, D, stride_b, stride_f, stride_j, stride_d, FRAMES: tl.constexpr):
    """score [B, F] in float64: sums of |p_t - p_(t-1)|, joint by joint and coordinate by coordinate; 0 at frame 0."""
    blocks = tl.cdiv(F, FRAMES)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    frame = modulo(tl.program_id(0), blocks) * FRAMES + tl.arange(0, FRAMES)
    moving = (frame > 0) & (frame < F)
    at = pose + b * stride_b + frame.to(tl.int64) * stride_f
    total = tl.zeros([FRAMES], tl.float64)
    for _ in range(J):
        coordinate = at
        for _ in range(D):
            now = tl.load(coordinate, moving, 0).to(tl.float64)
            total += tl.abs(now - tl.load(coordinate - stride_f, moving, 0).to(tl.float64))
            coordinate += stride_d
        at += stride_j
    tl.store(score + b * F + frame, total, frame < F)


def select_tile(N: int) -> dict[str, int]:
    """Width of select_kernel and how many keys it ranks against at a time.

    >>> select_tile(243)
    {'WIDTH': 256, 'CHUNK': 16, 'num_warps': 4}
    """
    width = pow2(N, 64, ONE_PROGRAM)
    warps = 4 if width <= 256 else 8
    return {"WIDTH": width, "CHUNK": 1024 * warps // width, "num_warps": warps}


def select_tokens(score: Tensor, num_tokens: int, keep: Tensor | None, mask: Tensor | None) -> Tensor:
    B, N = score.shape
    out = score.new_empty((B, num_tokens), dtype=torch.int64)
    keys = score.new_empty((B, N), dtype=torch.int64)
    mask_strides = (0, 0) if mask is None else mask.stride()
    keep_strides = (0, 0) if keep is None else (keep.stride(0) if keep.shape[0] > 1 else 0, keep.stride(1))
    M = 0 if keep is None else keep.shape[1]
    strides = (*score.stride(), *mask_strides, *keep_strides, M)
    if N <= ONE_PROGRAM:
        launch(select_kernel, (B,), score, mask, keep, keys, out, N, num_tokens, *strides, **select_tile(N))
        return out
    kept = score.new_empty((B, N), dtype=torch.bool)
    launch(key_kernel, (B * triton.cdiv(N, 512),), score, mask, keep, keys, N, *strides, ROWS=512, num_warps=4)
    launch(
        rank_kernel,
        (B * triton.cdiv(N, 128),),
        keys,
        kept,
        N,
        num_tokens,
        ROWS=128,
        CHUNK=per_step(64, 2048),
        num_warps=8,
    )
    launch(compact_kernel, (B,), kept, out, N, num_tokens, CHUNK=2048, num_warps=8)
    return out


def prune_motion(pose: Tensor, num_tokens: int, keep: Tensor | None) -> Tensor:
    B, F, J, D = pose.shape
    score = pose.new_empty((B, F), dtype=torch.float64)
    launch(
        motion_kernel, (B * triton.cdiv(F, 32),), pose, score, F, J, D, *pose.stride(), FRAMES=32, num_warps=1
    )  # fmt: skip
    return select_tokens(score, num_tokens, keep, None)


implement("select_tokens", "triton", declare_custom("select_tokens_triton", function=select_tokens, **SELECT))
implement("prune_motion", "triton", declare_custom("prune_motion_triton", function=prune_motion, **MOTION))
