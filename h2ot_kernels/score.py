"""Density-peak scoring (DPC-kNN): how dense each token is, and how far the next denser one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import python_ref
from python_ref.score import TokenScores

from . import checks
from .backend import dispatch, implement
from .library import declare, exportable

exportable(TokenScores)


def score_tokens(
    x: Tensor,
    k: int = 2,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    noise: Tensor | None = None,
    metric: str = "euclidean",
    exclude_self: bool = False,
    scale: float | None = None,
    density: str = "knn",
    cutoff: float | None = None,
    backend: str | None = None,
) -> TokenScores:
    """Density, distance to the next denser token, score and that token, for every token of every sample.

    With d(i, j) = |x_i - x_j| / sqrt(C) and m_i the mean of the k smallest d(i, j)^2 (the token itself included):
    density_i = exp(-m_i), distance_i = min d(i, j) over denser j (for a token with no denser one the largest d of its
    sample), parent_i = that j, or -1.
    Without noise j is denser when (m_j, j) < (m_i, i), and score_i = log(distance_i) - m_i (+inf for the densest).
    With noise, density_i = exp(-m_i) + noise_i, denser is strictly larger, and score_i = density_i * distance_i.

    x: [B, N, C], or [B, F, J, C] whose tokens are the means over J; float32, float64, bfloat16 or float16, any strides.
    k: 1 .. N. mask: bool [B, N], True = valid. lengths: int [B], valid tokens at the front, 0 .. N (of a tensor, whose
    values only the device knows, more is N and less 0). noise: float [B, N].
    Options, for tokens of other kinds:
    metric: "cosine" scores the tokens at unit length (|u - v|^2 = 2 - 2 cos), normalised in float64 and rounded once to
        float32 (float64 for float64); a token of zeros stays zero.
    scale: the divisor of distances in place of sqrt(C).
    exclude_self: m_i averages the k nearest other tokens, k up to N - 1 (0 for a token that is alone).
    density: "gaussian" (Rodriguez & Laio) makes density_i the sum over j of exp(-(d(i, j) / cutoff)^2), j = i included
        unless exclude_self, each term rounded to a multiple of 2^-40; k is not used. score_i is then
        log(density_i) + log(distance_i). cutoff: d_c, in units of d; about the 2 % quantile of all d is usual.
    metric is a transformation before any kernel; the others are the operator score_variant, which C++ has for CPUs and
    Triton for GPUs: `can_run` says so.

    Returns TokenScores(density, distance, score: float64 [B, N]; parent: int64 [B, N]), without gradients.
    A masked token, or one that holds NaN or infinity, gets 0, 0, -inf, -1 and is nobody's neighbour.

    Raises TypeError or ValueError that name the argument, RuntimeError where a named backend lacks an option. Cost:
    B N^2 C / 2 differences; "gaussian" as many again, and in float64 with an exponential for the pairs nearer than
    5.4 cutoff. Memory O(N (C + k)) beyond N of about 1500. Results are those of float64 arithmetic on the tokens.
    Source: Rodriguez & Laio 2014, Du et al. 2016; `python_ref.score`.

    >>> import torch, h2ot_kernels as h2ot
    >>> h2ot.score_tokens(torch.tensor([[[0.0], [1.0], [9.0]]]), k=2).parent
    tensor([[-1,  0,  1]])
    """
    checks.no_tangent("score_tokens", x, noise)
    variant = Variant(metric, exclude_self, scale, density, cutoff)
    mask, noise = check_scoring(x, k, mask, lengths, noise, variant)
    return score_checked(x.detach(), k, mask, noise, variant, backend)


class Variant(NamedTuple):
    """How density and distance are defined: the options of `score_tokens`."""

    metric: str = "euclidean"
    exclude_self: bool = False
    scale: float | None = None
    density: str = "knn"
    cutoff: float | None = None

    @property
    def is_default(self) -> bool:
        return self == Variant()

    def check(self) -> None:
        checks.choice("metric", self.metric, METRICS)
        checks.choice("density", self.density, ("knn", "gaussian"))
        if not isinstance(self.exclude_self, bool):
            raise TypeError(f"exclude_self: got {type(self.exclude_self).__name__}, wanted a bool")
        if self.scale is not None:
            checks.positive("scale", self.scale)
        if self.density == "gaussian":
            cutoff = checks.positive("cutoff", self.cutoff)
            if self.scale is not None:
                checks.positive("scale * cutoff", self.scale * cutoff)
        elif self.cutoff is not None:
            raise ValueError(f"cutoff: got {self.cutoff}, wanted None with density='knn', which has no cut-off")


METRICS = ("euclidean", "cosine")


def score_checked(x, k, mask, noise, variant: Variant, backend: str | None) -> TokenScores:
    """Score tokens whose arguments are checked. Distances between unit tokens need no kernel of their own."""
    if variant.metric != "euclidean":
        x = python_ref.metric_tokens(x, variant.metric)
    _, exclude_self, scale, _, cutoff = variant
    if not exclude_self and scale is None and cutoff is None:
        return TokenScores(*dispatch("score_tokens", x, backend)(x, k, mask, noise))
    given = 0.0 if scale is None else float(scale), exclude_self, 0.0 if cutoff is None else float(cutoff)
    k = k if cutoff is None else 1  # not used, and not checked
    return TokenScores(*dispatch("score_variant", x, backend)(x, k, mask, noise, *given))


def valid_of(score: Tensor, parent: Tensor) -> Tensor:
    """[B, N] bool: which tokens were valid, from their scores and parents."""
    return (parent >= 0) | (score > float("-inf"))


def check_scoring(x, k, mask, lengths, noise, variant: Variant) -> tuple[Tensor | None, Tensor | None]:
    """Check the arguments that scoring and cluster pruning share; returns (mask with lengths, noise in float64)."""
    checks.tokens(x)
    variant.check()
    if variant.density == "knn":
        counted = "the number of other tokens" if variant.exclude_self else "the number of tokens"
        checks.integer("k", k, 1, x.shape[1] - int(variant.exclude_self), counted)
    mask = checks.validity(x, mask, lengths)
    if noise is not None:
        checks.tensor("noise", noise, (2,), "[B, N]")
        checks.has_shape("noise", noise, x.shape[:2], "[B, N]")
        checks.same_device("noise", noise, "x", x)
        noise = noise.detach().double().contiguous()
    return mask, noise


def _fake(x, k, mask, noise, *options):
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


VARIANT = {
    "schema": "(Tensor x, int k, Tensor? mask, Tensor? noise, float scale, bool exclude_self, float cutoff) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    "fake": _fake,
    "flops": pair_flops,
}


def _reference(x, k, mask, noise, scale=0.0, exclude_self=False, cutoff=0.0):
    return python_ref.score_tokens(
        x,
        k,
        mask=mask,
        noise=noise,
        exclude_self=exclude_self,
        scale=scale or None,
        density="gaussian" if cutoff else "knn",
        cutoff=cutoff or None,
    )


OPERATOR = declare("score_tokens", **SCORE)
implement("score_tokens", "cpp", OPERATOR)
implement("score_tokens", "cuda", OPERATOR)
implement("score_tokens", "reference", _reference)
implement("score_variant", "cpp", declare("score_variant", **VARIANT))
implement("score_variant", "reference", _reference)
