"""What the drop-in forms of DPC-kNN share: the official noise, the order of the selected tokens, their labels."""

import operator

import torch
from torch import Tensor

from .. import checks
from ..cluster import assign_clusters, cluster_tokens
from ..score import score_tokens
from ..select import select_tokens


def select_and_assign(
    x: Tensor,
    cluster_num: int,
    k: int,
    token_mask: Tensor | None,
    without: int | None = None,
    noise_dtype: torch.dtype | None = None,
    masked_label: int = -1,
) -> tuple[Tensor, Tensor]:
    """(index_down [B, K] in descending score order, idx_cluster [B, N]: positions in index_down).

    The noise is drawn from torch's default generator as official code draws it, once a call; the selection is that of
    the float64 official formulation with this noise (but where a sample has fewer than k valid tokens: the mean is over
    those). token_mask [B, N]: > 0 is valid. Masked tokens come last and get the label -1, or masked_label: 0 is that of
    official code, in which one that is selected has its own. A token as far from two selected ones goes to the first of
    them in x. without: a token that is not selected. noise_dtype: that of the distances in official code, by default
    what `torch.cdist` makes of x.
    """
    cluster_num = operator.index(cluster_num)
    checks.tokens(x)  # before the noise is drawn
    dtype = distance_dtype(x) if noise_dtype is None else noise_dtype
    noise = torch.rand(x.shape[0], x.shape[1], device=x.device, dtype=dtype) * 1e-6
    mask = None if token_mask is None else token_mask > 0
    selectable = x.shape[1] - int(without is not None)  # torch.jit.trace makes sizes tensors
    if not 1 <= cluster_num <= selectable:
        raise ValueError(f"cluster_num: got {cluster_num}, wanted 1 to {selectable}")
    if without is None:
        index, labels, score = cluster_tokens(x, cluster_num, k, mask=mask, noise=noise)
    else:
        score = score_tokens(x, k, mask=mask, noise=noise).score
        score = score.clamp(min=torch.finfo(score.dtype).min)  # a masked token still comes before the excluded one
        score[:, without] = -torch.inf
        index = select_tokens(score, cluster_num)
        labels = assign_clusters(x, index, mask=mask)
    order = score.gather(1, index).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(cluster_num, device=x.device).expand_as(order))
    index_down = index.gather(1, order)
    idx_cluster = torch.where(labels >= 0, rank.gather(1, labels.clamp(min=0)), masked_label)
    if masked_label >= 0:
        idx_cluster.scatter_(1, index_down, torch.arange(cluster_num, device=x.device).expand_as(index_down))
    return index_down, idx_cluster


def distance_dtype(x: Tensor) -> torch.dtype:
    """Of `torch.cdist(x, x)`: x's, but autocast makes it float32 at least."""
    wide = torch.is_autocast_enabled(x.device.type)
    return torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
