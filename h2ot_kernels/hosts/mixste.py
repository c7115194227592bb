"""MixSTE and its hourglasses (HoT, TPC, H2OT), with the official parameter names."""

from functools import partial

import torch
from torch import Tensor, nn

from ..gather import gather_tokens
from ..hourglass import Kept
from ..linear import normed
from .blocks import Block, drop_rates
from .host import Host


class MixSTE(Host):
    """2D keypoints [B, F, J, in_channels] -> 3D poses: `depth` pairs of a spatial (STE) and a temporal (TTE) block.

    num_frames, num_joints: F, J. channels: C. drop_path_rate: of the last block in training, rising linearly from 0.
    hourglass: stages, pruner, recover, pipeline, keep, k, pos_embed, see `Host`.

    >>> import torch
    >>> from h2ot_kernels.hosts.mixste import MixSTE
    >>> model = MixSTE(num_frames=27, channels=32, depth=3, stages={1: 9}, pruner="cluster").eval()
    >>> model(torch.randn(2, 27, 17, 2)).shape
    torch.Size([2, 27, 17, 3])
    """

    embedding = "Spatial_patch_to_embedding"

    def __init__(
        self,
        num_frames: int = 243,
        num_joints: int = 17,
        in_channels: int = 2,
        channels: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.1,
        **hourglass,
    ):
        super().__init__((num_frames, num_joints, in_channels), depth, **hourglass)
        # The order of parameters and modules is that of the official state_dict.
        self.pos_embed_token = self.stage_embedding(channels)
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, num_joints, channels))
        self.Temporal_pos_embed = nn.Parameter(torch.zeros(1, num_frames, channels))
        self.x_token = self.recovery_token(channels)
        self.Spatial_patch_to_embedding = nn.Linear(in_channels, channels)
        rates = drop_rates(drop_path_rate, depth)
        hidden = int(channels * mlp_ratio)
        self.STEblocks = nn.ModuleList(Block(channels, num_heads, hidden, rate) for rate in rates)
        self.TTEblocks = nn.ModuleList(Block(channels, num_heads, hidden, rate) for rate in rates)
        self.cross_attention = self.recovering_attention(channels, num_heads)
        self.Spatial_norm = nn.LayerNorm(channels, eps=1e-6)
        self.Temporal_norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 3))

    def lift(self, x: Tensor, signals: dict) -> tuple[Tensor, Kept]:
        x = self.Spatial_patch_to_embedding(x) + self.Spatial_pos_embed
        norms = self.Spatial_norm, self.Temporal_norm
        if x.is_cpu:  # elsewhere it would only be one call more
            norms = (partial(normed, norm, dtype=x.dtype) for norm in norms)
        after_spatial, after_temporal = norms
        kept, signals = (), {**signals, "pos_embed": self.pos_embed_token}
        for i, (spatial, temporal) in enumerate(zip(self.STEblocks, self.TTEblocks, strict=True)):
            x, kept = self.hourglass.prune(i, x, kept, **signals)
            x = after_spatial(spatial(x, dim=2)[0])
            if i == 0:
                x = x + self._temporal_embedding(kept)
            x, query_key = temporal(x, dim=1, with_query_key=self.prunes_by_attention(i + 1))
            signals["query"], signals["key"] = query_key or (None, None)
            x = after_temporal(x)
        tail = {"x_token": self.x_token, "cross_attention": self.cross_attention}
        return self.hourglass.recover(x, kept, self.head, **tail), kept

    def _temporal_embedding(self, kept: Kept) -> Tensor:
        embed = self.Temporal_pos_embed
        if kept:
            embed = gather_tokens(embed.expand(kept[0].shape[0], -1, -1), kept[0])
        return embed[:, :, None]
