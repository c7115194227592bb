"""Recovery by cross-attention (TRA): every frame asks the kept ones."""

import math

import torch
from torch import Tensor

import python_ref

from . import checks
from .backend import copying, dispatch, implement, is_reference, write
from .library import declare, into_out, no_second_order


def recover_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out = softmax(Q K^T scale) V per head, heads side by side on C; without storing the weights.

    query: [F, C] or [1, F, C] (shared by every sample and joint: the recovery token, projected once), or [B, F, C].
    key, value: [B, K, C], projected; B is the batch times the joints. All float32, float64, bfloat16 or float16.
    num_heads = H divides C. scale: default (C / H) ** -0.5.
    out: [B, F, C] of value's dtype, contiguous, apart from the inputs: takes the result and is returned, no gradients.
    Returns [B, F, C], accumulated in float32 (float64 for float64). Gradients to query, key and value, first order
    (a second derivative raises; backend="reference" has one).
    Raises TypeError or ValueError that name the argument. Cost: 4 B F K C FLOPs.
    Source: HoT section 3.3; `python_ref.recover_attention`.

    >>> import torch, h2ot_kernels as h2ot
    >>> value = torch.tensor([[[1.0], [3.0]]])
    >>> h2ot.recover_attention(torch.zeros(3, 1), torch.zeros(1, 2, 1), value, num_heads=1)
    tensor([[[2.],
             [2.],
             [2.]]])
    """
    arguments = attention_arguments(query, key, value, num_heads, scale)
    if not is_reference(backend):
        checks.no_tangent("recover_attention", query, key, value, out)
    if out is None:
        return dispatch("recover_attention", value, backend)(*arguments)
    checks.out(out, (key.shape[0], query.shape[-2], key.shape[2]), value=value, key=key, query=query)
    return write("recover_attention", value, backend, arguments, out)


def attention_arguments(query, key, value, num_heads, scale=None) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """What the operators take, or an error."""
    checks.tensor("key", key, (3,), "[B, K, C]")
    B, K, C = key.shape
    checks.tensor("value", value, (3,), "[B, K, C]")
    checks.has_shape("value", value, key.shape, "the shape of key")
    checks.tensor("query", query, (2, 3), "[F, C], [1, F, C] or [B, F, C]")
    for name, x in (("query", query), ("value", value)):
        checks.same_dtype(name, x, "key", key)
        checks.same_device(name, x, "key", key)
    if query.shape[-1] != C or (query.dim() == 3 and query.shape[0] not in (1, B)):
        raise ValueError(f"query: got shape {checks.shape(query)}, wanted [F, {C}], [1, F, {C}] or [{B}, F, {C}]")
    if 0 in (K, C, query.shape[-2]):
        raise ValueError(f"key: got shape {checks.shape(key)}, wanted at least one frame, kept frame and channel")
    checks.integer("num_heads", num_heads, 1, C, "the number of channels")
    if C % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, wanted a divisor of C = {C}")
    scale = checks.scale(scale, C // num_heads)
    return query, key, value, num_heads, scale


def _fake(query, key, value, num_heads, scale):
    return value.new_empty(value.shape[0], query.shape[-2], value.shape[2])


def _setup(ctx, inputs, output):
    query, key, value, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(query, key, value)


def attention_gradient(op):
    """The gradient of a recovery operator, by the operator `op` that makes all three."""

    def backward(ctx, grad):
        return *op(grad, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None

    return backward


def _backward_fake(grad, query, key, value, num_heads, scale):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def attention_flops(query, key, value, *rest) -> int:
    return 4 * math.prod(value) * query[-2]


def _backward_flops(grad, query, key, value, *rest) -> int:
    """The weights again, then the gradients of the weights, of value, query and key: five products."""
    return 10 * math.prod(value) * query[-2]


FORWARD = {
    "schema": "(Tensor query, Tensor key, Tensor value, int num_heads, float scale) -> Tensor",
    "fake": _fake,
    "setup_context": _setup,
    "flops": attention_flops,
}
BACKWARD = {
    "schema": "(Tensor grad, Tensor query, Tensor key, Tensor value, int num_heads, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    "fake": _backward_fake,
    "backward": no_second_order("recover_attention"),
    "flops": _backward_flops,
}


def _reference(query, key, value, num_heads, scale):
    return python_ref.recover_attention(query, key, value, num_heads, scale=scale)


_ops = torch.ops.h2ot_kernels
implement(
    "recover_attention",
    "cpp",
    declare(
        "recover_attention",
        **FORWARD,
        backward=attention_gradient(lambda *args: _ops.recover_attention_backward(*args)),
    ),
)
declare("recover_attention_backward", **BACKWARD)
implement("recover_attention", "reference", _reference)
implement("recover_attention_out", "cpp", declare("recover_attention_out", **into_out(FORWARD)))
implement("recover_attention_out", "reference", copying(_reference))
