"""A layer of a graph in one pass over memory, in CPU inference: neighbours, sums, BatchNorm, activation, residual.

Internal to MotionAGFormer.
"""

import torch
from torch import Tensor, nn

from .checks import FLOATS
from .inference import declare_for_inference, is_unseen, require_inference

MOST_NEIGHBOURS = 16


def graph_update(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    residual: Tensor,
    scale: Tensor,
    norm: nn.BatchNorm1d,
    dim: int,
    adjacency: Tensor | None,
    neighbours: int,
) -> Tensor:
    """residual + scale * relu(x + norm(D^(-1/2) A D^(-1/2) v + u)) where `takes` says so (python_ref/graph.py).

    x, u, v, residual: [..., T, ..., C] with the nodes on axis dim, D the degrees. adjacency: A as bool [T, T], or one
    for each line [..., T, T], or None: a node's neighbours are those whose product with it reaches the
    `neighbours`-th largest. In float32 (float64 for float64) throughout: products of two nodes are never rounded to 16
    bits. Time for neighbours by product: T^2 C multiply-adds a line. Memory for each thread: T (C + 32) numbers, and
    the lists.
    """
    require_inference("graph_update", x, u, v, residual, scale, norm.weight, norm.bias)
    vectors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return _op(x, u, v, residual, scale, adjacency, neighbours, *vectors, norm.eps, dim)


def takes(x: Tensor, others: tuple[Tensor, ...], norm: nn.Module, neighbours: int) -> bool:
    """Whether graph_update of x and others (u, v, residual, scale) gives what the definition gives, unseen.

    Hooks and a forward on the instance of norm are the caller's business (`watched.is_silent`).
    """
    if type(norm) is not nn.BatchNorm1d or norm.training or norm.running_mean is None:
        return False
    tensors = (x, *others, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if not is_unseen(*tensors):
        return False
    return x.dtype in FLOATS and neighbours <= MOST_NEIGHBOURS and all(t is None or t.dtype == x.dtype for t in tensors)


def _fake(x, u, v, residual, scale, adjacency, neighbours, weight, bias, mean, variance, eps, dim):
    return x.new_empty(x.shape)


def _flops(x, u, v, residual, scale, adjacency, neighbours, weight, bias, mean, variance, eps, dim):
    """The products of the definition: of the weights with v, and of the nodes where they say who is a neighbour."""
    return 2 * torch.Size(x).numel() * x[dim] * (1 if adjacency is not None else 2)


_op = declare_for_inference(
    "graph_update",
    "(Tensor x, Tensor u, Tensor v, Tensor residual, Tensor scale, Tensor? adjacency, int neighbours, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor mean, Tensor variance, float eps, int dim) -> Tensor",
    _fake,
    flops=_flops,
)
