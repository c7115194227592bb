"""What follows the attention of a recovery in inference, in one kernel: projection, residual, LayerNorm and head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import declare_custom
from ..recover_tail import PROJECTED_TAIL
from .common import divide, launch, modulo, narrow, number, pow2, product, widen
from .distance import load_tokens
from .pairs import grouped_products, in_units, pair_products, pairs_of

PROGRAMS = 128  # to be had before a program owns more rows: large GPUs have 108 to 148 multiprocessors


@triton.jit
def _vector(x, at, step, inside):
    """x[at] in float32 or float64; 0 outside."""
    return widen(tl.load(x + at.to(tl.int64) * step, inside, 0))


@triton.jit
def _projected(
    attended, row_at, row_inside, attended_c, weight, weight_n, weight_c, bias, bias_n, unit, row_unit, plane,
    unit_plane, channel, C, like, GROUP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Channels `channel` of attended weight^T + bias, of like's dtype; 0 outside. Of pairs where there is a unit.

    row_unit: of the rows, or, where there is a GROUP, where theirs are for the first GROUP channels.
    """
    if GROUP:
        column_at = tl.minimum(channel, C - 1).to(tl.int64) * weight_n
        total = grouped_products(
            attended, row_at, row_unit, weight, column_at, unit_plane, plane, weight_n, GROUP, STEP
        )
        total *= tl.load(unit + channel, channel < C, 0)[None, :]
    elif unit is not None:
        column_at = tl.minimum(channel, C - 1).to(tl.int64) * weight_n
        total = pair_products(attended, row_at, weight, column_at, plane, weight_n, STEP)
        total = in_units(total, row_unit, tl.load(unit + channel, channel < C, 0))
    else:
        total = tl.zeros([row_at.shape[0], channel.shape[0]], like.dtype)
        for first in range(0, C, STEP):
            a = load_tokens(attended, row_at, row_inside, first, attended_c, C, STEP)
            b = load_tokens(weight, channel.to(tl.int64) * weight_n, channel < C, first, weight_c, C, STEP)
            total = product(a, tl.trans(b), total)
    if bias is not None:
        total += _vector(bias, channel, bias_n, channel < C)[None, :]
    return total


