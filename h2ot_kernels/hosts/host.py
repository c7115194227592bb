"""What the hosts share: an hourglass, the shape of their input, and what a call takes and gives."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import checks
from ..hourglass import Hourglass, Kept
from ..modes import is_autocast_on
from ..nn import TokenRecoveringAttention
from ..watched import is_own


class Host(nn.Module):
    """A video pose transformer with an hourglass: 2D keypoints [B, F, J, in_channels] in, 3D poses out.

    A host writes `lift` and names its `embedding`, the layer whose dtype and device x has to have; its blocks are
    numbered 0 to depth - 1. in_shape: (F, J, in_channels). With `takes_fewer` the unpruned model takes 1 to F frames.
    stages, pruner, recover, pipeline, keep, k: see `Hourglass`; no stages: the unpruned model. pos_embed: a learnable
    embedding is added after the (single) pruning stage, as HoT does.
    Raises ValueError for a stage that no block follows, or pos_embed without exactly one stage.
    """

    embedding: str | None = None  # its name
    takes_fewer = False

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        depth: int,
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
        self.in_shape = in_shape
        self.hourglass = Hourglass(in_shape[0], stages or {}, pruner, recover, pipeline, keep=keep, k=k)
        stages = self.hourglass.stages
        if stages and max(stages) >= depth:
            raise ValueError(f"stages: got a stage before block {max(stages)}, wanted blocks 0 to {depth - 1}")
        if pos_embed and len(stages) != 1:
            raise ValueError(f"pos_embed: needs exactly one stage, got {len(stages)}")
        self._has_stage_embedding = pos_embed

    def stage_embedding(self, channels: int) -> nn.Parameter | None:
        """HoT's `pos_embed_token` [1, K, C], zero at the start."""
        if not self._has_stage_embedding:
            return None
        return nn.Parameter(torch.zeros(1, *self.hourglass.stages.values(), channels))

    def recovery_token(self, channels: int) -> nn.Parameter | None:
        """TRA's `x_token` [1, F, C], zero at the start."""
        if self.hourglass.recovery != "attention":
            return None
        return nn.Parameter(torch.zeros(1, self.in_shape[0], channels))

    def recovering_attention(self, channels: int, num_heads: int, qkv_bias: bool = True) -> nn.Module | None:
        """TRA's `cross_attention`."""
        if self.hourglass.recovery != "attention":
            return None
        return TokenRecoveringAttention(channels, num_heads, qkv_bias)

    def lift(self, x: Tensor, signals: dict) -> tuple[Tensor, Kept]:
        """x [B, F, J, in_channels] -> (what `Hourglass.recover` made of it, kept); signals: for `Hourglass.prune`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its blocks are")

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

        F: in_shape[0]; where `may_be_shorter`, 1 to that, and as many poses.
        With recover=None (TPC), or return_index=True: (poses, index); recover=None in seq2seq gives the K kept frames.
        index: the kept input frames, int64 [B, K] or [1, K]; with several stages a tuple of one a stage. Given back as
        `index=` they are kept again (test-time flip). scores, mask, noise: see `Hourglass.prune`.
        """
        checks.tensor("x", x, (4,), "[B, F, J, in_channels]")
        frames, layout = self.in_shape[0], "[B, F, J, in_channels]"
        if self.may_be_shorter:
            frames, layout = x.shape[1] if 1 <= x.shape[1] <= frames else frames, "[B, 1 to F, J, in_channels]"
        checks.has_shape("x", x, (x.shape[0], frames, *self.in_shape[1:]), layout)
        if not self.hourglass.stages and index is not None and len(index):
            raise ValueError("index: got frames to keep, wanted None: this model prunes none")
        if self.embedding is not None:
            check_input("x", x, self.embedding, getattr(self, self.embedding))
        signals = {"index": index, "pose": x[..., :2], "scores": scores, "mask": mask, "noise": noise}
        pose, kept = self.lift(x, signals)
        if return_index or (self.hourglass.recovery is None and self.hourglass.pipeline == "seq2seq"):
            return pose, kept[0] if len(kept) == 1 else kept
        return pose

    @property
    def may_be_shorter(self) -> bool:
        """Whether a call may have fewer frames than in_shape[0], as the official model's: not where frames are pruned,
        recovered from a token of every frame, or counted for the centre.
        """
        hourglass = self.hourglass
        plain = not hourglass.stages and hourglass.recovery != "attention" and hourglass.pipeline == "seq2seq"
        return self.takes_fewer and plain

    def prunes_by_attention(self, block: int) -> bool:
        """Whether a stage before `block` reads the temporal query and key of the block before it."""
        return self.hourglass.pruner == "attention" and block in self.hourglass.stages

    def tokens_of_blocks(self, depth: int) -> list[int]:
        """How many frames each block sees."""
        tokens, frames = [], self.in_shape[0]
        for block in range(depth):
            frames = self.hourglass.stages.get(block, frames)
            tokens.append(frames)
        return tokens


def check_input(name: str, x: Tensor, layer_name: str, layer: nn.Module) -> None:
    """x is where layer's weight is and has its dtype, unless autocast sees to that. Whoever hooks, wraps or replaces
    layer may want another: then PyTorch says so.
    """
    if not any([is_own(layer, kind) for kind in (nn.Linear, nn.Conv1d, nn.Conv2d)]):
        return
    weight = layer.weight
    checks.same_device(name, x, f"{layer_name}.weight", weight)
    if x.dtype != weight.dtype:
        dtypes = x.dtype, weight.dtype
        if not is_autocast_on(x.device.type) or torch.float64 in dtypes:  # which autocast leaves as it is
            checks.same_dtype(name, x, f"{layer_name}.weight", weight)
