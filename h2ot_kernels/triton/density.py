"""What density and score are: by the nearest tokens, or by a Gaussian of all distances.

m orders the tokens, the densest first: the mean square to the nearest, with density exp(-m), or with GAUSSIAN -density.
The terms of a Gaussian are multiples of 2^-40 and are added as integers: the sum is exact, in whatever order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

STEPS = tl.constexpr(2.0**40)
REACH = tl.constexpr(28.42)  # exp(-28.42) < 2^-41: such a term rounds to 0
INTEGERS = tl.constexpr(2.0**52)  # float64 from here on are integers: adding it rounds to them, to nearest even


class Definition(NamedTuple):
    """How a call defines distances and densities: d^2 = |x_i - x_j|^2 / area, terms exp(-|x_i - x_j|^2 / width).

    itself: 1 where a token counts among its neighbours, else 0; a float, for which Triton compiles nothing anew.
    """

    area: float
    width: float
    itself: float
    gaussian: bool


def definition(C: int, scale: float = 0.0, exclude_self: bool = False, cutoff: float = 0.0) -> Definition:
    """What the options of `score_variant` mean for tokens of C channels; 0: the option is not given.

    >>> definition(16, cutoff=0.5)
    Definition(area=16.0, width=4.0, itself=1.0, gaussian=True)
    """
    area = scale * scale if scale else float(C)
    return Definition(area, area * cutoff * cutoff, float(not exclude_self), cutoff > 0)


@triton.jit
def gaussian_steps(x, rows, rows_inside, columns, columns_inside, low, pairs, stride_c, C, width):
    """[rows, columns] int64: exp(-|x_i - x_j|^2 / width) of pairs, in steps of 2^-40; low: bounds of the squares.

    The squares are direct differences in float64, the same bits for (i, j) and (j, i); a tile whose bounds are all out
    of reach is left out.
    """
    steps = tl.zeros(low.shape, tl.int64)
    reached = pairs & (low.to(tl.float64) <= width * REACH)
    if tl.max(tl.max(reached.to(tl.int32), 1), 0) > 0:
        square = tl.zeros(low.shape, tl.float64)
        row, column = x + rows, x + columns
        for _ in range(C):
            a = tl.load(row, rows_inside, 0).to(tl.float64)
            b = tl.load(column, columns_inside, 0).to(tl.float64)
            difference = a[:, None] - b[None, :]
            square = tl.fma(difference, difference, square)
            row += stride_c
            column += stride_c
        term = tl.exp(-square / width) * STEPS
        steps = tl.where(pairs, (term + INTEGERS - INTEGERS).to(tl.int64), steps)
    return steps


@triton.jit
def gaussian_key(steps, itself):
    """m of tokens from the sums of their terms with all others; itself: as in `Definition`, float64."""
    return -(steps + (itself * STEPS).to(tl.int64)).to(tl.float64) / STEPS


@triton.jit
def density_of(m, GAUSSIAN: tl.constexpr):
    if GAUSSIAN:
        return -m
    else:
        return tl.exp(-m)


@triton.jit
def store_keys(mean, m, rank, noise, at, inside, GAUSSIAN: tl.constexpr):
    """m, and with noise what ranks the tokens in its place: -(density + noise)."""
    tl.store(m + at, mean, inside)
    if noise is not None:
        tl.store(rank + at, -(density_of(mean, GAUSSIAN) + tl.load(noise + at, inside, 0)), inside)


@triton.jit
def score_of(m, square, largest, parent, noise, area, GAUSSIAN: tl.constexpr):
    """(density, distance, score) of valid tokens from m, the square to the parent (-1: none), the largest square."""
    density = density_of(m, GAUSSIAN)
    distance = tl.sqrt(tl.where(parent < 0, largest, square) / area)
    if noise is not None:
        density += noise
        score = density * distance
    elif GAUSSIAN:
        score = tl.where(parent < 0, float("inf"), tl.log(distance) + tl.log(density))
    else:
        score = tl.where(parent < 0, float("inf"), tl.log(distance) - m)
    return density, distance, score
