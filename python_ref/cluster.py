"""Clusters around the kept tokens, and their means."""

import torch
from torch import Tensor

from .score import pool_joints, squared_distances, valid_tokens


def assign_clusters(x: Tensor, index: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """labels [B, N]: the position in index [B or 1, K] of each token's nearest selected token, the lowest on a tie.

    A selected token belongs to itself. Masked tokens, and tokens of a sample without a valid selected one, get -1.
    """
    tokens = pool_joints(x).double()
    valid = valid_tokens(tokens, mask)
    tokens = tokens.masked_fill(~valid[..., None], 0.0)
    B, N, C = tokens.shape
    index = index.expand(B, -1)
    centres = tokens.gather(1, index[..., None].expand(-1, -1, C))
    squared = squared_distances(tokens, centres)
    squared = squared.masked_fill(~valid.gather(1, index)[:, None, :], float("inf"))
    least = squared.amin(-1, keepdim=True)
    position = torch.arange(index.shape[1], device=x.device)
    labels = torch.where(squared == least, position, index.shape[1]).amin(-1)
    labels = labels.scatter(1, index, position.expand(B, -1))
    return labels.masked_fill(~valid | least[..., 0].isinf(), -1)


def merge_tokens(x: Tensor, labels: Tensor, num_clusters: int, weight: Tensor | None = None) -> Tensor:
    """[B, N, C] -> [B, K, C]: the (weighted) mean of each cluster's tokens; 0 where the weights sum to 0."""
    precision = torch.promote_types(x.dtype, torch.float32)
    member = labels[:, None, :] == torch.arange(num_clusters, device=x.device)[:, None]
    share = member.to(precision)
    if weight is not None:
        share = share * weight.reshape(x.shape[0], 1, x.shape[1]).to(precision)
    # A token outside every cluster must not reach the sum, whatever it holds.
    tokens = x.to(precision).masked_fill((labels < 0)[..., None], 0.0)
    total = share.sum(-1, keepdim=True)
    mean = (share @ tokens) / torch.where(total == 0, 1.0, total)
    return torch.where(total == 0, 0.0, mean).to(x.dtype)
