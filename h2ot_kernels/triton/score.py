"""Density-peak scoring of up to 512 tokens: three kernels, the selection included.

pool_kernel: pooled tokens and which are valid. gram_kernel: tiles of distance bounds over the upper triangle, and the
terms of a Gaussian density; whoever completes a block of rows makes their densities. delta_kernel: the next denser
token; whoever completes a sample scores and selects. Larger samples: score_large.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implement
from ..library import declare_custom
from ..score import SCORE, VARIANT
from ..select import CLUSTER
from .common import divide, is_last, launch, modulo, number, pow2, wide, widen
from .density import Definition, definition, gaussian_key, gaussian_steps, score_of, store_keys
from .distance import bounds, insert, mean_square, next_candidate, pair_squares
from .score_large import score_large
from .select import selection_key, write_selected

SMALL = 512  # tokens up to which all bounds of a sample are stored (1 MB in float32)


# Bytes: x once, + the pooled tokens (1 / J of it). Floor: those at the copy bandwidth.
@triton.jit
def pool_kernel(
    x, mask, tokens, valid, counters,
    N, J, C, stride_b, stride_n, stride_j, stride_c, mask_b, mask_n, counters_per_sample,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """valid [B, N]: finite and not masked. tokens [B, N, C] (where given): the means over J. Counters start at 0."""
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    offset = b * stride_b + row.to(tl.int64) * stride_n
    finite = inside
    for first in range(0, C, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        there = inside[:, None] & (channel < C)[None, :]
        at = x + offset[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
        total = widen(tl.load(at, there, 0))
        for _ in range(1, J):
            at += stride_j
            total += widen(tl.load(at, there, 0))
        if tokens is not None:
            total = divide(total, tl.zeros_like(total) + J)
            tl.store(tokens + ((b * N + row) * C)[:, None] + channel[None, :], total, there)
        finite &= tl.min((tl.abs(total) < float("inf")).to(tl.int32), 1) != 0
    if mask is not None:
        finite &= tl.load(mask + b * mask_b + row.to(tl.int64) * mask_n, inside, 0) != 0
    tl.store(valid + b * N + row, finite, inside)
    if counters is not None:
        counter = tl.arange(0, COUNTERS)
        mine = tl.where(tl.program_id(0) % blocks == 0, counters_per_sample, 0)
        tl.store(counters + b * counters_per_sample + counter, 0, counter < mine)


@triton.jit
def _nearest_mean(
    x, low, valid, row, b, N, stride_b, stride_n, stride_c, C, k, area, itself,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m of these rows: the mean square to the k nearest tokens, the token itself first if it counts."""
    column = tl.arange(0, WIDTH)
    inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)
    open_pairs = inside[:, None] & (column < N)[None, :] & (column[None, :] != row[:, None])
    bound = tl.load(low + (b * N + row)[:, None] * N + column[None, :], open_pairs, float("inf"), cache_modifier=".cg")
    offset = b * stride_b + row.to(tl.int64) * stride_n
    slot = tl.arange(0, SLOTS)
    # Slots beyond k never count.
    start = tl.where(slot < itself, 0.0, tl.where(slot < k, float("inf"), float("-inf"))).to(tl.float64)
    near = tl.zeros([ROWS, 1], tl.float64) + start[None, :]
    which = tl.zeros([ROWS, SLOTS], tl.int32)
    last_low = tl.full([ROWS], -1.0, bound.dtype)
    last_column = tl.zeros([ROWS], tl.int32)
    least, candidate = next_candidate(bound, open_pairs, last_low, last_column, column)
    active = inside & (least < float("inf")) & (least.to(tl.float64) < tl.max(near, 1))
    while tl.max(active.to(tl.int32), 0) > 0:
        other = b * stride_b + candidate.to(tl.int64) * stride_n
        square = pair_squares(x, offset, other, active, stride_c, C, BLOCK)
        near, which = insert(near, which, square, candidate, active)
        least, candidate = next_candidate(bound, open_pairs, least, candidate, column)
        active = inside & (least < float("inf")) & (least.to(tl.float64) < tl.max(near, 1))
    return mean_square(tl.where(slot[None, :] < k, near, float("inf")), k, area)


