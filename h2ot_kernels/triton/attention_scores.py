"""Pruning by attention: the mean softmax weight that each frame receives, without the attention matrix."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implement
from ..library import declare_custom
from ..select import ATTENTION
from .common import divide, launch, modulo, wide, widen
from .recover_attention import _logits
from .select import select_tokens


@triton.jit
def _head(pid, blocks, H, P):
    """(block, head, joint, sample) of a program."""
    rest = pid // blocks
    return modulo(pid, blocks), (rest % H).to(tl.int64), (rest // H % P).to(tl.int64), (rest // H // P).to(tl.int64)


# FLOPs: 2 B P H F^2 D (x 3 in float32). Bytes: query once, key once per block of queries (from L2).
# Floor: the larger of the bytes at the copy bandwidth and the FLOPs at the product rate.
@triton.jit
def level_kernel(
    query, key, level, P, H, F, D,
    query_b, query_p, query_h, query_f, query_d, key_b, key_p, key_h, key_f, key_d, scale: tl.float64,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """level [B, P, H, F]: per query the log of its softmax's denominator."""
    block, h, p, b = _head(tl.program_id(0), tl.cdiv(F, QUERIES), H, P)
    frame = block * QUERIES + tl.arange(0, QUERIES)
    query_at = b * query_b + p * query_p + h * query_h + frame.to(tl.int64) * query_f
    like = widen(tl.zeros([1], query.dtype.element_ty))
    top = tl.full([QUERIES], float("-inf"), like.dtype)
    mass = tl.zeros([QUERIES], like.dtype)
    for first in range(0, F, KEYS):
        other = first + tl.arange(0, KEYS)
        key_at = b * key_b + p * key_p + h * key_h + other.to(tl.int64) * key_f
        logit = _logits(query, query_at, frame < F, query_d, key, key_at, other < F, key_d, D, scale, like, BLOCK)
        higher = tl.maximum(top, tl.max(logit, 1))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(logit - higher[:, None]), 1)
        top = higher
    tl.store(level + ((b * P + p) * H + h) * F + frame, top + tl.log(mass), frame < F)


# FLOPs and bytes: as level_kernel, + 4 B P H F bytes written.
@triton.jit
def received_kernel(
    query, key, level, received, P, H, F, D,
    query_b, query_p, query_h, query_f, query_d, key_b, key_p, key_h, key_f, key_d, scale: tl.float64,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """received [B, P, H, F]: per key the sum of its weights over the queries, in ascending order."""
    block, h, p, b = _head(tl.program_id(0), tl.cdiv(F, KEYS), H, P)
    other = block * KEYS + tl.arange(0, KEYS)
    key_at = b * key_b + p * key_p + h * key_h + other.to(tl.int64) * key_f
    like = widen(tl.zeros([1], query.dtype.element_ty))
    total = tl.zeros([KEYS], like.dtype)
    row = ((b * P + p) * H + h) * F
    for first in range(0, F, QUERIES):
        frame = first + tl.arange(0, QUERIES)
        query_at = b * query_b + p * query_p + h * query_h + frame.to(tl.int64) * query_f
        logit = _logits(query, query_at, frame < F, query_d, key, key_at, other < F, key_d, D, scale, like, BLOCK)
        weight = tl.exp(logit - tl.load(level + row + frame, frame < F, 0)[:, None])
        total += tl.sum(tl.where((frame < F)[:, None], weight, 0), 0)
    tl.store(received + row + other, total, other < F)


# Bytes: 4 B P H F read. Floor: those at the copy bandwidth.
@triton.jit
def mean_kernel(received, score, heads, F, count, FRAMES: tl.constexpr):
    """score [B, F]: the mean over heads (and joints) and queries, added in ascending order."""
    blocks = tl.cdiv(F, FRAMES)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    frame = modulo(tl.program_id(0), blocks) * FRAMES + tl.arange(0, FRAMES)
    at = received + b * heads * F + frame
    total = tl.load(at, frame < F, 0)
    for _ in range(1, heads):
        at += F
        total += tl.load(at, frame < F, 0)
    tl.store(score + b * F + frame, divide(total, tl.zeros_like(total) + count), frame < F)


def scores_tile(F: int, D: int, double: bool) -> dict[str, int]:
    """Queries, keys and channels of one tile.

    >>> scores_tile(243, 64, False)
    {'QUERIES': 32, 'KEYS': 64, 'BLOCK': 32, 'num_warps': 4, 'num_stages': 2}
    """
    return {
        "QUERIES": 16 if double else 32,
        "KEYS": 16 if double or F <= 16 else 64,
        "BLOCK": 16 if double or D <= 16 else 32,
        "num_warps": 4,
        "num_stages": 2,
    }


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, H, F, D] or [B, J, H, F, D] -> [B, F], float32 (float64 for float64)."""
    if query.dim() == 4:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    B, P, H, F, D = query.shape
    precise = wide(query.dtype)
    level, received = (query.new_empty((B, P, H, F), dtype=precise) for _ in range(2))
    score = query.new_empty((B, F), dtype=precise)
    config = scores_tile(F, D, query.dtype == torch.float64)
    sizes = (P, H, F, D, *query.stride(), *key.stride(), scale)
    heads = B * P * H
    launch(level_kernel, (heads * triton.cdiv(F, config["QUERIES"]),), query, key, level, *sizes, **config)
    launch(received_kernel, (heads * triton.cdiv(F, config["KEYS"]),), query, key, level, received, *sizes, **config)
    launch(
        mean_kernel, (B * triton.cdiv(F, 64),), received, score, P * H, F, P * H * F, FRAMES=64, num_warps=2
    )  # fmt: skip
    return score


def prune_attention(query: Tensor, key: Tensor, num_tokens: int, keep: Tensor | None, scale: float) -> Tensor:
    return select_tokens(attention_scores(query, key, scale), num_tokens, keep, None)


implement("prune_attention", "triton", declare_custom("prune_attention_triton", function=prune_attention, **ATTENTION))
