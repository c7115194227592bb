"""Taking the kept frames out of a tensor."""

import torch
from torch import Tensor


def gather_tokens(
    x: Tensor, index: Tensor, pos_embed: Tensor | None = None, *, dim: int = 1, out_dim: int | None = None
) -> Tensor:
    """x, frames on axis dim, at index [B or 1, K]: K frames on axis out_dim, + pos_embed [1, K, C] where given.

    Each row of the index serves x.shape[0] / index.shape[0] consecutive rows of x. Frames named -1 (padding) are zeros.
    """
    out_dim = dim if out_dim is None else out_dim
    index = index.repeat_interleave(x.shape[0] // max(index.shape[0], 1), 0)
    frames_first = x.movedim(dim, 1)
    position = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *frames_first.shape[2:])
    kept = frames_first.gather(1, position.clamp(min=0)).masked_fill(position < 0, 0.0)
    if pos_embed is not None:
        embed = pos_embed.reshape(pos_embed.shape[-2], *[1] * (x.dim() - 3), pos_embed.shape[-1])
        kept = (kept.to(torch.promote_types(x.dtype, torch.float32)) + embed).to(x.dtype)
    return kept.movedim(1, out_dim).contiguous()
