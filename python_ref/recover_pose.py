"""Recovery by cross-attention with what follows it in HoT: projection, residual, norm and head."""

from torch import Tensor
from torch.nn import functional

from .recover_attention import recover_attention


def recover_pose(token, query, key, value, proj, norm, head, num_heads: int, *, num_joints: int = 17) -> Tensor:
    """head(norm(token + proj(attention))): key, value [B * J, K, C] -> [B, J, F, out_features of head]."""
    attended = recover_attention(query, key, value, num_heads)
    projected = functional.linear(attended, proj.weight, proj.bias)
    pose = recover_tail(token, projected, norm.weight, norm.bias, head.weight, head.bias, norm.eps)
    return pose.unflatten(0, (-1, num_joints))


def recover_tail(token, projected, norm_weight, norm_bias, head_weight, head_bias, eps: float) -> Tensor:
    """head(norm(token + projected)): token [F, C], projected [R, F, C] -> [R, F, out_features of head]."""
    normed = functional.layer_norm(token + projected, token.shape[-1:], norm_weight, norm_bias, eps)
    return functional.linear(normed, head_weight, head_bias)
