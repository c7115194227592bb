"""TCFormer's clustering block, on token dictionaries."""

import torch
from torch import nn

from . import clustering
from .clustering import index_points


def cluster_dpc_knn(token_dict, cluster_num, k=5, token_mask=None):
    index_down, idx_cluster = clustering.cluster_dpc_knn(token_dict["x"], cluster_num, k, token_mask)
    return idx_cluster, cluster_num


def merge_tokens(token_dict, idx_cluster, cluster_num, token_weight=None):
    x, idx_token, agg_weight = token_dict["x"], token_dict["idx_token"], token_dict["agg_weight"]
    B, N, C = x.shape
    if token_weight is None:
        token_weight = x.new_ones(B, N, 1)
    idx = idx_cluster + torch.arange(B, device=x.device)[:, None] * cluster_num
    all_weight = token_weight.new_zeros(B * cluster_num, 1)
    all_weight.index_add_(dim=0, index=idx.reshape(B * N), source=token_weight.reshape(B * N, 1))
    all_weight = all_weight + 1e-6
    norm_weight = token_weight / all_weight[idx]
    x_merged = x.new_zeros(B * cluster_num, C)
    x_merged.index_add_(dim=0, index=idx.reshape(B * N), source=(x * norm_weight).reshape(B * N, C).type(x.dtype))
    return {
        "x": x_merged.reshape(B, cluster_num, C),
        "token_num": cluster_num,
        "map_size": token_dict["map_size"],
        "init_grid_size": token_dict["init_grid_size"],
        "idx_token": index_points(idx_cluster[..., None], idx_token).squeeze(-1),
        "agg_weight": agg_weight * index_points(norm_weight, idx_token),
    }


class CTM(nn.Module):
    def __init__(self, ratio, dim, k=5):
        super().__init__()
        self.ratio, self.k = ratio, k
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, token_dict):
        token_dict = dict(token_dict)
        token_dict["x"] = x = self.norm(self.proj(token_dict["x"]))
        token_weight = self.score(x).exp()
        idx_cluster, cluster_num = cluster_dpc_knn(token_dict, max(int(x.shape[1] * self.ratio), 1), self.k)
        return merge_tokens(token_dict, idx_cluster, cluster_num, token_weight)


def token_dict(x):
    B, N, _ = x.shape
    return {
        "x": x,
        "token_num": N,
        "map_size": [N, 1],
        "init_grid_size": [N, 1],
        "idx_token": torch.arange(N).repeat(B, 1),
        "agg_weight": x.new_ones(B, N, 1),
    }
