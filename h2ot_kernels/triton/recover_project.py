"""The query, key and value of a recovery in float32 inference, in two launches: the pairs, all products."""

import triton
import triton.language as tl
from torch import Tensor

from ..library import declare_custom
from ..recover_pose import PROJECT
from .common import launch, modulo
from .pairs import in_units, pair_products, pairs_of

PROGRAMS = 128  # as in recover_tail.py; two fit a multiprocessor


@triton.jit
def _bias(bias, step, channel, C, total):
    """total + bias[channel], for the channels within 0 .. C - 1."""
    if bias is not None:
        inside = (channel >= 0) & (channel < C)
        total += tl.load(bias + channel.to(tl.int64) * step, inside, 0)[None, :]
    return total


# FLOPs: 3 x 2 (2 rows + F) C^2. Bytes: pairs of the rows, again from L2 for every COLUMNS of 2 C channels, of the
# weights for every ROWS rows; the result once. Floor: the larger of the FLOPs at float16's product rate and the bytes.
@triton.jit
def project_kernel(
    pairs, unit, query_bias, key_bias, value_bias, query, both,
    rows, F, C, pitch, plane, query_step, key_step, value_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """both [rows, 2 C]: key and value beside each other; query [F, C]. One program: a tile of one of them.

    pairs: of the rows, the F rows of the token, the weights [C, C] of key, value and query, one under the other.
    """
    columns, query_columns = tl.cdiv(2 * C, COLUMNS), tl.cdiv(C, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * columns
    tile = tl.program_id(0)
    asks = tile >= tiles
    tile = tl.where(asks, tile - tiles, tile)
    across = tl.where(asks, query_columns, columns)
    height = tl.where(asks, F, rows)
    width = tl.where(asks, C, 2 * C)
    row = tile // across * ROWS + tl.arange(0, ROWS)
    column = modulo(tile, across) * COLUMNS + tl.arange(0, COLUMNS)
    # Those that are not there: the last one again.
    a = tl.where(asks, rows, 0) + tl.minimum(row, height - 1)
    b = rows + F + tl.where(asks, 2 * C, 0) + tl.minimum(column, width - 1)
    total = pair_products(pairs, a.to(tl.int64) * pitch, pairs, b.to(tl.int64) * pitch, plane, pitch, STEP)
    total = in_units(total, tl.load(unit + a), tl.load(unit + b))
    inside = (row < height)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    if asks:
        tl.store(query + at, _bias(query_bias, query_step, column, C, total), inside)
    else:
        total = _bias(key_bias, key_step, column, C, total)
        tl.store(both + at, _bias(value_bias, value_step, column - C, C, total), inside)


def project_tile(rows: int, C: int) -> dict[str, int]:
    """Rows and channels of one program's tile, channels of a step of its product: small where few tiles are to be had.

    >>> project_tile(68 * 81, 512)
    {'ROWS': 128, 'COLUMNS': 64, 'STEP': 32, 'num_warps': 8, 'num_stages': 4}
    >>> project_tile(17 * 81, 512)
    {'ROWS': 64, 'COLUMNS': 64, 'STEP': 32, 'num_warps': 4, 'num_stages': 4}
    """
    many = triton.cdiv(rows, 128) * triton.cdiv(2 * C, 64) >= 2 * PROGRAMS
    tile = (128, 64, 32, 8, 4) if many else (64, 64, 32, 4, 4)
    return dict(zip(("ROWS", "COLUMNS", "STEP", "num_warps", "num_stages"), tile, strict=True))


def recover_project(
    token: Tensor,
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """token [F, C], x [rows, C], weights [C, C], float32 -> (query [F, C], key and value [rows, 2 C])."""
    (rows, C), F = x.shape, token.shape[0]
    query, both = x.new_empty((F, C)), x.new_empty((rows, 2 * C))
    pairs, unit = pairs_of(x, token, key_weight, value_weight, query_weight)
    config = project_tile(rows, C)
    tiles = triton.cdiv(rows, config["ROWS"]) * triton.cdiv(2 * C, config["COLUMNS"])
    tiles += triton.cdiv(F, config["ROWS"]) * triton.cdiv(C, config["COLUMNS"])
    steps = (0 if bias is None else bias.stride(0) for bias in (query_bias, key_bias, value_bias))
    launch(
        project_kernel,
        (tiles,),
        pairs, unit, query_bias, key_bias, value_bias, query, both,
        rows, F, C, pairs.shape[2], pairs.stride(0), *steps,
        **config,
    )  # fmt: skip
    return query, both


project = declare_custom("recover_project_triton", function=recover_project, **PROJECT)