# FLOPs: 2 R F C^2 (x 3 in float32) + 2 R F C M. Bytes: attended once (again from L2 for every COLUMNS of its channels),
# proj_weight and token from L2, R F M written. Floor: the larger of the bytes at the copy bandwidth and the FLOPs at
# the product rate; from L2 come (1 / ROWS + 1 / COLUMNS) R F C^2 elements.
@triton.jit
def projected_tail_kernel(
    token, attended, proj_weight, proj_bias, norm_weight, norm_bias, head_weight, head_bias, unit, out,
    rows, plane, F, C, M, token_f, token_c, attended_r, attended_c, proj_n, proj_c, proj_bias_n,
    norm_c, norm_bias_c, head_m, head_c, head_bias_m, eps: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [rows, M] = head(norm(y)), y = token + proj(attended). One program: ROWS rows, OUTPUTS of their outputs.

    COLUMNS channels of y at a time, never stored. Kept of them are their mean, the sum of their squared deviations and,
    per output, the deviations times w = norm_weight head_weight: sums about the mean of the block, moved to the common
    mean as it changes (Chan et al.). What is added is of the size of the deviations: nothing as large as the mean
    cancels, as it would in E[y^2] - E[y]^2 or in sum y w - mean sum w. unit: attended and proj_weight are pairs of
    float32 (pairs.py), plane elements apart, with units of their rows, proj_weight's after attended's;
    where there is a GROUP, before those [groups of as many channels, rows] of attended (recover_pose.py).
    """
    parts = tl.cdiv(M, OUTPUTS)
    first_output = modulo(tl.program_id(0), parts) * OUTPUTS
    output = first_output + tl.arange(0, OUTPUTS)
    row = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    like = widen(tl.zeros([1], attended.dtype.element_ty))
    row_unit = like
    weight_unit = None
    if unit is not None:  # rows that are not there: the last one again
        row_at = tl.minimum(row, rows - 1) * attended_r
        if GROUP:
            row_unit = unit + C + tl.minimum(row, rows - 1)
            weight_unit = unit
        else:
            row_unit = tl.load(unit + row, row < rows, 0)
            weight_unit = unit + rows
    else:
        row_at = row * attended_r
    token_at = row % F * token_f
    mean = tl.zeros([ROWS], like.dtype)
    squares = tl.zeros([ROWS], like.dtype)
    forms = tl.zeros([ROWS, OUTPUTS], like.dtype)  # sums of (y - mean) w
    weights = tl.zeros([OUTPUTS], like.dtype)  # sums of w
    shift = tl.zeros([OUTPUTS], like.dtype)
    if head_bias is not None:
        shift += _vector(head_bias, output, head_bias_m, output < M)
    for first in range(0, C, COLUMNS):
        channel = first + tl.arange(0, COLUMNS)
        inside = channel < C
        y = _projected(
            attended, row_at, row < rows, attended_c, proj_weight, proj_n, proj_c, proj_bias, proj_bias_n,
            weight_unit, row_unit, plane, rows, channel, C, like, GROUP, STEP,
        )  # fmt: skip
        y += widen(load_tokens(token, token_at, row < rows, first, token_c, C, COLUMNS))
        # Nothing is added: Triton keeps the rows of a product within a quarter of a warp, those of loads across half of
        # one, and takes what follows a product for the former: the sums below need two shuffles instead of many.
        if like.dtype != tl.float64:
            y = tl.dot(tl.zeros([ROWS, 16], tl.bfloat16), tl.zeros([16, COLUMNS], tl.bfloat16), y)
        before = tl.zeros_like(mean) + first
        count = tl.zeros_like(mean) + tl.minimum(C - first, COLUMNS)
        own_mean = divide(tl.sum(y, 1), count)
        y = tl.where(inside[None, :], y - own_mean[:, None], 0)
        off = divide(tl.sum(y, 1), count)  # what rounding took from it: of channels next to equal, all of y
        own_mean += off
        y = tl.where(inside[None, :], y - off[:, None], 0)
        share = divide(count, before + count)
        gap = own_mean - mean
        mean += gap * share
        squares += tl.sum(y * y, 1) + gap * gap * before * share
        forms -= (gap * share)[:, None] * weights[None, :]
        rest = gap - gap * share
        for m in range(tl.minimum(M - first_output, OUTPUTS)):
            this = output == first_output + m
            weight = _vector(head_weight + (first_output + m).to(tl.int64) * head_m, channel, head_c, inside)
            if norm_bias is not None:
                bias = _vector(norm_bias, channel, norm_bias_c, inside)
                shift += tl.where(this, tl.sum(weight * bias), 0)
            if norm_weight is not None:
                weight *= _vector(norm_weight, channel, norm_c, inside)
            total = tl.sum(weight)
            form = tl.sum(y * weight[None, :], 1) + rest * total
            forms += tl.where(this[None, :], form[:, None], 0)
            weights += tl.where(this, total, 0)
    spread = tl.sqrt(divide(squares, tl.zeros_like(mean) + C) + number(eps, like.dtype))
    value = divide(forms, tl.broadcast_to(spread[:, None], forms.shape)) + shift[None, :]
    at = out + (row * M)[:, None] + output[None, :]
    tl.store(at, narrow(value, out.dtype.element_ty), (row < rows)[:, None] & (output < M)[None, :])


def tail_tile(rows: int, C: int, M: int, dtype: torch.dtype, group: int = 0) -> dict[str, int]:
    """Rows and outputs of one program, channels of a block and of a step of its product.

    As many rows as leave a large GPU busy: the more, the less often the weights are read. Where C is not a multiple of
    16 a thread loads single elements: their addresses leave registers for small tiles only. group: GROUP of the kernel,
    a multiple of STEP.

    >>> tail_tile(68 * 243, 512, 3, torch.float32)
    {'OUTPUTS': 4, 'ROWS': 128, 'COLUMNS': 64, 'STEP': 32, 'num_warps': 8, 'num_stages': 3}
    >>> tail_tile(68 * 243, 512, 3, torch.bfloat16)
    {'OUTPUTS': 4, 'ROWS': 128, 'COLUMNS': 128, 'STEP': 64, 'num_warps': 8, 'num_stages': 3}
    """
    many = pow2(rows // PROGRAMS // 2 + 1, 32, 64 if M > 4 else 128)
    if dtype == torch.float64:
        tile = 16, 16, 16, 4, 1
    elif C % 16:
        tile = 32, 64, 32, 8, 4
    elif dtype == torch.float32:
        small = many == 64 and group  # two sums in registers, and with a group its units
        tile = many, 64 if small or many == 128 else 128, 32, 4 if small else 8, 3
    else:
        tile = many, 128, 64, 8, 3
    names = "ROWS", "COLUMNS", "STEP", "num_warps", "num_stages"
    return {"OUTPUTS": 4 if M <= 4 else 16, **dict(zip(names, tile, strict=True))}


def launch_tail(
    token: Tensor,
    rows: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    eps: float,
    R: int,
    unit: Tensor | None,
    plane: int,
    group: int = 0,
) -> Tensor:
    """[R, F, M] of rows [R F, C] and proj_weight, or of their pairs: unit, plane, group as `projected_tail_kernel`."""
    F, C = token.shape
    M = head_weight.shape[0]
    out = token.new_empty((R, F, M))
    config = tail_tile(R * F, C, M, token.dtype, group)
    proj_bias_n, norm_c, norm_bias_c, head_bias_m = (
        0 if x is None else x.stride(0) for x in (proj_bias, norm_weight, norm_bias, head_bias)
    )
    launch(
        projected_tail_kernel,
        (triton.cdiv(R * F, config["ROWS"]) * triton.cdiv(M, config["OUTPUTS"]),),
        token, rows, proj_weight, proj_bias, norm_weight, norm_bias, head_weight, head_bias, unit, out,
        R * F, plane, F, C, M, *token.stride(), *rows.stride(), *proj_weight.stride(), proj_bias_n,
        norm_c, norm_bias_c, *head_weight.stride(), head_bias_m, eps,
        **config, GROUP=group,
    )  # fmt: skip
    return out


def recover_projected_tail(
    token: Tensor,
    attended: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """token [F, C], attended [R, F, C], proj_weight [C, C], head_weight [M, C] -> [R, F, M]."""
    R, F, C = attended.shape
    rows = attended.reshape(R * F, C)  # a view of what recover_attention gives
    unit, plane = None, 0
    if attended.dtype == torch.float32:
        pairs, unit = pairs_of(rows, proj_weight)
        rows, proj_weight, plane = pairs[0], pairs[0, R * F :], pairs.stride(0)
    vectors = proj_bias, norm_weight, norm_bias, head_weight, head_bias
    return launch_tail(token, rows, proj_weight, *vectors, eps, R, unit, plane)


projected_tail = declare_custom("recover_projected_tail_triton", function=recover_projected_tail, **PROJECTED_TAIL)
