"""HoT's and TPC's functions."""

import torch


def index_points(points, idx):
    B = points.shape[0]
    batch = torch.arange(B, device=points.device).view(B, *[1] * (idx.dim() - 1)).expand_as(idx)
    return points[batch, idx, :]


def peaks(x, k, token_mask):
    B, N, C = x.shape
    matrix = torch.cdist(x, x) / C**0.5
    if token_mask is not None:
        token_mask = token_mask > 0
        matrix = matrix * token_mask[:, None, :] + (matrix.max() + 1) * (~token_mask[:, None, :])
    nearest, _ = torch.topk(matrix, k=k, dim=-1, largest=False)
    density = (-(nearest**2).mean(dim=-1)).exp()
    density = density + torch.rand(B, N, device=x.device, dtype=x.dtype) * 1e-6
    if token_mask is not None:
        density = density * token_mask
    denser = (density[:, None, :] > density[:, :, None]).type(x.dtype)
    largest = matrix.flatten(1).max(dim=-1)[0][:, None, None]
    distance = (matrix * denser + largest * (1 - denser)).min(dim=-1)[0]
    return density * distance, matrix


def labels(matrix, index_down, cluster_num):
    B = matrix.shape[0]
    idx_cluster = index_points(matrix, index_down).argmin(dim=1)
    batch = torch.arange(B)[:, None].expand(B, cluster_num)
    idx_cluster[batch.reshape(-1), index_down.reshape(-1)] = torch.arange(cluster_num).repeat(B)
    return idx_cluster


def cluster_dpc_knn(x, cluster_num, k, token_mask=None):
    with torch.no_grad():
        score, matrix = peaks(x, k, token_mask)
        _, index_down = torch.topk(score, k=cluster_num, dim=-1)
        return index_down, labels(matrix, index_down, cluster_num)


def cluster_dpc_knn_center(x, cluster_num, k, center, token_mask=None):
    with torch.no_grad():
        score, matrix = peaks(x, k, token_mask)
        score[:, center] = -float("inf")
        _, index_down = torch.topk(score, k=cluster_num, dim=-1)
        return index_down, labels(matrix, index_down, cluster_num)
