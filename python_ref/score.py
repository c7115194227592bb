"""Density-peak scoring (DPC-kNN): how dense each token is and how far the next denser one."""

from typing import NamedTuple

import torch
from torch import Tensor

GAUSSIAN_STEPS = 2.0**40  # terms of the Gaussian density are multiples of 1 / GAUSSIAN_STEPS


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


def unit_tokens(tokens: Tensor) -> Tensor:
    """Tokens over their Euclidean norm, in float64 and rounded once to their dtype; a token of zeros stays so."""
    wide = tokens.double()
    most = wide.abs().amax(-1, keepdim=True)
    wide = wide / most.where(most > 0, 1.0)  # norms neither overflow nor underflow
    norm = wide.square().sum(-1, keepdim=True).sqrt()
    return (wide / norm.where(norm > 0, 1.0)).to(tokens.dtype)


def metric_tokens(x: Tensor, metric: str) -> Tensor:
    """The tokens between which distances are Euclidean: `pool_joints(x)`, for "cosine" at unit length."""
    return unit_tokens(pool_joints(x).contiguous()) if metric == "cosine" else pool_joints(x)


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
    metric: str = "euclidean",
    exclude_self: bool = False,
    scale: float | None = None,
    density: str = "knn",
    cutoff: float | None = None,
) -> TokenScores:
    """SPEC section 1 in float64, over the tokens of `metric_tokens(x, metric)`; d = |x_i - x_j| / scale.

    density "knn": exp(-m), m the mean d^2 to the k nearest tokens. "gaussian": the sum of exp(-(d / cutoff)^2) over all
    tokens, each term rounded to a multiple of 2^-40: the sum is then exact, in any order.
    exclude_self: the token itself is not among them.
    """
    tokens = metric_tokens(x, metric).double()
    valid = valid_tokens(tokens, mask, lengths)
    tokens = tokens.masked_fill(~valid[..., None], 0.0)
    B, N, C = tokens.shape
    position = torch.arange(N, device=x.device)
    pair = valid[:, :, None] & valid[:, None, :]
    squared = squared_distances(tokens, tokens)
    area = C if scale is None else scale * scale
    near = pair & (position[None, :] != position[:, None]) if exclude_self else pair

    if density == "gaussian":
        terms = torch.exp(-squared / (area * cutoff * cutoff)).mul(GAUSSIAN_STEPS).round().masked_fill(~near, 0.0)
        rho = terms.to(torch.int64).sum(-1).double() / GAUSSIAN_STEPS
        key, log_rho = -rho, rho.log()
    else:
        # m_i: mean of the k smallest d^2, added in ascending order and divided once.
        nearest = squared.masked_fill(~near, float("inf")).sort(-1).values[..., :k]
        count = (valid.sum(-1, keepdim=True) - int(exclude_self)).clamp(0, k)
        total = torch.zeros_like(nearest[..., 0])
        for rank in range(nearest.shape[-1]):
            total = total + torch.where(rank < count, nearest[..., rank], 0.0)
        m = total / (count.clamp(min=1).double() * area)
        key, rho, log_rho = m, torch.exp(-m), -m

    return rank_tokens(squared, key, rho, log_rho, valid, noise, area)


def rank_tokens(
    squared: Tensor, key: Tensor, rho: Tensor, log_rho: Tensor, valid: Tensor, noise: Tensor | None, area: float
) -> TokenScores:
    """Distances to denser tokens, scores and parents from densities rho [B, N] and squared distances [B, N, N].

    key orders the densities, the densest first; with noise, rho + noise does. area: the square of the scale of d.
    """
    position = torch.arange(key.shape[1], device=key.device)
    pair = valid[:, :, None] & valid[:, None, :]
    if noise is None:
        earlier = position[None, :] < position[:, None]
        denser = (key[:, None, :] < key[:, :, None]) | ((key[:, None, :] == key[:, :, None]) & earlier)
    else:
        rho = rho + noise
        denser = rho[:, None, :] > rho[:, :, None]
    denser = denser & pair

    # delta_i: the nearest denser token; for a token with none, the largest distance of its sample.
    to_denser = squared.masked_fill(~denser, float("inf"))
    least = to_denser.amin(-1)
    is_peak = valid & ~denser.any(-1)
    parent = torch.where(to_denser == least[..., None], position, key.shape[1]).amin(-1)
    largest = squared.masked_fill(~pair, 0.0).amax((-2, -1))
    distance = torch.where(is_peak, largest[:, None], least).div(area).sqrt()

    if noise is None:
        score = (distance.log() + log_rho).masked_fill(is_peak, float("inf"))
    else:
        score = rho * distance
    return TokenScores(
        rho.masked_fill(~valid, 0.0),
        distance.masked_fill(~valid, 0.0),
        score.masked_fill(~valid, float("-inf")),
        parent.masked_fill(~valid | is_peak, -1),
    )
