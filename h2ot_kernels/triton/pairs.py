"""Products of float32 matrices with the products of float16: a number is the sum of two, and of four products three
count.

A row is divided by 2^-12 times the power of two at its largest magnitude, so that float16 holds it: |x| < 2^13. Its
numbers become high = x to float16, and low = x - high to float16. What that loses of a number is at most 2^-23 of
itself or, where low is subnormal, 2^-25, 2^-37 of the row's largest. The product of the low parts is left out: 2^-22
of |a b|. So a sum of products of C channels is off by 2^-21 sum |a b|, as by 8 roundings to float32, beside what its
summation loses: at most a bit of each STEP's sum for each product of tensor cores in it, and C / STEP roundings to
nearest; less than C products with as many roundings may lose. Powers of two are exact: rows of any size are as good,
from 2^-114 on (below it digits are lost). A row with NaN or infinity gives NaN. The same holds for parts of a row with
a unit each: what is lost is of the largest in the part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import launch, narrow, product
from .distance import load_tokens

PITCH = 64  # channels of pairs come in as many, the rest 0: no product asks where they end
SOURCES = 5


@triton.jit
def put_pairs(value, scale, at, inside, first, pitch, plane, pairs, BLOCK: tl.constexpr):
    large = value * scale[:, None]
    high = narrow(large, tl.float16)
    low = narrow(large - high.to(tl.float32), tl.float16)
    channel = first + tl.arange(0, BLOCK)
    mask = inside[:, None] & (channel < pitch)[None, :]
    tl.store(pairs + at[:, None] + channel[None, :], high, mask)
    tl.store(pairs + plane + at[:, None] + channel[None, :], low, mask)


@triton.jit
def largest_exponent(value):
    """Of each row, the bits of its largest magnitude's exponent."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7F800000, 1)


@triton.jit
def unit_of(most):
    """(unit, 2^12 over it) of rows with these `largest_exponent`."""
    exponent = tl.minimum(tl.maximum(most >> 23, 13), 254)
    scale = ((266 - exponent) << 23).to(tl.float32, bitcast=True)
    return (exponent << 23).to(tl.float32, bitcast=True), scale


