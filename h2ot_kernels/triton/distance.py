"""Distances between tokens: lower bounds from products, exact ones by direct difference in float64.

A search looks at the bounds, in ascending order, and computes a distance exactly only while its bound could still
matter: the result is that of float64 arithmetic on the tokens, whatever the products were rounded to.
"""

import triton
import triton.language as tl

from .common import product, widen

SAMPLES = tl.constexpr(8)  # tokens whose mean is subtracted before products


@triton.jit
def load_tokens(x, offset, inside, first, stride_c, C, BLOCK: tl.constexpr):
    """Channels first .. first + BLOCK - 1 of the tokens at x + offset; 0 outside."""
    channel = first + tl.arange(0, BLOCK)
    at = offset[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
    return tl.load(x + at, inside[:, None] & (channel < C)[None, :], 0)


@triton.jit
def pair_squares(x, rows, others, inside, stride_c, C, BLOCK: tl.constexpr):
    """|x_i - x_j|^2 in float64 for pairs of tokens at x + rows and x + others: the same bits for (i, j) and (j, i).

    In every row of a tile, too, so neighbours of each other have one distance, and ties stay ties.
    """
    total = tl.zeros([rows.shape[0], BLOCK], tl.float64)
    for first in range(0, C, BLOCK):
        a = load_tokens(x, rows, inside, first, stride_c, C, BLOCK).to(tl.float64)
        b = load_tokens(x, others, inside, first, stride_c, C, BLOCK).to(tl.float64)
        total = tl.fma(a - b, a - b, total)
    return tl.sum(total, 1)


@triton.jit
def bounds(
    x, rows, rows_inside, columns, columns_inside, sample, N, stride_n, stride_c, C, valid,
    CENTRE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(low, slack) [rows, columns]: low <= |x_i - x_j|^2 <= low + 2 slack, low >= 0; tokens not inside give low 0.

    rows, columns, sample: offsets of tokens, and of the sample's first. y = x - centre. In units of 2^-24 (|y_i|^2 +
    |y_j|^2) the product's error is at most 5 C / 4 + 128: 16-bit tokens run through C / 8 accumulations of eight
    products, each cut a bit below float32 and the sum to float32, 10 units; float32 ones through such chains of one
    BLOCK, then C / BLOCK roundings to nearest; 128 for those chains, the norms, the split and this epilogue. float64:
    C + 64 times 2^-52.
    """
    single = widen(tl.zeros([1], x.dtype.element_ty))
    total = tl.zeros([rows.shape[0], columns.shape[0]], single.dtype)
    row_norm = tl.zeros(rows.shape, single.dtype)
    column_norm = tl.zeros(columns.shape, single.dtype)
    if CENTRE:
        chosen = (tl.arange(0, SAMPLES) * N // SAMPLES).to(tl.int64)
        chosen_inside = tl.load(valid + chosen) != 0
        share = 1.0 / tl.maximum(tl.sum(chosen_inside.to(tl.int32)), 1).to(single.dtype)
        chosen = sample + chosen * stride_n
    for first in range(0, C, BLOCK):
        a = load_tokens(x, rows, rows_inside, first, stride_c, C, BLOCK)
        b = load_tokens(x, columns, columns_inside, first, stride_c, C, BLOCK)
        if CENTRE:
            centre = tl.sum(widen(load_tokens(x, chosen, chosen_inside, first, stride_c, C, BLOCK)) * share, 0)
            a = widen(a) - centre[None, :]
            b = widen(b) - centre[None, :]
        row_norm += tl.sum(widen(a) * widen(a), 1)
        column_norm += tl.sum(widen(b) * widen(b), 1)
        total = product(a, tl.trans(b), total)
    norms = row_norm[:, None] + column_norm[None, :]
    if single.dtype == tl.float64:
        slack = norms * ((C + 64) * 2.0**-52) + 2.0**-900
    else:
        slack = norms * ((C * 1.25 + 128) * 2.0**-24) + C * 2.0**-116
    low = norms - 2 * total - slack
    # Overflow leaves nothing known.
    return tl.where(low < float("inf"), tl.maximum(low, 0), 0), slack


@triton.jit
def next_candidate(low, open_pairs, last_low, last_column, column):
    """Of the open pairs of each row the first after (last_low, last_column) in the order (low, column): (low, column).

    inf where there is none."""
    after = (low > last_low[:, None]) | ((low == last_low[:, None]) & (column[None, :] > last_column[:, None]))
    return tl.min(tl.where(open_pairs & after, low, float("inf")), 1, return_indices=True)


@triton.jit
def insert(near, which, square, column, active):
    """Put square (and its column) into each active row's list in place of its largest entry, where it is smaller."""
    worst, at = tl.max(near, 1, return_indices=True)
    slot = tl.arange(0, near.shape[1])
    there = (slot[None, :] == at[:, None]) & (active & (square < worst))[:, None]
    return tl.where(there, square[:, None], near), tl.where(there, column[:, None], which)


@triton.jit
def mean_square(near, k, area):
    """m: the mean of the k smallest entries of each row that are finite, added in ascending order, over area."""
    total = tl.zeros([near.shape[0]], tl.float64)
    count = tl.zeros([near.shape[0]], tl.float64)
    slot = tl.arange(0, near.shape[1])
    for _ in range(k):
        least, at = tl.min(near, 1, return_indices=True)
        there = least < float("inf")
        total += tl.where(there, least, 0.0)
        count += there.to(tl.float64)
        near = tl.where(slot[None, :] == at[:, None], float("inf"), near)
    return total / (tl.maximum(count, 1.0) * area)
