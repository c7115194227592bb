"""MHFormer, TPC and H2OT on it as public code formulates them: the opponent, the equality partner.

Three streams in three tensors, joined and split around each MLP; stored N x N attention weights. The parameter names
are the official ones. Nothing here depends on the rest of the package.
"""

import torch
from torch import Tensor, nn

from .official import CrossAttention, interpolate
from .official_mixste import Attention, Block, DropPath, FramePruning, Mlp


class Encoder(nn.Module):
    """x [B, 2J, F]."""

    def __init__(self, rows: int, length: int, depth: int, num_heads: int, drop: float, drop_path: float):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, length))
        self.pos_drop = nn.Dropout(drop)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(length, num_heads, 2.0, rate, drop) for rate in rates])
        self.norm = nn.LayerNorm(length, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SHRBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, drop: float, drop_path: float):
        super().__init__()
        for s in (1, 2, 3):
            setattr(self, f"norm1_{s}", nn.LayerNorm(dim, eps=1e-6))
            setattr(self, f"attn_{s}", Attention(dim, num_heads, drop=drop))
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(3 * dim, eps=1e-6)
        self.mlp = Mlp(3 * dim, hidden, drop)

    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor):
        x_1 = x_1 + self.drop_path(self.attn_1(self.norm1_1(x_1)))
        x_2 = x_2 + self.drop_path(self.attn_2(self.norm1_2(x_2)))
        x_3 = x_3 + self.drop_path(self.attn_3(self.norm1_3(x_3)))
        x = torch.cat([x_1, x_2, x_3], dim=2)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.chunk(3, dim=2)


class CHIBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, drop: float, drop_path: float):
        super().__init__()
        for s in (1, 2, 3):
            for part in (1, 2, 3):
                setattr(self, f"norm3_{s}{part}", nn.LayerNorm(dim, eps=1e-6))
            setattr(self, f"attn_{s}", CrossAttention(dim, num_heads, qkv_bias=True))
        self.proj_drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(3 * dim, eps=1e-6)
        self.mlp = Mlp(3 * dim, hidden, drop)

    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        x_1 = x_1 + self._update(self.attn_1, self.norm3_11(x_2), self.norm3_12(x_3), self.norm3_13(x_1))
        x_2 = x_2 + self._update(self.attn_2, self.norm3_21(x_1), self.norm3_22(x_3), self.norm3_23(x_2))
        x_3 = x_3 + self._update(self.attn_3, self.norm3_31(x_1), self.norm3_32(x_2), self.norm3_33(x_3))
        x = torch.cat([x_1, x_2, x_3], dim=2)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _update(self, attention: CrossAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.drop_path(self.proj_drop(attention(query, key, value)))


class HypothesisTransformer(nn.Module):
    def __init__(self, length: int, dim: int, num_heads: int, hidden: int, drop: float, drop_path: float):
        super().__init__()
        for s in (1, 2, 3):
            setattr(self, f"pos_embed_{s}", nn.Parameter(torch.zeros(1, length, dim)))
        self.pos_drop = nn.Dropout(drop)
        self.SHR_blocks = nn.ModuleList([SHRBlock(dim, num_heads, hidden, drop, drop_path * i / 2) for i in (0, 1)])
        self.CHI_blocks = nn.ModuleList([CHIBlock(dim, num_heads, hidden, drop, drop_path)])
        self.norm = nn.LayerNorm(3 * dim, eps=1e-6)

    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor, pruning: FramePruning) -> Tensor:
        streams = (
            self.pos_drop(x_1 + self.pos_embed_1),
            self.pos_drop(x_2 + self.pos_embed_2),
            self.pos_drop(x_3 + self.pos_embed_3),
        )
        for i, block in enumerate([*self.SHR_blocks, *self.CHI_blocks]):
            if i in pruning.stages:
                x = pruning(i, torch.cat(streams, dim=2)[:, :, None])
                streams = x.squeeze(2).chunk(3, dim=2)
            streams = block(*streams)
        return self.norm(streams)


class OfficialMHFormer(nn.Module):
    """x [B, F, J, 2] -> poses [B, F, J, 3]; recover=None: (poses of the kept frames, index).

    stages ({0, 1: before an SHR block, 2: before the CHI block}), pruner, recover, keep_centre: see `OfficialMixSTE`.
    """

    def __init__(
        self,
        num_frames: int = 351,
        num_joints: int = 17,
        in_channels: int = 2,
        channels: int = 512,
        hidden: int = 1024,
        num_heads: int = 8,
        encoder_depth: int = 4,
        encoder_heads: int = 9,
        dropout: float = 0.1,
        drop_path_rate: float = 0.2,
        *,
        stages: dict[int, int] | None = None,
        pruner: str = "cluster",
        recover: str | None = None,
        keep_centre: bool = False,
    ):
        super().__init__()
        self.stages, self.pruner, self.recover, self.keep_centre = stages or {}, pruner, recover, keep_centre
        rows = in_channels * num_joints
        for s in (1, 2, 3):
            setattr(self, f"norm_{s}", nn.LayerNorm(num_frames))
            encoder = Encoder(rows, num_frames, encoder_depth, encoder_heads, dropout, drop_path_rate)
            setattr(self, f"Transformer_encoder_{s}", encoder)
            setattr(self, f"embedding_{s}", nn.Conv1d(rows, channels, kernel_size=1))
        self.Transformer_hypothesis = HypothesisTransformer(
            num_frames, channels, num_heads, hidden, dropout, drop_path_rate
        )
        self.regression = nn.Sequential(
            nn.BatchNorm1d(3 * channels), nn.Conv1d(3 * channels, 3 * num_joints, kernel_size=1)
        )

    def forward(self, x: Tensor, index: Tensor | tuple[Tensor, ...] | None = None, *, noise: Tensor | None = None):
        """index [B, K] (several stages: one each): input frames to keep; noise [B, N]: that of the clustering."""
        B, F, J, _ = x.shape
        x = x.permute(0, 2, 3, 1).reshape(B, -1, F)
        x_1 = x + self.Transformer_encoder_1(self.norm_1(x))
        x_2 = x_1 + self.Transformer_encoder_2(self.norm_2(x_1))
        x_3 = x_2 + self.Transformer_encoder_3(self.norm_3(x_2))
        x_1 = self.embedding_1(x_1).permute(0, 2, 1).contiguous()
        x_2 = self.embedding_2(x_2).permute(0, 2, 1).contiguous()
        x_3 = self.embedding_3(x_3).permute(0, 2, 1).contiguous()
        pruning = FramePruning(F, self.stages, self.pruner, self.keep_centre, index, noise)
        x = self.Transformer_hypothesis(x_1, x_2, x_3, pruning)
        x = self.regression(x.permute(0, 2, 1).contiguous())
        pose = x.reshape(B, J, 3, -1).permute(0, 3, 1, 2).contiguous()
        if self.recover == "interpolation":
            pose = interpolate(pose, pruning.frames, F)
        return (pose, pruning.frames) if self.stages and self.recover is None else pose


MODELS = {
    "mhformer": {},
    "tpc_mhformer": {"stages": {1: 117}, "keep_centre": True},
    "h2ot_mhformer": {"stages": {1: 176, 2: 117}, "pruner": "sampler", "recover": "interpolation"},
}


def build(name: str, **overrides) -> OfficialMHFormer:
    """The official formulation of one of MODELS, weights random."""
    return OfficialMHFormer(**{**MODELS[name], **overrides})
