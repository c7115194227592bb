"""The formulation that public code uses today: the opponent in benchmarks and in the demo.

The operator sequence and the layouts are those of HoT- and TCFormer-style code, mistakes
included: `torch.cdist` distances, density in the tokens' own precision, fills that couple the samples of a batch.
Any float dtype; in float64 this is "the float64 official formulation". Nothing here depends on the rest of the package.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def index_points(points: Tensor, idx: Tensor) -> Tensor:
    """points [B, N, ...] at idx [B, ...]: an advanced index with a batch index of idx's shape."""
    B = points.shape[0]
    batch = torch.arange(B, device=points.device).view(B, *[1] * (idx.dim() - 1)).expand_as(idx)
    return points[batch, idx]


def density_peaks(x: Tensor, k: int, token_mask: Tensor | None = None, noise: Tensor | None = None):
    """score [B, N] = density * distance, density, distance, and the distance matrix [B, N, N]."""
    B, N, C = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as autocast does
    matrix = torch.cdist(wide, wide) / C**0.5
    if token_mask is not None:
        valid = token_mask > 0
        matrix = matrix * valid[:, None, :] + (matrix.max() + 1) * ~valid[:, None, :]
    nearest = torch.topk(matrix, k, dim=-1, largest=False).values
    density = (-(nearest**2).mean(-1)).exp()
    density = density + (torch.rand(B, N, device=x.device, dtype=x.dtype) * 1e-6 if noise is None else noise)
    if token_mask is not None:
        density = density * valid
    denser = (density[:, None, :] > density[:, :, None]).type(x.dtype)
    largest = matrix.flatten(1).max(-1).values[:, None, None]
    distance = (matrix * denser + largest * (1 - denser)).min(-1).values
    return density * distance, density, distance, matrix


def cluster_labels(matrix: Tensor, index_down: Tensor) -> Tensor:
    """[B, N]: the position in index_down of the nearest selected token; a selected token belongs to itself."""
    B, K = index_down.shape
    idx_cluster = index_points(matrix, index_down).argmin(dim=1)
    batch = torch.arange(B, device=matrix.device)[:, None].expand(B, K)
    position = torch.arange(K, device=matrix.device)[None, :].expand(B, K)
    idx_cluster[batch.reshape(-1), index_down.reshape(-1)] = position.reshape(-1)
    return idx_cluster


