"""Linear layers and MLPs of CPU inference in float32 by vectors (AVX2, AVX-512), with what stands around them.

Internal to `linear.Linear`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .inference import capability, floats_panel, tiles_run
from .packed import Packed, declare_layers, fits


class Floats(Packed):
    """float32 weights [chunks * M, C] and a bias: a LayerNorm before the product, GELU and an addition behind it.

    A product takes rows * C * M multiply-adds. A result has the same bits in any batch, with any number of threads.
    """

    @staticmethod
    def take(weight: Tensor, chunks: int) -> bool:
        """Whether such a product is about as fast as oneDNN's alone, or faster (bench/notes_linear.md)."""
        runs = floats_run() or (has_floats() and is_narrow(weight.shape[0] // chunks, weight.shape[1]))
        return fits(weight, chunks) and weight.dtype == torch.float32 and runs

    def __init__(self, weight: Tensor, bias: Tensor | None, chunks: int):
        super().__init__(OPERATORS, pack(weight, chunks), bias, weight.shape[0], chunks, (torch.float32,))


def is_narrow(outputs: int, channels: int) -> bool:
    """Whether vectors are faster than a tile unit, which takes 64 channels and 16 outputs at once: of both layers of an
    MLP or of none (bench/notes_linear.md).
    """
    least, most = sorted((outputs, channels))
    return least < 32 or (least < 64 and most <= 256)


def has_floats() -> bool:
    """Whether the CPU has them: nothing is known of their time on other instruction sets."""
    return capability() in ("avx2", "avx512")


def floats_run() -> bool:
    """Whether products of float32 are `Floats`, narrow or not: no tile unit takes them."""
    return has_floats() and not tiles_run()


def pack(weight: Tensor, chunks: int, panel: int | None = None) -> Tensor:
    """weight [chunks * M, C] of float32 as panels [chunks, panels, C, panel] (csrc/launch_linear.h).

    panel: outputs of one; None: as many as the kernels in use take.
    """
    panel = floats_panel() if panel is None else panel
    M, C = weight.shape[0] // chunks, weight.shape[1]
    whole = functional.pad(weight.reshape(chunks, M, C), (0, 0, 0, -M % panel))
    return whole.unflatten(1, (-1, panel)).transpose(-1, -2).contiguous()


OPERATORS = declare_layers("floats", torch.float32)
