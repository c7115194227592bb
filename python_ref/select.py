"""Which tokens are kept: the K largest scores, and the pruners that make scores."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .score import pool_joints, score_tokens, valid_tokens


def keep_flags(keep, B: int, N: int, device) -> Tensor:
    """[B, N] bool, true at the tokens that `keep` (None, an int, [M] or [B, M]) names."""
    flags = torch.zeros(B, N, dtype=torch.bool, device=device)
    if keep is not None:
        keep = torch.as_tensor(keep, dtype=torch.int64, device=device)
        keep = keep.reshape(1, -1) if keep.dim() < 2 else keep
        flags = flags.scatter(1, keep.expand(B, -1), True)  # not in place: keep may be a sample's own under vmap
    return flags


def select_tokens(score: Tensor, num_tokens: int, *, keep=None, mask: Tensor | None = None) -> Tensor:
    """The K = num_tokens first by (kept, valid, score descending, index ascending), as ascending index [B, K].

    A masked token, or one whose score is NaN, is not valid.
    """
    valid = ~score.isnan()
    if mask is not None:
        valid = valid & mask
    score = score.double().masked_fill(~valid, float("-inf"))
    order = score.argsort(dim=-1, descending=True, stable=True)
    for flags in (valid, keep_flags(keep, *score.shape, score.device)):
        first = flags.gather(1, order).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(1, first)
    return order[:, :num_tokens].sort(dim=-1).values


def select_ragged(score: Tensor, num_tokens, *, keep=None, mask: Tensor | None = None) -> Tensor:
    """`select_tokens` with a num_tokens per sample: index [B, max K], each row filled up with -1."""
    index = torch.full((score.shape[0], max(num_tokens, default=0)), -1, dtype=torch.int64, device=score.device)
    flags = keep_flags(keep, *score.shape, score.device)
    for b, K in enumerate(num_tokens):
        row = slice(b, b + 1)
        kept = flags[row].nonzero()[:, 1]
        index[row, :K] = select_tokens(score[row], K, keep=kept, mask=None if mask is None else mask[row])
    return index


def prune_cluster(x, num_tokens, k=2, *, keep=None, mask=None, lengths=None, **options) -> Tensor:
    """TPC: the K largest DPC-kNN scores; num_tokens: one int, or one a sample. options: as in `score_tokens`."""
    valid = valid_tokens(pool_joints(x), mask, lengths)
    score = score_tokens(x, k, mask=mask, lengths=lengths, **options).score
    select = select_tokens if isinstance(num_tokens, int) else select_ragged
    return select(score, num_tokens, keep=keep, mask=valid)


def prune_sample(num_frames: int, num_tokens: int, *, keep=None, device=None) -> Tensor:
    """TPS: `sampled_frames` as [1, K]."""
    keep = keep.flatten().tolist() if isinstance(keep, Tensor) else [keep] if isinstance(keep, int) else keep
    return torch.tensor([sampled_frames(num_frames, num_tokens, keep or ())], dtype=torch.int64, device=device)


def sampled_frames(F: int, K: int, keep: Iterable[int] = ()) -> list[int]:
    """K evenly spaced frames of F, in integer arithmetic.

    Each `keep` frame (in ascending order) that is not sampled replaces the nearest sampled frame
    that is not itself kept, the lower on a tie.
    """
    sampled = [(F - 1) // 2] if K == 1 else [i * (F - 1) // (K - 1) for i in range(K)]
    kept = sorted(set(keep))
    for frame in kept:
        if frame not in sampled:
            free = [f for f in sampled if f not in kept]
            distance = min(abs(f - frame) for f in free)
            sampled.remove(frame - distance if frame - distance in free else frame + distance)
            sampled.append(frame)
    return sorted(sampled)


def motion_scores(pose: Tensor) -> Tensor:
    """[B, F, J, 2] -> [B, F] float64: sum of |p_t - p_(t-1)| over joints, then coordinates, in order; 0 at t = 0."""
    step = pose.double().diff(dim=1).abs().flatten(2)
    total = step.new_zeros(step.shape[:2])
    for coordinate in step.unbind(-1):
        total = total + coordinate
    return torch.cat([total.new_zeros(pose.shape[0], 1), total], 1)


def prune_motion(pose: Tensor, num_tokens: int, *, keep=None) -> Tensor:
    """TPMo: the K frames that moved most."""
    return select_tokens(motion_scores(pose), num_tokens, keep=keep)


def attention_scores(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """[B, H, F, D] or [B, J, H, F, D] -> [B, F]: the mean softmax weight that each frame receives."""
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(precision), key.to(precision)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = (query @ key.mT * scale).softmax(-1)
    return weights.flatten(1, -3).mean((1, 2))


def prune_attention(query, key, num_tokens, *, keep=None, scale=None) -> Tensor:
    """TPA: the K frames that receive most attention."""
    return select_tokens(attention_scores(query, key, scale), num_tokens, keep=keep)