def cluster_dpc_knn(
    x: Tensor, cluster_num: int, k: int, token_mask: Tensor | None = None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(index_down [B, K] in descending score order, idx_cluster [B, N]); noise: default `torch.rand * 1e-6`."""
    score, _, _, matrix = density_peaks(x, k, token_mask, noise)
    index_down = torch.topk(score, cluster_num, dim=-1).indices
    return index_down, cluster_labels(matrix, index_down)


def cluster_dpc_knn_center(
    x: Tensor, cluster_num: int, k: int, center: int, token_mask: Tensor | None = None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `cluster_dpc_knn`, without the centre frame, which the caller appends to the cluster_num tokens."""
    score, _, _, matrix = density_peaks(x, k, token_mask, noise)
    score[:, center] = -math.inf
    index_down = torch.topk(score, cluster_num, dim=-1).indices
    return index_down, cluster_labels(matrix, index_down)


def merge_tokens(x: Tensor, idx_cluster: Tensor, cluster_num: int, weight: Tensor | None = None) -> Tensor:
    """TCFormer's merge, [B, N, C] -> [B, K, C]: sums by `index_add` over all samples at once."""
    B, N, C = x.shape
    weight = x.new_ones(B, N, 1) if weight is None else weight.reshape(B, N, 1)
    cluster = (idx_cluster + torch.arange(B, device=x.device)[:, None] * cluster_num).reshape(B * N)
    total = weight.new_zeros(B * cluster_num, 1).index_add_(0, cluster, weight.reshape(B * N, 1)) + 1e-6
    share = weight / total[cluster].reshape(B, N, 1)
    merged = x.new_zeros(B * cluster_num, C)
    merged.index_add_(0, cluster, (x * share).reshape(B * N, C).type(x.dtype))
    return merged.reshape(B, cluster_num, C)


def gather_frames(x: Tensor, index: Tensor, num_joints: int, pos_embed: Tensor | None = None) -> Tensor:
    """HoT's gather: x [(B J), F, C] at index [B, K] -> [(B J), K, C], by way of [B, F, J, C]."""
    rows, F, C = x.shape
    frames = x.reshape(rows // num_joints, num_joints, F, C).permute(0, 2, 1, 3)
    kept = index_points(frames, index)
    kept = kept.permute(0, 2, 1, 3).reshape(rows, index.shape[1], C)
    return kept if pos_embed is None else kept + pos_embed


def prune_step(
    x: Tensor,
    cluster_num: int,
    k: int,
    num_joints: int,
    pos_embed: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """HoT's pruning of x [(B J), F, C]: mean over joints, cluster, sort, gather, + embedding -> (x, index [B, K])."""
    rows, F, C = x.shape
    tokens = x.reshape(rows // num_joints, num_joints, F, C).permute(0, 2, 1, 3).mean(dim=2)
    index, _ = cluster_dpc_knn(tokens, cluster_num, k, noise=noise)
    index = index.sort(dim=-1).values
    return gather_frames(x, index, num_joints, pos_embed), index


def prune_sample(num_frames: int, num_tokens: int) -> Tensor:
    """Evenly spaced frames [1, K]."""
    return (torch.arange(num_tokens) * (num_frames - 1) // max(num_tokens - 1, 1))[None]


def prune_motion(pose: Tensor, num_tokens: int) -> Tensor:
    """pose [B, F, J, 2]: the K frames with most motion since the frame before, ascending [B, K]."""
    motion = (pose[:, 1:] - pose[:, :-1]).abs().sum(dim=(2, 3))
    motion = torch.cat([torch.zeros_like(motion[:, :1]), motion], dim=1)
    return torch.topk(motion, num_tokens, dim=-1).indices.sort(dim=-1).values


def prune_attention(query: Tensor, key: Tensor, num_tokens: int) -> Tensor:
    """[B, J, H, F, D]: the K frames that receive most attention; the F x F weights are stored, as in public code."""
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    received = weights.mean(dim=(1, 2, 3))
    return torch.topk(received, num_tokens, dim=-1).indices.sort(dim=-1).values


class CrossAttention(nn.Module):
    """HoT's recovering attention with its parameter names: separate q, k, v products, weights stored."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.linear_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.linear_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.linear_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        rows, tokens, C = x.shape
        return x.reshape(rows, tokens, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)

    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        rows, F, C = x_1.shape
        query = self._heads(self.linear_q(x_1))
        key = self._heads(self.linear_k(x_2))
        value = self._heads(self.linear_v(x_3))
        weights = (query @ key.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(rows, F, C))


def cross_attention(token: Tensor, x: Tensor, attention: CrossAttention) -> Tensor:
    """HoT's recovery: token [1, F, C], repeated over the rows of x [(B J), K, C] before `linear_q` -> [(B J), F, C]."""
    repeated = token.repeat(x.shape[0], 1, 1)
    return repeated + attention(repeated, x, x)


def interpolate(x: Tensor, index: Tensor, num_frames: int) -> Tensor:
    """Linear at the true frames: x [B, K, ...], index [B or 1, K] -> [B, F, ...]; searchsorted, gather, lerp."""
    B, K = x.shape[:2]
    index = index.expand(B, K).contiguous()
    frame = torch.arange(num_frames, device=x.device).expand(B, num_frames).contiguous()
    position = torch.searchsorted(index, frame, right=True)
    after = position.clamp(max=K - 1)
    before = (position - 1).clamp(min=0)
    start, end = index.gather(1, before), index.gather(1, after)
    weight = ((frame - start).to(x.dtype) / (end - start).clamp(min=1)).clamp(0, 1)
    shape = (B, num_frames, *[1] * (x.dim() - 2))
    full = (B, num_frames, *x.shape[2:])
    first = x.gather(1, before.view(shape).expand(full))
    second = x.gather(1, after.view(shape).expand(full))
    return torch.lerp(first, second, weight.view(shape).expand(full))


def interpolate_uniform(x: Tensor, num_frames: int) -> Tensor:
    """x [B, K, ...] stretched evenly to [B, F, ...] by `F.interpolate(align_corners=True)`, which ignores the index."""
    B, K = x.shape[:2]
    columns = x.reshape(B, K, -1).permute(0, 2, 1)
    stretched = functional.interpolate(columns, size=num_frames, mode="linear", align_corners=True)
    return stretched.permute(0, 2, 1).reshape(B, num_frames, *x.shape[2:])
