"""HoT MixSTE (seq2seq, recovering attention) and TPC MixSTE (`index` goes out and comes back)."""

import torch
from torch import nn

from .clustering import cluster_dpc_knn, cluster_dpc_knn_center, index_points


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, comb=False):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.comb = comb

    def forward(self, x, vis=False):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.comb:  # attention among channels
            attn = self.attn_drop((q.transpose(-2, -1) @ k * self.scale).softmax(dim=-1))
            x = (attn @ v.transpose(-2, -1)).transpose(-2, -1).transpose(1, 2).reshape(B, N, C)
        else:
            attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
            x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        x = self.proj_drop(self.proj(x))
        return (x, attn) if vis else x


class Cross_Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.linear_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.linear_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.linear_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_1, x_2, x_3):
        B, N, C = x_1.shape

        def heads(x):
            return x.reshape(B, -1, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)

        q, k, v = heads(self.linear_q(x_1)), heads(self.linear_k(x_2)), heads(self.linear_v(x_3))
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, N, C)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, drop=0.0, attn_drop=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x, vis=False):
        x = x + self.attn(self.norm1(x), vis=vis)
        return x + self.mlp(self.norm2(x))


class MixSTE(nn.Module):
    """layer_index: the block before which token_num frames are kept; recover: HoT, else TPC."""

    def __init__(self, frames, joints, dim, depth, heads, token_num, layer_index, recover, drop=0.0, attn_drop=0.0):
        super().__init__()
        self.frames, self.joints, self.token_num = frames, joints, token_num
        self.layer_index, self.recover, self.center = layer_index, recover, (frames - 1) // 2
        if recover:
            self.pos_embed_token = nn.Parameter(torch.randn(1, token_num, dim) * 0.1)
        self.Spatial_pos_embed = nn.Parameter(torch.randn(1, joints, dim) * 0.1)
        self.Temporal_pos_embed = nn.Parameter(torch.randn(1, frames, dim) * 0.1)
        if recover:
            self.x_token = nn.Parameter(torch.randn(1, frames, dim) * 0.1)
        self.Spatial_patch_to_embedding = nn.Linear(2, dim)
        self.STEblocks = nn.ModuleList(Block(dim, heads, 2.0, drop, attn_drop) for _ in range(depth))
        self.TTEblocks = nn.ModuleList(Block(dim, heads, 2.0, drop, attn_drop) for _ in range(depth))
        if recover:
            self.cross_attention = Cross_Attention(dim, heads, qkv_bias=True)
        self.Spatial_norm = nn.LayerNorm(dim, eps=1e-6)
        self.Temporal_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3))

    def prune(self, x, index):
        """x [B, F, J, C]."""
        if index is None:
            pooled = x.mean(dim=2)
            if self.recover:
                index, _ = cluster_dpc_knn(pooled, self.token_num, 2)
            else:
                index, _ = cluster_dpc_knn_center(pooled, self.token_num - 1, 2, self.center)
                index = torch.cat([index, torch.full_like(index[:, :1], self.center)], dim=-1)
            index, _ = index.sort(dim=-1)
        return index_points(x, index), index

    def forward(self, x, index=None):
        B, F, J, _ = x.shape
        x = self.Spatial_patch_to_embedding(x.reshape(B * F, J, 2)) + self.Spatial_pos_embed
        for i, (spatial, temporal) in enumerate(zip(self.STEblocks, self.TTEblocks, strict=True)):
            if i:
                x = x.reshape(B, J, -1, x.shape[-1]).permute(0, 2, 1, 3)
                if i == self.layer_index:
                    x, index = self.prune(x, index)
                    if self.recover:
                        x = x + self.pos_embed_token[:, :, None]
                x = x.reshape(-1, J, x.shape[-1])
            x = self.Spatial_norm(spatial(x))
            x = x.reshape(B, -1, J, x.shape[-1]).permute(0, 2, 1, 3).reshape(B * J, -1, x.shape[-1])
            if i == 0:
                x = x + self.Temporal_pos_embed
            x = self.Temporal_norm(temporal(x))
        if self.recover:
            x_token = self.x_token.expand(B * J, -1, -1)
            x = x_token + self.cross_attention(x_token, x, x)
        pose = self.head(x.reshape(B, J, -1, x.shape[-1]).permute(0, 2, 1, 3))
        return pose if self.recover else (pose, index)
