"""Labels of the nearest selected token, decided as in float64; and cluster means without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implement
from ..cluster import ASSIGN, MERGE, _merged, merge_backward
from ..library import declare_custom
from .common import divide, launch, modulo, narrow, wide, widen
from .distance import bounds, next_candidate, pair_squares
from .score import pool


# FLOPs: 2 B N K C (x 3 in float32). Bytes: tokens once, the K selected ones once per block of rows (from L2).
# Floor: the products at the rate of TF32, or the tokens at the copy bandwidth.
@triton.jit
def assign_kernel(
    x, valid, index, labels, N, C, K, stride_b, stride_n, stride_c, index_b, index_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """labels [B, N]: the lowest of the nearest valid centres; a centre its own; -1 for what is not valid."""
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)
    offset = b * stride_b + row.to(tl.int64) * stride_n
    best = tl.full([ROWS], float("inf"), tl.float64)
    label = tl.full([ROWS], -1, tl.int32)
    own = tl.full([ROWS], -1, tl.int32)
    for first in range(0, K, COLUMNS):
        position = first + tl.arange(0, COLUMNS)
        centre = tl.load(index + b * index_b + position.to(tl.int64) * index_k, position < K, -1)
        there = (centre >= 0) & (centre < N)
        there &= tl.load(valid + b * N + centre, there, 0) != 0
        at = b * stride_b + centre * stride_n
        low, slack = bounds(
            x, offset, inside, at, there, b * stride_b, N, stride_n, stride_c, C, valid + b * N, True, BLOCK
        )
        pairs = inside[:, None] & there[None, :]
        same = pairs & (centre[None, :] == row[:, None])
        own = tl.maximum(own, tl.max(tl.where(same, position[None, :], -1), 1))
        last_low = tl.full([ROWS], -1.0, low.dtype)
        last_column = tl.zeros([ROWS], tl.int32)
        local = tl.arange(0, COLUMNS)
        least, candidate = next_candidate(low, pairs, last_low, last_column, local)
        floor = least.to(tl.float64)
        active = (least < float("inf")) & (floor < best)
        while tl.max(active.to(tl.int32), 0) > 0:
            chosen = tl.load(index + b * index_b + (first + candidate).to(tl.int64) * index_k, active, 0)
            square = pair_squares(x, offset, b * stride_b + chosen * stride_n, active, stride_c, C, EXACT)
            nearer = active & ((square < best) | ((square == best) & (first + candidate < label)))
            best = tl.where(nearer, square, best)
            label = tl.where(nearer, first + candidate, label)
            least, candidate = next_candidate(low, pairs, least, candidate, local)
            floor = least.to(tl.float64)
            active = (least < float("inf")) & ((floor < best) | ((floor == best) & (first + candidate < label)))
    label = tl.where(own >= 0, own, label)
    tl.store(labels + b * N + row, label.to(tl.int64), row < N)


# Bytes: labels once per block of channels and cluster (from L2), x once. Floor: x at the copy bandwidth.
@triton.jit
def merge_kernel(
    x, labels, weight, out, total_out,
    N, C, K, stride_b, stride_n, stride_c, labels_b, labels_n, weight_b, weight_n,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out [B, K, C], total_out [B, K]: one program sums one cluster's tokens in ascending order, BLOCK channels."""
    blocks = tl.cdiv(C, BLOCK)
    part = tl.program_id(0) % blocks
    cluster = tl.program_id(0) // blocks % K
    b = (tl.program_id(0) // blocks // K).to(tl.int64)
    channel = part * BLOCK + tl.arange(0, BLOCK)
    at = x + b * stride_b + channel.to(tl.int64) * stride_c
    like = widen(tl.zeros([1], x.dtype.element_ty))
    total = tl.zeros([BLOCK], like.dtype)
    mass = tl.zeros([1], like.dtype)
    local = tl.arange(0, CHUNK)
    for first in range(0, N, CHUNK):
        token = first + local
        mine = tl.load(labels + b * labels_b + token.to(tl.int64) * labels_n, token < N, -1) == cluster
        member = tl.min(tl.where(mine, local, CHUNK), 0)
        while member < CHUNK:
            share = tl.full([1], 1.0, like.dtype)
            if weight is not None:
                share = tl.load(weight + b * weight_b + (first + member).to(tl.int64) * weight_n + tl.arange(0, 1))
            value = widen(tl.load(at + (first + member).to(tl.int64) * stride_n, channel < C, 0))
            total += share * value
            mass += share
            member = tl.min(tl.where(mine & (local > member), local, CHUNK), 0)
    mean = divide(total, tl.zeros_like(total) + tl.where(mass == 0, 1, mass))
    mean = tl.where(mass == 0, 0, mean)
    tl.store(out + (b * K + cluster) * C + channel, narrow(mean, out.dtype.element_ty), channel < C)
    lane = tl.arange(0, 1)
    tl.store(total_out + b * K + cluster + lane, mass, part + lane == 0)


def assign_tile(double: bool) -> dict[str, int]:
    """Rows and centres of one tile, channels per step of the products and of the exact distances."""
    side = 16 if double else 32
    return {"ROWS": side, "COLUMNS": side, "BLOCK": 16, "EXACT": 64, "num_warps": 4, "num_stages": 2}


def assign_clusters(x: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
    B, N = x.shape[:2]
    tokens, valid = pool(x, mask, None)
    labels = x.new_empty((B, N), dtype=torch.int64)
    config = assign_tile(x.dtype == torch.float64)
    launch(
        assign_kernel,
        (B * triton.cdiv(N, config["ROWS"]),),
        tokens, valid, index, labels, N, tokens.shape[2], index.shape[1], *tokens.stride(),
        index.stride(0) if index.shape[0] > 1 else 0, index.stride(1),
        **config,
    )  # fmt: skip
    return labels


def merge_tile(C: int) -> dict[str, int]:
    """Channels of one program, and how many labels it looks through at a time.

    >>> merge_tile(512)
    {'BLOCK': 256, 'CHUNK': 256, 'num_warps': 4}
    """
    return {"BLOCK": 256 if C > 64 else 64, "CHUNK": 256, "num_warps": 4 if C > 64 else 2}


def merge_tokens(x: Tensor, labels: Tensor, num_clusters: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N, C = x.shape
    out = x.new_empty((B, num_clusters, C))
    total = x.new_empty((B, num_clusters), dtype=wide(x.dtype))
    config = merge_tile(C)
    launch(
        merge_kernel,
        (B * num_clusters * triton.cdiv(C, config["BLOCK"]),),
        x, labels, weight, out, total, N, C, num_clusters, *x.stride(), *labels.stride(),
        *(weight.stride() if weight is not None else (0, 0)),
        **config,
    )  # fmt: skip
    return out, total


_merge = declare_custom(
    "merge_tokens_triton", function=merge_tokens, **MERGE, backward=merge_backward(lambda *args: _merge(*args))
)
implement("assign_clusters", "triton", declare_custom("assign_clusters_triton", function=assign_clusters, **ASSIGN))
implement("merge_tokens", "triton", _merged(_merge))
