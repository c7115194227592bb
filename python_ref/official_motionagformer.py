"""MotionAGFormer, HoT and H2OT on it as public code formulates them: the opponent, the equality partner.

Stored attention weights, the graphs' weights as dense products with diagonal matrices, joined streams before the
fusion. The parameter names are the official ones. Nothing here depends on the rest of the package.
"""

import torch
from torch import Tensor, nn

from .official import CrossAttention, cross_attention, interpolate
from .official_mixste import FramePruning, Mlp, frames_to_rows, rows_to_frames
from .official_motionbert import Attention, Representation

SKELETON = {
    0: [1, 7], 1: [0, 2], 2: [1, 3], 3: [2], 4: [0, 5], 5: [4, 6], 6: [5], 7: [0, 8], 8: [7, 9], 9: [8, 10],
    10: [9], 11: [8, 12], 12: [11, 13], 13: [12], 14: [8, 15], 15: [14, 16], 16: [15],
}  # fmt: skip


class GraphConvolution(nn.Module):
    def __init__(self, dim: int, num_nodes: int, mode: str, neighbour_num: int = 4):
        super().__init__()
        self.mode, self.neighbour_num = mode, neighbour_num
        self.U = nn.Linear(dim, dim)
        self.V = nn.Linear(dim, dim)
        self.batch_norm = nn.BatchNorm1d(num_nodes)
        if mode == "spatial":
            self.adj = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
            for joint, others in SKELETON.items():
                self.adj[joint, others] = 1

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, nodes, C]."""
        if self.mode == "temporal":
            similarity = x @ x.transpose(1, 2)
            threshold = similarity.topk(k=self.neighbour_num, dim=-1, largest=True)[0][..., -1:]
            adj = (similarity >= threshold).to(x.dtype)
        else:
            adj = self.adj.to(x).repeat(x.shape[0], 1, 1)
        norm_adj = self._normalised(adj)
        aggregate = norm_adj @ self.V(x)
        return torch.relu(x + self.batch_norm(aggregate + self.U(x)))

    def _normalised(self, adj: Tensor) -> Tensor:
        degree = adj.detach().sum(dim=-1)
        diagonal = torch.eye(adj.shape[-1], device=adj.device, dtype=adj.dtype) * (degree**-0.5)[:, :, None]
        return torch.bmm(torch.bmm(diagonal, adj), diagonal)


class SubBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, mixer_type: str, mode: str, num_nodes: int):
        super().__init__()
        self.mixer_type, self.mode = mixer_type, mode
        self.norm1 = nn.LayerNorm(dim)
        if mixer_type == "attention":
            self.mixer = Attention(dim, num_heads, mode, qkv_bias=False)
        else:
            self.mixer = GraphConvolution(dim, num_nodes, mode)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-5))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, F, J, C]."""
        x = x + self.layer_scale_1 * self._mix(self.norm1(x))
        return x + self.layer_scale_2 * self.mlp(self.norm2(x))

    def _mix(self, x: Tensor) -> Tensor:
        B, F, J, C = x.shape
        if self.mixer_type == "attention":
            return self.mixer(x.reshape(B * F, J, C), F).reshape(B, F, J, C)
        if self.mode == "spatial":
            return self.mixer(x.reshape(B * F, J, C)).reshape(B, F, J, C)
        return rows_to_frames(self.mixer(frames_to_rows(x)), B)


class Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, num_joints: int, num_frames: int):
        super().__init__()
        self.att_spatial = SubBlock(dim, num_heads, mlp_ratio, "attention", "spatial", num_joints)
        self.att_temporal = SubBlock(dim, num_heads, mlp_ratio, "attention", "temporal", num_frames)
        self.graph_spatial = SubBlock(dim, num_heads, mlp_ratio, "graph", "spatial", num_joints)
        self.graph_temporal = SubBlock(dim, num_heads, mlp_ratio, "graph", "temporal", num_frames)
        self.fusion = nn.Linear(2 * dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x_attn = self.att_temporal(self.att_spatial(x))
        x_graph = self.graph_temporal(self.graph_spatial(x))
        alpha = self.fusion(torch.cat([x_attn, x_graph], dim=-1)).softmax(dim=-1)
        return x_attn * alpha[..., 0:1] + x_graph * alpha[..., 1:2]


class OfficialMotionAGFormer(nn.Module):
    """x [B, F, J, 3] -> poses [B, F, J, 3]; recover=None: (poses of the kept frames, index).

    stages, pruner, recover, keep_centre, pos_embed: see `OfficialMixSTE`.
    """

    def __init__(
        self,
        num_frames: int = 243,
        num_joints: int = 17,
        in_channels: int = 3,
        channels: int = 128,
        depth: int = 16,
        num_heads: int = 4,
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
            self.cross_attention = CrossAttention(channels, num_heads, qkv_bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_joints, channels))
        self.joints_embed = nn.Linear(in_channels, channels)
        self.norm = nn.LayerNorm(channels)
        tokens, layers = num_frames, []
        for i in range(depth):
            tokens = self.stages.get(i, tokens)
            layers.append(Layer(channels, num_heads, mlp_ratio, num_joints, tokens))
        self.layers = nn.ModuleList(layers)
        self.rep_logit = Representation(channels, representation)
        self.head = nn.Linear(representation, 3)

    def forward(self, x: Tensor, index: Tensor | tuple[Tensor, ...] | None = None, *, noise: Tensor | None = None):
        """index [B, K] (several stages: one each): input frames to keep; noise [B, N]: that of the clustering."""
        B, F, J, _ = x.shape
        x = self.joints_embed(x) + self.pos_embed
        pruning = FramePruning(F, self.stages, self.pruner, self.keep_centre, index, noise)
        for i, layer in enumerate(self.layers):
            x = layer(pruning(i, x, getattr(self, "pos_embed_token", None)))
        x = self.norm(x)
        if self.recover == "attention":
            x = rows_to_frames(cross_attention(self.x_token, frames_to_rows(x), self.cross_attention), B)
        pose = self.head(self.rep_logit(x))
        if self.recover == "interpolation":
            pose = interpolate(pose, pruning.frames, F)
        return (pose, pruning.frames) if self.stages and self.recover is None else pose


MODELS = {
    "motionagformer": {},
    "hot_motionagformer": {"stages": {7: 81}, "recover": "attention", "pos_embed": True},
    "h2ot_motionagformer": {"stages": {3: 121, 7: 81}, "pruner": "sampler", "recover": "interpolation"},
}


def build(name: str, **overrides) -> OfficialMotionAGFormer:
    """The official formulation of one of MODELS, weights random."""
    return OfficialMotionAGFormer(**{**MODELS[name], **overrides})
