"""Recovery by cross-attention (TRA): every frame asks the kept ones."""

import torch
from torch import Tensor
from torch.nn import functional


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


def recover_pose(token, query, key, value, proj, norm, head, num_heads: int, *, num_joints: int = 17) -> Tensor:
    """head(norm(token + proj(attention))): key, value [B * J, K, C] -> [B, J, F, out_features of head]."""
    attended = recover_attention(query, key, value, num_heads)
    projected = functional.linear(attended, proj.weight, proj.bias)
    normed = functional.layer_norm(token + projected, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    pose = functional.linear(normed, head.weight, head.bias)
    return pose.unflatten(0, (-1, num_joints))
