"""MotionAGFormer and its hourglasses (HoT, H2OT), with the official parameter names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..graph import graph_update, takes
from ..hourglass import Kept
from ..linear import Linear, normed
from ..watched import is_silent
from .blocks import Attention, Mlp, Representation, fused
from .host import Host

# The neighbours of each joint of the Human3.6M skeleton, as published: not symmetric at joints 0 and 8.
NEIGHBOURS = (
    (1, 7), (0, 2), (1, 3), (2,), (0, 5), (4, 6), (5,), (0, 8), (7, 9),
    (8, 10), (9,), (8, 12), (11, 13), (12,), (8, 15), (14, 16), (15,),
)  # fmt: skip


class MotionAGFormer(Host):
    """2D keypoints and confidence [B, F, J, 3] -> 3D poses: `depth` layers of an attention and a graph stream.

    num_frames, num_joints: F, J (17, or another skeleton's `joints`). channels: C. representation: features before the
    last layer. temporal_neighbours: of the graph over the frames. joints: for each joint its neighbours.
    hourglass: stages, pruner, recover, pipeline, keep, k, pos_embed, see `Host`. The BatchNorms of the graphs have one
    feature a frame: a model fits the stages that it was made with.

    >>> import torch
    >>> from h2ot_kernels.hosts.motionagformer import MotionAGFormer
    >>> model = MotionAGFormer(num_frames=27, channels=32, depth=2, stages={1: 9}, pruner="cluster").eval()
    >>> model(torch.randn(2, 27, 17, 3)).shape
    torch.Size([2, 27, 17, 3])
    """

    embedding = "joints_embed"

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
        temporal_neighbours: int = 4,
        joints: tuple[tuple[int, ...], ...] = NEIGHBOURS,
        **hourglass,
    ):
        super().__init__((num_frames, num_joints, in_channels), depth, **hourglass)
        if len(joints) != num_joints:
            raise ValueError(f"joints: got the neighbours of {len(joints)} joints, wanted {num_joints}")
        hidden = int(channels * mlp_ratio)
        # The order of parameters and modules is that of the official state_dict.
        self.pos_embed_token = self.stage_embedding(channels)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_joints, channels))
        self.x_token = self.recovery_token(channels)
        self.joints_embed = nn.Linear(in_channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(
            Layer(channels, num_heads, hidden, tokens, joints, temporal_neighbours)
            for tokens in self.tokens_of_blocks(depth)
        )
        self.cross_attention = self.recovering_attention(channels, num_heads, qkv_bias=False)
        self.rep_logit = Representation(channels, representation)
        self.head = nn.Linear(representation, 3)

    def lift(self, x: Tensor, signals: dict) -> tuple[Tensor, Kept]:
        x = self.joints_embed(x) + self.pos_embed
        kept, query, key = (), None, None
        for i, layer in enumerate(self.layers):
            x, kept = self.hourglass.prune(i, x, kept, pos_embed=self.pos_embed_token, query=query, key=key, **signals)
            x, (query, key) = layer(x)
        tail = {"x_token": self.x_token, "cross_attention": self.cross_attention}
        return self.hourglass.recover(self.norm(x), kept, self._regress, **tail), kept

    def _regress(self, x: Tensor) -> Tensor:
        return self.head(self.rep_logit(x))


class Layer(nn.Module):
    """The two streams of [B, F, J, C], each space and then time, and their fusion."""

    def __init__(self, channels: int, num_heads: int, hidden: int, num_frames: int, joints, temporal_neighbours: int):
        super().__init__()

        def attention() -> Attention:
            return Attention(channels, num_heads, qkv_bias=False, proj_first=True)

        self.att_spatial = Mixing(attention(), channels, hidden)
        self.att_temporal = Mixing(attention(), channels, hidden)
        self.graph_spatial = Mixing(SpatialGraph(channels, joints), channels, hidden)
        self.graph_temporal = Mixing(TemporalGraph(channels, num_frames, temporal_neighbours), channels, hidden)
        self.fusion = nn.Linear(2 * channels, 2)
        nn.init.zeros_(self.fusion.weight)
        nn.init.constant_(self.fusion.bias, 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x -> the layer's output and the (query, key) of its temporal attention."""
        attended, query_key = self.att_temporal(self.att_spatial(x, 2)[0], 1)
        passed, _ = self.graph_temporal(self.graph_spatial(x, 2)[0], 1)
        return fused(self.fusion, attended, passed), query_key


class Mixing(nn.Module):
    """x + s1 * mixer(norm1(x)), then x + s2 * mlp(norm2(x))."""

    def __init__(self, mixer: nn.Module, channels: int, hidden: int):
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), 1e-5))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), 1e-5))
        self.norm1 = nn.LayerNorm(channels)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, hidden)

    def forward(self, x: Tensor, dim: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x [B, F, J, C] mixed along axis dim -> (x, what the mixer says beside)."""
        x, beside = self.mixer(x, dim, norm=self.norm1, residual=x, scale=self.layer_scale_1)
        return self.mlp(x, norm=self.norm2, residual=x, scale=self.layer_scale_2), beside


class Graph(nn.Module):
    """residual + scale * relu(x + batch_norm(A' V(x) + U(x))) over the nodes on one axis, A' of `by_degree`.

    A subclass says who is a neighbour of whom, in the words of `graph_update` (`links`) and as a tensor (`adjacency`).
    """

    def __init__(self, channels: int, nodes: int):
        super().__init__()
        self.U = Linear(channels, channels)
        self.V = Linear(channels, channels)
        self.batch_norm = nn.BatchNorm1d(nodes)

    def forward(self, x: Tensor, dim: int, norm: nn.LayerNorm, residual: Tensor, scale: Tensor) -> tuple[Tensor, None]:
        """x, residual [B, F, J, C], the nodes on axis dim; norm: what is done to x first."""
        x = normed(norm, x, x.dtype)
        u, v = self.U(x), self.V(x)
        adjacency, neighbours = self.links()
        if is_silent(self.batch_norm) and takes(x, (u, v, residual, scale), self.batch_norm, neighbours):
            return graph_update(x, u, v, residual, scale, self.batch_norm, dim, adjacency, neighbours), None
        x, u, v, residual = (t.movedim(dim, 2) for t in (x, u, v, residual))  # the nodes beside the channels
        y = by_degree(self.adjacency(x), x.dtype) @ v + u
        y = self.batch_norm(y.flatten(0, 1)).view_as(x)
        return torch.addcmul(residual, torch.relu(x + y), scale).movedim(2, dim), None

    def unexecuted_flops(self, x: Tensor, dim: int) -> int:
        """The published formulation multiplies by D^(-1/2) as two dense products of [T, T] matrices."""
        B, F, J, _ = x.shape
        T = x.shape[dim]
        return 2 * 2 * (B * F * J // T) * T**3


class SpatialGraph(Graph):
    """Over the joints, along the skeleton."""

    def __init__(self, channels: int, joints: tuple[tuple[int, ...], ...]):
        super().__init__(channels, len(joints))
        self.joints = joints
        self.register_buffer("skeleton", self._skeleton(), persistent=False)
        self.register_load_state_dict_post_hook(_refill)

    def _skeleton(self, device: torch.device | None = None) -> Tensor:
        linked = [[other in neighbours for other in range(len(self.joints))] for neighbours in self.joints]
        return torch.tensor(linked, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpatialGraph":
        super()._apply(fn, recurse)
        _refill(self)
        return self

    def links(self) -> tuple[Tensor, int]:
        return self.skeleton, 0

    def adjacency(self, x: Tensor) -> Tensor:
        return self.skeleton


def _refill(graph: SpatialGraph, keys=None) -> None:
    """The skeleton is in no state_dict: nothing else fills it after `to_empty`, or of a model made on "meta"."""
    skeleton = graph.skeleton
    device = next(graph.parameters(), skeleton).device
    if device.type == "meta" or is_fake(skeleton):
        return
    made = graph._skeleton(device)
    if skeleton.is_meta:
        graph.skeleton = made
    elif not torch.equal(skeleton, made):
        skeleton.copy_(made)


class TemporalGraph(Graph):
    """Over the frames of each joint: each frame's neighbours are those most similar to it, as many as asked for."""

    def __init__(self, channels: int, nodes: int, num_neighbours: int):
        super().__init__(channels, nodes)
        self.num_neighbours = min(num_neighbours, nodes)

    def links(self) -> tuple[None, int]:
        return None, self.num_neighbours

    def adjacency(self, x: Tensor) -> Tensor:
        """x [..., T, C] -> bool [..., T, T]: where the product of two frames reaches the row's n-th largest."""
        x = x.detach()
        similarity = x @ x.mT
        left = similarity.clone()
        for _ in range(self.num_neighbours - 1):  # for a few neighbours sooner done than topk
            left.scatter_(-1, left.argmax(-1, keepdim=True), -torch.inf)
        return similarity >= left.amax(-1, keepdim=True)


def by_degree(adjacency: Tensor, dtype: torch.dtype) -> Tensor:
    """D^(-1/2) A D^(-1/2) of A bool [..., T, T], D the rows' degrees."""
    scale = adjacency.sum(-1, dtype=dtype) ** -0.5
    return adjacency * scale[..., :, None] * scale[..., None, :]
