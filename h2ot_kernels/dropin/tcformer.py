"""The token-dictionary forms of TCFormer, mmpose and Chat-UniVi. Empty or padded clusters give no NaN."""

import torch
from torch import Tensor

from .. import checks, cluster
from . import prunevid
from .clusters import INTEGERS, integer, per_token, tokens_in
from .hot import index_points

# What stands beside the tokens and is handed on unchanged; a mask becomes None: no merged token is padding.
KEPT = ("map_size", "init_grid_size")


def cluster_dpc_knn(
    token_dict: dict,
    cluster_num: int,
    k: int = 5,
    token_mask: Tensor | None = None,
    *,
    noise_dtype: torch.dtype | None = None,
    masked_label: int = -1,
) -> tuple[Tensor, int]:
    """(idx_cluster [B, N], cluster_num) of token_dict["x"] [B, N, C]; see `dropin.prunevid.cluster_dpc_knn`.

    noise_dtype: x's by default, as in TCFormer; torch.float32 as in Chat-UniVi. masked_label: as in
    `dropin.hot.cluster_dpc_knn`.
    Raises TypeError or ValueError that name the argument. Cost: that of `score_tokens` and `assign_clusters`.
    Source: TCFormer section 3.

    >>> import torch
    >>> from h2ot_kernels.dropin import tcformer
    >>> tokens = {"x": torch.tensor([[[0.0], [0.2], [5.0], [5.2]]])}
    >>> idx_cluster, K = tcformer.cluster_dpc_knn(tokens, 2, k=2)
    >>> merged = tcformer.merge_tokens(tokens, idx_cluster, K)
    >>> [round(x, 3) for x in sorted(merged["x"].flatten().tolist())], merged["token_num"]
    ([0.1, 5.1], 2)
    """
    return prunevid.cluster_dpc_knn(
        tokens_in(token_dict), cluster_num, k, token_mask, noise_dtype=noise_dtype, masked_label=masked_label
    )


def merge_tokens(token_dict: dict, idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None) -> dict:
    """The weighted means of the clusters, as a token dictionary: x [B, K, C], token_num and what token_dict had of
    idx_token [B, M] (followed into the clusters), agg_weight [B, M, 1] (times each token's share), map_size,
    init_grid_size (the same) and mask (None).

    token_dict: x [B, N, C], of the dtypes of `h2ot_kernels.merge_tokens`, and perhaps the others, idx_token integers.
    idx_cluster: integers [B, N] or [1, N], -1 .. K - 1, K = cluster_num: an integer, or a tensor that holds one.
    token_weight: numbers [B, N, 1] or [B, N]. As in the official code a share is w / (sum of w + 1e-6). Tokens labelled
    -1, or not > 0 in token_dict["mask"], are not merged; a token of idx_token that was not merged stays -1, its
    agg_weight 0. Gradients to x and token_weight. Cost: one read of x. Raises TypeError or ValueError that name the
    argument, IndexError for a label or an idx_token outside its range. Source: TCFormer section 3.

    >>> import torch
    >>> from h2ot_kernels.dropin import tcformer
    >>> tokens = {"x": torch.tensor([[[1.0], [3.0], [7.0]]])}
    >>> merged = tcformer.merge_tokens(tokens, torch.tensor([[0, 0, 1]]), 2)
    >>> [round(x, 3) for x in merged["x"].flatten().tolist()], merged["token_num"]
    ([2.0, 7.0], 2)
    """
    x = tokens_in(token_dict)
    checks.tensor("x", x, (3,), "[B, N, C]")
    B, N, _ = x.shape
    K = integer("cluster_num", cluster_num, 1)
    labels = per_token("idx_cluster", idx_cluster, x, INTEGERS).long()
    if token_dict.get("mask") is not None:
        labels = torch.where(per_token("mask", token_dict["mask"], x) > 0, labels, -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    given = None if token_weight is None else per_token("token_weight", token_weight, x).to(wide)
    merged = cluster.merge_tokens(x, labels, K, given)  # looks at the labels' range
    weight = x.new_ones(B, N, dtype=wide) if given is None else given
    valid, member = labels >= 0, labels.clamp(min=0)
    counted = torch.where(valid, weight, 0.0)
    total = counted.new_zeros(B, K).scatter_add(1, member, counted)
    merged = (merged * (total / (total + 1e-6))[..., None]).to(x.dtype)

    out = {"x": merged, "token_num": cluster_num} | {name: token_dict[name] for name in KEPT if name in token_dict}
    idx_token = token_dict.get("idx_token")
    if idx_token is not None:
        checks.tensor("idx_token", idx_token, (2,), "[B, M]", INTEGERS)
        checks.has_shape("idx_token", idx_token, (B, idx_token.shape[1]), "[B, M]")
        checks.same_device("idx_token", idx_token, "x", x)
        idx_token = idx_token.long()
        here, at = idx_token >= 0, idx_token.clamp(min=0)
        out["idx_token"] = torch.where(here, labels.gather(1, at), -1)
        if token_dict.get("agg_weight") is not None:
            dtype = x.dtype if token_weight is None else token_weight.dtype
            dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
            share = (counted / (total + 1e-6).gather(1, member)).to(dtype)
            followed = torch.where(here[..., None], index_points(share[..., None], at), 0.0)
            out["agg_weight"] = token_dict["agg_weight"] * followed
    if "mask" in token_dict:
        out["mask"] = None
    return out
