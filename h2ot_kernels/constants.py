"""Integers that the host knows as tensors on any device, without a copy that waits for a GPU's queue."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# (device, values) -> the tensor. What is here stays here: a captured graph reads it in every replay, and a stream that
# reads it may be behind the one that would be given its memory. Beyond MOST they are made anew in every call.
_MADE: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
MOST = 256


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """values as int64 [M]. On other devices than the CPU a launch for every stretch of even steps, and no copy."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64, device=device)
    parts = [_even(*part, device) for part in _stretches(values)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def shared(values: tuple[int, ...], device: torch.device) -> Tensor:
    """values as int64 [1, M], the same tensor in every call, to be read only. device: with its index.

    Tensors of a tracer, a mode or a capture are made anew: they mean nothing outside of it.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return integers(values, device)[None]
    made = _MADE.get((device, values))
    if made is not None:
        return made
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return integers(values, device)[None]
    with torch.inference_mode(False):  # by a copy, which has ended when this returns: other streams may read at once
        made = torch.tensor([values], dtype=torch.int64, device=device)
    if len(_MADE) < MOST:
        _MADE[device, values] = made
    return made


def resolved(device: torch.device | str | int | None) -> torch.device:
    """The device, with its index, on which a tensor that is made for `device` would be now."""
    if isinstance(device, torch.device) and (device.index is not None or device.type == "cpu"):
        return device
    return torch.empty(0, device=device).device


def _stretches(values: Sequence[int]) -> list[tuple[int, int, int]]:
    """values as (first, step, how many) one after the other."""
    found, start = [], 0
    while start < len(values):
        end = start + 1
        step = values[end] - values[start] if end < len(values) else 0
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        found.append((values[start], step, end - start))
        start = end
    return found


def _even(first: int, step: int, count: int, device: torch.device) -> Tensor:
    if step == 0:
        return torch.full((count,), first, dtype=torch.int64, device=device)
    return torch.arange(first, first + step * count, step, dtype=torch.int64, device=device)
