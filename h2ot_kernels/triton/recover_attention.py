"""Recovery by cross-attention without stored weights, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import implement
from ..library import allocating, declare_custom, into_out
from ..recover_attention import BACKWARD, FORWARD, attention_gradient
from .common import divide, launch, modulo, narrow, number, product, wide, widen
from .distance import load_tokens


@triton.jit
def _logits(
    query, query_at, query_inside, query_c, key, key_at, key_inside, key_c, D, scale, like,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """scale q k^T of like's dtype; -inf at keys that are not inside."""
    total = tl.zeros([query_at.shape[0], key_at.shape[0]], like.dtype)
    for first in range(0, D, BLOCK):
        a = load_tokens(query, query_at, query_inside, first, query_c, D, BLOCK)
        b = load_tokens(key, key_at, key_inside, first, key_c, D, BLOCK)
        total = product(a, tl.trans(b), total)
    return tl.where(key_inside[None, :], total * number(scale, like.dtype), float("-inf"))


@triton.jit
def lowest(count: tl.constexpr, dtype: tl.constexpr):
    """[count] of the lowest number, below all logits but -inf: beside it a block of those weighs 0, beside -inf NaN."""
    if dtype == tl.float64:
        return tl.full([count], -1.7976931348623157e308, dtype)
    else:
        return tl.full([count], -3.4028234663852886e38, dtype)


