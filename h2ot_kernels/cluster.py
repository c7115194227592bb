"""Clusters around the kept tokens, and their means (TCFormer)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import python_ref

from . import checks
from .backend import dispatch, implement, is_reference
from .library import declare, exportable
from .score import METRICS, Variant, check_scoring, pair_flops, valid_of


@exportable
class TokenClusters(NamedTuple):
    """What `cluster_tokens` returns."""

    index: Tensor  # int64 [B, K], ascending
    labels: Tensor  # int64 [B, N], positions in index
    score: Tensor  # float64 [B, N]


def cluster_tokens(
    x: Tensor,
    num_tokens: int,
    k: int = 2,
    *,
    keep=None,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    noise: Tensor | None = None,
    metric: str = "euclidean",
    backend: str | None = None,
) -> TokenClusters:
    """DPC-kNN in one call: the num_tokens = K tokens with the largest scores, and which of them each token belongs to.

    x, k, keep, mask, lengths, noise, metric: as in `prune_cluster`, whose other options it has not; num_tokens: one int
    for all samples. Returns (index int64 [B, K], labels int64 [B, N], score float64 [B, N]): those of
    `prune_cluster`, `assign_clusters` of its index, and `score_tokens`. Raises as they do.
    Cost: on a CPU, for up to 1536 tokens (CUDA C++: 2048), that of `prune_cluster` alone, as labels are read off the
    distances that scoring has made; else that of both. Source: HoT section 3.2, TCFormer section 3:
    labels[b, i] = argmin over c of |x[b, i] - x[b, index[b, c]]|;
    `python_ref.score`, `python_ref.select`, `python_ref.cluster`.

    >>> import torch, h2ot_kernels as h2ot
    >>> x = torch.tensor([[[0.0], [1.0], [2.0], [50.0], [51.0], [52.0]]])
    >>> index, labels, score = h2ot.cluster_tokens(x, 2)
    >>> index, labels
    (tensor([[0, 3]]), tensor([[0, 0, 0, 1, 1, 1]]))
    """
    checks.no_tangent("cluster_tokens", x, noise)
    mask, noise = check_scoring(x, k, mask, lengths, noise, Variant(metric))
    B, N = x.shape[:2]
    checks.integer("num_tokens", num_tokens, 1, N, "the number of tokens")
    keep = checks.kept(keep, B, N, num_tokens, x.device)
    x = x.detach() if metric == "euclidean" else python_ref.metric_tokens(x.detach(), metric)
    return TokenClusters(*dispatch("cluster_tokens", x, backend)(x, num_tokens, k, keep, mask, noise))


def assign_clusters(
    x: Tensor,
    index: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    metric: str = "euclidean",
    parent: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """labels [B, N]: which selected token each token is nearest to, as a position in index; the lowest on a tie.

    x: [B, N, C] or [B, F, J, C] (dtypes and pooling over J as in `score_tokens`).
    index: int64 [B, K] or [1, K], ascending, then perhaps -1: padding (`select_tokens` with a num_tokens per sample),
    which attracts nobody.
    mask: bool [B, N], True = valid. lengths: int [B], valid tokens at the front. metric: see `score_tokens`.
    parent: int64 [B, N], `score_tokens(...).parent`: labels then follow the chain of parents to the first selected
    token, as Rodriguez & Laio do, in place of the nearest one; x only says which tokens are finite.
    A selected token is labelled with itself. Tokens that are masked or hold NaN or infinity get -1 and attract nobody;
    so do all tokens of a sample with no valid selected token, those whose chain meets none, and float64 tokens whose
    squared distances overflow.
    Returns int64 [B, N]. Raises TypeError or ValueError that name the argument, IndexError for an index or parent
    outside -1 .. N - 1 (a GPU cannot raise: such an index attracts nobody there).
    Cost: B N K C differences (parent: B N steps), memory O(N C); decided as in float64.
    Source: TCFormer section 3: labels[b, i] = argmin over c of |x[b, i] - x[b, index[b, c]]|; with parent
    Rodriguez & Laio 2014: labels[b, i] = labels[b, parent[b, i]]; `python_ref.cluster`.

    >>> import torch, h2ot_kernels as h2ot
    >>> h2ot.assign_clusters(torch.tensor([[[0.0], [1.0], [8.0], [9.0]]]), torch.tensor([[0, 3]]))
    tensor([[0, 0, 1, 1]])
    """
    checks.tokens(x)
    checks.index("index", index, x)
    if index.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"index: got shape {checks.shape(index)}, wanted [1, K] or [B, K] with B = {x.shape[0]}")
    checks.choice("metric", metric, METRICS)
    mask = checks.validity(x, mask, lengths)
    if parent is not None:
        checks.tensor("parent", parent, (2,), "[B, N]", (torch.int64,))
        checks.has_shape("parent", parent, x.shape[:2], "[B, N]")
        checks.same_device("parent", parent, "x", x)
        return dispatch("assign_by_parent", x, backend)(x.detach(), index, parent, mask)
    x = x.detach() if metric == "euclidean" else python_ref.metric_tokens(x.detach(), metric)
    return dispatch("assign_clusters", x, backend)(x, index, mask)


def merge_tokens(
    x: Tensor, labels: Tensor, num_clusters: int, weight: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """The mean, or weighted mean, of each cluster: out[b, c] = sum_i w_i x_i / sum_i w_i over labels[b, i] = c.

    x: [B, N, C], float32, float64, bfloat16 or float16, any strides. labels: int64 [B, N] in 0 .. num_clusters - 1, or
    -1 for tokens of no cluster. weight: float [B, N] or [B, N, 1].
    Returns [B, num_clusters, C] of x's dtype, summed in float32 (float64 for float64) in ascending token order; 0 for
    an empty cluster or one whose weights sum to 0. Gradients to x and weight, first and second order.
    Raises TypeError or ValueError that name the argument, IndexError for a label outside its range
    (a GPU cannot raise: such a token is of no cluster there).
    Cost: one read of x. Source: TCFormer section 3; `python_ref.cluster`.

    >>> import torch, h2ot_kernels as h2ot
    >>> h2ot.merge_tokens(torch.tensor([[[1.0], [3.0], [7.0]]]), torch.tensor([[0, 0, 1]]), 2)
    tensor([[[2.],
             [7.]]])
    """
    checks.tensor("x", x, (3,), "[B, N, C]")
    checks.token_limit("x", x)
    B, N = x.shape[:2]
    checks.tensor("labels", labels, (2,), "[B, N]", (torch.int64,))
    checks.has_shape("labels", labels, (B, N), "[B, N]")
    checks.same_device("labels", labels, "x", x)
    checks.integer("num_clusters", num_clusters, 1)
    if weight is not None:
        checks.tensor("weight", weight, (2, 3), "[B, N] or [B, N, 1]")
        checks.has_shape("weight", weight, (B, N, 1)[: weight.dim()], "[B, N] or [B, N, 1]")
        checks.same_device("weight", weight, "x", x)
        weight = weight.reshape(B, N).to(torch.promote_types(x.dtype, torch.float32))
    if not is_reference(backend):
        checks.no_tangent("merge_tokens", x, weight)
    return dispatch("merge_tokens", x, backend)(x, labels, num_clusters, weight)


def _cluster_fake(x, num_tokens, *rest):
    B, N = x.shape[:2]
    labels = x.new_empty(B, N, dtype=torch.int64)
    return labels.new_empty(B, num_tokens), labels, x.new_empty(B, N, dtype=torch.float64)


def _assign_fake(x, index, *rest):
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def _merge_fake(x, labels, num_clusters, weight):
    wide = torch.promote_types(x.dtype, torch.float32)
    B, _, C = x.shape
    return x.new_empty(B, num_clusters, C), x.new_empty(B, num_clusters, dtype=wide)


def _merge_setup(ctx, inputs, output):
    x, labels, _, weight = inputs
    of_weight = (x, output[0]) if ctx.needs_input_grad[3] else ()
    ctx.save_for_backward(labels, weight, output[1], *of_weight)


def merge_backward(merge):
    """The gradient of a merging operator: gathers by label, differentiable; `merge` is the operator.

    d out_c / d x_i = w_i / total_c, d out_c / d w_i = (x_i - out_c) / total_c, with out_c before it is rounded.
    """

    def backward(ctx, grad, grad_total):
        labels, weight, total, *of_weight = ctx.saved_tensors
        wide, (K, C) = total.dtype, grad.shape[1:]
        inside, member = (labels >= 0) & (labels < K), labels.clamp(0, K - 1)
        total_of = torch.where(inside, total.gather(1, member), 0.0)
        counted = total_of != 0
        total_of = torch.where(counted, total_of, 1.0)  # not its inverse, which may be infinite
        counted, member_of = counted[..., None], member[..., None].expand(-1, -1, C)
        # What is of no cluster has gradient 0, whatever it and the first cluster hold.
        grad_of = torch.where(counted, grad.to(wide).gather(1, member_of), 0.0)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            share = (1.0 if weight is None else torch.where(inside, weight, 0.0)) / total_of
            grad_x = (grad_of * share[..., None]).to(grad.dtype)
        if ctx.needs_input_grad[3]:
            x, merged = of_weight
            if merged.dtype != wide:
                x = x.to(wide)
                merged, _ = merge(x, labels, K, weight)
            centred = torch.where(counted, x - merged.gather(1, member_of), 0.0)
            grad_weight = (grad_of * centred).sum(-1) / total_of
            if grad_total is not None:
                grad_weight = grad_weight + torch.where(inside, grad_total.gather(1, member), 0.0)
        return grad_x, None, None, grad_weight

    return backward


def _distance_flops(x, index, *rest) -> int:
    return 2 * x[0] * x[1] * index[1] * x[-1]


CLUSTER = {
    "schema": "(Tensor x, SymInt num_tokens, int k, Tensor? keep, Tensor? mask, Tensor? noise) -> "
    "(Tensor, Tensor, Tensor)",
    "fake": _cluster_fake,
    "flops": pair_flops,
}
ASSIGN = {
    "schema": "(Tensor x, Tensor index, Tensor? mask) -> Tensor",
    "fake": _assign_fake,
    "flops": _distance_flops,
}
ASSIGN_BY_PARENT = {
    "schema": "(Tensor x, Tensor index, Tensor parent, Tensor? mask) -> Tensor",
    "fake": _assign_fake,
}
MERGE = {
    "schema": "(Tensor x, Tensor labels, SymInt num_clusters, Tensor? weight) -> (Tensor, Tensor)",
    "fake": _merge_fake,
    "setup_context": _merge_setup,
}


def _in_steps(backend, x, num_tokens, k, keep, mask, noise):
    """cluster_tokens by the operations that it stands for."""
    _, _, score, parent = dispatch("score_tokens", x, backend)(x, k, mask, noise)
    index = dispatch("select_tokens", x, backend)(score, num_tokens, keep, valid_of(score, parent))
    return index, dispatch("assign_clusters", x, backend)(x, index, mask), score


def _reference_assign(x, index, mask, parent=None):
    for name, value in (("index", index), ("parent", parent)):
        if value is not None and checks.has_values(value) and ((value < -1) | (value >= x.shape[1])).any():
            raise IndexError(f"assign_clusters: {name} holds a value outside its range")
    return python_ref.assign_clusters(x, index, mask=mask, parent=parent)


def _reference_by_parent(x, index, parent, mask):
    return _reference_assign(x, index, mask, parent)


def _reference_merge(x, labels, num_clusters, weight):
    if checks.has_values(labels) and ((labels < -1) | (labels >= num_clusters)).any():
        raise IndexError("merge_tokens: labels holds a value outside its range")
    return python_ref.merge_tokens(x, labels, num_clusters, weight)


def _merged(op):
    return lambda *args: op(*args)[0]


_ops = torch.ops.h2ot_kernels
_cluster = declare("cluster_tokens", **CLUSTER)
_assign = declare("assign_clusters", **ASSIGN)
_merge = declare("merge_tokens", **MERGE, backward=merge_backward(lambda *args: _ops.merge_tokens(*args)))

implement("cluster_tokens", "cpp", _cluster)
implement("cluster_tokens", "cuda", _cluster)
implement("cluster_tokens", "triton", partial(_in_steps, "triton"))
implement("cluster_tokens", "reference", partial(_in_steps, "reference"))
implement("assign_clusters", "cpp", _assign)
implement("assign_clusters", "cuda", _assign)
implement("assign_clusters", "reference", _reference_assign)
implement("assign_by_parent", "cpp", declare("assign_by_parent", **ASSIGN_BY_PARENT))
implement("assign_by_parent", "reference", _reference_by_parent)
implement("merge_tokens", "cpp", _merged(_merge))
implement("merge_tokens", "reference", _reference_merge)
