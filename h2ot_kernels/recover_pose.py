"""Recovery by cross-attention with the rest of HoT's end: query, key and value before it, the poses after it."""

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import checks
from .backend import dispatch, is_reference
from .linear import Linear
from .recover_attention import attention_arguments, attention_flops
from .recover_tail import projected_tail_flops
from .watched import is_silent

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
    argument. Cost: 4 B J F K C + 2 B J F C^2 FLOPs. Source: HoT section 3.3; `python_ref.recover_pose`.

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
    checks.integer("num_joints", num_joints, 1)
    checks.tensor("key", key, (3,), "[B * J, K, C]")
    if key.shape[0] % num_joints:
        raise ValueError(f"num_joints: got {num_joints}, wanted a divisor of key's first axis, {key.shape[0]}")
    arguments = attention_arguments(query, key, value, num_heads)
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
    inputs = query, key, value, *given
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise RuntimeError("recover_pose is for inference: call it under torch.no_grad() or torch.inference_mode()")
    if not is_reference(backend):
        checks.no_tangent("recover_pose", *inputs)
    attend, tail = dispatch("recover_attention", value, backend), dispatch("recover_tail", value, backend)
    token = token.reshape(F, C)
    together = getattr(tail, "pose", None)
    pose = together and together(token, *arguments, proj, *vectors, norm.eps)
    if pose is None:
        pose = tail(token, attend(*arguments), proj, *vectors, norm.eps)
    return pose.unflatten(0, (key.shape[0] // num_joints, num_joints))


def project(token: Tensor, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value) of token [..., C] and x [B, K, C] by their three layers.

    By one operator, where the backend that does the tail has one, in float32 inference by plain linear layers.
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


def _pose_fake(token, query, key, value, num_heads, scale, proj_weight, proj_bias, norm_weight, norm_bias, head, *rest):
    return value.new_empty(value.shape[0], query.shape[-2], head.shape[0])


def _project_fake(token, x, *parameters):
    return token.new_empty(token.shape), x.new_empty(x.shape[0], 2 * x.shape[1])


def _pose_flops(token, query, key, value, num_heads, scale, *tail) -> int:
    attended = value[0], query[-2], value[2]
    return attention_flops(query, key, value) + projected_tail_flops(token, attended, *tail)


def _project_flops(token, x, weight, *rest) -> int:
    return 2 * (math.prod(token) + 2 * math.prod(x)) * weight[0]


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
