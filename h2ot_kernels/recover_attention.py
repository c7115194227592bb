"""Recovery by cross-attention (TRA): every frame asks the kept ones."""

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

import python_ref

from . import checks
from .backend import copying, dispatch, implement, is_reference, write
from .library import declare, into_out, no_second_order
from .linear import Linear
from .recover_rotated import recover_rotated, takes
from .watched import is_silent


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
    arguments = _checked(query, key, value, num_heads, scale, out, backend)
    if out is None:
        return dispatch("recover_attention", value, backend)(*arguments)
    checks.out(out, (key.shape[0], query.shape[-2], key.shape[2]), value=value, key=key, query=query)
    return write("recover_attention", value, backend, arguments, out)


def _checked(query, key, value, num_heads, scale, out, backend) -> tuple[Tensor, Tensor, Tensor, int, float]:
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
    if not is_reference(backend):
        checks.no_tangent("recover_attention", query, key, value, out)
    scale = checks.scale(scale, C // num_heads)
    return query, key, value, num_heads, scale


_TAIL_INPUTS = ("token", "proj.weight", "proj.bias", "norm.weight", "norm.bias", "head.weight", "head.bias")


def recover_pose(
    token: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj: nn.Linear,
    norm: nn.LayerNorm,
    head: nn.Linear,
    num_heads: int,
    *,
    num_joints: int = 17,
    backend: str | None = None,
) -> Tensor:
    """The fused inference tail of HoT: pose = head(norm(token + proj(recover_attention(query, key, value)))).

    Dtypes as in `recover_attention`.
    token: [F, C] or [1, F, C], the recovery token; query: the same, projected; key, value: [B * J, K, C] with
    J = num_joints; num_heads = H divides C; proj: Linear(C, C); norm: LayerNorm(C); head: Linear(C, 3).
    [B, J, F, C] is never written after the projection; in Triton, which projects in one kernel with the norm and the
    head, not after the attention. On a CPU a `linear.Linear` in eval mode keeps the triangle of its weight's QR
    decomposition for this: half the projection, and no [B, J, F, C] at all (C^3 multiply-adds at the first call; not in
    float64; in 16 bits with AVX512-BF16, or where the CPU has no product of them). Of norm and head (in Triton of proj,
    too) only the parameters count, cast to key's dtype.
    Returns [B, J, F, 3] of key's dtype, or of autocast's where that is on for proj; the norm and the head are summed in
    float32 (float64 for float64).
    Inference only: raises RuntimeError where a gradient would be needed. Raises TypeError or ValueError that name the
    argument. Cost: 4 B J F K C + 2 B J F C^2 FLOPs. Source: HoT section 3.3; `python_ref.recover_attention`.

    >>> import torch, h2ot_kernels as h2ot
    >>> from torch import nn
    >>> token, kept = torch.zeros(9, 8), torch.randn(2 * 17, 3, 8)
    >>> with torch.no_grad():
    ...     pose = h2ot.recover_pose(token, token, kept, kept, nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3), 2)
    >>> pose.shape
    torch.Size([2, 17, 9, 3])
    """
    for name, module, kind in (("proj", proj, nn.Linear), ("norm", norm, nn.LayerNorm), ("head", head, nn.Linear)):
        if not isinstance(module, kind):
            raise TypeError(f"{name}: got {type(module).__name__}, wanted {kind.__name__}")
    vectors = norm.weight, norm.bias, head.weight, head.bias
    given = token, proj.weight, proj.bias, *vectors
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, *given)):
        raise RuntimeError("recover_pose is for inference: call it under torch.no_grad() or torch.inference_mode()")
    if not is_reference(backend):
        checks.no_tangent("recover_pose", *given)
    checks.integer("num_joints", num_joints, 1)
    checks.tensor("key", key, (3,), "[B * J, K, C]")
    if key.shape[0] % num_joints:
        raise ValueError(f"num_joints: got {num_joints}, wanted a divisor of key's first axis, {key.shape[0]}")
    arguments = _checked(query, key, value, num_heads, None, None, backend)
    attend = dispatch("recover_attention", value, backend)
    F, C = query.shape[-2], key.shape[2]
    checks.tensor("token", token, (2, 3), "[F, C] or [1, F, C]")
    checks.has_shape("token", token, (1, F, C)[3 - token.dim() :], "that of query")
    if proj.in_features != C or proj.out_features != C:
        raise ValueError(f"proj: got {proj.in_features} to {proj.out_features} features, wanted C = {C} to {C}")
    if head.in_features != C:
        raise ValueError(f"head.in_features: got {head.in_features}, wanted C = {C}")
    if tuple(norm.normalized_shape) != (C,):
        raise ValueError(f"norm.normalized_shape: got {tuple(norm.normalized_shape)}, wanted ({C},)")
    device = key.device
    for name, x in zip(_TAIL_INPUTS, given, strict=True):
        if x is not None and x.device != device:
            checks.same_device(name, x, "key", key)
    if proj.weight.dtype != key.dtype and not torch.is_autocast_enabled(key.device.type):
        checks.same_dtype("proj.weight", proj.weight, "key", key)
    token, tail = token.reshape(F, C), dispatch("recover_tail", value, backend)
    together = getattr(tail, "pose", None)
    pose = together and together(token, *arguments, proj, *vectors, norm.eps)
    if pose is None:
        pose = tail(token, attend(*arguments), proj, *vectors, norm.eps)
    return pose.unflatten(0, (key.shape[0] // num_joints, num_joints))


def _cast(dtype: torch.dtype, *given: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype) for x in given]


def project_first(tail):
    """What runs as "recover_tail": the projection as the module `proj` does it, then the operator `tail`."""

    def run(token: Tensor, attended: Tensor, proj: nn.Linear, *rest) -> Tensor:
        projected, (*vectors, eps) = proj(attended), rest
        token, *vectors = _cast(projected.dtype, token, *vectors)
        return tail(token, projected, *vectors, eps)

    return run


def with_rotated(tail):
    """tail, with its attention in one call, in rotated channels, where that is possible."""

    def pose(token: Tensor, query: Tensor, key: Tensor, value: Tensor, num_heads, scale, proj, *rest) -> Tensor | None:
        *vectors, _ = rest
        if not takes((token, query, key, value), proj, *vectors):
            return None
        return recover_rotated(token, query, key, value, num_heads, scale, proj, *rest)

    tail.pose = pose
    return tail


def has_plain_tail(x: Tensor) -> bool:
    """Whether what runs for x is a kernel of the tail after the projection, as `norm_and_head` calls it."""
    return dispatch("recover_tail", x, None) is _plain_tail


def norm_and_head(x: Tensor, *vectors: Tensor | None, eps: float) -> Tensor:
    """head(norm(x)) by the tail's kernel, whose token is zero: x [..., C] of any strides -> [..., M] contiguous.

    vectors: as the tail takes them, of x's dtype. x is read in the order of its memory: a permuted view is not copied.
    """
    C = x.shape[-1]
    axes = range(x.dim() - 1)
    order = sorted(axes, key=x.stride, reverse=True)
    rows = x.permute(*order, -1)
    out = _ops.recover_tail(x.new_zeros(1, C), rows.reshape(-1, 1, C), *vectors, eps)
    return out.reshape(*rows.shape[:-1], out.shape[-1]).movedim(list(axes), order).contiguous()


def project_inside(tail, project, pose):
    """The same of an operator `tail` that projects, too.

    project: an operator that makes query, key and value; pose: one of float32 for attention and tail together.
    """

    def run(token: Tensor, attended: Tensor, proj: nn.Linear, *rest) -> Tensor:
        *vectors, eps = rest
        token, *vectors = _cast(attended.dtype, token, proj.weight, proj.bias, *vectors)
        return tail(token, attended, *vectors, eps)

    def attend_first(token: Tensor, query: Tensor, key: Tensor, value: Tensor, num_heads, scale, proj, *rest):
        if value.dtype != torch.float32:
            return None
        *vectors, eps = rest
        token, *vectors = _cast(value.dtype, token, proj.weight, proj.bias, *vectors)
        return pose(token, query, key, value, num_heads, scale, *vectors, eps)

    run.project, run.pose = project, attend_first
    return run


def project(token: Tensor, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value) of token [..., C] and x [B, K, C] by their three layers.

    In one launch, where the backend that does the tail has one, in float32 inference by plain linear layers.
    """
    together = getattr(dispatch("recover_tail", x, None), "project", None)
    if together is None or not _fits_together(token, x, layers):
        query, key, value = layers
        return query(token), key(x), value(x)
    C = x.shape[-1]
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    query, both = together(token.reshape(-1, C), x.reshape(-1, C), *parameters)
    return query.view(token.shape), *both.view(*x.shape[:-1], 2 * C).split(C, -1)


def _fits_together(token: Tensor, x: Tensor, layers: tuple[nn.Linear, ...]) -> bool:
    C, tensors = x.shape[-1], (token, *(p for layer in layers for p in (layer.weight, layer.bias) if p is not None))
    return (
        not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled(x.device.type)
        # One product of TF32 is as fast as three of float16. What cuBLAS goes by: allow_tf32 raises once it was set so.
        and torch.backends.cuda.matmul.fp32_precision != "tf32"
        and all(t.dtype == x.dtype and t.device == x.device and t.layout is torch.strided for t in tensors)
        and all(type(layer) in (nn.Linear, Linear) and layer.weight.shape == (C, C) for layer in layers)
        and is_silent(*layers)
        and token.shape[-1] == C
        and min(token.numel(), x.numel()) > 0
        and forward_ad._current_level < 0
    )


def _project_fake(token, x, *parameters):
    return token.new_empty(token.shape), x.new_empty(x.shape[0], 2 * x.shape[1])


def _project_flops(token, x, weight, *rest) -> int:
    return 2 * (math.prod(token) + 2 * math.prod(x)) * weight[0]


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


def _tail_fake(token, projected, norm_weight, norm_bias, head_weight, head_bias, eps):
    return projected.new_empty(*projected.shape[:2], head_weight.shape[0])


def _projected_tail_fake(token, attended, proj_weight, proj_bias, norm_weight, norm_bias, head_weight, head_bias, eps):
    return attended.new_empty(*attended.shape[:2], head_weight.shape[0])


def _pose_fake(token, query, key, value, num_heads, scale, proj_weight, proj_bias, norm_weight, norm_bias, head, *rest):
    return value.new_empty(value.shape[0], query.shape[-2], head.shape[0])


def _forward_flops(query, key, value, *rest) -> int:
    return 4 * math.prod(value) * query[-2]


def _backward_flops(grad, query, key, value, *rest) -> int:
    """The weights again, then the gradients of the weights, of value, query and key: five products."""
    return 10 * math.prod(value) * query[-2]


def _tail_flops(token, projected, norm_weight, norm_bias, head_weight, *rest) -> int:
    return 2 * math.prod(projected) * head_weight[0]


def _projected_tail_flops(token, attended, proj_weight, proj_bias, norm_weight, norm_bias, head_weight, *rest) -> int:
    return 2 * math.prod(attended) * (proj_weight[0] + head_weight[0])


def _pose_flops(token, query, key, value, num_heads, scale, *tail) -> int:
    attended = value[0], query[-2], value[2]
    return _forward_flops(query, key, value) + _projected_tail_flops(token, attended, *tail)


FORWARD = {
    "schema": "(Tensor query, Tensor key, Tensor value, int num_heads, float scale) -> Tensor",
    "fake": _fake,
    "setup_context": _setup,
    "flops": _forward_flops,
}
BACKWARD = {
    "schema": "(Tensor grad, Tensor query, Tensor key, Tensor value, int num_heads, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    "fake": _backward_fake,
    "backward": no_second_order("recover_attention"),
    "flops": _backward_flops,
}
TAIL = {
    "schema": "(Tensor token, Tensor projected, Tensor? norm_weight, Tensor? norm_bias, Tensor head_weight, "
    "Tensor? head_bias, float eps) -> Tensor",
    "fake": _tail_fake,
    "flops": _tail_flops,
}

PROJECTED_TAIL = {
    "schema": "(Tensor token, Tensor attended, Tensor proj_weight, Tensor? proj_bias, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor head_weight, Tensor? head_bias, float eps) -> Tensor",
    "fake": _projected_tail_fake,
    "flops": _projected_tail_flops,
}
POSE = {
    "schema": "(Tensor token, Tensor query, Tensor key, Tensor value, int num_heads, float scale, Tensor proj_weight, "
    "Tensor? proj_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor head_weight, Tensor? head_bias, float eps) "
    "-> Tensor",
    "fake": _pose_fake,
    "flops": _pose_flops,
}
PROJECT = {
    "schema": "(Tensor token, Tensor x, Tensor query_weight, Tensor? query_bias, Tensor key_weight, Tensor? key_bias, "
    "Tensor value_weight, Tensor? value_bias) -> (Tensor, Tensor)",
    "fake": _project_fake,
    "flops": _project_flops,
}


def _reference(query, key, value, num_heads, scale):
    return python_ref.recover_attention(query, key, value, num_heads, scale=scale)


def reference_tail(token, projected, norm_weight, norm_bias, head_weight, head_bias, eps):
    normed = functional.layer_norm(token + projected, token.shape[-1:], norm_weight, norm_bias, eps)
    return functional.linear(normed, head_weight, head_bias)


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
_plain_tail = with_rotated(project_first(declare("recover_tail", **TAIL)))
implement("recover_tail", "cpp", _plain_tail)
implement("recover_tail", "reference", project_first(reference_tail))
