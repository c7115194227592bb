"""Density-peak scoring of any number of tokens with O(N k) memory: tiles of bounds are made, searched and forgotten.

nearest_kernel: the nearest tokens of each, exactly, and its density, by them or by all tokens. resolve_kernel: the next
denser token where it is among them; the other rows go to a list. scan_kernel: the rows of the list against all tokens.
farthest_kernel (only where a peak's distance is asked for): the largest distance of a sample. finish_kernel: density,
distance, score.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, modulo, number, pow2
from .density import Definition, gaussian_key, gaussian_steps, score_of, store_keys
from .distance import bounds, insert, mean_square, next_candidate, pair_squares
from .select import select_tokens


# FLOPs: 2 B N^2 C (x 3 in float32), with GAUSSIAN 3 B N^2 C in float64 where all pairs are in reach. Bytes: tokens once
# per block of rows (from L2), 12 B N SLOTS written. Floor: the products at the rate of TF32, or of the 16-bit type.
@triton.jit
def nearest_kernel(
    x, valid, noise, m, rank, near_out, which_out, N, C, stride_b, stride_n, stride_c, k,
    area: tl.float64, width: tl.float64, itself: tl.float64,
    GAUSSIAN: tl.constexpr,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """near_out, which_out [B, N, SLOTS]: the SLOTS > k nearest tokens, unordered; inf: too few. m: of k of them.

    The token itself is one of them if it counts.
    """
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)
    offset = b * stride_b + row.to(tl.int64) * stride_n
    slot = tl.arange(0, SLOTS)
    own = slot < number(itself, tl.float64)
    near = tl.zeros([ROWS, 1], tl.float64) + tl.where(own, 0.0, float("inf")).to(tl.float64)[None, :]
    which = tl.zeros([1, SLOTS], tl.int32) + row[:, None]
    steps = tl.zeros([ROWS], tl.int64)
    tiles = tl.cdiv(N, COLUMNS)
    for i in range(tiles):
        # The row's own neighbourhood first: in a video the nearest tokens stand there.
        column = modulo(modulo(tl.program_id(0), blocks) * ROWS // COLUMNS + i, tiles) * COLUMNS + tl.arange(0, COLUMNS)
        there = (column < N) & (tl.load(valid + b * N + column, column < N, 0) != 0)
        at = b * stride_b + column.to(tl.int64) * stride_n
        low, slack = bounds(
            x, offset, inside, at, there, b * stride_b, N, stride_n, stride_c, C, valid + b * N, CENTRE, BLOCK
        )
        pairs = inside[:, None] & there[None, :] & (row[:, None] != column[None, :])
        last_low = tl.full([ROWS], -1.0, low.dtype)
        last_column = tl.zeros([ROWS], tl.int32)
        least, candidate = next_candidate(low, pairs, last_low, last_column, tl.arange(0, COLUMNS))
        active = (least < float("inf")) & (least.to(tl.float64) < tl.max(near, 1))
        first = tl.min(column, 0)
        while tl.max(active.to(tl.int32), 0) > 0:
            other = b * stride_b + (first + candidate).to(tl.int64) * stride_n
            square = pair_squares(x, offset, other, active, stride_c, C, EXACT)
            near, which = insert(near, which, square, first + candidate, active)
            least, candidate = next_candidate(low, pairs, least, candidate, tl.arange(0, COLUMNS))
            active = (least < float("inf")) & (least.to(tl.float64) < tl.max(near, 1))
        if GAUSSIAN:
            steps += tl.sum(
                gaussian_steps(x, offset, inside, at, there, low, pairs, stride_c, C, number(width, tl.float64)), 1
            )
    at = ((b * N + row) * SLOTS)[:, None] + slot[None, :]
    tl.store(near_out + at, near, (row < N)[:, None])
    tl.store(which_out + at, which, (row < N)[:, None])
    if GAUSSIAN:
        mean = gaussian_key(steps, number(itself, tl.float64))
    else:
        mean = mean_square(near, k, number(area, tl.float64))
    store_keys(mean, m, rank, noise, b * N + row, row < N, GAUSSIAN)


# Bytes: 12 B N SLOTS read. Floor: those at the copy bandwidth.
@triton.jit
def resolve_kernel(
    valid, noise, rank, near, which, square_of, parent_of, work, count, largest, N,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """square_of, parent_of where the nearest denser token is among the nearest ones; other rows are put into work."""
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)
    slot = tl.arange(0, SLOTS)
    at = ((b * N + row) * SLOTS)[:, None] + slot[None, :]
    square = tl.load(near + at, inside[:, None], float("inf"))
    other = tl.load(which + at, inside[:, None], 0)
    own = tl.load(rank + b * N + row, row < N, 0)[:, None]
    theirs = tl.load(rank + b * N + other, square < float("inf"), float("inf"))
    denser = theirs < own
    if noise is None:
        denser |= (theirs == own) & (other < row[:, None])
    denser &= square < float("inf")
    best = tl.min(tl.where(denser, square, float("inf")), 1)
    parent = tl.min(tl.where(denser & (square == best[:, None]), other, 2**31 - 1), 1)
    # Tokens that are not listed are at least as far as the farthest listed one; inf: all are listed.
    reach = tl.max(square, 1)
    known = (best < reach) | (reach == float("inf"))
    parent = tl.where(best < float("inf"), parent, -1)
    tl.store(square_of + b * N + row, best, row < N)
    tl.store(parent_of + b * N + row, tl.where(inside, parent, -1).to(tl.int64), row < N)
    if largest is not None:
        tl.store(largest + b, 0.0, tl.program_id(0) % blocks == 0)
    unknown = (inside & ~known).to(tl.int32)
    found = tl.sum(unknown, 0)
    if found > 0:
        place = tl.atomic_add(count + b, found) + tl.cumsum(unknown, 0) - 1
        tl.store(work + b * N + place, row, unknown != 0)


# FLOPs: 2 B P N C (x 3 in float32) for P rows that are left. Bytes: tokens once per block of those rows (from L2).
# Floor: the products at the rate of TF32, or of the 16-bit type.
@triton.jit
def scan_kernel(
    x, valid, noise, rank, square_of, parent_of, work, count, N, C, stride_b, stride_n, stride_c,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """square_of, parent_of of the rows in work: their nearest denser token among all. The order of work is free."""
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    item = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    left = tl.load(count + b)
    if modulo(tl.program_id(0), blocks) * ROWS < left:
        inside = item < left
        row = tl.load(work + b * N + item, inside, 0)
        offset = b * stride_b + row.to(tl.int64) * stride_n
        own = tl.load(rank + b * N + row, inside, float("-inf"))
        best = tl.full([ROWS], float("inf"), tl.float64)
        parent = tl.full([ROWS], -1, tl.int32)
        local = tl.arange(0, COLUMNS)
        for first in range(0, N, COLUMNS):
            column = first + local
            there = (column < N) & (tl.load(valid + b * N + column, column < N, 0) != 0)
            theirs = tl.load(rank + b * N + column, there, float("inf"))
            denser = theirs[None, :] < own[:, None]
            if noise is None:
                denser |= (theirs[None, :] == own[:, None]) & (column[None, :] < row[:, None])
            denser &= inside[:, None] & there[None, :]
            at = b * stride_b + column.to(tl.int64) * stride_n
            low, slack = bounds(
                x, offset, inside, at, there, b * stride_b, N, stride_n, stride_c, C, valid + b * N, CENTRE, BLOCK
            )
            last_low = tl.full([ROWS], -1.0, low.dtype)
            last_column = tl.zeros([ROWS], tl.int32)
            least, candidate = next_candidate(low, denser, last_low, last_column, local)
            # Columns come in ascending order: at equal distances the first found stays.
            active = (least < float("inf")) & (least.to(tl.float64) < best)
            while tl.max(active.to(tl.int32), 0) > 0:
                other = b * stride_b + (first + candidate).to(tl.int64) * stride_n
                square = pair_squares(x, offset, other, active, stride_c, C, EXACT)
                nearer = active & ((square < best) | ((square == best) & (first + candidate < parent)))
                best = tl.where(nearer, square, best)
                parent = tl.where(nearer, first + candidate, parent)
                least, candidate = next_candidate(low, denser, least, candidate, local)
                floor = least.to(tl.float64)
                active = (least < float("inf")) & ((floor < best) | ((floor == best) & (first + candidate < parent)))
        tl.store(square_of + b * N + row, best, inside)
        tl.store(parent_of + b * N + row, parent.to(tl.int64), inside)


# FLOPs: B N^2 C (x 3 in float32). Bytes: tokens once per block of rows (from L2). Floor: as nearest_kernel, half of it.
@triton.jit
def farthest_kernel(
    x, valid, largest, N, C, stride_b, stride_n, stride_c,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """largest [B]: the largest |x_i - x_j|^2 of valid tokens. A maximum: the same in whatever order programs finish."""
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    begin = modulo(tl.program_id(0), blocks) * ROWS
    row = begin + tl.arange(0, ROWS)
    inside = (row < N) & (tl.load(valid + b * N + row, row < N, 0) != 0)
    offset = b * stride_b + row.to(tl.int64) * stride_n
    local = tl.arange(0, COLUMNS)
    best = tl.load(largest + b)  # what others have found so far only saves work
    for first in range(begin, N, COLUMNS):
        column = first + local
        there = (column < N) & (tl.load(valid + b * N + column, column < N, 0) != 0)
        at = b * stride_b + column.to(tl.int64) * stride_n
        low, slack = bounds(
            x, offset, inside, at, there, b * stride_b, N, stride_n, stride_c, C, valid + b * N, CENTRE, BLOCK
        )
        pairs = inside[:, None] & there[None, :] & (row[:, None] < column[None, :])
        high = tl.where(pairs, -(low + 2 * slack), float("inf"))
        last_low = tl.full([ROWS], float("-inf"), low.dtype)
        last_column = tl.full([ROWS], -1, tl.int32)
        least, candidate = next_candidate(high, pairs, last_low, last_column, local)
        active = (least < float("inf")) & (-least.to(tl.float64) > best)
        while tl.max(active.to(tl.int32), 0) > 0:
            other = b * stride_b + (first + candidate).to(tl.int64) * stride_n
            square = pair_squares(x, offset, other, active, stride_c, C, EXACT)
            best = tl.maximum(best, tl.max(tl.where(active, square, 0.0), 0))
            least, candidate = next_candidate(high, pairs, least, candidate, local)
            active = (least < float("inf")) & (-least.to(tl.float64) > best)
    tl.atomic_max(largest + b, best)


# Bytes: 32 B N read, 24 B N written. Floor: those at the copy bandwidth.
@triton.jit
def finish_kernel(
    valid, noise, m, square_of, parent_of, largest, density_out, distance_out, score_out, N, area: tl.float64,
    GAUSSIAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """density and distance (where asked for) and score [B, N]."""
    blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = modulo(tl.program_id(0), blocks) * ROWS + tl.arange(0, ROWS)
    there = row < N
    at = b * N + row
    inside = there & (tl.load(valid + at, there, 0) != 0)
    most = tl.zeros([ROWS], tl.float64)
    if largest is not None:
        most += tl.load(largest + b)
    added = None
    if noise is not None:
        added = tl.load(noise + at, there, 0)
    density, distance, score = score_of(
        tl.load(m + at, there, 0), tl.load(square_of + at, there, 0), most, tl.load(parent_of + at, there, -1), added,
        number(area, tl.float64), GAUSSIAN,
    )  # fmt: skip
    tl.store(score_out + at, tl.where(inside, score, float("-inf")), there)
    if density_out is not None:
        tl.store(density_out + at, tl.where(inside, density, 0.0), there)
        tl.store(distance_out + at, tl.where(inside, distance, 0.0), there)


def stream_tile(B: int, N: int, slots: int, dtype: torch.dtype, gaussian: bool = False) -> dict:
    """Tile of nearest_kernel, scan_kernel and farthest_kernel; CENTRE: whether the mean is subtracted (not in 16 bits,
    whose products are exact as they are). gaussian: that of a nearest_kernel that holds a tile of squares, too."""
    double, half = dtype == torch.float64, dtype in (torch.bfloat16, torch.float16)
    side = 16 if double else 32 if gaussian or B * N < 8192 or (slots > 8 and not half) else 64
    return {
        "CENTRE": not half,
        "ROWS": side,
        "COLUMNS": side,
        "BLOCK": side if half else 16,
        "EXACT": 32 if slots > 16 and side == 32 and not half else 64,  # sums and lists stay in registers
        "num_warps": 8 if side == 64 or (gaussian and not double) else 4,
        "num_stages": 2,
    }


def score_large(pool, x: Tensor, k: int, mask, noise, keep, num_tokens: int, scores: bool, by: Definition):
    """((density, distance, score, parent), index): what score.py's _run gives, for any N."""
    B, N = x.shape[:2]
    count = x.new_empty((B, 1), dtype=torch.int32)
    tokens, valid = pool(x, mask, count)
    slots = pow2(k + 1, 4)
    config = stream_tile(B, N, slots, tokens.dtype)
    strides = (N, tokens.shape[2], *tokens.stride())
    m, square, score = (x.new_empty((B, N), dtype=torch.float64) for _ in range(3))
    rank = m if noise is None else x.new_empty((B, N), dtype=torch.float64)
    near = x.new_empty((B, N, slots), dtype=torch.float64)
    which = x.new_empty((B, N, slots), dtype=torch.int32)
    parent, work = x.new_empty((B, N), dtype=torch.int64), x.new_empty((B, N), dtype=torch.int32)
    density, distance = (x.new_empty((B, N), dtype=torch.float64) if scores else None for _ in range(2))
    largest = x.new_empty((B,), dtype=torch.float64) if scores or noise is not None else None
    grid = (B * triton.cdiv(N, config["ROWS"]),)
    nearest_config = stream_tile(B, N, slots, tokens.dtype, by.gaussian)
    launch(
        nearest_kernel,
        (B * triton.cdiv(N, nearest_config["ROWS"]),),
        tokens, valid, noise, m, rank, near, which, *strides, k, by.area, by.width, by.itself,
        GAUSSIAN=by.gaussian,
        SLOTS=slots,
        **nearest_config,
    )  # fmt: skip
    rows = 2048 // max(slots, 16)  # rows times slots stay in registers
    launch(
        resolve_kernel,
        (B * triton.cdiv(N, rows),),
        valid, noise, rank, near, which, square, parent, work, count, largest, N,
        ROWS=rows,
        SLOTS=slots,
        num_warps=4,
    )  # fmt: skip
    launch(scan_kernel, grid, tokens, valid, noise, rank, square, parent, work, count, *strides, **config)
    if largest is not None:
        launch(farthest_kernel, grid, tokens, valid, largest, *strides, **config)
    launch(
        finish_kernel,
        (B * triton.cdiv(N, 256),),
        valid, noise, m, square, parent, largest, density, distance, score, N, by.area,
        GAUSSIAN=by.gaussian,
        ROWS=256,
        num_warps=4,
    )  # fmt: skip
    return (density, distance, score, parent), (select_tokens(score, num_tokens, keep, valid) if num_tokens else None)
