"""What the drop-in forms share: checks of what official code takes; of DPC-kNN, the official noise, the order of the
selected tokens, their labels.
"""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import checks
from ..cluster import assign_clusters, cluster_tokens
from ..modes import is_autocast_on
from ..score import score_tokens
from ..select import select_tokens

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (torch.bool, *INTEGERS, *checks.FLOATS)
LARGEST = 2**63 - 1


def integer(name: str, value, low: int, high: int | None = None, high_name: str = "") -> int:
    """value, an integer in low .. high, as an int; a tensor of one is taken, too, as torch's own functions take it."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype in INTEGERS:
        value = operator.index(value)
    checks.integer(name, value, low, high, high_name)
    return operator.index(value)


def tokens_in(token_dict: Mapping) -> Tensor:
    """What a token dictionary holds as x."""
    if not isinstance(token_dict, Mapping):
        raise TypeError(f"token_dict: got {type(token_dict).__name__}, wanted a dictionary")
    if "x" not in token_dict:
        raise ValueError(f"token_dict: got {', '.join(map(repr, token_dict)) or 'nothing'}, wanted 'x' among its keys")
    return token_dict["x"]


def per_token(name: str, value: Tensor, x: Tensor, dtypes: Sequence[torch.dtype] = NUMBERS) -> Tensor:
    """value as [B, N], a number for each token of x [B, N, ...]; given as [B, N, 1], too, or as [1, N], for all samples
    the same, or for one sample as [N, 1].
    """
    checks.tensor(name, value, (2, 3), "[B, N] or [B, N, 1]", dtypes)
    checks.same_device(name, value, "x", x)
    B, N = x.shape[:2]
    of_one = [(N, 1)] if B == 1 else []
    if tuple(value.shape) not in ((B, N), (B, N, 1), (1, N), (1, N, 1), *of_one):
        checks.has_shape(name, value, (B, N, 1)[: value.dim()], "[B, N, 1]" if value.dim() == 3 else "[B, N]")
    return value.reshape(B if value.numel() == B * N else 1, N).expand(B, N)


def select_and_assign(
    x: Tensor,
    cluster_num: int,
    k: int,
    token_mask: Tensor | None,
    without: tuple[int, ...] = (),
    noise_dtype: torch.dtype | None = None,
    masked_label: int = -1,
) -> tuple[Tensor, Tensor]:
    """(index_down [B, K] in descending score order, idx_cluster [B, N]: positions in index_down).

    The noise is drawn from torch's default generator as official code draws it, once a call; the selection is that of
    the float64 official formulation with this noise (but where a sample has fewer than k valid tokens: the mean is over
    those). token_mask [B, N]: > 0 is valid. Masked tokens come last and get the label -1, or masked_label: 0 is that of
    official code, in which one that is selected has its own. A token as far from two selected ones goes to the first of
    them in x. without: the center, which is not selected. noise_dtype: that of the distances in official code, by
    default what `torch.cdist` makes of x.
    """
    checks.tokens(x)  # all of it before the noise is drawn
    N = checks.size_of(x, 1)
    without = [integer("center", token, -N, N - 1) for token in without]
    others = "the number of other tokens" if without else "the number of tokens"
    cluster_num = integer("cluster_num", cluster_num, 1, N - len(without), others)
    k = integer("k", k, 1, N, "the number of tokens")
    masked_label = integer("masked_label", masked_label, -LARGEST, LARGEST)
    mask = None if token_mask is None else per_token("token_mask", token_mask, x) > 0
    dtype = distance_dtype(x) if noise_dtype is None else noise_dtype
    checks.choice("noise_dtype", dtype, checks.FLOATS)
    noise = torch.rand(x.shape[0], x.shape[1], device=x.device, dtype=dtype) * 1e-6
    if not without:
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
    """Of `torch.cdist(x, x)`: x's, but autocast, on devices that have it, makes it float32 at least."""
    return torch.promote_types(x.dtype, torch.float32) if is_autocast_on(x.device.type) else x.dtype
