"""What the drop-in forms of DPC-kNN share: the official noise, the order of the selected tokens, their labels."""

import torch
from torch import Tensor

from ..cluster import assign_clusters
from ..score import score_tokens


def select_and_assign(
    x: Tensor, cluster_num: int, k: int, token_mask: Tensor | None, without: int | None = None
) -> tuple[Tensor, Tensor]:
    """(index_down [B, K] in descending score order, idx_cluster [B, N]: positions in index_down).

    The noise is drawn from torch's default generator as official code draws it, once a call; the selection is that of
    the float64 official formulation with this noise. token_mask [B, N]: > 0 is valid. Masked tokens get the label -1
    and come last. without: a token that is not selected.
    """
    noise = torch.rand(x.shape[0], x.shape[1], device=x.device, dtype=x.dtype) * 1e-6
    mask = None if token_mask is None else token_mask > 0
    score = score_tokens(x, k, mask=mask, noise=noise).score
    selectable = x.shape[1]
    if without is not None:
        selectable -= 1
        lowest = torch.finfo(score.dtype).min  # a masked token still comes before the excluded one
        score = score.clamp(min=lowest)
        score[:, without] = -torch.inf
    if not 1 <= cluster_num <= selectable:
        raise ValueError(f"cluster_num: got {cluster_num}, wanted 1 to {selectable}")
    index_down = score.sort(dim=-1, descending=True, stable=True).indices[:, :cluster_num]
    index, position = index_down.sort(dim=-1)
    labels = assign_clusters(x, index, mask=mask)
    return index_down, torch.where(labels >= 0, position.gather(1, labels.clamp(min=0)), -1)
