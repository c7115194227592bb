"""MotionBERT's DSTformer, HoT and H2OT on it as public code formulates them: the opponent, the equality partner.

Tokens are rows [(B F), J, C] throughout; temporal attention permutes its heads instead, and stores its weights. The
parameter names are the official ones. Nothing here depends on the rest of the package.
"""

import torch
from torch import Tensor, nn

from .official import CrossAttention, cross_attention, interpolate
from .official_mixste import FramePruning, Mlp, frames_to_rows, rows_to_frames


class Attention(nn.Module):
    """Along the joints, or along the frames of each joint; qkv_bias as MotionBERT has it, not as MotionAGFormer."""

    def __init__(self, dim: int, num_heads: int, mode: str, qkv_bias: bool = True):
        super().__init__()
        self.num_heads, self.mode = num_heads, mode
        self.scale = (dim // num_heads) ** -0.5
        self.proj = nn.Linear(dim, dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x [(B F), J, C]."""
        rows, J, C = x.shape
        qkv = self.qkv(x).reshape(rows, J, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        if self.mode == "temporal":
            query, key, value = (self._over_frames(heads, num_frames) for heads in (query, key, value))
        weights = (query @ key.transpose(-2, -1)) * self.scale
        x = weights.softmax(dim=-1) @ value
        if self.mode == "temporal":
            x = x.permute(0, 3, 2, 1, 4).reshape(rows, J, C)
        else:
            x = x.transpose(1, 2).reshape(rows, J, C)
        return self.proj(x)

    def _over_frames(self, heads: Tensor, num_frames: int) -> Tensor:
        """[(B F), H, J, D] -> [B, H, J, F, D]."""
        return heads.reshape(-1, num_frames, *heads.shape[1:]).permute(0, 2, 3, 1, 4)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, st_mode: str):
        super().__init__()
        self.st_mode = st_mode
        self.norm1_s = nn.LayerNorm(dim, eps=1e-6)
        self.norm1_t = nn.LayerNorm(dim, eps=1e-6)
        self.attn_s = Attention(dim, num_heads, "spatial")
        self.attn_t = Attention(dim, num_heads, "temporal")
        self.norm2_s = nn.LayerNorm(dim, eps=1e-6)
        self.norm2_t = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_s = Mlp(dim, int(dim * mlp_ratio))
        self.mlp_t = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        return (
            self._time(self._space(x), num_frames) if self.st_mode == "st" else self._space(self._time(x, num_frames))
        )

    def _space(self, x: Tensor) -> Tensor:
        x = x + self.attn_s(self.norm1_s(x), 1)
        return x + self.mlp_s(self.norm2_s(x))

    def _time(self, x: Tensor, num_frames: int) -> Tensor:
        x = x + self.attn_t(self.norm1_t(x), num_frames)
        return x + self.mlp_t(self.norm2_t(x))


class Representation(nn.Module):
    def __init__(self, dim: int, features: int):
        super().__init__()
        self.fc = nn.Linear(dim, features)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class OfficialMotionBERT(nn.Module):
    """x [B, F, J, 3] -> poses [B, F, J, 3]; recover=None: (poses of the kept frames, index). Unpruned, F may be less
    than num_frames.

    stages, pruner, recover, keep_centre, pos_embed: see `OfficialMixSTE`.
    """

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
        *,
        stages: dict[int, int] | None = None,
        pruner: str = "cluster",
        recover: str | None = None,
        keep_centre: bool = False,
        pos_embed: bool = False,
    ):
        super().__init__()
        self.stages, self.pruner, self.recover, self.keep_centre = stages or {}, pruner, recover, keep_centre
        if pos_embed:
            self.pos_embed_token = nn.Parameter(torch.zeros(1, *self.stages.values(), channels))
        if recover == "attention":
            self.x_token = nn.Parameter(torch.zeros(1, num_frames, channels))
            self.cross_attention = CrossAttention(channels, num_heads, qkv_bias=True)
        self.temp_embed = nn.Parameter(torch.zeros(1, num_frames, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_joints, channels))
        self.joints_embed = nn.Linear(in_channels, channels)
        self.blocks_st = nn.ModuleList([Block(channels, num_heads, mlp_ratio, "st") for _ in range(depth)])
        self.blocks_ts = nn.ModuleList([Block(channels, num_heads, mlp_ratio, "ts") for _ in range(depth)])
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pre_logits = Representation(channels, representation)
        self.head = nn.Linear(representation, 3)
        self.ts_attn = nn.ModuleList([nn.Linear(2 * channels, 2) for _ in range(depth)])

    def forward(self, x: Tensor, index: Tensor | tuple[Tensor, ...] | None = None, *, noise: Tensor | None = None):
        """index [B, K] (several stages: one each): input frames to keep; noise [B, N]: that of the clustering."""
        B, F, J, _ = x.shape
        x = self.joints_embed(x.reshape(B * F, J, -1)) + self.pos_embed
        x = (x.reshape(B, F, J, -1) + self.temp_embed[:, :F]).reshape(B * F, J, -1)
        pruning = FramePruning(F, self.stages, self.pruner, self.keep_centre, index, noise)
        frames = F
        for i in range(len(self.blocks_st)):
            x = pruning(i, x.reshape(B, frames, J, -1), getattr(self, "pos_embed_token", None))
            frames = x.shape[1]
            x = x.reshape(B * frames, J, -1)
            x_st = self.blocks_st[i](x, frames)
            x_ts = self.blocks_ts[i](x, frames)
            alpha = self.ts_attn[i](torch.cat([x_st, x_ts], dim=-1)).softmax(dim=-1)
            x = x_st * alpha[:, :, 0:1] + x_ts * alpha[:, :, 1:2]
        x = self.norm(x).reshape(B, frames, J, -1)
        if self.recover == "attention":
            x = rows_to_frames(cross_attention(self.x_token, frames_to_rows(x), self.cross_attention), B)
        pose = self.head(self.pre_logits(x))
        if self.recover == "interpolation":
            pose = interpolate(pose, pruning.frames, F)
        return (pose, pruning.frames) if self.stages and self.recover is None else pose


MODELS = {
    "motionbert": {},
    "hot_motionbert": {"stages": {1: 81}, "recover": "attention", "pos_embed": True},
    "h2ot_motionbert": {"stages": {1: 121, 2: 81}, "pruner": "sampler", "recover": "interpolation"},
}


def build(name: str, **overrides) -> OfficialMotionBERT:
    """The official formulation of one of MODELS, weights random."""
    return OfficialMotionBERT(**{**MODELS[name], **overrides})
