"""Recovery by cross-attention (TRA): every frame asks the kept ones."""

import torch
from torch import Tensor


def recover_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, *, scale: float | None = None
) -> Tensor:
    """softmax(Q K^T scale) V per head: query [F, C], [1, F, C] or [B, F, C]; key, value [B, K, C] -> [B, F, C].

    float32 and up inside; the result has the dtype of value.
    """
    B, K, C = key.shape
    precision = torch.promote_types(value.dtype, torch.float32)
    query = query.reshape(-1, query.shape[-2], C).expand(B, -1, -1)

    def heads(x: Tensor) -> Tensor:
        return x.to(precision).reshape(B, x.shape[1], num_heads, C // num_heads).transpose(1, 2)

    scale = (C // num_heads) ** -0.5 if scale is None else scale
    weights = (heads(query) @ heads(key).mT * scale).softmax(-1)
    return (weights @ heads(value)).transpose(1, 2).reshape(B, query.shape[1], C).to(value.dtype)
