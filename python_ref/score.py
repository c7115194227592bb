"""Density-peak scoring (DPC-kNN): how dense each token is and how far the next denser one."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenScores(NamedTuple):
    """Per token [B, N]: density, distance (delta) and score in float64, parent in int64 (-1: no denser token)."""

    density: Tensor
    distance: Tensor
    score: Tensor
    parent: Tensor


def pool_joints(x: Tensor) -> Tensor:
    """Tokens of x [B, N, C] (itself) or [B, F, J, C] (the mean over J), in float32, or float64 for float64.

    The joints are added one after the other and the sum divided once: this order defines the last bit.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.dim() == 3:
        return x
    total = x[:, :, 0]
    for joint in range(1, x.shape[2]):
        total = total + x[:, :, joint]
    return total / x.shape[2]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Sums of squared differences over C, [B, N, C] and [B, M, C] -> [B, N, M], row by row and by direct difference."""
    rows = [(row.unsqueeze(1) - y).square().sum(-1) for row in x.unbind(1)]
    return torch.stack(rows, 1) if rows else x.new_empty(x.shape[0], 0, y.shape[1])


def valid_tokens(tokens: Tensor, mask: Tensor | None, lengths: Tensor | None = None) -> Tensor:
    """[B, N] bool: inside mask and lengths, and finite in every channel."""
    valid = tokens.isfinite().all(-1)
    if mask is not None:
        valid = valid & mask
    if lengths is not None:
        valid = valid & (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])
    return valid


def score_tokens(
    x: Tensor,
    k: int = 2,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    noise: Tensor | None = None,
) -> TokenScores:
    """SPEC section 1 in float64, over the tokens of `pool_joints(x)`."""
    tokens = pool_joints(x).double()
    valid = valid_tokens(tokens, mask, lengths)
    tokens = tokens.masked_fill(~valid[..., None], 0.0)
    B, N, C = tokens.shape
    position = torch.arange(N, device=x.device)
    pair = valid[:, :, None] & valid[:, None, :]
    squared = squared_distances(tokens, tokens)

    # m_i: mean of the k smallest d^2, the token itself included, added in ascending order and divided once.
    nearest = squared.masked_fill(~pair, float("inf")).sort(-1).values[..., :k]
    count = valid.sum(-1, keepdim=True).clamp(1, k)
    total = torch.zeros_like(nearest[..., 0])
    for rank in range(nearest.shape[-1]):
        total = total + torch.where(rank < count, nearest[..., rank], 0.0)
    m = total / (count * C)

    density = torch.exp(-m)
    if noise is None:
        earlier = position[None, :] < position[:, None]
        denser = (m[:, None, :] < m[:, :, None]) | ((m[:, None, :] == m[:, :, None]) & earlier)
    else:
        density = density + noise
        denser = density[:, None, :] > density[:, :, None]
    denser = denser & pair

    # delta_i: the nearest denser token; for a token with none, the largest distance of its sample.
    to_denser = squared.masked_fill(~denser, float("inf"))
    least = to_denser.amin(-1)
    is_peak = valid & ~denser.any(-1)
    parent = torch.where(to_denser == least[..., None], position, N).amin(-1)
    largest = squared.masked_fill(~pair, 0.0).amax((-2, -1))
    distance = torch.where(is_peak, largest[:, None], least).div(C).sqrt()

    if noise is None:
        score = (distance.log() - m).masked_fill(is_peak, float("inf"))
    else:
        score = density * distance
    return TokenScores(
        density.masked_fill(~valid, 0.0),
        distance.masked_fill(~valid, 0.0),
        score.masked_fill(~valid, float("-inf")),
        parent.masked_fill(~valid | is_peak, -1),
    )
