"""Attention over rows of tokens, without stored weights, by what is fastest where the tensors are."""

from torch import Tensor
from torch.nn import functional

from .recover_attention import recover_attention


def attend_rows(query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """softmax(Q K^T scale) V per head: query [B or 1, F, C], key and value [B, K, C] -> [B, F, C]. Differentiable.

    scale: 1 / sqrt(C / num_heads) unless given. On the CPU `recover_attention`, which reads the parts of one projection
    in place, and whose backward keeps nothing but its arguments; elsewhere PyTorch's fused one.

    >>> import torch
    >>> from h2ot_kernels.attention import attend_rows
    >>> attend_rows(*torch.randn(2, 5, 3 * 8).chunk(3, -1), num_heads=2, scale=0.5).shape
    torch.Size([2, 5, 8])
    """
    if value.device.type == "cpu":
        return recover_attention(query, key, value, num_heads, scale=scale)
    return attend_by_torch(query, key, value, num_heads, scale)


def attend_by_torch(query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """`attend_rows` by `scaled_dot_product_attention`."""
    heads = [x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
    heads[0] = heads[0].expand(value.shape[0], -1, -1, -1)
    return functional.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).flatten(2)
