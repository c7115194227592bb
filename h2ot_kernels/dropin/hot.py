"""HoT's and TPC's functions and recovering attention, with their signatures and return orders."""

import torch
from torch import Tensor, nn

from ..attention import attend_rows
from ..checks import FLOATS
from ..gather import gather_tokens
from ..inference import is_transformed
from ..linear import Linear
from .clusters import integer, select_and_assign


def cluster_dpc_knn(
    x: Tensor, cluster_num: int, k: int, token_mask: Tensor | None = None, *, masked_label: int = -1
) -> tuple[Tensor, Tensor]:
    """(index_down [B, K], in descending score order; idx_cluster [B, N], positions in index_down) of x [B, N, C].

    x: a dtype of float32, float64, bfloat16 or float16; results int64. cluster_num, k: integers, or tensors that hold
    one. token_mask: [B, N] or [1, N], numbers or bool, > 0 is valid; masked tokens belong to no cluster (-1;
    masked_label=0: to the first, as in official code). The noise is drawn as the official
    code draws it: a seed gives the selection of that code in float64, where each sample has k valid tokens. A token as
    far from two selected ones goes to the first of them in x. Raises TypeError or ValueError that name the argument.
    Cost: that of `score_tokens` and `assign_clusters`. Source: HoT section 3.2.

    >>> import torch
    >>> from h2ot_kernels.dropin import hot
    >>> index_down, idx_cluster = hot.cluster_dpc_knn(torch.tensor([[[0.0], [0.1], [5.0], [5.1]]]), 2, 2)
    >>> index_down.shape, idx_cluster.shape
    (torch.Size([1, 2]), torch.Size([1, 4]))
    """
    return select_and_assign(x, cluster_num, k, token_mask, masked_label=masked_label)


def cluster_dpc_knn_center(
    x: Tensor, cluster_num: int, k: int, center: int, token_mask: Tensor | None = None, *, masked_label: int = -1
) -> tuple[Tensor, Tensor]:
    """As `cluster_dpc_knn`, without the frame `center`, which the caller appends (TPC).

    x [B, N, C] -> int64 index_down [B, K], K = cluster_num of the other N - 1 frames, and idx_cluster [B, N].
    center: one frame, -N .. N - 1, a negative one from the end.
    Raises TypeError or ValueError that name the argument. Its dtypes, cost and source: those of `cluster_dpc_knn`.

    >>> import torch
    >>> from h2ot_kernels.dropin import hot
    >>> index_down, _ = hot.cluster_dpc_knn_center(torch.tensor([[[0.0], [0.1], [5.0], [5.1]]]), 3, 2, center=1)
    >>> sorted(index_down[0].tolist())
    [0, 2, 3]
    """
    return select_and_assign(x, cluster_num, k, token_mask, without=(center,), masked_label=masked_label)


def index_points(points: Tensor, idx: Tensor) -> Tensor:
    """points [B, N, ...] at idx [B, ...] -> [B, ..., the rest]; idx in any order, repeats too, -1 is the last.

    points: any dtype; idx: int64. Gradients to points. Raises IndexError outside -N .. N - 1 (on a GPU: what indexing
    does, or NaN). Cost: one read and write of the result. Source: HoT's and PointNet++'s function of that name.

    >>> import torch
    >>> from h2ot_kernels.dropin import hot
    >>> hot.index_points(torch.tensor([[[3.0], [4.0], [5.0]]]), torch.tensor([[2, 0]]))
    tensor([[[5.],
             [3.]]])
    """
    records = is_transformed() or (torch.is_grad_enabled() and points.requires_grad)
    is_usual = points.dtype in FLOATS and 3 <= points.dim() <= 8 and idx.dtype == torch.int64 and idx.dim() == 2
    if is_usual and not records and len(idx) == len(points) and idx.numel():
        # its gradient would need a strictly ascending index; and there -1 is padding
        N = points.shape[1]
        return gather_tokens(points, torch.where(idx < 0, torch.where(idx < -N, N, idx + N), idx))
    batch = torch.arange(points.shape[0], device=points.device)
    return points[batch.view(-1, *[1] * (idx.dim() - 1)), idx]


class CrossAttention(nn.Module):
    """HoT's recovering attention, with the official arguments and parameter names, for code that builds its own.

    It is there as `hot.Cross_Attention`, too: the class is called that in HoT's code. Raises TypeError or ValueError
    that name the argument where dim or num_heads is no positive integer, num_heads does not divide dim, or attn_drop is
    not 0.

    >>> import torch
    >>> from h2ot_kernels.dropin import hot
    >>> token, kept = torch.zeros(1, 27, 16).expand(34, -1, -1), torch.randn(34, 9, 16)
    >>> hot.CrossAttention(16, num_heads=2, qkv_bias=True)(token, kept, kept).shape
    torch.Size([34, 27, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        dim = integer("dim", dim, 1)
        num_heads = integer("num_heads", num_heads, 1, dim, "dim")
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, wanted a divisor of dim = {dim}")
        if attn_drop:
            raise ValueError(f"attn_drop: got {attn_drop}, wanted 0: the weights are never stored")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.linear_q = Linear(dim, dim, bias=qkv_bias)
        self.linear_k = Linear(dim, dim, bias=qkv_bias)
        self.linear_v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        """x_1 [B, F, C] asks x_2 and x_3 [B, K, C] -> [B, F, C]. Equal rows of x_1 are projected once."""
        query, key, value = self.linear_q(shared_rows(x_1)), self.linear_k(x_2), self.linear_v(x_3)
        return self.proj_drop(self.proj(attend_rows(query, key, value, self.num_heads, self.scale)))


Cross_Attention = CrossAttention  # the official name


def shared_rows(x: Tensor) -> Tensor:
    """x [B, F, C], or [1, F, C] where all B are known to be the same: the recovery token, repeated.

    An expanded tensor shows it; for a copied one CPU inference looks, which costs a hundredth of the projection.
    """
    if x.shape[0] > 1 and x.stride(0) == 0:
        return x[:1]
    looks = not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and x.device.type == "cpu"
    if looks and x.shape[0] > 3 and torch.equal(x[:1], x[-1:]) and torch.equal(x, x[:1].expand_as(x)):
        return x[:1]
    return x
