"""A layer of a graph, as MotionAGFormer has it: neighbours, sums over them, BatchNorm, activation, residual."""

import torch
from torch import Tensor


def similar_nodes(x: Tensor, neighbours: int) -> Tensor:
    """x [..., T, C] -> bool [..., T, T]: where the product of two nodes reaches the row's n-th largest.

    Products that are equal to it are neighbours, too; NaN counts as the largest and is nobody's neighbour.
    """
    similarity = x @ x.mT
    return similarity >= similarity.topk(neighbours, dim=-1).values[..., -1:]


def graph_update(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    residual: Tensor,
    scale: Tensor,
    adjacency: Tensor,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor, float],
) -> Tensor:
    """residual + scale * relu(x + batch_norm(D^(-1/2) A D^(-1/2) v + u)), D the rows' sums of A.

    x, u, v, residual: [..., T, C]; scale [C]; adjacency A: bool [..., T, T]; norm: weight, bias, mean and variance
    [T] and eps of a BatchNorm in eval mode with one feature per node.
    """
    root = adjacency.sum(-1, dtype=x.dtype) ** -0.5
    y = (adjacency * root[..., :, None] * root[..., None, :]) @ v + u
    weight, bias, mean, variance, eps = norm
    y = (y - mean[:, None]) / (variance[:, None] + eps).sqrt()
    y = y if weight is None else y * weight[:, None]
    y = y if bias is None else y + bias[:, None]
    return residual + scale * torch.relu(x + y)
