"""Clusters around the kept tokens, and their means."""

import torch
from torch import Tensor

from .score import metric_tokens, squared_distances, valid_tokens


def own_labels(index: Tensor, N: int) -> Tensor:
    """[B, N]: the position in index [B, K] of each selected token, -1 for the others; -1 in index is padding."""
    position = torch.arange(index.shape[1], device=index.device).expand_as(index)
    labels = index.new_full((index.shape[0], N + 1), -1)
    return labels.scatter(1, index.where(index >= 0, N), position)[:, :N]


def assign_clusters(
    x: Tensor,
    index: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    metric: str = "euclidean",
    parent: Tensor | None = None,
) -> Tensor:
    """labels [B, N]: the position in index [B or 1, K] of each token's nearest selected token, the lowest on a tie.

    parent [B, N]: instead the first selected token on the chain of parents from the token on.
    A selected token belongs to itself. Masked tokens, and tokens of a sample without a valid selected one (or whose
    chain meets none, or whose squared distances all overflow), get -1. Entries of index that are -1 select nothing.
    """
    tokens = metric_tokens(x, metric).double()
    valid = valid_tokens(tokens, mask, lengths)
    tokens = tokens.masked_fill(~valid[..., None], 0.0)
    B, N, C = tokens.shape
    index = index.expand(B, -1)
    own = own_labels(index, N).masked_fill(~valid, -1)
    if parent is not None:
        is_end = (own >= 0) | (parent < 0) | ~valid
        target = torch.where(is_end, torch.arange(N, device=x.device), parent)
        for _ in range(N.bit_length()):  # after t rounds 2^t steps up the chain
            target = target.gather(1, target)
        return own.gather(1, target).masked_fill(~valid, -1)
    if index.shape[1] == 0:
        return own
    at = index.clamp(min=0)
    centres = tokens.gather(1, at[..., None].expand(-1, -1, C))
    squared = squared_distances(tokens, centres)
    squared = squared.masked_fill(~(valid.gather(1, at) & (index >= 0))[:, None, :], float("inf"))
    least = squared.amin(-1, keepdim=True)
    position = torch.arange(index.shape[1], device=x.device)
    labels = torch.where(squared == least, position, index.shape[1]).amin(-1)
    labels = torch.where(own >= 0, own, labels)
    return labels.masked_fill(~valid | least[..., 0].isinf(), -1)


def sums(member: Tensor, value: Tensor) -> Tensor:
    """member [B, K, N] of 0 and 1, value [B, N, C] -> [B, K, C]: the sum over each cluster's own members.

    What is not finite takes part beside the product, where 0 times it would reach all clusters.
    """
    total = member @ torch.where(value.isfinite(), value, 0.0)
    for special in (float("inf"), float("-inf"), float("nan")):
        is_it = value.isnan() if special != special else value == special
        total = total + torch.where(member @ is_it.to(member.dtype) > 0, special, 0.0)
    return total


def merge_tokens(x: Tensor, labels: Tensor, num_clusters: int, weight: Tensor | None = None) -> Tensor:
    """[B, N, C] -> [B, K, C]: the (weighted) mean of each cluster's tokens; 0 where the weights sum to 0."""
    precision = torch.promote_types(x.dtype, torch.float32)
    member = (labels[:, None, :] == torch.arange(num_clusters, device=x.device)[:, None]).to(precision)
    outside = (labels < 0)[..., None]
    tokens = x.to(precision).masked_fill(outside, 0.0)
    if weight is None:
        weight = torch.ones_like(tokens[..., :1])
    else:
        weight = weight.reshape(outside.shape).to(precision).masked_fill(outside, 0.0)
        tokens = tokens * weight
    total = sums(member, weight)
    mean = sums(member, tokens) / torch.where(total == 0, 1.0, total)
    return torch.where(total == 0, 0.0, mean).to(x.dtype)
