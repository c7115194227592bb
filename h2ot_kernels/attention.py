"""Attention over rows of tokens, without stored weights, by what is fastest where the tensors are."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backend import is_cpp
from .linear import Linear
from .linear_fused import attention_in_one_call
from .recover_attention import recover_attention

MOST_ROWS = 65535  # blocks on a grid's second axis


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


def attend_in_one_call(
    x: Tensor, qkv: Linear, proj: nn.Linear, dim: int, num_heads: int, norm: nn.LayerNorm | None = None, **update
) -> Tensor | None:
    """Self-attention along axis dim of x [..., C], from norm to residual, in CPU inference; None: by its parts.

    update: residual, scale, out as `Linear` takes them. The bits are those of its parts, but where 16-bit weights are
    `Widened`: only the result is rounded then.
    """
    if not x.is_cpu or torch.compiler.is_compiling() or x.shape[-1] % num_heads or not is_cpp("recover_attention", x):
        return None
    return attention_in_one_call(x, qkv, proj, dim, num_heads, norm=norm, **update)


def takes_one_product(x: Tensor, dim: int) -> bool:
    """Whether self-attention along axis dim of x [..., C] is best made from one product with `attend_packed`.

    Off the CPU, where each operator is a launch; where torch's attention can read that product without a copy.
    """
    return x.device.type != "cpu" and (dim == x.dim() - 2 or (dim == 1 and x.dim() == 4 and x.shape[0] == 1))


def attend_packed(qkv: Tensor, num_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention along axis dim of qkv [..., 3 C], the projected query, key and value beside each other, by torch.

    dim: the last but one axis, or 1 of [1, F, J, 3 C]. Returns (attended [..., C], query, key), these two views
    [rows, H, T, D] with rows the other axes as one.

    >>> import torch
    >>> from h2ot_kernels.attention import attend_packed
    >>> [tuple(x.shape) for x in attend_packed(torch.randn(1, 9, 5, 24), 2, dim=1)]
    [(1, 9, 5, 8), (5, 2, 9, 4), (5, 2, 9, 4)]
    """
    *sizes, width = qkv.shape
    C, T = width // 3, sizes[dim]
    if dim == len(sizes) - 1:
        rows = qkv.reshape(-1, T, 3, num_heads, C // num_heads).permute(2, 0, 3, 1, 4)
        axes = (0, 2, 1, 3)
    else:
        rows = qkv.reshape(T, -1, 3, num_heads, C // num_heads).permute(2, 1, 3, 0, 4)
        axes = (2, 0, 1, 3)
    query, key, value = rows.unbind(0)
    attended = _fused(query, key, value)
    return attended.permute(axes).reshape(*sizes, C), query, key


def attend_by_torch(query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """`attend_rows` by `scaled_dot_product_attention`."""
    heads = [x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
    heads[0] = heads[0].expand(value.shape[0], -1, -1, -1)
    return _fused(*heads, scale).transpose(1, 2).flatten(2)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """By torch's fused attention, as many rows at once as it takes: query [rows, H, T, D] -> the same of the value's.

    An exported graph keeps its rows free.
    """
    if torch.compiler.is_exporting() or value.shape[0] <= (most := _rows_at_once(query)):
        return functional.scaled_dot_product_attention(query, key, value, scale=scale)
    parts = zip(query.split(most), key.split(most), value.split(most), strict=True)
    return torch.cat([functional.scaled_dot_product_attention(*part, scale=scale) for part in parts])


def _rows_at_once(query: Tensor) -> int:
    """FlashAttention, torch's for 16 bits, does not ask: it launches a block for each row on a grid's second axis, and
    its backward pass counts the query's gradient, in tiles of 128 x 32, in 32 bits (until its pull request 2260).
    """
    if not torch.is_grad_enabled() or query.element_size() > 2:
        return MOST_ROWS
    _, H, T, D = query.shape
    tiles = H * -(-T // 128) * -(-D // 32)
    return min(MOST_ROWS, max(2**31 // (128 * 32) // max(tiles, 1), 1))
