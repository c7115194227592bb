"""MHFormer and its hourglasses (TPC, H2OT), with the official parameter names."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..attention import attend_rows
from ..hourglass import Kept
from ..inference import is_unseen
from ..linear import Linear, call
from ..watched import is_own
from .blocks import Attention, Block, Mlp, QueryKey, check_heads, drop_path, drop_rates, project
from .host import Host

STREAMS = (1, 2, 3)
# Which streams give the query and the key when stream s is updated; the value is its own.
SOURCES = {1: (2, 3), 2: (1, 3), 3: (1, 2)}
POINTWISE = ((1,), (1,), (0,), 1)


class MHFormer(Host):
    """2D keypoints [B, F, J, in_channels] -> 3D poses, by way of three hypotheses.

    Three encoders over the 2J coordinate rows make the hypotheses; two blocks refine each (`SHR_blocks`, blocks 0 and 1
    of the hourglass), one lets them interact (`CHI_blocks`, block 2). From the embedding on, the three streams lie side
    by side in one [B, F, 3C]: that is also what the cluster pruner reads.
    num_frames, num_joints: F, J. channels: C, of a stream. hidden: of the MLP over all three. encoder_depth: blocks of
    an encoder. encoder_heads divides F. dropout, drop_path_rate: in training.
    embedding_dropout: a number gives each embedding a BatchNorm1d, a ReLU and this dropout, as official models of up to
    27 frames have (0.25); None: a Conv1d alone, as those of more.
    hourglass: stages, pruner, recover (None or "interpolation"), pipeline, keep, k, see `Host`.

    >>> import torch
    >>> from h2ot_kernels.hosts.mhformer import MHFormer
    >>> model = MHFormer(num_frames=27, channels=32, hidden=64, stages={1: 9}, pruner="cluster").eval()
    >>> model(torch.randn(2, 27, 17, 2)).shape
    torch.Size([2, 27, 17, 3])
    """

    embedding = "embedding_1"

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
        embedding_dropout: float | None = None,
        **hourglass,
    ):
        super().__init__((num_frames, num_joints, in_channels), 3, **hourglass)
        if self.hourglass.recovery == "attention":
            raise ValueError("recover: got 'attention', wanted 'interpolation' or None: MHFormer has no recovery token")
        if hourglass.get("pos_embed"):
            raise ValueError("pos_embed: got True, wanted False: MHFormer has no embedding after its pruning")
        check_heads("num_heads", num_heads, "channels", channels)
        check_heads("encoder_heads", encoder_heads, "num_frames", num_frames)
        rows, common = in_channels * num_joints, (dropout, drop_path_rate)
        # The order of parameters and modules is that of the official state_dict.
        for s in STREAMS:
            embedding = nn.Conv1d(rows, channels, 1)
            if embedding_dropout is not None:
                beside = nn.BatchNorm1d(channels), nn.ReLU(), nn.Dropout(embedding_dropout)
                embedding = nn.Sequential(embedding, *beside)
            self.add_module(f"embedding_{s}", embedding)
        self.Transformer_hypothesis = HypothesisTransformer(num_frames, channels, num_heads, hidden, *common)
        self.regression = nn.Sequential(nn.BatchNorm1d(3 * channels), nn.Conv1d(3 * channels, 3 * num_joints, 1))
        for s in STREAMS:
            self.add_module(f"norm_{s}", nn.LayerNorm(num_frames))
        for s in STREAMS:
            encoder = Encoder(rows, num_frames, encoder_depth, encoder_heads, *common)
            self.add_module(f"Transformer_encoder_{s}", encoder)

    def lift(self, x: Tensor, signals: dict) -> tuple[Tensor, Kept]:
        x = x.flatten(2).mT
        streams = []
        for s in STREAMS:
            x = x + getattr(self, f"Transformer_encoder_{s}")(getattr(self, f"norm_{s}")(x))
            streams.append(pointwise(getattr(self, f"embedding_{s}"), x.mT))
        transformer = self.Transformer_hypothesis
        x, kept, query, key = transformer.embed(streams), (), None, None
        for i, block in enumerate((*transformer.SHR_blocks, *transformer.CHI_blocks)):
            x, kept = self.hourglass.prune(i, x, kept, query=query, key=key, **signals)
            asked = self.prunes_by_attention(i + 1)
            x, of_streams = block(x, with_query_key=asked)
            if asked:
                query, key = (torch.stack(parts, 1) for parts in zip(*of_streams, strict=True))
        return self.hourglass.recover(transformer.norm(x), kept, self._regress), kept

    def _regress(self, x: Tensor) -> Tensor:
        """[B, K, 3C] -> [B, K, J, 3]. Unwatched, the rows are a batch to the BatchNorm: the statistics over B and K."""
        layers = self.regression
        if is_own(layers, nn.Sequential) and len(layers) == 2 and is_own(layers[0], nn.BatchNorm1d):
            y = pointwise(layers[1], layers[0](x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        else:
            y = layers(x.mT).mT
        return y.unflatten(-1, (-1, 3))


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A Conv1d on channels last: [B, T, in_channels] -> [B, T, out_channels]; whoever watches, and what is more than a
    Conv1d, sees channels first.
    """
    if is_own(conv, nn.Conv1d) and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == POINTWISE:
        return functional.linear(x, conv.weight[..., 0], conv.bias)
    return conv(x.mT).mT


