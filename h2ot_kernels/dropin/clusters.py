"""What the drop-in forms of DPC-kNN share: the official noise, the order of the selected tokens, their labels."""

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
) -> tuple[Tensor, Tensor]:
    """(index_down [B, K] in descending score order, idx_cluster [B, N]: positions in index_down).

    The noise is drawn from torch's default generator as official code draws it, once a call; the selection is that of
    the float64 official formulation with this noise. token_mask [B, N]: > 0 is valid. Masked tokens get the label -1
    and come last. without: a token that is not selected. noise_dtype: that of the distances in official code, by
    default what `torch.cdist` makes of x.
    """
    checks.tokens(x)  # before the noise is drawn
    dtype = distance_dtype(x) if noise_dtype is None else noise_dtype
    noise = torch.rand(x.shape[0], x.shape[1], device=x.device, dtype=dtype) * 1e-6
    mask = None if token_mask is None else token_mask > 0
    selectable = x.shape[1] - (without is not None)
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
    return index.gather(1, order), torch.where(labels >= 0, rank.gather(1, labels.clamp(min=0)), -1)


def distance_dtype(x: Tensor) -> torch.dtype:
    """Of `torch.cdist(x, x)`: x's, but autocast makes it float32 at least."""
    wide = torch.is_autocast_enabled(x.device.type)
    return torch.promote_types(x.dtype, torch.float32) if wide else x.dtype
