"""HoT MotionBERT: dual-stream blocks whose attention is told the number of frames."""

import torch
from torch import nn

from .clustering import cluster_dpc_knn, index_points
from .mixste import Cross_Attention, Mlp


class Attention(nn.Module):
    def __init__(self, dim, num_heads, st_mode, proj_drop=0.0):
        super().__init__()
        self.num_heads, self.mode = num_heads, st_mode
        self.scale = (dim // num_heads) ** -0.5
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, seqlen=1):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.mode == "temporal":
            q, k, v = (t.reshape(-1, seqlen, *t.shape[1:]).permute(0, 2, 3, 1, 4) for t in (q, k, v))
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        x = attn @ v
        x = x.permute(0, 3, 2, 1, 4) if self.mode == "temporal" else x.transpose(1, 2)
        return self.proj_drop(self.proj(x.reshape(B, N, C)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, st_mode):
        super().__init__()
        self.st_mode = st_mode
        for part in ("s", "t"):
            setattr(self, f"norm1_{part}", nn.LayerNorm(dim, eps=1e-6))
            mode = "spatial" if part == "s" else "temporal"
            setattr(self, f"attn_{part}", Attention(dim, num_heads, mode))
            setattr(self, f"norm2_{part}", nn.LayerNorm(dim, eps=1e-6))
            setattr(self, f"mlp_{part}", Mlp(dim, int(dim * mlp_ratio)))

    def forward(self, x, seqlen=1):
        for part in self.st_mode:
            get = lambda name: getattr(self, f"{name}_{part}")  # noqa: E731
            x = x + get("attn")(get("norm1")(x), seqlen)
            x = x + get("mlp")(get("norm2")(x))
        return x


class PreLogits(nn.Module):
    def __init__(self, dim, dim_rep):
        super().__init__()
        self.fc = nn.Linear(dim, dim_rep)
        self.act = nn.Tanh()

    def forward(self, x):
        return self.act(self.fc(x))


class DSTformer(nn.Module):
    def __init__(self, frames, joints, dim, dim_rep, depth, heads, token_num, layer_index):
        super().__init__()
        self.token_num, self.layer_index = token_num, layer_index
        self.joints_embed = nn.Linear(3, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, joints, dim) * 0.1)
        self.temp_embed = nn.Parameter(torch.randn(1, frames, 1, dim) * 0.1)
        self.blocks_st = nn.ModuleList(Block(dim, heads, 4.0, "st") for _ in range(depth))
        self.blocks_ts = nn.ModuleList(Block(dim, heads, 4.0, "ts") for _ in range(depth))
        self.ts_attn = nn.ModuleList(nn.Linear(dim * 2, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pre_logits = PreLogits(dim, dim_rep)
        self.head = nn.Linear(dim_rep, 3)
        self.pos_embed_token = nn.Parameter(torch.randn(1, token_num, dim) * 0.1)
        self.x_token = nn.Parameter(torch.randn(1, frames, dim) * 0.1)
        self.cross_attention = Cross_Attention(dim, heads, qkv_bias=True)

    def forward(self, x):
        B, F, J, _ = x.shape
        x = self.joints_embed(x.reshape(B * F, J, -1)) + self.pos_embed
        x = (x.reshape(B, F, J, -1) + self.temp_embed).reshape(B * F, J, -1)
        for i, (st, ts, fuse) in enumerate(zip(self.blocks_st, self.blocks_ts, self.ts_attn, strict=True)):
            if i == self.layer_index:
                x = x.reshape(B, F, J, -1)
                index, _ = cluster_dpc_knn(x.mean(dim=2), self.token_num, 2)
                x = index_points(x, index.sort(dim=-1)[0]) + self.pos_embed_token[:, :, None]
                F = self.token_num
                x = x.reshape(B * F, J, -1)
            x_st, x_ts = st(x, F), ts(x, F)
            alpha = fuse(torch.cat([x_st, x_ts], dim=-1)).softmax(dim=-1)
            x = x_st * alpha[..., :1] + x_ts * alpha[..., 1:]
        x = self.norm(x).reshape(B, F, J, -1).permute(0, 2, 1, 3).reshape(B * J, F, -1)
        x_token = self.x_token.repeat(B * J, 1, 1)
        x = x_token + self.cross_attention(x_token, x, x)
        return self.head(self.pre_logits(x.reshape(B, J, x.shape[1], -1).permute(0, 2, 1, 3)))
