"""What follows the attention in `recover_pose`: head(norm(token + proj(attended))).

On the CPU a layer projects and an operator does the rest; in Triton one operator does both.
"""

import math

import torch
from torch import Tensor, nn

import python_ref

from .backend import dispatch, implement
from .library import declare
from .recover_rotated import recover_rotated, takes


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


def _tail_fake(token, projected, norm_weight, norm_bias, head_weight, head_bias, eps):
    return projected.new_empty(*projected.shape[:2], head_weight.shape[0])


def _projected_tail_fake(token, attended, proj_weight, proj_bias, norm_weight, norm_bias, head_weight, head_bias, eps):
    return attended.new_empty(*attended.shape[:2], head_weight.shape[0])


def _tail_flops(token, projected, norm_weight, norm_bias, head_weight, *rest) -> int:
    return 2 * math.prod(projected) * head_weight[0]


def projected_tail_flops(token, attended, proj_weight, proj_bias, norm_weight, norm_bias, head_weight, *rest) -> int:
    return 2 * math.prod(attended) * (proj_weight[0] + head_weight[0])


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
    "flops": projected_tail_flops,
}


_ops = torch.ops.h2ot_kernels
_plain_tail = with_rotated(project_first(declare("recover_tail", **TAIL)))
implement("recover_tail", "cpp", _plain_tail)
implement("recover_tail", "reference", project_first(python_ref.recover_tail))
