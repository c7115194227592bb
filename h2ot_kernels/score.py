"""Density-peak scoring (DPC-kNN): how dense each token is, and how far the next denser one."""

import torch
from torch import Tensor

import python_ref
from python_ref.score import TokenScores

from . import checks
from .backend import dispatch, implement
from .library import declare


def score_tokens(
    x: Tensor,
    k: int = 2,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> TokenScores:
    """Density, distance to the next denser token, score and that token, for every token of every sample.

    With d(i, j) = |x_i - x_j| / sqrt(C) and m_i the mean of the k smallest d(i, j)^2 (the token itself included):
    density_i = exp(-m_i), distance_i = min d(i, j) over denser j (for a token with no denser one the largest d of its
    sample), parent_i = that j, or -1.
    Without noise j is denser when (m_j, j) < (m_i, i), and score_i = log(distance_i) - m_i (+inf for the densest).
    With noise, density_i = exp(-m_i) + noise_i, denser is strictly larger, and score_i = density_i * distance_i.

    x: [B, N, C], or [B, F, J, C] whose tokens are the means over J; float32, float64, bfloat16 or float16, any strides.
    k: 1 .. N. mask: bool [B, N], True = valid. lengths: int [B], valid tokens at the front. noise: float [B, N].
    Returns TokenScores(density, distance, score: float64 [B, N]; parent: int64 [B, N]), without gradients.
    A masked token, or one that holds NaN or infinity, gets 0, 0, -inf, -1 and is nobody's neighbour.

    Raises TypeError or ValueError that name the argument. Cost: B N^2 C / 2 differences; memory O(N k) beyond N of
    about 1500. Results are those of float64 arithmetic on the tokens. Source: Rodriguez & Laio 2014, Du et al. 2016,
    SPEC section 1.

    >>> import torch, h2ot_kernels as h2ot
    >>> h2ot.score_tokens(torch.tensor([[[0.0], [1.0], [9.0]]]), k=2).parent
    tensor([[-1,  0,  1]])
    """
    mask, noise = check_scoring(x, k, mask, lengths, noise)
    if backend != "reference":
        checks.no_tangent("score_tokens", x)
    return TokenScores(*dispatch("score_tokens", x, backend)(x.detach(), k, mask, noise))


def check_scoring(x, k, mask, lengths, noise) -> tuple[Tensor | None, Tensor | None]:
    """Check the arguments that scoring and cluster pruning share; returns (mask with lengths, noise in float64)."""
    checks.tokens(x)
    checks.integer("k", k, 1, x.shape[1], "the number of tokens")
    mask = checks.validity(x, mask, lengths)
    if noise is not None:
        checks.tensor("noise", noise, (2,), "[B, N]")
        checks.has_shape("noise", noise, x.shape[:2], "[B, N]")
        checks.same_device("noise", noise, "x", x)
        noise = noise.detach().double()
    return mask, noise


def _fake(x, k, mask, noise):
    size = x.shape[:2]
    scores = [x.new_empty(size, dtype=torch.float64) for _ in range(3)]
    return *scores, x.new_empty(size, dtype=torch.int64)


def pair_flops(x, *rest) -> int:
    """Each pair of tokens once, a multiply-add a channel; x: its shape, [B, N, ..., C]."""
    return x[0] * x[1] * (x[1] - 1) * x[-1]


SCORE = {
    "schema": "(Tensor x, int k, Tensor? mask, Tensor? noise) -> (Tensor, Tensor, Tensor, Tensor)",
    "fake": _fake,
    "flops": pair_flops,
}


def _reference(x, k, mask, noise):
    return python_ref.score_tokens(x, k, mask=mask, noise=noise)


OPERATOR = declare("score_tokens", **SCORE)
implement("score_tokens", "cpp", OPERATOR)
implement("score_tokens", "cuda", OPERATOR)
implement("score_tokens", "reference", _reference)
