"""Where a kept frame is decided: the K largest scores, and the four pruners that make scores."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import python_ref

from . import checks, constants
from .backend import dispatch, implement
from .library import declare
from .score import Variant, check_scoring, pair_flops, score_checked, valid_of


def select_tokens(
    score: Tensor,
    num_tokens: int | Sequence[int] | Tensor,
    *,
    keep=None,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The num_tokens = K largest scores of each sample, ties to the lowest index, as ascending index.

    score: [B, N], any float dtype (a caller's own scores, too); NaN counts as masked.
    keep: tokens that are always kept, masked ones too, and count towards K: an int, a list, or int64 [M] or [B, M].
    mask: bool [B, N], True = valid. Others are taken only when fewer than K are valid, lowest index first.
    lengths: int [B], valid tokens at the front.
    num_tokens: one int, or a list or int tensor [B] with one in 0 .. N per sample (a tensor on a GPU is read back).
        Then K is the largest of them and every row ends in -1 where it has fewer: `index >= 0` says which entries are
        tokens, `gather_tokens` writes zeros for the others, `assign_clusters` and `merge_tokens` give empty clusters.
        One that is made of a free N (N // 4): `torch.export.export` takes it with
        prefer_deferred_runtime_asserts_over_guards=True.
    Returns int64 [B, K]. Raises TypeError or ValueError that name the argument, IndexError for keep outside 0 .. N - 1
    and for a tensor that keeps more than K tokens. On a GPU, which cannot raise, such a row is -1 (CUDA C++), or keeps
    what it can (Triton).
    Cost: O(N) time and memory per sample. Source: the end of HoT section 3.2:
    index[b] = sorted(the first K tokens i by (-score[b, i], i)); `python_ref.select`.

    >>> import torch, h2ot_kernels as h2ot
    >>> h2ot.select_tokens(torch.tensor([[0.1, 0.9, 0.5, 0.2]]), 2, keep=0)
    tensor([[0, 1]])
    """
    checks.tensor("score", score, (2,), "[B, N]")
    B, N = score.shape
    num_tokens = checks.token_counts(num_tokens, B, N)
    keep = checks.kept(keep, B, N, _least(num_tokens), score.device)
    mask = checks.validity(score, mask, lengths)
    return _select(score.detach(), num_tokens, keep, mask, backend)


def _least(num_tokens: int | list[int]) -> int:
    if not isinstance(num_tokens, list):
        return num_tokens
    return min(num_tokens) if num_tokens else checks.MOST_TOKENS  # Dynamo knows no default=


def _select(score: Tensor, num_tokens: int | list[int], keep, mask, backend: str | None) -> Tensor:
    """Selection with checked arguments: one call, or one for every number of tokens."""
    select = dispatch("select_tokens", score, backend)
    if not isinstance(num_tokens, list):
        return select(score, num_tokens, keep, mask)
    if keep is not None and 0 in num_tokens:  # a call is made for none of these samples
        raise IndexError(f"keep: got shape {checks.shape(keep)}, wanted none, as a sample has num_tokens = 0")
    index = score.new_full((score.shape[0], max(num_tokens) if num_tokens else 0), -1, dtype=torch.int64)
    for count in sorted(set(num_tokens) - {0}):
        rows = constants.integers([b for b, own in enumerate(num_tokens) if own == count], score.device)
        kept = keep if keep is None or keep.shape[0] == 1 else keep[rows]
        index[rows, :count] = select(score[rows], count, kept, None if mask is None else mask[rows])
    return index


