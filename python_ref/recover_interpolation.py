"""Recovery by interpolation in time (TRI)."""

import torch
from torch import Tensor


def blend(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """first (1 - weight) + second weight; a token of weight 0 is not read, whatever it holds."""
    mixed = first * (1 - weight) + second * weight
    return torch.where(weight == 0, first, torch.where(weight == 1, second, mixed))


def recover_interpolate(
    x: Tensor, index: Tensor | None, num_frames: int, *, mode: str = "linear", align: str = "index"
) -> Tensor:
    """x [B, K, ...] at the frames index [B or 1, K] -> [B, num_frames, ...].

    Frames before the first kept one or after the last hold its value. align="uniform" ignores the index:
    frame t reads position t (K - 1) / (num_frames - 1). mode="nearest": the earlier one on a tie.
    A frame that is one token's alone, as a kept one is, has its bits, even beside NaN or infinity.
    """
    B, K, F = x.shape[0], x.shape[1], num_frames
    precision = torch.promote_types(x.dtype, torch.float32)
    frame = torch.arange(F, device=x.device)
    if align == "uniform":
        step = max(F - 1, 1)
        before = (frame * (K - 1) // step).expand(B, F)
        past = (frame * (K - 1) % step).expand(B, F)
        span = torch.full_like(past, step)
    else:
        index = index.expand(B, K).contiguous()
        before = torch.searchsorted(index, frame.expand(B, F).contiguous(), right=True) - 1
        before = before.clamp(min=0)
        after = (before + 1).clamp(max=K - 1)
        past = (frame - index.gather(1, before)).clamp(min=0)
        span = (index.gather(1, after) - index.gather(1, before)).clamp(min=1)
        past = torch.where(before == after, 0, past)
    after = (before + 1).clamp(max=K - 1)
    weight = past.to(precision) / span
    if mode == "nearest":
        weight = (2 * past > span).to(precision)

    def frames(position: Tensor) -> Tensor:
        position = position.reshape(B, F, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        return x.to(precision).gather(1, position)

    weight = weight.reshape(B, F, *[1] * (x.dim() - 2))
    return blend(frames(before), frames(after), weight).to(x.dtype)
