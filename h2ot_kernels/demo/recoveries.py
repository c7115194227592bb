"""The recovering operations as comparisons, see operations.py."""

import functools

import torch
from torch import Tensor, nn

import h2ot_kernels as h2ot
import python_ref
from python_ref import official

from ..comparison import Comparison, Verdict, same_values


class RecoveryWeights:
    """The weights of a recovery: token, attention, norm and head, random but fixed, and the work they take."""

    def __init__(self, kept: Tensor, num_frames: int, num_joints: int, num_heads: int = 8):
        rows, K, C = kept.shape
        self.shape = {"B": rows // num_joints, "J": num_joints, "F": num_frames, "K": K, "C": C}
        self.num_heads, self.num_joints = num_heads, num_joints
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            torch.manual_seed(0)
            self.attention = official.CrossAttention(C, num_heads, qkv_bias=True)
            self.ours = h2ot.nn.TokenRecoveringAttention(C, num_heads).eval()
            self.ours.load_state_dict(self.attention.state_dict())
            self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 3)
            self.token = torch.randn(1, num_frames, C) * 0.02
        for module in (self.attention, self.ours, self.norm, self.head):
            module.requires_grad_(False).to(kept.device, kept.dtype)
        self.token = self.token.to(kept)
        products = 2 * C * C * (num_frames + rows * (2 * K + num_frames))
        self.flops = products + 4 * rows * num_frames * K * C

    def doubled(self):
        """The same weights in float64."""
        with torch.inference_mode(False):
            attention = official.CrossAttention(self.token.shape[-1], self.num_heads, qkv_bias=True).double()
            attention.load_state_dict(self.attention.state_dict())
        return attention.to(self.token.device), self.token.double()


def recover_attention(kept: Tensor, num_frames: int, num_joints: int) -> Comparison:
    """TRA with its projections and residual: kept [(B J), K, C] -> [(B J), F, C]."""
    weights = RecoveryWeights(kept, num_frames, num_joints)

    def ours() -> Tensor:
        return weights.ours(weights.token, kept)

    @functools.cache
    def oracle() -> Tensor:
        attention, token = weights.doubled()
        return official.cross_attention(token, kept.double(), attention)

    def check() -> Verdict:
        theirs = official.cross_attention(weights.token, kept, weights.attention)
        return same_values(theirs, ours(), oracle(), kept.shape[-1])

    return Comparison(
        "recover_attention",
        weights.shape,
        official.cross_attention,
        (weights.token, kept, weights.attention),
        ours,
        check,
        flops=weights.flops,
        num_bytes=kept.nbytes + kept.nbytes * num_frames // kept.shape[1],
    )


def recover_pose(kept: Tensor, num_frames: int, num_joints: int) -> Comparison:
    """TRA, LayerNorm and head: kept [(B J), K, C] -> poses."""
    weights = RecoveryWeights(kept, num_frames, num_joints)
    norm, head = weights.norm, weights.head
    tail = nn.Sequential(norm, head)

    def opponent(token: Tensor, x: Tensor, attention: nn.Module) -> Tensor:
        return head(norm(official.cross_attention(token, x, attention))).unflatten(0, (-1, num_joints))

    def ours() -> Tensor:
        return weights.ours(weights.token, kept, head=tail).unflatten(0, (-1, num_joints))

    @functools.cache
    def oracle() -> Tensor:
        attention, token = weights.doubled()
        recovered = official.cross_attention(token, kept.double(), attention)
        normed = nn.functional.layer_norm(recovered, recovered.shape[-1:], eps=norm.eps)
        return nn.functional.linear(normed, head.weight.double(), head.bias.double()).unflatten(0, (-1, num_joints))

    def check() -> Verdict:
        return same_values(opponent(weights.token, kept, weights.attention), ours(), oracle(), kept.shape[-1])

    return Comparison(
        "recover_pose",
        weights.shape,
        opponent,
        (weights.token, kept, weights.attention),
        ours,
        check,
        kernel="recover_tail",
        flops=weights.flops + 6 * kept.shape[0] * num_frames * kept.shape[-1],
        num_bytes=kept.nbytes,
    )


def recover_interpolate(x: Tensor, index: Tensor, num_frames: int) -> Comparison:
    """TRI of x [B, K, ...] at its true frames."""
    B, K = x.shape[:2]
    channels = x[0, 0].numel()

    oracle = functools.cache(lambda: python_ref.recover_interpolate(x.double(), index, num_frames))

    def check() -> Verdict:
        theirs, ours = official.interpolate(x, index, num_frames), h2ot.recover_interpolate(x, index, num_frames)
        return same_values(theirs, ours, oracle(), channels)

    shape = {"B": B, "K": K, "F": num_frames, "C": channels}
    return Comparison(
        "recover_interpolate",
        shape,
        official.interpolate,
        (x, index, num_frames),
        lambda: h2ot.recover_interpolate(x, index, num_frames),
        check,
        num_bytes=x.nbytes + x.nbytes * num_frames // K,
    )