def prune_cluster(
    x: Tensor,
    num_tokens: int | Sequence[int] | Tensor,
    k: int = 2,
    *,
    keep=None,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    noise: Tensor | None = None,
    metric: str = "euclidean",
    exclude_self: bool = False,
    scale: float | None = None,
    density: str = "knn",
    cutoff: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """TPC: the num_tokens = K tokens with the largest DPC-kNN scores, as ascending int64 index [B, K].

    Arguments as in `score_tokens` and `select_tokens` (a num_tokens per sample, too); equal to
    `select_tokens(score_tokens(x, k).score, K)` with the same mask given to both (tokens that hold NaN or infinity
    count as masked here; select_tokens sees only their score of -inf).
    Raises as they do. Cost: that of scoring; nothing else is written. Source: HoT section 3.2:
    score_i = density_i * distance_i, index[b] = sorted(its first K); `python_ref.score`, `python_ref.select`.

    >>> import torch, h2ot_kernels as h2ot
    >>> x = torch.tensor([[[0.0], [1.0], [2.0], [50.0], [51.0], [52.0]]])
    >>> h2ot.prune_cluster(x, 2)
    tensor([[0, 3]])
    """
    variant = Variant(metric, exclude_self, scale, density, cutoff)
    mask, noise = check_scoring(x, k, mask, lengths, noise, variant)
    B, N = x.shape[:2]
    num_tokens = checks.token_counts(num_tokens, B, N)
    keep = checks.kept(keep, B, N, _least(num_tokens), x.device)
    if variant.is_default and not isinstance(num_tokens, list):
        return dispatch("prune_cluster", x, backend)(x.detach(), num_tokens, k, keep, mask, noise)
    scores = score_checked(x.detach(), k, mask, noise, variant, backend)
    return _select(scores.score, num_tokens, keep, valid_of(scores.score, scores.parent), backend)


def prune_sample(num_frames: int, num_tokens: int, *, keep=None, device=None) -> Tensor:
    """TPS: num_tokens = K evenly spaced frames of num_frames = F: index[i] = i (F - 1) // (K - 1); K = 1: (F - 1) // 2.

    keep: an int or a list of frames that are always kept; one that is not sampled replaces the nearest sampled
    frame that is not kept itself, the lower on a tie. device: where the index is made.
    Returns ascending int64 [1, K], which every sample shares. Raises TypeError, ValueError or IndexError that name the
    argument. Cost: O(K), once per (F, K, keep, device), which is resolved in every call. Source: H2OT section 3;
    `python_ref.select`.

    >>> import h2ot_kernels as h2ot
    >>> h2ot.prune_sample(9, 3)
    tensor([[0, 4, 8]])
    """
    checks.integer("num_frames", num_frames, 1)
    checks.integer("num_tokens", num_tokens, 1, num_frames, "num_frames")
    kept = checks.kept_values(keep, num_frames, num_tokens)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _sampled_in_a_graph(num_frames, num_tokens, kept, device)
    return constants.shared(_sampled(num_frames, num_tokens, kept), constants.resolved(device)).clone()


def _sampled_in_a_graph(F: int, K: int, kept: tuple[int, ...], device) -> Tensor:
    """A constant of the graph, or a few operators of an F, K and `kept` that may be free in it."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy, which a tracer has done

    if kept and all(has_static_value(value) for value in (F, K, *kept)):
        return python_ref.prune_sample(F, K, keep=kept, device=device)
    if K == 1:
        sampled = torch.full((1,), (F - 1) // 2, dtype=torch.int64, device=device)
    else:
        sampled = torch.arange(K, device=device) * (F - 1) // (K - 1)
    return (_with_kept(sampled, kept) if kept else sampled)[None]


def _with_kept(sampled: Tensor, kept: tuple[int, ...]) -> Tensor:
    """As `python_ref.select.sampled_frames` has it: each in turn in place of the nearest that is not kept itself."""
    frames = constants.integers(kept, sampled.device).sort().values
    position = torch.arange(sampled.shape[0], device=sampled.device)
    for frame in frames.unbind():
        is_kept = (sampled[:, None] == frames).any(1)
        distance = 2 * (sampled - frame).abs() + (sampled > frame)
        nearest = distance.masked_fill(is_kept, torch.iinfo(torch.int64).max).argmin()
        is_new = ~(sampled == frame).any()
        sampled = sampled.where(~is_new | (position != nearest), frame)
    return sampled.sort().values


@functools.lru_cache(maxsize=256)
def _sampled(num_frames: int, num_tokens: int, kept: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(python_ref.select.sampled_frames(num_frames, num_tokens, kept))


def prune_motion(pose: Tensor, num_tokens: int, *, keep=None, backend: str | None = None) -> Tensor:
    """TPMo: the num_tokens = K frames that moved most: score_t = sum over joints and coordinates of |p_t - p_(t-1)|.

    pose: [B, F, J, D] (D = 2 for 2D keypoints, pixels or normalised), any float dtype and strides; score_0 = 0.
    A frame whose motion is NaN is taken last. keep: as in `select_tokens`.
    Returns ascending int64 [B, K]. Raises as `select_tokens`. Cost: one read of pose. Source: H2OT section 3;
    `python_ref.select`.

    >>> import torch, h2ot_kernels as h2ot
    >>> pose = torch.tensor([0.0, 0.0, 3.0, 3.0, 4.0]).reshape(1, 5, 1, 1)
    >>> h2ot.prune_motion(pose, 2)
    tensor([[2, 4]])
    """
    checks.tensor("pose", pose, (4,), "[B, F, J, D]")
    B, F = pose.shape[:2]
    checks.integer("num_tokens", num_tokens, 1, F, "the number of frames")
    keep = checks.kept(keep, B, F, num_tokens, pose.device)
    return dispatch("prune_motion", pose, backend)(pose.detach(), num_tokens, keep)


def prune_attention(
    query: Tensor, key: Tensor, num_tokens: int, *, keep=None, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """TPA: the num_tokens = K frames that receive the largest mean softmax weight from all queries, heads and joints.

    query, key: [B, H, F, D] or [B, J, H, F, D], one float dtype, any strides; weights and means in float32 (float64 for
    float64), so near-ties may fall otherwise than in float64. scale: default D ** -0.5.
    keep: as in `select_tokens`. Returns ascending int64 [B, K]. Raises as `select_tokens`.
    Cost: B J H F^2 D multiply-adds; no F x F matrix is stored. Source: H2OT section 3:
    score[b, f] = the mean over joints, heads and queries q of softmax(query[b, j, h, q] . key[b, j, h] scale)[f];
    `python_ref.select`.

    >>> import torch, h2ot_kernels as h2ot
    >>> key = torch.tensor([0.0, 2.0, 1.0]).reshape(1, 1, 3, 1)
    >>> h2ot.prune_attention(torch.ones(1, 1, 3, 1), key, 2)
    tensor([[1, 2]])
    """
    checks.tensor("query", query, (4, 5), "[B, H, F, D] or [B, J, H, F, D]")
    checks.tensor("key", key, (query.dim(),), "the shape of query")
    checks.has_shape("key", key, query.shape, "the shape of query")
    checks.same_dtype("key", key, "query", query)
    checks.same_device("key", key, "query", query)
    B, F, D = query.shape[0], query.shape[-2], query.shape[-1]
    if 0 in query.shape[1:]:
        raise ValueError(f"query: got shape {checks.shape(query)}, wanted at least one joint, head, frame and channel")
    checks.integer("num_tokens", num_tokens, 1, F, "the number of frames")
    keep = checks.kept(keep, B, F, num_tokens, query.device)
    scale = checks.scale(scale, D)
    return dispatch("prune_attention", query, backend)(query.detach(), key.detach(), num_tokens, keep, scale)


def _index_fake(x, num_tokens, *rest):
    return x.new_empty(x.shape[0], num_tokens, dtype=torch.int64)


def _attention_fake(query, key, num_tokens, keep, scale):
    return _index_fake(query, num_tokens)


def _scores_fake(query, key, scale):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape[0], query.shape[-2], dtype=wide)


def _logit_flops(query, *rest) -> int:
    return 2 * math.prod(query) * query[-2]


SELECT = {
    "schema": "(Tensor score, SymInt num_tokens, Tensor? keep, Tensor? mask) -> Tensor",
    "fake": _index_fake,
}
CLUSTER = {
    "schema": "(Tensor x, SymInt num_tokens, int k, Tensor? keep, Tensor? mask, Tensor? noise) -> Tensor",
    "fake": _index_fake,
    "flops": pair_flops,
}
MOTION = {"schema": "(Tensor pose, SymInt num_tokens, Tensor? keep) -> Tensor", "fake": _index_fake}
ATTENTION = {
    "schema": "(Tensor query, Tensor key, SymInt num_tokens, Tensor? keep, float scale) -> Tensor",
    "fake": _attention_fake,
    "flops": _logit_flops,
}


def _check_kept(keep, N, K):
    if keep is not None and checks.has_values(keep):
        if ((keep < 0) | (keep >= N)).any():
            raise IndexError("select_tokens: keep holds a value outside its range")
        if max((row.unique().numel() for row in keep), default=0) > K:
            raise IndexError("select_tokens: keep names more tokens than num_tokens")


def _reference_select(score, num_tokens, keep, mask):
    _check_kept(keep, score.shape[1], num_tokens)
    return python_ref.select_tokens(score, num_tokens, keep=keep, mask=mask)


def _reference_cluster(x, num_tokens, k, keep, mask, noise):
    _check_kept(keep, x.shape[1], num_tokens)
    return python_ref.prune_cluster(x, num_tokens, k, keep=keep, mask=mask, noise=noise)


def _reference_motion(pose, num_tokens, keep):
    return _reference_select(python_ref.motion_scores(pose), num_tokens, keep, None)


def _reference_attention(query, key, num_tokens, keep, scale):
    if torch.is_autocast_enabled(query.device.type):  # the choice stays that of the tensors' own dtype
        with torch.autocast(query.device.type, enabled=False):
            return _reference_attention(query, key, num_tokens, keep, scale)
    return _reference_select(python_ref.attention_scores(query, key, scale), num_tokens, keep, None)


_SELECT_TOKENS = declare("select_tokens", **SELECT)
implement("select_tokens", "cpp", _SELECT_TOKENS)
implement("select_tokens", "cuda", _SELECT_TOKENS)
implement("select_tokens", "reference", _reference_select)
PRUNE_CLUSTER = declare("prune_cluster", **CLUSTER)
implement("prune_cluster", "cpp", PRUNE_CLUSTER)
implement("prune_cluster", "cuda", PRUNE_CLUSTER)
implement("prune_cluster", "reference", _reference_cluster)
implement("prune_motion", "cpp", declare("prune_motion", **MOTION))
implement("prune_motion", "reference", _reference_motion)
implement("prune_attention", "cpp", declare("prune_attention", **ATTENTION))
implement("prune_attention", "reference", _reference_attention)
declare("attention_scores", "(Tensor query, Tensor key, float scale) -> Tensor", _scores_fake, flops=_logit_flops)