@triton.jit
def attend(
    program, query, key, value,
    F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c, value_b, value_k, value_c, scale: tl.float64,
    FRAMES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """([FRAMES, BLOCK] of the result, its sample, frames, head and part of the head's channels): a program's share.

    WHOLE: D <= BLOCK, and the queries are loaded once. ONCE: K <= KEYS, and nothing is left of the loop.
    """
    parts = tl.cdiv(D, BLOCK)
    part = program % parts
    frames = tl.cdiv(F, FRAMES)
    frame = modulo(program // parts, frames) * FRAMES + tl.arange(0, FRAMES)
    head = program // parts // frames % H
    b = (program // parts // frames // H).to(tl.int64)
    query_at = b * query_b + frame.to(tl.int64) * query_f + head.to(tl.int64) * D * query_c
    like = widen(tl.zeros([1], value.dtype.element_ty))
    top = lowest(FRAMES, like.dtype)
    mass = tl.zeros([FRAMES], like.dtype)
    total = tl.zeros([FRAMES, BLOCK], like.dtype)
    if WHOLE:
        asked = load_tokens(query, query_at, frame < F, 0, query_c, D, BLOCK)
    for first in range(0, KEYS if ONCE else K, KEYS):
        kept = first + tl.arange(0, KEYS)
        key_at = b * key_b + kept.to(tl.int64) * key_k + head.to(tl.int64) * D * key_c
        value_at = b * value_b + kept.to(tl.int64) * value_k + head.to(tl.int64) * D * value_c
        if ONCE:  # with the keys: a loop has fewer registers, and brings the next block while it works on this one
            shown = load_tokens(value, value_at, kept < K, part * BLOCK, value_c, D, BLOCK)
        if WHOLE:
            known = load_tokens(key, key_at, kept < K, 0, key_c, D, BLOCK)
            logit = product(asked, tl.trans(known), tl.zeros([FRAMES, KEYS], like.dtype))
            logit = tl.where((kept < K)[None, :], logit * number(scale, like.dtype), float("-inf"))
        else:
            logit = _logits(query, query_at, frame < F, query_c, key, key_at, kept < K, key_c, D, scale, like, STEP)
        if not ONCE:
            shown = load_tokens(value, value_at, kept < K, part * BLOCK, value_c, D, BLOCK)
        higher = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp(logit - higher[:, None])
        shrink = tl.exp(top - higher)
        total = product(narrow(weight, shown.dtype), shown, total * shrink[:, None])
        mass = mass * shrink + tl.sum(weight, 1)
        top = higher
    share = divide(tl.full([FRAMES], 1.0, like.dtype), mass)
    return total * share[:, None], b, frame, head, part


# FLOPs: 4 B F K C (x 3 in float32), K as a multiple of KEYS. Bytes: query (shared: from L2), key, value once each per
# block of frames, out once. Floor: the larger of the bytes at the copy bandwidth and the FLOPs at the product rate.
@triton.jit
def attention_kernel(
    query, key, value, out,
    F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c, value_b, value_k, value_c, scale: tl.float64,
    FRAMES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """out [B, F, C]. One program: FRAMES queries of one head, BLOCK of its channels out."""
    total, b, frame, head, part = attend(
        tl.program_id(0), query, key, value, F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c,
        value_b, value_k, value_c, scale, FRAMES, KEYS, BLOCK, STEP, WHOLE, ONCE,
    )  # fmt: skip
    channel = part * BLOCK + tl.arange(0, BLOCK)
    at = ((b * F + frame) * H * D + head * D)[:, None] + channel[None, :]
    inside = (frame < F)[:, None] & (channel < D)[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty), inside)


# FLOPs: 4 B F K C. Bytes: query, key, value, grad once; 8 B H F written. Floor: as the forward pass.
@triton.jit
def statistics_kernel(
    query, key, value, grad, level, delta,
    F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c, value_b, value_k, value_c, grad_b, grad_f, grad_c,
    scale: tl.float64,
    FRAMES: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Per query [B, H, F]: level, the log of its softmax's denominator, and delta, the weighted mean of grad v^T."""
    frames = tl.cdiv(F, FRAMES)
    frame = modulo(tl.program_id(0), frames) * FRAMES + tl.arange(0, FRAMES)
    head = tl.program_id(0) // frames % H
    b = (tl.program_id(0) // frames // H).to(tl.int64)
    query_at = b * query_b + frame.to(tl.int64) * query_f + head.to(tl.int64) * D * query_c
    grad_at = b * grad_b + frame.to(tl.int64) * grad_f + head.to(tl.int64) * D * grad_c
    like = widen(tl.zeros([1], value.dtype.element_ty))
    top = lowest(FRAMES, like.dtype)
    mass = tl.zeros([FRAMES], like.dtype)
    mean = tl.zeros([FRAMES], like.dtype)
    for first in range(0, K, KEYS):
        kept = first + tl.arange(0, KEYS)
        key_at = b * key_b + kept.to(tl.int64) * key_k + head.to(tl.int64) * D * key_c
        value_at = b * value_b + kept.to(tl.int64) * value_k + head.to(tl.int64) * D * value_c
        logit = _logits(query, query_at, frame < F, query_c, key, key_at, kept < K, key_c, D, scale, like, STEP)
        gain = _logits(grad, grad_at, frame < F, grad_c, value, value_at, kept < K, value_c, D, 1.0, like, STEP)
        higher = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp(logit - higher[:, None])
        shrink = tl.exp(top - higher)
        mass = mass * shrink + tl.sum(weight, 1)
        mean = mean * shrink + tl.sum(tl.where((kept < K)[None, :], weight * gain, 0), 1)
        top = higher
    at = (b * H + head) * F + frame
    tl.store(level + at, top + tl.log(mass), frame < F)
    tl.store(delta + at, divide(mean, mass), frame < F)


# FLOPs: 8 B F K C. Bytes: query and grad once per block of keys, key and value once, both gradients once.
# Floor: as the forward pass.
@triton.jit
def key_gradient_kernel(
    query, key, value, grad, level, delta, grad_key, grad_value,
    F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c, value_b, value_k, value_c, grad_b, grad_f, grad_c,
    scale: tl.float64,
    FRAMES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value [B, K, C]: sums over the queries in ascending order, no atomics."""
    parts = tl.cdiv(D, BLOCK)
    part = tl.program_id(0) % parts
    keys = tl.cdiv(K, KEYS)
    kept = modulo(tl.program_id(0) // parts, keys) * KEYS + tl.arange(0, KEYS)
    head = tl.program_id(0) // parts // keys % H
    b = (tl.program_id(0) // parts // keys // H).to(tl.int64)
    key_at = b * key_b + kept.to(tl.int64) * key_k + head.to(tl.int64) * D * key_c
    value_at = b * value_b + kept.to(tl.int64) * value_k + head.to(tl.int64) * D * value_c
    like = widen(tl.zeros([1], value.dtype.element_ty))
    key_total = tl.zeros([KEYS, BLOCK], like.dtype)
    value_total = tl.zeros([KEYS, BLOCK], like.dtype)
    for first in range(0, F, FRAMES):
        frame = first + tl.arange(0, FRAMES)
        query_at = b * query_b + frame.to(tl.int64) * query_f + head.to(tl.int64) * D * query_c
        grad_at = b * grad_b + frame.to(tl.int64) * grad_f + head.to(tl.int64) * D * grad_c
        logit = _logits(query, query_at, frame < F, query_c, key, key_at, kept < K, key_c, D, scale, like, STEP)
        gain = _logits(grad, grad_at, frame < F, grad_c, value, value_at, kept < K, value_c, D, 1.0, like, STEP)
        at = (b * H + head) * F + frame
        both = (frame < F)[:, None] & (kept < K)[None, :]
        weight = tl.where(both, tl.exp(logit - tl.load(level + at, frame < F, 0)[:, None]), 0)
        own_delta = tl.load(delta + at, frame < F, 0)[:, None]
        slope = tl.where(both, weight * (gain - own_delta), 0) * number(scale, like.dtype)
        asked = load_tokens(query, query_at, frame < F, part * BLOCK, query_c, D, BLOCK)
        pulled = load_tokens(grad, grad_at, frame < F, part * BLOCK, grad_c, D, BLOCK)
        key_total = product(tl.trans(slope), widen(asked), key_total)
        value_total = product(tl.trans(weight), widen(pulled), value_total)
    channel = part * BLOCK + tl.arange(0, BLOCK)
    at = ((b * K + kept) * H * D + head * D)[:, None] + channel[None, :]
    inside = (kept < K)[:, None] & (channel < D)[None, :]
    tl.store(grad_key + at, narrow(key_total, grad_key.dtype.element_ty), inside)
    tl.store(grad_value + at, narrow(value_total, grad_value.dtype.element_ty), inside)


# FLOPs: 6 B F K C. Bytes: query, grad, key, value once, a partial sum of [F, C] per split. Floor: as the forward pass.
@triton.jit
def query_gradient_kernel(
    query, key, value, grad, level, delta, out,
    B, F, K, H, D, query_b, query_f, query_c, key_b, key_k, key_c, value_b, value_k, value_c, grad_b, grad_f, grad_c,
    scale: tl.float64, per_split,
    FRAMES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [B / per_split, F, C]: the gradient of the query summed over per_split samples each, in ascending order."""
    parts = tl.cdiv(D, BLOCK)
    part = tl.program_id(0) % parts
    frames = tl.cdiv(F, FRAMES)
    frame = modulo(tl.program_id(0) // parts, frames) * FRAMES + tl.arange(0, FRAMES)
    head = tl.program_id(0) // parts // frames % H
    split = (tl.program_id(0) // parts // frames // H).to(tl.int64)
    like = widen(tl.zeros([1], value.dtype.element_ty))
    total = tl.zeros([FRAMES, BLOCK], like.dtype)
    for i in range(per_split):
        b = split * per_split + i
        query_at = b * query_b + frame.to(tl.int64) * query_f + head.to(tl.int64) * D * query_c
        grad_at = b * grad_b + frame.to(tl.int64) * grad_f + head.to(tl.int64) * D * grad_c
        at = (b * H + head) * F + frame
        asked = frame < tl.where(b < B, F, 0)
        own_level = tl.load(level + at, asked, 0)
        own_delta = tl.load(delta + at, asked, 0)
        for first in range(0, K, KEYS):
            kept = first + tl.arange(0, KEYS)
            key_at = b * key_b + kept.to(tl.int64) * key_k + head.to(tl.int64) * D * key_c
            value_at = b * value_b + kept.to(tl.int64) * value_k + head.to(tl.int64) * D * value_c
            there = kept < tl.where(b < B, K, 0)
            logit = _logits(query, query_at, asked, query_c, key, key_at, there, key_c, D, scale, like, STEP)
            gain = _logits(grad, grad_at, asked, grad_c, value, value_at, there, value_c, D, 1.0, like, STEP)
            both = asked[:, None] & there[None, :]
            weight = tl.where(both, tl.exp(logit - own_level[:, None]), 0)
            slope = tl.where(both, weight * (gain - own_delta[:, None]), 0) * number(scale, like.dtype)
            shown = load_tokens(key, key_at, there, part * BLOCK, key_c, D, BLOCK)
            total = product(slope, widen(shown), total)
    channel = part * BLOCK + tl.arange(0, BLOCK)
    at = ((split * F + frame) * H * D + head * D)[:, None] + channel[None, :]
    inside = (frame < F)[:, None] & (channel < D)[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty), inside)


# Bytes: the partial sums once, the result once. Floor: those at the copy bandwidth.
@triton.jit
def sum_kernel(partial, out, size, count, BLOCK: tl.constexpr):
    """out [size]: the sum of count rows of partial, in ascending order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(partial + at, at < size, 0)
    for _ in range(1, count):
        partial += size
        total += tl.load(partial + at, at < size, 0)
    tl.store(out + at, narrow(total, out.dtype.element_ty), at < size)


def attention_tile(K: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Queries, keys and channels of one program, channels per step of the logits where D is more than that.

    >>> attention_tile(81, 64, torch.float32)
    {'FRAMES': 64, 'KEYS': 32, 'BLOCK': 64, 'STEP': 32, 'WHOLE': True, 'ONCE': False, 'num_warps': 4, 'num_stages': 2}
    """
    double, half = dtype == torch.float64, dtype not in (torch.float32, torch.float64)
    block = 16 if double or D <= 16 else 64
    keys = 16 if double else 32 if not half else 64 if K <= 64 or D > 64 else 128
    return {
        "FRAMES": 16 if double else 64,
        "KEYS": keys,
        "BLOCK": block,
        "STEP": min(block, 32),
        "WHOLE": block >= D,
        "ONCE": half and keys >= K and block >= D,
        "num_warps": 8 if double else 4,
        "num_stages": 2,
    }


def gradient_tile(K: int, D: int, double: bool) -> dict[str, int]:
    """The same of the gradients, whose programs hold two sums.

    >>> gradient_tile(81, 64, False)
    {'FRAMES': 32, 'KEYS': 64, 'BLOCK': 64, 'STEP': 32, 'num_warps': 8, 'num_stages': 2}
    """
    block = 16 if double or D <= 16 else 64
    return {
        "FRAMES": 16 if double else 32,
        "KEYS": 16 if double or K <= 16 else 64,
        "BLOCK": block,
        "STEP": min(block, 32),
        "num_warps": 8,
        "num_stages": 2,
    }


def query_strides(query: Tensor) -> tuple[int, int, int]:
    """Strides (sample, frame, channel) of a query [F, C], [1, F, C] or [B, F, C]."""
    shared = query.dim() == 2 or query.shape[0] == 1
    return (0 if shared else query.stride(0), query.stride(-2), query.stride(-1))


def recover_attention_out(query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float, out: Tensor) -> None:
    B, K, C = key.shape
    F, D = query.shape[-2], C // num_heads
    config = attention_tile(K, D, value.dtype)
    launch(
        attention_kernel,
        (B * num_heads * triton.cdiv(F, config["FRAMES"]) * triton.cdiv(D, config["BLOCK"]),),
        query, key, value, out, F, K, num_heads, D, *query_strides(query), *key.stride(), *value.stride(), scale,
        **config,
    )  # fmt: skip


recover_attention = allocating(FORWARD["fake"], recover_attention_out)


def recover_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, K, C = key.shape
    F, H, D = query.shape[-2], num_heads, C // num_heads
    precise = wide(value.dtype)
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    level, delta = (value.new_empty((B, H, F), dtype=precise) for _ in range(2))
    config = gradient_tile(K, D, value.dtype == torch.float64)
    sizes = (F, K, H, D, *query_strides(query), *key.stride(), *value.stride(), *grad.stride(), scale)
    both = {**config, "KEYS": min(config["KEYS"], 32)}  # two sums in registers
    frames, keys = triton.cdiv(F, config["FRAMES"]), triton.cdiv(K, both["KEYS"])
    whole = {name: size for name, size in config.items() if name != "BLOCK"}
    launch(statistics_kernel, (B * H * frames,), query, key, value, grad, level, delta, *sizes, **whole)
    launch(
        key_gradient_kernel,
        (B * H * keys * triton.cdiv(D, config["BLOCK"]),),
        query, key, value, grad, level, delta, grad_key, grad_value, *sizes,
        **both,
    )  # fmt: skip
    shared = query.numel() != B * F * C
    per_split = max(triton.cdiv(B, 16), 1) if shared else 1
    splits = max(triton.cdiv(B, per_split), 1)
    partial = value.new_empty((splits, F, C), dtype=precise) if shared else grad_query
    launch(
        query_gradient_kernel,
        ((splits if shared else B) * H * frames * triton.cdiv(D, config["BLOCK"]),),
        query, key, value, grad, level, delta, partial, B, *sizes, per_split,
        **config,
    )  # fmt: skip
    if shared:
        launch(sum_kernel, (triton.cdiv(F * C, 512),), partial, grad_query, F * C, splits, BLOCK=512, num_warps=4)
    return grad_query, grad_key, grad_value


_ops = torch.ops.h2ot_kernels
implement(
    "recover_attention",
    "triton",
    declare_custom(
        "recover_attention_triton",
        function=recover_attention,
        **FORWARD,
        backward=attention_gradient(lambda *args: _ops.recover_attention_backward_triton(*args)),
    ),
)
implement(
    "recover_attention_out",
    "triton",
    declare_custom("recover_attention_out_triton", function=recover_attention_out, **into_out(FORWARD)),
)
declare_custom("recover_attention_backward_triton", function=recover_attention_backward, **BACKWARD)