@triton.jit
def _pair_rows(
    x, count, x_r, x_c, tile, before, pairs, unit, C, pitch, plane,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows ROWS tile .. of x as pairs, after the `before` rows of other matrices."""
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < count
    row_at = row.to(tl.int64) * x_r
    at = (before + row).to(tl.int64) * pitch
    most = tl.zeros([ROWS], tl.int32)
    if WHOLE:
        value = load_tokens(x, row_at, inside, 0, x_c, C, BLOCK)
        most = largest_exponent(value)
    else:
        for first in range(0, C, BLOCK):
            value = load_tokens(x, row_at, inside, first, x_c, C, BLOCK)
            most = tl.maximum(most, largest_exponent(value))
    own_unit, scale = unit_of(most)
    tl.store(unit + before + row, own_unit, inside)
    if WHOLE:
        put_pairs(value, scale, at, inside, 0, pitch, plane, pairs, BLOCK)
    else:
        for first in range(0, pitch, BLOCK):
            value = load_tokens(x, row_at, inside, first, x_c, C, BLOCK)
            put_pairs(value, scale, at, inside, first, pitch, plane, pairs, BLOCK)


# Bytes: every matrix once, as many written. Floor: those at the copy bandwidth.
@triton.jit
def pair_kernel(
    x0, x1, x2, x3, x4, n0, n1, n2, n3, n4, r0, r1, r2, r3, r4, c0, c1, c2, c3, c4, pairs, unit, C, pitch, plane,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """pairs [2, rows, pitch] and unit [rows] of up to five matrices of C columns, one under the other.

    One program: ROWS rows of one matrix. WHOLE: pitch <= BLOCK, and a row is read once.
    """
    tile = tl.program_id(0)
    t0, t1 = tl.cdiv(n0, ROWS), tl.cdiv(n1, ROWS)
    if tile < t0:
        _pair_rows(x0, n0, r0, c0, tile, 0, pairs, unit, C, pitch, plane, ROWS, BLOCK, WHOLE)
    elif tile < t0 + t1:
        _pair_rows(x1, n1, r1, c1, tile - t0, n0, pairs, unit, C, pitch, plane, ROWS, BLOCK, WHOLE)
    if x2 is not None:
        tile -= t0 + t1
        before = n0 + n1
        t2, t3 = tl.cdiv(n2, ROWS), tl.cdiv(n3, ROWS)
        if tile >= 0:
            if tile < t2:
                _pair_rows(x2, n2, r2, c2, tile, before, pairs, unit, C, pitch, plane, ROWS, BLOCK, WHOLE)
            elif tile < t2 + t3:
                _pair_rows(x3, n3, r3, c3, tile - t2, before + n2, pairs, unit, C, pitch, plane, ROWS, BLOCK, WHOLE)
            else:
                _pair_rows(
                    x4, n4, r4, c4, tile - t2 - t3, before + n2 + n3, pairs, unit, C, pitch, plane, ROWS, BLOCK, WHOLE
                )


@triton.jit
def _step_of_products(a, row_at, b, column_at, plane, first, STEP: tl.constexpr):
    """The three products that count of channels first .. of pairs."""
    channel = (first + tl.arange(0, STEP))[None, :]
    a_at, b_at = row_at[:, None] + channel, column_at[:, None] + channel
    high_a, low_b = tl.load(a + a_at), tl.load(b + plane + b_at)
    nothing = tl.zeros([row_at.shape[0], column_at.shape[0]], tl.float32)
    step = product(high_a, tl.trans(low_b), nothing)
    high_b = tl.load(b + b_at)
    step = product(high_a, tl.trans(high_b), step)
    low_a = tl.load(a + plane + a_at)
    return product(low_a, tl.trans(high_b), step)


@triton.jit
def pair_products(a, row_at, b, column_at, plane, pitch, STEP: tl.constexpr):
    """a b^T of pairs, without the units: rows at a + row_at, b + column_at, which are there."""
    total = tl.zeros([row_at.shape[0], column_at.shape[0]], tl.float32)
    for first in range(0, pitch, STEP):
        total += _step_of_products(a, row_at, b, column_at, plane, first, STEP)
    return total


@triton.jit
def grouped_products(
    a, row_at, row_unit, b, column_at, unit_plane, plane, pitch, GROUP: tl.constexpr, STEP: tl.constexpr
):
    """The same in the units of the rows of a, which have one for every GROUP channels: unit_plane apart at row_unit."""
    total = tl.zeros([row_at.shape[0], column_at.shape[0]], tl.float32)
    for first in range(0, pitch, STEP):
        step = _step_of_products(a, row_at, b, column_at, plane, first, STEP)
        own = tl.load(row_unit + tl.full([], first // GROUP, tl.int64) * unit_plane) * 2.0**-24  # exact, if subnormal
        total = tl.fma(step, tl.broadcast_to(own[:, None], step.shape), total)
    return total


@triton.jit
def in_units(total, row_unit, column_unit):
    """total of `pair_products` in the units of its rows and columns; none of the factors leaves float32's range."""
    return total * 2.0**-24 * row_unit[:, None] * column_unit[None, :]


def pair_tile(C: int) -> dict[str, int]:
    """Rows and channels of one program.

    >>> pair_tile(512)
    {'ROWS': 8, 'BLOCK': 512, 'WHOLE': True, 'num_warps': 4}
    """
    block = 64 if C <= 64 else 512
    return {"ROWS": 4096 // block, "BLOCK": block, "WHOLE": block >= C, "num_warps": 4}


def pairs_of(*matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(pairs [2, rows, pitch], unit [rows]) of two or five float32 matrices [n, C], one under the other."""
    C = matrices[0].shape[1]
    pitch = triton.cdiv(C, PITCH) * PITCH
    counts = [x.shape[0] for x in matrices]
    pairs = matrices[0].new_empty((2, sum(counts), pitch), dtype=torch.float16)
    unit = matrices[0].new_empty((sum(counts),))
    config = pair_tile(C)
    missing = [None] * (SOURCES - len(matrices))
    launch(
        pair_kernel,
        (sum(triton.cdiv(n, config["ROWS"]) for n in counts),),
        *matrices, *missing, *counts, *missing, *(x.stride(0) for x in matrices), *missing,
        *(x.stride(1) for x in matrices), *missing, pairs, unit, C, pitch, pairs.stride(0),
        **config,
    )  # fmt: skip
    return pairs, unit
