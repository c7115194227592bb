"""Pruning by attention: the mean softmax weight that each frame receives, without the attention matrix."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implement
from ..library import declare_custom
from ..select import ATTENTION
from .common import divide, has_tensor_memory, launch, modulo, pow2, wide, widen
from .recover_attention import _logits, lowest
from .select import select_tokens

ONCE = 256  # frames up to which a program has all keys in one tile, and makes every logit once


@triton.jit
def _head(pid, blocks, H, P):
    """(block, head, joint, sample) of a program."""
    rest = pid // blocks
    return modulo(pid, blocks), (rest % H).to(tl.int64), (rest // H % P).to(tl.int64), (rest // H // P).to(tl.int64)


# FLOPs: 2 B P H F^2 D (x 3 in float32). Bytes: query once, key once per block of queries (from L2), 4 B P H F per block
# of queries written. Floor: the larger of the bytes at the copy bandwidth and the FLOPs at the product rate.
@triton.jit
def received_once_kernel(
    query, key, received, P, H, F, D,
    query_b, query_p, query_h, query_f, query_d, key_b, key_p, key_h, key_f, key_d, scale: tl.float64,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """received [B, P, H, blocks of queries, F], F <= KEYS: per key the sum of its weights over a block of queries."""
    block, h, p, b = _head(tl.program_id(0), tl.cdiv(F, QUERIES), H, P)
    frame = block * QUERIES + tl.arange(0, QUERIES)
    other = tl.arange(0, KEYS)
    query_at = b * query_b + p * query_p + h * query_h + frame.to(tl.int64) * query_f
    key_at = b * key_b + p * key_p + h * key_h + other.to(tl.int64) * key_f
    like = widen(tl.zeros([1], query.dtype.element_ty))
    logit = _logits(query, query_at, frame < F, query_d, key, key_at, other < F, key_d, D, scale, like, BLOCK)
    weight = tl.exp(logit - tl.max(logit, 1)[:, None])
    share = divide(tl.full([QUERIES], 1.0, like.dtype), tl.sum(weight, 1))
    total = tl.sum(weight * tl.where(frame < F, share, 0)[:, None], 0)
    tl.store(received + tl.program_id(0).to(tl.int64) * F + other, total, other < F)


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
    top = lowest(QUERIES, like.dtype)
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
    """received [B, P, H, F]: per key the sum of its weights over the queries."""
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


# Bytes: the sums that were received, once. Floor: those at the copy bandwidth.
@triton.jit
def mean_kernel(received, score, rows, F, count, ROWS: tl.constexpr, FRAMES: tl.constexpr):
    """score [B, F]: the sum of received [B, rows, F] over its rows, over count."""
    blocks = tl.cdiv(F, FRAMES)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    frame = modulo(tl.program_id(0), blocks) * FRAMES + tl.arange(0, FRAMES)
    total = tl.zeros([ROWS, FRAMES], score.dtype.element_ty)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        at = received + ((b * rows + row) * F)[:, None] + frame[None, :]
        total += tl.load(at, (row < rows)[:, None] & (frame < F)[None, :], 0)
    mean = divide(tl.sum(total, 0), tl.zeros([FRAMES], total.dtype) + count)
    tl.store(score + b * F + frame, mean, frame < F)


def scores_tile(F: int, D: int, dtype: torch.dtype, tensor_memory: bool = False) -> dict[str, int]:
    """Queries, keys and channels of one tile. tensor_memory: whether results of products of 64 queries lie there;
    those of 256 keys by three of TF32 want 528 of its 512 columns.

    >>> scores_tile(243, 64, torch.float32)
    {'QUERIES': 64, 'KEYS': 256, 'BLOCK': 16, 'num_warps': 8, 'num_stages': 2}
    """
    if dtype == torch.float64:
        return {"QUERIES": 16, "KEYS": 16, "BLOCK": 16, "num_warps": 4, "num_stages": 2}
    keys = pow2(F, 64, ONCE) if F <= ONCE else 64
    too_many = tensor_memory and dtype == torch.float32 and keys > 128
    return {
        "QUERIES": 32 if F > ONCE or too_many else 64,
        "KEYS": keys,
        "BLOCK": 16 if D <= 16 or (F <= ONCE and dtype == torch.float32) else 32 if F > ONCE else 64,
        "num_warps": 8 if keys > 128 else 4,
        "num_stages": 2,
    }


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, H, F, D] or [B, J, H, F, D] -> [B, F], float32 (float64 for float64)."""
    if query.dim() == 4:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    B, P, H, F, D = query.shape
    precise = wide(query.dtype)
    score = query.new_empty((B, F), dtype=precise)
    config = scores_tile(F, D, query.dtype, has_tensor_memory(query.device))
    sizes = (P, H, F, D, *query.stride(), *key.stride(), scale)
    blocks = triton.cdiv(F, config["QUERIES"])
    once = config["KEYS"] >= F
    received = query.new_empty((B, P, H, blocks if once else 1, F), dtype=precise)
    if once:
        launch(received_once_kernel, (B * P * H * blocks,), query, key, received, *sizes, **config)
    else:
        level = query.new_empty((B, P, H, F), dtype=precise)
        launch(level_kernel, (B * P * H * blocks,), query, key, level, *sizes, **config)
        keys = triton.cdiv(F, config["KEYS"])
        launch(received_kernel, (B * P * H * keys,), query, key, level, received, *sizes, **config)
    rows = received.shape[1] * H * received.shape[3]
    launch(
        mean_kernel, (B * triton.cdiv(F, 16),), received, score, rows, F, P * H * F, ROWS=128, FRAMES=16, num_warps=4
    )  # fmt: skip
    return score


def prune_attention(query: Tensor, key: Tensor, num_tokens: int, keep: Tensor | None, scale: float) -> Tensor:
    return select_tokens(attention_scores(query, key, scale), num_tokens, keep, None)


implement("prune_attention", "triton", declare_custom("prune_attention_triton", function=prune_attention, **ATTENTION))
