"""`hourglass.wrap`: a user's own blocks as an hourglass."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import checks
from .hourglass import Hourglass, Kept, _take
from .linear import Linear
from .watched import is_own


def wrap(
    blocks: nn.ModuleList | nn.Sequential | nn.TransformerEncoder,
    num_frames: int,
    stages: Mapping[int, int] | None = None,
    pruner: str = "sampler",
    recover: str | None = "interpolation",
    pipeline: str = "seq2seq",
    *,
    query_key: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None,
    **options,
) -> "WrappedBlocks":
    """The blocks, run in turn, as an hourglass: x [B, F, ..., C] -> what `Hourglass.recover` gives.

    blocks: shared, not copied; nn.TransformerEncoderLayer with batch_first=True. Hooks of what holds them are not
    called; a class of it that has a forward of its own is refused. num_frames, stages, pruner,
    recover, pipeline and options (frame_dim, keep, k, num_joints, channels, num_heads): see `Hourglass`.
    query_key: for pruner="attention", (block, its input) -> its temporal attention's query and key [B, ..., H, F, D];
    known for nn.TransformerEncoderLayer and for blocks with `norm1` and `attn.qkv`.
    Raises ValueError for a stage that no block follows, recover="attention" without channels, for blocks behind the
    first stage whose parameters depend on the number of frames (a position embedding, a norm over frames;
    channels=num_frames says that such an axis holds channels), and TypeError for other blocks.

    >>> import torch, h2ot_kernels as h2ot
    >>> layers = [torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(4)]
    >>> model = h2ot.hourglass.wrap(torch.nn.ModuleList(layers), 81, stages={1: 41, 2: 27})
    >>> model(torch.randn(2, 81, 32), head=torch.nn.Linear(32, 51)).shape
    torch.Size([2, 81, 51])
    """
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential, nn.TransformerEncoder)):
        raise TypeError(f"blocks: got {type(blocks).__name__}, wanted ModuleList, Sequential or TransformerEncoder")
    known = (nn.ModuleList.forward, nn.Sequential.forward, nn.TransformerEncoder.forward)
    if type(blocks).forward not in known or "forward" in blocks.__dict__:
        raise TypeError(
            f"blocks: got {type(blocks).__name__} with a forward of its own, which would not run; wanted ModuleList, "
            "Sequential or TransformerEncoder, or a call of Hourglass in that forward"
        )
    return WrappedBlocks(blocks, Hourglass(num_frames, stages, pruner, recover, pipeline, **options), query_key)


class WrappedBlocks(nn.Module):
    """What `wrap` makes: `blocks` (the caller's own) and `hourglass`."""

    def __init__(self, blocks: nn.Module, hourglass: Hourglass, query_key: Callable | None = None):
        super().__init__()
        self.blocks, self.hourglass = blocks, hourglass
        self.query_key = _query_key if query_key is None else query_key
        layers, stages = self.layers(), hourglass.stages
        if hourglass.recovery == "attention" and hourglass.cross_attention is None:
            raise ValueError(
                "channels: got None, wanted those of x: recover='attention' needs an x_token of that width"
            )
        if stages and max(stages) >= len(layers):
            raise ValueError(f"stages: got a stage before block {max(stages)}, wanted blocks 0 to {len(layers) - 1}")
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.TransformerEncoderLayer) and not layer.self_attn.batch_first:
                raise ValueError(f"blocks: block {i} has batch_first=False, wanted the batch on axis 0")
            if stages and i >= min(stages):
                _check_independent(i, layer, hourglass)
        if hourglass.pruner == "attention":
            if 0 in stages:
                raise ValueError(
                    "stages: pruner='attention' reads the block before the cut, and none is before block 0"
                )
            for block in stages if query_key is None else ():
                if not _has_query_key(layers[block - 1]):
                    raise ValueError(
                        f"query_key: got None, but block {block - 1} is no TransformerEncoderLayer and has no norm1 "
                        "and attn.qkv to take them from"
                    )

    def layers(self) -> list[nn.Module]:
        return list(self.blocks.layers if isinstance(self.blocks, nn.TransformerEncoder) else self.blocks)

    def forward(
        self,
        x: Tensor,
        *,
        head: nn.Module | None = None,
        index: Tensor | Kept | None = None,
        mask: Tensor | None = None,
        return_index: bool = False,
        **given,
    ) -> Tensor | tuple[Tensor, Tensor | Kept]:
        """x: the frames on axis frame_dim. head, and given (pose, scores, noise): see `Hourglass`.

        mask: [B, F], True = valid; for the pruner, and for each nn.TransformerEncoderLayer its padding mask.
        With recover=None in seq2seq, or return_index=True: (result, the kept input frames), which `index` takes back.
        """
        kept, before = (), None
        self.hourglass.check_frames(x, kept)
        if mask is not None:
            checks.tensor("mask", mask, (2,), "[B, F]", (torch.bool,))
            checks.signal("mask", mask, self.hourglass.num_frames)
            if x.shape[0] % max(mask.shape[0], 1):
                raise ValueError(f"mask: got shape {checks.shape(mask)}, wanted a row per sample of the {len(x)} of x")
        for i, layer in enumerate(self.layers()):
            if i in self.hourglass.stages:
                if self.hourglass.pruner == "attention" and index is None:
                    given["query"], given["key"] = before
                x, kept = self.hourglass.prune(i, x, kept, index=index, mask=mask, **given)
            if self.hourglass.pruner == "attention" and i + 1 in self.hourglass.stages and index is None:
                before = self._asked(layer, x)
            if mask is not None and isinstance(layer, nn.TransformerEncoderLayer):
                valid = _take(mask, kept[-1]) if kept else mask
                x = layer(x, src_key_padding_mask=~valid.repeat_interleave(len(x) // max(len(valid), 1), 0))
            else:
                x = layer(x)
            if not isinstance(x, Tensor):
                raise TypeError(f"blocks: block {i} returned {type(x).__name__}, wanted a tensor")
        if isinstance(self.blocks, nn.TransformerEncoder) and self.blocks.norm is not None:
            x = self.blocks.norm(x)
        result = self.hourglass.recover(x, kept, head)
        if return_index or (self.hourglass.recovery is None and self.hourglass.pipeline == "seq2seq"):
            return result, kept[0] if len(kept) == 1 else kept
        return result

    def _asked(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # a choice of frames has no gradient
            if self.query_key is not _query_key:
                return self.query_key(layer, x)
            return _query_key(layer, x, self.hourglass.frame_dim)


def _has_query_key(layer: nn.Module) -> bool:
    if isinstance(layer, nn.TransformerEncoderLayer):
        return layer.self_attn.in_proj_weight is not None
    attention = getattr(layer, "attn", None)
    return hasattr(layer, "norm1") and hasattr(attention, "qkv") and hasattr(attention, "num_heads")


def _query_key(layer: nn.Module, x: Tensor, frame_dim: int) -> tuple[Tensor, Tensor]:
    """The query and key [..., H, F, D] of a block's attention along frame_dim, as it will compute them from x."""
    if isinstance(layer, nn.TransformerEncoderLayer):
        attention = layer.self_attn
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        normed = layer.norm1(x) if layer.norm_first else x
    else:
        attention, normed = layer.attn, layer.norm1(x)
        if not (is_own(attention.qkv, nn.Linear) or is_own(attention.qkv, Linear)):  # a wrapper's weight says little
            return _heads(attention.qkv(normed), 3, attention.num_heads, frame_dim)
        weight, bias = attention.qkv.weight, attention.qkv.bias
    two = weight.shape[0] // 3 * 2
    both = functional.linear(normed, weight[:two], None if bias is None else bias[:two])
    return _heads(both, 2, attention.num_heads, frame_dim)


def _heads(projected: Tensor, parts: int, num_heads: int, frame_dim: int) -> tuple[Tensor, Tensor]:
    """The first two of that many parts [..., H, F, D]."""
    heads = projected.movedim(frame_dim, -2).unflatten(-1, (parts, num_heads, -1))
    query, key, *_ = heads.movedim(-4, -2).unbind(-4)
    return query, key


def _check_independent(block: int, layer: nn.Module, hourglass: Hourglass) -> None:
    """Raises where a parameter or buffer has an axis as long as the frames: it would not fit the kept ones.

    Of nn.TransformerEncoderLayer all axes hold channels.
    """
    frames = hourglass.num_frames
    if hourglass.channels == frames or type(layer) is nn.TransformerEncoderLayer:
        return
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if frames in tensor.shape:
            raise ValueError(
                f"blocks: block {block} has {name} of shape {checks.shape(tensor)}, which depends on the number of "
                f"frames = {frames}, but a stage prunes them; where that axis holds channels, say channels={frames}"
            )
