"""A recovery of float32 in inference, attention to head, in two launches: pairs of float16 go from one to the other.

The attention writes its result as pairs (pairs.py) that have a unit for each row and block of a head's channels, and
programs beyond its own split the weight of the projection, whose rows have one unit. Blocks are padded with zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implement
from ..library import declare_custom
from ..recover_pose import POSE
from ..recover_tail import project_inside
from .common import launch
from .distance import load_tokens
from .pairs import largest_exponent, put_pairs, unit_of
from .recover_attention import attend, attention_tile, query_strides
from .recover_project import project
from .recover_tail import launch_tail, projected_tail

WEIGHTS = 16  # rows of the projection's weight in one program


@triton.jit
def _block(weight, row_at, inside, weight_c, block, parts, D, BLOCK: tl.constexpr):
    """Of the rows, BLOCK channels of one head; 0 beyond it."""
    first = block % parts * BLOCK
    head_at = tl.full([], block // parts * D, tl.int64)
    return load_tokens(weight + head_at * weight_c, row_at, inside, first, weight_c, D, BLOCK)


@triton.jit
def _pair_weight(
    program, weight, weight_n, weight_c, C, D, pairs, unit, before, blocks, plane,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight as pairs, after the `before` rows of the attention."""
    row = program * ROWS + tl.arange(0, ROWS)
    inside = row < C
    row_at = row.to(tl.int64) * weight_n
    parts = tl.cdiv(D, BLOCK)
    most = tl.zeros([ROWS], tl.int32)
    for block in range(blocks):
        value = _block(weight, row_at, inside, weight_c, block, parts, D, BLOCK)
        most = tl.maximum(most, largest_exponent(value))
    own_unit, scale = unit_of(most)
    tl.store(unit + row, own_unit, inside)
    pitch = blocks * BLOCK
    at = (before + row.to(tl.int64)) * pitch
    for block in range(blocks):
        value = _block(weight, row_at, inside, weight_c, block, parts, D, BLOCK)
        put_pairs(value, scale, at, inside, block * BLOCK, pitch, plane, pairs, BLOCK)


@triton.jit
def _pair_attended(
    query, key, value, pairs, unit, rows, blocks, plane,
    F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c, value_b, value_k, value_c, scale,
    FRAMES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    total, b, frame, head, part = attend(
        tl.program_id(0), query, key, value, F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c,
        value_b, value_k, value_c, scale, FRAMES, KEYS, BLOCK, STEP, WHOLE, ONCE,
    )  # fmt: skip
    row, inside = b * F + frame, frame < F
    block = head * tl.cdiv(D, BLOCK) + part
    own_unit, factor = unit_of(largest_exponent(total))
    tl.store(unit + H * D + tl.full([], block, tl.int64) * rows + row, own_unit, inside)
    pitch = blocks * BLOCK
    put_pairs(total, factor, row * pitch, inside, block * BLOCK, pitch, plane, pairs, BLOCK)


# FLOPs: 3 x 4 B F K C. Bytes: as attention_kernel, the weight twice and its pairs once. Floor: as attention_kernel.
@triton.jit
def attention_pairs_kernel(
    query, key, value, weight, pairs, unit, programs, rows, blocks, plane, weight_n, weight_c,
    F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c, value_b, value_k, value_c, scale: tl.float64,
    FRAMES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, ONCE: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """pairs [2, rows + C, blocks BLOCK] and their units: [C] of the weight's, [blocks, rows] of the attention's result.

    The first `programs` programs are those of attention_kernel, the others own WEIGHTS rows of the weight each.
    """
    if tl.program_id(0) < programs:
        _pair_attended(
            query, key, value, pairs, unit, rows, blocks, plane, F, K, H, D, query_b, query_f, query_c,
            key_b, key_k, key_c, value_b, value_k, value_c, scale, FRAMES, KEYS, BLOCK, STEP, WHOLE, ONCE,
        )  # fmt: skip
    else:
        _pair_weight(
            tl.program_id(0) - programs, weight, weight_n, weight_c, H * D, D, pairs, unit, rows, blocks, plane,
            BLOCK, WEIGHTS,
        )  # fmt: skip


def pose_tile(K: int, D: int) -> dict[str, int]:
    """As attention_tile; BLOCK holds whole steps of the products of pairs.

    >>> pose_tile(81, 16)
    {'FRAMES': 64, 'KEYS': 32, 'BLOCK': 32, 'STEP': 32, 'WHOLE': True, 'ONCE': False, 'num_warps': 4, 'num_stages': 2}
    """
    block = 32 if D <= 32 or D % 16 else 64  # single elements: their addresses leave registers for small tiles only
    return {**attention_tile(K, D, torch.float32), "BLOCK": block, "STEP": 32, "WHOLE": block >= D}


def recover_pose(
    token: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    scale: float,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """token [F, C], query as recover_attention takes it, key and value [R, K, C], float32 -> [R, F, M]."""
    R, K, C = key.shape
    F, D = query.shape[-2], C // num_heads
    config = pose_tile(K, D)
    parts = triton.cdiv(D, config["BLOCK"])
    rows, blocks = R * F, num_heads * parts
    pairs = value.new_empty((2, rows + C, blocks * config["BLOCK"]), dtype=torch.float16)
    unit = value.new_empty((blocks * rows + C,))
    plane = pairs.stride(0)
    programs = R * num_heads * triton.cdiv(F, config["FRAMES"]) * parts
    launch(
        attention_pairs_kernel,
        (programs + triton.cdiv(C, WEIGHTS),),
        query, key, value, proj_weight, pairs, unit, programs, rows, blocks, plane, *proj_weight.stride(),
        F, K, num_heads, D, *query_strides(query), *key.stride(), *value.stride(), scale,
        **config, WEIGHTS=WEIGHTS,
    )  # fmt: skip
    vectors = proj_bias, norm_weight, norm_bias, head_weight, head_bias
    return launch_tail(token, pairs[0], pairs[0, rows:], *vectors, eps, R, unit, plane, config["BLOCK"])


_pose = declare_custom("recover_pose_triton", function=recover_pose, **POSE)
implement("recover_tail", "triton", project_inside(projected_tail, project, _pose))
