"""MixSTE and its hourglasses (HoT, TPC, H2OT), with the official parameter names."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import checks
from ..gather import gather_tokens
from ..hourglass import Hourglass, Kept
from ..nn import TokenRecoveringAttention
from .blocks import Block


class MixSTE(nn.Module):
    """2D keypoints [B, F, J, in_channels] -> 3D poses: `depth` pairs of a spatial (STE) and a temporal (TTE) block.

    num_frames, num_joints: F, J. channels: C. stages, pruner, recover, pipeline, keep, k: see `Hourglass`; no stages:
    the unpruned model. pos_embed: HoT's learnable embedding after the (single) pruning stage.
    drop_path_rate: of the last block in training, rising linearly from 0.
    Raises ValueError for a stage that no block follows, or pos_embed without exactly one stage.

    >>> import torch
    >>> from h2ot_kernels.hosts.mixste import MixSTE
    >>> model = MixSTE(num_frames=27, channels=32, depth=3, stages={1: 9}, pruner="cluster").eval()
    >>> model(torch.randn(2, 27, 17, 2)).shape
    torch.Size([2, 27, 17, 3])
    """

    def __init__(
        self,
        num_frames: int = 243,
        num_joints: int = 17,
        in_channels: int = 2,
        channels: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.1,
        *,
        stages: Mapping[int, int] | None = None,
        pruner: str = "cluster",
        recover: str | None = "interpolation",
        pipeline: str = "seq2seq",
        keep: int | Sequence[int] | str | None = None,
        k: int = 2,
        pos_embed: bool = False,
    ):
        super().__init__()
        self.hourglass = Hourglass(num_frames, stages or {}, pruner, recover, pipeline, keep=keep, k=k)
        stages = self.hourglass.stages
        if stages and max(stages) >= depth:
            raise ValueError(f"stages: got a stage before block {max(stages)}, wanted blocks 0 to {depth - 1}")
        if pos_embed and len(stages) != 1:
            raise ValueError(f"pos_embed: needs exactly one stage, got {len(stages)}")
        self.in_shape = (num_frames, num_joints, in_channels)

        # The order of parameters and modules is that of the official state_dict.
        self.pos_embed_token = nn.Parameter(torch.zeros(1, *stages.values(), channels)) if pos_embed else None
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, num_joints, channels))
        self.Temporal_pos_embed = nn.Parameter(torch.zeros(1, num_frames, channels))
        self.x_token = nn.Parameter(torch.zeros(1, num_frames, channels)) if recover == "attention" else None
        self.Spatial_patch_to_embedding = nn.Linear(in_channels, channels)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.STEblocks = nn.ModuleList(Block(channels, num_heads, mlp_ratio, rate) for rate in rates)
        self.TTEblocks = nn.ModuleList(Block(channels, num_heads, mlp_ratio, rate) for rate in rates)
        self.cross_attention = TokenRecoveringAttention(channels, num_heads) if recover == "attention" else None
        self.Spatial_norm = nn.LayerNorm(channels, eps=1e-6)
        self.Temporal_norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 3))

    def forward(
        self,
        x: Tensor,
        index: Tensor | Kept | None = None,
        *,
        scores: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | torch.Generator | None = None,
        return_index: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | Kept]:
        """x [B, F, J, in_channels] -> poses [B, F, J, 3]; seq2frame: [B, 1, J, 3], the centre.

        With recover=None (TPC), or return_index=True: (poses, index); recover=None in seq2seq gives the K kept frames.
        index: the kept input frames, int64 [B, K] or [1, K]; with several stages a tuple of one a stage. Given back as
        `index=` they are kept again (test-time flip). scores, mask, noise: see `Hourglass.prune`.
        """
        checks.tensor("x", x, (4,), "[B, F, J, in_channels]")
        checks.has_shape("x", x, (x.shape[0], *self.in_shape), "[B, F, J, in_channels]")
        given = {"index": index, "pose": x[..., :2], "scores": scores, "mask": mask, "noise": noise}
        x = self.Spatial_patch_to_embedding(x) + self.Spatial_pos_embed
        kept, query, key = (), None, None
        for i, (spatial, temporal) in enumerate(zip(self.STEblocks, self.TTEblocks, strict=True)):
            x, kept = self.hourglass.prune(i, x, kept, pos_embed=self.pos_embed_token, query=query, key=key, **given)
            x = self.Spatial_norm(spatial(x, dim=2)[0])
            if i == 0:
                x = x + self._temporal_embedding(kept)
            x, (query, key) = temporal(x, dim=1)
            x = self.Temporal_norm(x)
        tail = {"x_token": self.x_token, "cross_attention": self.cross_attention}
        pose = self.hourglass.recover(x, kept, self.head, **tail)
        if return_index or (self.hourglass.recovery is None and self.hourglass.pipeline == "seq2seq"):
            return pose, kept[0] if len(kept) == 1 else kept
        return pose

    def _temporal_embedding(self, kept: Kept) -> Tensor:
        embed = self.Temporal_pos_embed
        if kept:
            embed = gather_tokens(embed.expand(kept[0].shape[0], -1, -1), kept[0])
        return embed[:, :, None]
