"""MixSTE, HoT, TPC and H2OT on it as public code formulates them: the opponent in speed tables, the equality partner.

Stored N x N attention weights, one copy of the tokens for each change of layout, the recovery token repeated over
samples and joints. The parameter names are the official ones. Nothing here depends on the rest of the package.
"""

import torch
from torch import Tensor, nn

from .official import (
    CrossAttention,
    cluster_dpc_knn,
    cluster_dpc_knn_center,
    cross_attention,
    index_points,
    interpolate,
    prune_sample,
)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        rows, N, C = x.shape
        qkv = self.qkv(x).reshape(rows, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        weights = (query @ key.transpose(-2, -1)) * self.scale
        weights = weights.softmax(dim=-1)
        return self.proj_drop(self.proj((weights @ value).transpose(1, 2).reshape(rows, N, C)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Each row of x becomes 0 with probability `rate` in training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, drop: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, drop=drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OfficialMixSTE(nn.Module):
    """x [B, F, J, in_channels] -> poses [B, F, J, 3]; recover=None: (poses of the kept frames, index).

    stages: {block: tokens}; pruner: "cluster" or "sampler"; recover: "attention", "interpolation" or None; keep_centre:
    the centre frame is left out of the clustering and appended (TPC); pos_embed: HoT's embedding after the pruning.
    """

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
        *,
        stages: dict[int, int] | None = None,
        pruner: str = "cluster",
        recover: str | None = None,
        keep_centre: bool = False,
        pos_embed: bool = False,
    ):
        super().__init__()
        self.num_frames, self.stages, self.pruner, self.recover = num_frames, stages or {}, pruner, recover
        self.keep_centre = keep_centre
        if pos_embed:
            self.pos_embed_token = nn.Parameter(torch.zeros(1, *self.stages.values(), channels))
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, num_joints, channels))
        self.Temporal_pos_embed = nn.Parameter(torch.zeros(1, num_frames, channels))
        if recover == "attention":
            self.x_token = nn.Parameter(torch.zeros(1, num_frames, channels))
        self.Spatial_patch_to_embedding = nn.Linear(in_channels, channels)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.STEblocks = nn.ModuleList([Block(channels, num_heads, mlp_ratio, rate) for rate in rates])
        self.TTEblocks = nn.ModuleList([Block(channels, num_heads, mlp_ratio, rate) for rate in rates])
        if recover == "attention":
            self.cross_attention = CrossAttention(channels, num_heads, qkv_bias=True)
        self.Spatial_norm = nn.LayerNorm(channels, eps=1e-6)
        self.Temporal_norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 3))

    def forward(self, x: Tensor, index: Tensor | tuple[Tensor, ...] | None = None, *, noise: Tensor | None = None):
        """index [B, K] (several stages: one each): input frames to keep; noise [B, N]: that of the clustering."""
        B, F, J, _ = x.shape
        x = self.Spatial_patch_to_embedding(x.reshape(B * F, J, -1)) + self.Spatial_pos_embed
        x = to_temporal(self.Spatial_norm(self.STEblocks[0](x)), B)
        x = self.Temporal_norm(self.TTEblocks[0](x + self.Temporal_pos_embed))
        pruning = FramePruning(F, self.stages, self.pruner, self.keep_centre, index, noise)
        for i in range(1, len(self.STEblocks)):
            x = rows_to_frames(x, B)
            x = pruning(i, x, getattr(self, "pos_embed_token", None))
            x = x.reshape(-1, J, x.shape[-1])
            x = to_temporal(self.Spatial_norm(self.STEblocks[i](x)), B)
            x = self.Temporal_norm(self.TTEblocks[i](x))
        if self.recover == "attention":
            x = cross_attention(self.x_token, x, self.cross_attention)
        pose = self.head(rows_to_frames(x, B))
        if self.recover == "interpolation":
            pose = interpolate(pose, pruning.frames, F)
        return (pose, pruning.frames) if self.stages and self.recover is None else pose


class FramePruning:
    """Which frames are left: one object a forward pass. index, noise: as the model's forward takes them."""

    def __init__(self, num_frames: int, stages: dict[int, int], pruner: str, keep_centre: bool, index, noise):
        self.frames = torch.arange(num_frames)[None]
        self.stages, self.pruner, self.keep_centre, self.noise = stages, pruner, keep_centre, noise
        self.wanted = dict(zip(stages, (index,) if isinstance(index, Tensor) else index or (), strict=False))

    def __call__(self, block: int, x: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        """x [B, F, J, C] as it enters the block -> its kept frames, + pos_embed [1, K, C] by way of [(B J), K, C]."""
        if block not in self.stages:
            return x
        B = x.shape[0]
        self.frames = self.frames.to(x.device)
        if self.wanted:
            wanted = self.wanted[block]
            position = torch.searchsorted(self.frames.expand(len(wanted), -1).contiguous(), wanted)
        else:
            position = self._select(x, self.stages[block])
        self.frames = self.frames.expand(len(position), -1).gather(1, position)
        x = index_points(x, position.expand(B, -1))
        return x if pos_embed is None else rows_to_frames(frames_to_rows(x) + pos_embed, B)

    def _select(self, x: Tensor, num_tokens: int) -> Tensor:
        if self.pruner == "sampler":
            return prune_sample(x.shape[1], num_tokens).to(x.device)
        tokens = x.mean(dim=2)
        if self.keep_centre:
            centre = (x.shape[1] - 1) // 2
            index, _ = cluster_dpc_knn_center(tokens, num_tokens - 1, 2, centre, noise=self.noise)
            index = torch.cat([index, torch.full_like(index[:, :1], centre)], dim=-1)
        else:
            index, _ = cluster_dpc_knn(tokens, num_tokens, 2, noise=self.noise)
        return index.sort(dim=-1).values


def rows_to_frames(x: Tensor, B: int) -> Tensor:
    """[(B J), F, C] -> [B, F, J, C]."""
    return x.reshape(B, -1, *x.shape[1:]).permute(0, 2, 1, 3)


def frames_to_rows(x: Tensor) -> Tensor:
    """[B, F, J, C] -> [(B J), F, C]."""
    B, F, J, C = x.shape
    return x.permute(0, 2, 1, 3).reshape(B * J, F, C)


def to_temporal(x: Tensor, B: int) -> Tensor:
    """[(B F), J, C] -> [(B J), F, C]."""
    return frames_to_rows(x.reshape(B, -1, *x.shape[1:]))


MODELS = {
    "mixste": {},
    "hot_mixste": {"stages": {3: 81}, "recover": "attention", "pos_embed": True},
    "tpc_mixste": {"stages": {7: 61}, "keep_centre": True},
    "h2ot_mixste": {"stages": {1: 121, 2: 81}, "pruner": "sampler", "recover": "interpolation"},
}


def build(name: str, **overrides) -> OfficialMixSTE:
    """The official formulation of one of MODELS, weights random."""
    return OfficialMixSTE(**{**MODELS[name], **overrides})
