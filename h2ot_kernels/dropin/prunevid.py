"""PruneVid's clustering: the tensor form, labels first."""

import torch
from torch import Tensor

from .clusters import select_and_assign


def cluster_dpc_knn(
    x: Tensor,
    cluster_num: int,
    k: int = 5,
    token_mask: Tensor | None = None,
    *,
    noise_dtype: torch.dtype | None = torch.float32,
    masked_label: int = -1,
) -> tuple[Tensor, int]:
    """(idx_cluster [B, N] in 0 .. cluster_num - 1, -1 for masked tokens; cluster_num) of x [B, N, C].

    Clusters are numbered by descending score. The noise is float32, as there, whatever x is; noise_dtype=None for code
    that draws it in x's dtype. Raises TypeError or ValueError that name the argument. Dtypes, cost, masked_label and
    everything else: `dropin.hot.cluster_dpc_knn`. Source: PruneVid's function of that name.

    >>> import torch
    >>> from h2ot_kernels.dropin import prunevid
    >>> idx, K = prunevid.cluster_dpc_knn(torch.tensor([[[0.0], [0.1], [5.0], [5.1]]]), 2, k=2)
    >>> (idx[0, 0] == idx[0, 1]).item(), (idx[0, 0] == idx[0, 2]).item(), K
    (True, False, 2)
    """
    beside = {"noise_dtype": noise_dtype, "masked_label": masked_label}
    return select_and_assign(x, cluster_num, k, token_mask, **beside)[1], cluster_num