class Encoder(nn.Module):
    """Blocks over the coordinate rows [B, 2J, F], with the F frames as channels."""

    def __init__(self, rows: int, num_frames: int, depth: int, num_heads: int, dropout: float, drop_path_rate: float):
        super().__init__()
        self.dropout = dropout
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, num_frames))
        rates = drop_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(Block(num_frames, num_heads, 2 * num_frames, rate, dropout) for rate in rates)
        self.norm = nn.LayerNorm(num_frames, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed
        x = functional.dropout(x, self.dropout) if self.training else x
        for block in self.blocks:
            x, _ = block(x, dim=1)
        return self.norm(x)


class HypothesisTransformer(nn.Module):
    """The embeddings, blocks and final norm of the three streams [B, F, 3C]."""

    def __init__(
        self, num_frames: int, channels: int, num_heads: int, hidden: int, dropout: float, drop_path_rate: float
    ):
        super().__init__()
        self.dropout = dropout
        for s in STREAMS:
            self.register_parameter(f"pos_embed_{s}", nn.Parameter(torch.zeros(1, num_frames, channels)))
        rates = drop_rates(drop_path_rate, 3)
        size = (channels, num_heads, hidden, dropout)
        self.SHR_blocks = nn.ModuleList(RefinementBlock(*size, rate) for rate in rates[:2])
        self.CHI_blocks = nn.ModuleList(InteractionBlock(*size, rate) for rate in rates[2:])
        self.norm = nn.LayerNorm(3 * channels, eps=1e-6)

    def embed(self, streams: list[Tensor]) -> Tensor:
        """Three [B, F, C] -> [B, F, 3C]."""
        x = torch.cat([x + getattr(self, f"pos_embed_{s}") for s, x in zip(STREAMS, streams, strict=True)], -1)
        return functional.dropout(x, self.dropout) if self.training else x


class HypothesisBlock(nn.Module):
    """A block of three streams [B, K, 3C]: each is updated, then all pass one MLP."""

    def __init__(self, channels: int, num_heads: int, hidden: int, dropout: float, drop_path_rate: float):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.make_streams(channels, num_heads, dropout)
        self.norm2 = nn.LayerNorm(3 * channels, eps=1e-6)
        self.mlp = Mlp(3 * channels, hidden, dropout)

    def forward(self, x: Tensor, *, with_query_key: bool = False) -> tuple[Tensor, list[QueryKey | None]]:
        """x -> the block's output, and each stream's (query, key) [B, H, K, D] where asked for."""
        streams, query_keys = dict(zip(STREAMS, x.chunk(3, -1), strict=True)), []
        drops = self.training and self.drop_path_rate > 0
        in_place = not (self.training or torch.is_grad_enabled()) and is_unseen(x)
        if in_place:
            whole = torch.empty_like(x)
            parts = dict(zip(STREAMS, whole.chunk(3, -1), strict=True))
        else:  # each is read by three layers or more: copied once
            streams = {s: stream.contiguous() for s, stream in streams.items()}
        for s in STREAMS:
            asked = {"with_query_key": with_query_key, "residual": None if drops else streams[s]}
            if in_place:
                asked["out"] = parts[s]  # where it is written unless somebody, whose result counts, put another there
            updated, query_key = self.update(s, streams, **asked)
            streams[s] = streams[s] + drop_path(updated, self.drop_path_rate, 1) if drops else updated
            query_keys.append(query_key)
        written = in_place and all([streams[s] is parts[s] for s in STREAMS])
        x = whole if written else torch.cat(list(streams.values()), -1)
        if drops:
            return x + drop_path(self.mlp(x, norm=self.norm2), self.drop_path_rate, 1), query_keys
        return self.mlp(x, norm=self.norm2, residual=x), query_keys


class RefinementBlock(HypothesisBlock):
    """SHR: self-attention in each stream."""

    def make_streams(self, channels: int, num_heads: int, dropout: float) -> None:
        for s in STREAMS:
            self.add_module(f"norm1_{s}", nn.LayerNorm(channels, eps=1e-6))
        for s in STREAMS:
            self.add_module(f"attn_{s}", Attention(channels, num_heads, dropout=dropout))

    def update(self, s: int, streams: dict[int, Tensor], **asked) -> tuple[Tensor, QueryKey | None]:
        return getattr(self, f"attn_{s}")(streams[s], dim=1, norm=getattr(self, f"norm1_{s}"), **asked)


class InteractionBlock(HypothesisBlock):
    """CHI: query and key from the other two streams as they are by now, value from the stream itself."""

    def make_streams(self, channels: int, num_heads: int, dropout: float) -> None:
        for s in STREAMS:
            for source in STREAMS:
                self.add_module(f"norm3_{s}{source}", nn.LayerNorm(channels, eps=1e-6))
        for s in STREAMS:
            self.add_module(f"attn_{s}", CrossAttention(channels, num_heads, dropout))

    def update(self, s: int, streams: dict[int, Tensor], **asked) -> tuple[Tensor, QueryKey | None]:
        norms = [getattr(self, f"norm3_{s}{i}") for i in STREAMS]
        return getattr(self, f"attn_{s}")([streams[i] for i in (*SOURCES[s], s)], norms, **asked)


class CrossAttention(nn.Module):
    """Attention with query, key and value from three tensors [B, K, C]."""

    def __init__(self, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.linear_q = Linear(channels, channels)
        self.linear_k = Linear(channels, channels)
        self.linear_v = Linear(channels, channels)
        self.proj = Linear(channels, channels)

    def forward(
        self, sources: list[Tensor], norms: list[nn.LayerNorm], *, with_query_key: bool, **update
    ) -> tuple[Tensor, QueryKey | None]:
        """sources: what query, key and value are made of after their norms -> residual + attention, (query, key).

        update: residual, out as `Linear` takes them.
        """
        layers = (self.linear_q, self.linear_k, self.linear_v)
        heads = [call(layer, x, norm=norm) for layer, x, norm in zip(layers, sources, norms, strict=True)]
        query_key = None
        if with_query_key:
            query_key = tuple(y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in heads[:2])
        attended = attend_rows(*heads, self.num_heads)
        return project(self.proj, attended, self.dropout if self.training else 0.0, **update), query_key
