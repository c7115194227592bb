"""MotionBERT's DSTformer and its hourglasses (HoT, H2OT), with the official parameter names."""

import torch
from torch import Tensor, nn

from ..hourglass import Kept
from .blocks import Attention, Mlp, QueryKey, Representation, fused, joined
from .host import Host


class DualBlock(nn.Module):
    """Attention and MLP along the joints (`_s`), attention and MLP along the frames (`_t`), in the order asked for."""

    def __init__(self, channels: int, num_heads: int, hidden: int, order: str):
        super().__init__()
        self.order = order
        for make, name in (
            (lambda: nn.LayerNorm(channels, eps=1e-6), "norm1"),
            (lambda: Attention(channels, num_heads, proj_first=True), "attn"),
            (lambda: nn.LayerNorm(channels, eps=1e-6), "norm2"),
            (lambda: Mlp(channels, hidden), "mlp"),
        ):
            self.add_module(f"{name}_s", make())
            self.add_module(f"{name}_t", make())

    def forward(self, x: Tensor) -> tuple[Tensor, QueryKey]:
        """x [B, F, J, C] -> the block's output and its temporal (query, key)."""
        for axis in self.order:
            if axis == "s":
                x, _ = self.attn_s(x, dim=2, with_query_key=False, norm=self.norm1_s, residual=x)
                x = self.mlp_s(x, norm=self.norm2_s, residual=x)
            else:
                x, query_key = self.attn_t(x, dim=1, norm=self.norm1_t, residual=x)
                x = self.mlp_t(x, norm=self.norm2_t, residual=x)
        return x, query_key


class MotionBERT(Host):
    """2D keypoints and confidence [B, F, J, 3] -> 3D poses: `depth` layers of two streams with learnt weights.

    In one stream (`blocks_st`) space comes before time, in the other (`blocks_ts`) after it.
    num_frames, num_joints: F, J; unpruned, a call may have fewer frames, as the official model's (the last clip of a
    video), which take the first of `temp_embed`. channels: C. representation: features before the last layer.
    hourglass: stages, pruner, recover, pipeline, keep, k, pos_embed, see `Host`.

    >>> import torch
    >>> from h2ot_kernels.hosts.motionbert import MotionBERT
    >>> model = MotionBERT(num_frames=27, channels=32, depth=2, stages={1: 9}, pruner="cluster").eval()
    >>> model(torch.randn(2, 27, 17, 3)).shape
    torch.Size([2, 27, 17, 3])
    """

    embedding = "joints_embed"
    takes_fewer = True

    def __init__(
        self,
        num_frames: int = 243,
        num_joints: int = 17,
        in_channels: int = 3,
        channels: int = 256,
        depth: int = 5,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        representation: int = 512,
        **hourglass,
    ):
        super().__init__((num_frames, num_joints, in_channels), depth, **hourglass)
        hidden = int(channels * mlp_ratio)
        # The order of parameters and modules is that of the official state_dict.
        self.pos_embed_token = self.stage_embedding(channels)
        self.x_token = self.recovery_token(channels)
        self.temp_embed = nn.Parameter(torch.zeros(1, num_frames, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_joints, channels))
        self.joints_embed = nn.Linear(in_channels, channels)
        self.blocks_st = nn.ModuleList(DualBlock(channels, num_heads, hidden, "st") for _ in range(depth))
        self.blocks_ts = nn.ModuleList(DualBlock(channels, num_heads, hidden, "ts") for _ in range(depth))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.cross_attention = self.recovering_attention(channels, num_heads)
        self.pre_logits = Representation(channels, representation)
        self.head = nn.Linear(representation, 3)
        self.ts_attn = nn.ModuleList(nn.Linear(2 * channels, 2) for _ in range(depth))

    def lift(self, x: Tensor, signals: dict) -> tuple[Tensor, Kept]:
        x = self.joints_embed(x) + (self.pos_embed + self.temp_embed[:, : x.shape[1]])
        kept, query, key = (), None, None
        for i, (st, ts, fusion) in enumerate(zip(self.blocks_st, self.blocks_ts, self.ts_attn, strict=True)):
            x, kept = self.hourglass.prune(i, x, kept, pos_embed=self.pos_embed_token, query=query, key=key, **signals)
            (first, of_first), (second, of_second) = st(x), ts(x)
            x = fused(fusion, first, second)
            if self.prunes_by_attention(i + 1):
                query, key = joined([of_first, of_second])
        if self.may_be_shorter:
            return self._regress(self.norm(x)), kept
        tail = {"x_token": self.x_token, "cross_attention": self.cross_attention}
        return self.hourglass.recover(self.norm(x), kept, self._regress, **tail), kept

    def _regress(self, x: Tensor) -> Tensor:
        return self.head(self.pre_logits(x))