# FLOPs: B N^2 C (upper triangle, a multiply and an add each), x 3 as TF32 products; for a Gaussian 3 / 2 B N^2 C in
# float64 where all pairs are in reach. Bytes: 2 B N^2 / TILE x TILE C reads of tokens from L2, B N^2 bounds written to
# L2, B N k C reads for the exact neighbours.
# Floor: the products at the rate of TF32; the rest overlaps.
@triton.jit
def gram_kernel(
    x, valid, noise, low, slack_of, terms, m, rank, counters,
    N, C, stride_b, stride_n, stride_c, k, area: tl.float64, width: tl.float64, itself: tl.float64,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """low [B, N, N]: bounds of all pairs, inf where one is not valid; slack_of [B, N]: each token's share of slack.

    terms [B, N, blocks], for a Gaussian: each token's sum over each block of columns, each written by one program.
    """
    blocks = tl.cdiv(N, TILE)
    b = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    upper = modulo(tl.program_id(0) // blocks, blocks)
    left = modulo(tl.program_id(0), blocks)
    if upper <= left:
        row = upper * TILE + tl.arange(0, TILE)
        column = left * TILE + tl.arange(0, TILE)
        row_inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)
        column_inside = (column < N) & (tl.load(valid + b * N + column, column < N, 0) != 0)
        sample = b * stride_b
        row_offset, column_offset = sample + row.to(tl.int64) * stride_n, sample + column.to(tl.int64) * stride_n
        bound, slack = bounds(
            x, row_offset, row_inside, column_offset, column_inside, sample, N, stride_n, stride_c, C,
            valid + b * N, True, BLOCK,
        )  # fmt: skip
        bound = tl.where(row_inside[:, None] & column_inside[None, :], bound, float("inf"))
        stored = (row < N)[:, None] & (column < N)[None, :]
        tl.store(low + (b * N + row)[:, None] * N + column[None, :], bound, stored)
        if upper == left:
            own = tl.sum(tl.where(row[:, None] == column[None, :], slack, 0), 1)
            tl.store(slack_of + b * N + row, own, row < N)
        else:
            tl.store(low + (b * N + column)[:, None] * N + row[None, :], tl.trans(bound), tl.trans(stored))
        if terms is not None:
            pairs = row_inside[:, None] & column_inside[None, :] & (row[:, None] != column[None, :])
            steps = gaussian_steps(
                x, row_offset, row_inside, column_offset, column_inside, bound, pairs, stride_c, C,
                number(width, tl.float64),
            )  # fmt: skip
            tl.store(terms + (b * N + row) * blocks + left, tl.sum(steps, 1), row < N)
            if upper != left:
                tl.store(terms + (b * N + column) * blocks + upper, tl.sum(steps, 0), column < N)
        arrived = counters + b * (blocks + 1)
        for side in range(2):
            block = tl.where(side == 0, upper, left)
            # Nested: `is_last` counts, so it must not run twice on the diagonal.
            if (side == 0) | (upper != left):  # noqa: SIM102
                if is_last(arrived + block, blocks):
                    for part in range(0, TILE, ROWS):
                        own = block * TILE + part + tl.arange(0, ROWS)
                        if terms is not None:
                            tile = tl.arange(0, WIDTH // TILE)
                            there = (own < N)[:, None] & (tile < blocks)[None, :]
                            at = ((b * N + own) * blocks)[:, None] + tile[None, :]
                            summed = tl.sum(tl.load(terms + at, there, 0, cache_modifier=".cg"), 1)
                            mean = gaussian_key(summed, number(itself, tl.float64))
                        else:
                            mean = _nearest_mean(
                                x, low, valid, own, b, N, stride_b, stride_n, stride_c, C, k, number(area, tl.float64),
                                number(itself, tl.float64), ROWS, WIDTH, SLOTS, EXACT,
                            )  # fmt: skip
                        store_keys(mean, m, rank, noise, b * N + own, own < N, terms is not None)


# Bytes: B N^2 bounds from L2, B N C tokens and more for the exact parents. Floor: the latency of a few dependent reads.
@triton.jit
def delta_kernel(
    x, valid, noise, keep, low, slack_of, m, rank, square_of, parent_of, largest_of, keys, counters,
    density_out, distance_out, score_out, index_out,
    N, C, stride_b, stride_n, stride_c, keep_b, keep_m, M, K, counters_per_sample, area: tl.float64,
    LARGEST: tl.constexpr, GAUSSIAN: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows of one sample: the nearest denser token (square_of, parent_of) and, with LARGEST, the largest square.

    The last program of a sample writes density, distance and score where asked for, and with K > 0 the index.
    """
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)
    column_valid = tl.load(valid + b * N + column, column < N, 0) != 0
    offset = b * stride_b + row.to(tl.int64) * stride_n
    pairs = inside[:, None] & column_valid[None, :] & (row[:, None] != column[None, :])
    bound = tl.load(low + (b * N + row)[:, None] * N + column[None, :], pairs, float("inf"))
    own = tl.load(rank + b * N + row, row < N, 0)
    others = tl.load(rank + b * N + column, column < N, 0)
    denser = pairs & (others[None, :] < own[:, None])
    if noise is None:
        denser |= pairs & (others[None, :] == own[:, None]) & (column[None, :] < row[:, None])
    best = tl.full([ROWS], float("inf"), tl.float64)
    parent = tl.full([ROWS], -1, tl.int32)
    last_low = tl.full([ROWS], -1.0, bound.dtype)
    last_column = tl.zeros([ROWS], tl.int32)
    least, candidate = next_candidate(bound, denser, last_low, last_column, column)
    active = least < float("inf")
    while tl.max(active.to(tl.int32), 0) > 0:
        other = b * stride_b + candidate.to(tl.int64) * stride_n
        square = pair_squares(x, offset, other, active, stride_c, C, EXACT)
        nearer = active & ((square < best) | ((square == best) & (candidate < parent)))
        best = tl.where(nearer, square, best)
        parent = tl.where(nearer, candidate, parent)
        least, candidate = next_candidate(bound, denser, least, candidate, column)
        floor = least.to(tl.float64)
        active = (least < float("inf")) & ((floor < best) | ((floor == best) & (candidate < parent)))
    tl.store(square_of + b * N + row, best, row < N)
    tl.store(parent_of + b * N + row, parent.to(tl.int64), row < N)
    if LARGEST:
        slack = tl.load(slack_of + b * N + row, row < N, 0)[:, None] + tl.load(slack_of + b * N + column, column < N, 0)
        # -high, so that the farthest comes first.
        high = tl.where(pairs, -(bound + slack), float("inf"))
        farthest = tl.zeros([ROWS], tl.float64)
        last_low = tl.full([ROWS], float("-inf"), bound.dtype)
        last_column = tl.full([ROWS], -1, tl.int32)
        least, candidate = next_candidate(high, pairs, last_low, last_column, column)
        active = (least < float("inf")) & (-least.to(tl.float64) > farthest)
        while tl.max(active.to(tl.int32), 0) > 0:
            other = b * stride_b + candidate.to(tl.int64) * stride_n
            square = pair_squares(x, offset, other, active, stride_c, C, EXACT)
            farthest = tl.where(active, tl.maximum(farthest, square), farthest)
            least, candidate = next_candidate(high, pairs, least, candidate, column)
            active = (least < float("inf")) & (-least.to(tl.float64) > farthest)
        tl.store(largest_of + b * N + row, farthest, row < N)
    if is_last(counters + (b + 1) * counters_per_sample - 1, blocks):
        there = column < N
        at = b * N + column
        mean = tl.load(m + at, there, 0)
        squares = tl.load(square_of + at, there, 0, cache_modifier=".cg")
        parents = tl.load(parent_of + at, there, -1, cache_modifier=".cg")
        largest = tl.zeros([WIDTH], tl.float64)
        if LARGEST:
            largest += tl.max(tl.load(largest_of + at, there, 0, cache_modifier=".cg"), 0)
        added = None
        if noise is not None:
            added = tl.load(noise + at, there, 0)
        density, distance, score = score_of(mean, squares, largest, parents, added, number(area, tl.float64), GAUSSIAN)
        score = tl.where(column_valid, score, float("-inf"))
        if density_out is not None:
            tl.store(density_out + at, tl.where(column_valid, density, 0.0), there)
            tl.store(distance_out + at, tl.where(column_valid, distance, 0.0), there)
            tl.store(score_out + at, score, there)
        if index_out is not None:
            key = selection_key(score, column_valid, keep, b * keep_b, keep_m, M, column)
            tl.store(keys + at, key, there)
            tl.debug_barrier()
            write_selected(keys + b * N, key, N, K, index_out + b * K, WIDTH, CHUNK)


def pool_tile(C: int) -> dict[str, int]:
    """Tokens and channels that a program of pool_kernel pools at a time.

    >>> pool_tile(512)
    {'ROWS': 4, 'BLOCK': 256, 'num_warps': 4}
    """
    block = 256 if C > 64 else 64
    return {"ROWS": 1024 // block, "BLOCK": block, "num_warps": 4}


def pool(x: Tensor, mask: Tensor | None, counters: Tensor | None, counters_per_sample: int = 1):
    """(tokens [B, N, C] of any strides, valid [B, N]) of x [B, N, C] or [B, F, J, C]; counters are set to 0."""
    B, N = x.shape[:2]
    if x.dim() == 4 and x.shape[2] == 1:
        x = x.flatten(2) if x.shape[3] == 1 else x.squeeze(2)
    J = x.shape[2] if x.dim() == 4 else 1
    C = x.shape[-1]
    pooled = x.new_empty((B, N, C), dtype=wide(x.dtype)) if x.dim() == 4 else None
    valid = x.new_empty((B, N), dtype=torch.bool)
    config = pool_tile(C)
    strides = (x.stride(0), x.stride(1), x.stride(2) if x.dim() == 4 else 0, x.stride(-1))
    launch(
        pool_kernel,
        (B * triton.cdiv(N, config["ROWS"]),),
        x, mask, pooled, valid, counters, N, J, C, *strides,
        *(mask.stride() if mask is not None else (0, 0)), counters_per_sample,
        COUNTERS=pow2(counters_per_sample, 16),
        **config,
    )  # fmt: skip
    return (x if pooled is None else pooled), valid


def gram_tile(N: int, k: int, double: bool) -> dict[str, int]:
    """Tile of distances, channels per step, and the rows, width and slots of the density phase of gram_kernel."""
    return {
        "TILE": 16 if double else 32,
        "BLOCK": 16 if double else 32,
        "ROWS": 8 if double else 16,
        "WIDTH": pow2(N, 32),
        "SLOTS": pow2(k, 2),
        "EXACT": 64,
        "num_warps": 4,
        "num_stages": 2,
    }


def delta_tile(N: int, double: bool) -> dict[str, int]:
    """Rows and width of one program of delta_kernel, and how many keys it ranks against at a time."""
    width = pow2(N, 32)
    return {
        "ROWS": 8 if double else 16,
        "WIDTH": width,
        "EXACT": 64,
        "CHUNK": min(8192 // width, 32),
        "num_warps": 8 if width > 256 else 4,
    }


def _run(x, k, mask, noise, keep, num_tokens: int, scores: bool, by: Definition | None = None):
    """(density, distance, score, parent) where scores, and the index where num_tokens > 0."""
    B, N = x.shape[:2]
    C = x.shape[-1]
    by = by or definition(C)
    k = 1 if by.gaussian else k
    if N > SMALL:
        return score_large(pool, x, k, mask, noise, keep, num_tokens, scores, by)
    config = gram_tile(N, k, x.dtype == torch.float64)
    per_sample = triton.cdiv(N, config["TILE"]) + 1
    counters = x.new_empty((B, per_sample), dtype=torch.int32)
    tokens, valid = pool(x, mask, counters, per_sample)
    precise = wide(x.dtype)
    low, slack = x.new_empty((B, N, N), dtype=precise), x.new_empty((B, N), dtype=precise)
    m, square, largest = (x.new_empty((B, N), dtype=torch.float64) for _ in range(3))
    rank = m if noise is None else x.new_empty((B, N), dtype=torch.float64)
    parent = x.new_empty((B, N), dtype=torch.int64)
    outputs = [x.new_empty((B, N), dtype=torch.float64) if scores else None for _ in range(3)]
    index = x.new_empty((B, num_tokens), dtype=torch.int64) if num_tokens else None
    keys = x.new_empty((B, N), dtype=torch.int64) if num_tokens else None
    blocks = triton.cdiv(N, config["TILE"])
    terms = x.new_empty((B, N, blocks), dtype=torch.int64) if by.gaussian else None
    launch(
        gram_kernel,
        (B * blocks * blocks,),
        tokens, valid, noise, low, slack, terms, m, rank, counters, N, C, *tokens.stride(), k, by.area, by.width,
        by.itself,
        **config,
    )  # fmt: skip
    config = delta_tile(N, x.dtype == torch.float64)
    keep_strides = (0, 0) if keep is None else (keep.stride(0) if keep.shape[0] > 1 else 0, keep.stride(1))
    launch(
        delta_kernel,
        (B * triton.cdiv(N, config["ROWS"]),),
        tokens, valid, noise, keep, low, slack, m, rank, square, parent, largest, keys, counters,
        *outputs, index, N, C, *tokens.stride(), *keep_strides, 0 if keep is None else keep.shape[1], num_tokens,
        per_sample, by.area,
        LARGEST=scores or noise is not None,
        GAUSSIAN=by.gaussian,
        **config,
    )  # fmt: skip
    return (*outputs, parent), index


def score_tokens(x: Tensor, k: int, mask: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(x, k, mask, noise, None, 0, scores=True)[0]


def score_variant(
    x: Tensor,
    k: int,
    mask: Tensor | None,
    noise: Tensor | None,
    scale: float,
    exclude_self: bool,
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(x, k, mask, noise, None, 0, True, definition(x.shape[-1], scale, exclude_self, cutoff))[0]


def prune_cluster(
    x: Tensor, num_tokens: int, k: int, keep: Tensor | None, mask: Tensor | None, noise: Tensor | None
) -> Tensor:
    return _run(x, k, mask, noise, keep, num_tokens, scores=False)[1]


implement("score_tokens", "triton", declare_custom("score_tokens_triton", function=score_tokens, **SCORE))
implement("score_variant", "triton", declare_custom("score_variant_triton", function=score_variant, **VARIANT))
implement("prune_cluster", "triton", declare_custom("prune_cluster_triton", function=prune_cluster, **CLUSTER))
