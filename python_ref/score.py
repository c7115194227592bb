"""Density-peak scoring (DPC-kNN): how dense each token is and how far the next denser one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GAUSSIAN_STEPS = 2.0**40  # terms of the Gaussian density are multiples of 1 / GAUSSIAN_STEPS
# Sizes of temporaries, which change no bit: elements that stay in a CPU's cache, elements on a GPU, where each step is
# a launch, and pairs of tokens that are ranked at once.
IN_CACHE, ON_A_GPU, PAIRS = 1 << 16, 1 << 26, 1 << 22


class TokenScores(NamedTuple):
    """Per token [B, N]: density, distance (delta) and score in float64, parent in int64 (-1: no denser token)."""

    density: Tensor
    distance: Tensor
    score: Tensor
    parent: Tensor


def pool_joints(x: Tensor) -> Tensor:
    """Tokens of x [B, N, C] (itself) or [B, F, J, C] (the mean over J), in float32, or float64 for float64.

    The joints are added one after the other and the sum divided once: this order defines the last bit. (By a tensor: by
    a number PyTorch divides on a GPU as it multiplies by its reciprocal, one bit off for 5 joints.)
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.dim() == 3:
        return x
    total = x[:, :, 0]
    for joint in range(1, x.shape[2]):
        total = total + x[:, :, joint]
    return total / total.new_full((), x.shape[2])


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
    """Sums of squared differences over C, [B, N, C] and [B, M, C] -> [B, N, M], row by row and by direct difference.

    Without a gradient, like everything that is made of them.
    """
    x, y = x.detach(), y.detach()
    B, M, C = y.shape
    squared = x.new_empty(B, x.shape[1], M)
    columns = max((ON_A_GPU if y.is_cuda else IN_CACHE) // max(B * C, 1), 1)
    for part, to in zip(y.split(columns, 1), squared.split(columns, 2), strict=True):
        for i, row in enumerate(x.unbind(1)):
            to[:, i] = (row.unsqueeze(1) - part).square().sum(-1)
    return squared


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
    """Density-peak scores in float64, over the tokens of `metric_tokens(x, metric)`; d = |x_i - x_j| / scale.

    density "knn": exp(-m), m the mean d^2 to the k nearest tokens. "gaussian": the sum of exp(-(d / cutoff)^2) over all
    tokens, each term rounded to a multiple of 2^-40: the sum is then exact, in any order.
    exclude_self: the token itself is not among them.
    """
    tokens = metric_tokens(x, metric).double()
    valid = valid_tokens(tokens, mask, lengths)
    tokens = tokens.masked_fill(~valid[..., None], 0.0)
    B, N, C = tokens.shape
    position = torch.arange(N, device=x.device)
    squared = squared_distances(tokens, tokens)
    area = C if scale is None else scale * scale
    rows = max(PAIRS // max(B * N, 1), 1)
    blocks = [slice(start, start + rows) for start in range(0, max(N, 1), rows)]

    def near(block: slice) -> Tensor:
        """[B, rows, N]: which tokens each token of the block counts in its density."""
        pair = valid[:, block, None] & valid[:, None, :]
        return pair & (position != position[block, None]) if exclude_self else pair

    if density == "gaussian":
        terms = (
            torch.exp(-squared[:, block] / (area * cutoff * cutoff))
            .mul(GAUSSIAN_STEPS)
            .round()
            .masked_fill(~near(block), 0.0)
            for block in blocks
        )
        rho = torch.cat([part.to(torch.int64).sum(-1) for part in terms], 1).double() / GAUSSIAN_STEPS
        key, log_rho = -rho, rho.log()
    else:
        # m_i: mean of the k smallest d^2, added in ascending order and divided once.
        others = (squared[:, block].masked_fill(~near(block), float("inf")) for block in blocks)
        nearest = torch.cat([part.topk(min(k, N), largest=False).values for part in others], 1)
        count = (valid.sum(-1, keepdim=True) - int(exclude_self)).clamp(0, k)
        total = torch.zeros_like(nearest[..., 0])
        for rank in range(nearest.shape[-1]):
            total = total + torch.where(rank < count, nearest[..., rank], 0.0)
        m = total / (count.clamp(min=1).double() * area)
        key, rho, log_rho = m, torch.exp(-m), -m

    return rank_tokens(squared, key, rho, log_rho, valid, noise, area, blocks)


def rank_tokens(
    squared: Tensor,
    key: Tensor,
    rho: Tensor,
    log_rho: Tensor,
    valid: Tensor,
    noise: Tensor | None,
    area: float,
    blocks: Sequence[slice] = (slice(None),),
) -> TokenScores:
    """Distances to denser tokens, scores and parents from densities rho [B, N] and squared distances [B, N, N].

    key orders the densities, the densest first; with noise, rho + noise does. area: the square of the scale of d.
    blocks: the rows that are ranked at once.
    """
    position = torch.arange(key.shape[1], device=key.device)
    rho = rho if noise is None else rho + noise
    found = []
    for block in blocks:
        pair = valid[:, block, None] & valid[:, None, :]
        if noise is None:
            earlier = position < position[block, None]
            denser = (key[:, None, :] < key[:, block, None]) | ((key[:, None, :] == key[:, block, None]) & earlier)
        else:
            denser = rho[:, None, :] > rho[:, block, None]
        denser = denser & pair
        to_denser = squared[:, block].masked_fill(~denser, float("inf"))
        least = to_denser.amin(-1)
        parent = torch.where(to_denser == least[..., None], position, key.shape[1]).amin(-1)
        found.append((least, parent, denser.any(-1), squared[:, block].masked_fill(~pair, 0.0).amax(-1)))
    least, parent, has_denser, furthest = (torch.cat(parts, 1) for parts in zip(*found, strict=True))

    # delta_i: the nearest denser token; for a token with none, the largest distance of its sample.
    is_peak = valid & ~has_denser
    distance = torch.where(is_peak, furthest.amax(-1, keepdim=True), least).div(area).sqrt()

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
