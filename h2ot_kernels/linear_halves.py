"""Linear layers and MLPs of CPU inference in bfloat16, on a tile unit (AMX) or by products of pairs (AVX512-BF16), with
what stands around them.

Internal to `linear.Linear`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .inference import dots_run
from .packed import Packed, declare_layers, fits

PANEL = 32  # outputs


class Halves(Packed):
    """bfloat16 weights [chunks * M, C] and a bias: a LayerNorm before the product, GELU and an addition behind it.

    A product takes rows * C * M multiply-adds. A result has the same bits in any batch, with any number of threads.
    """

    @staticmethod
    def take(weight: Tensor, chunks: int) -> bool:
        """Whether such a product is about as fast as oneDNN's alone (bench/notes_linear.md)."""
        return fits(weight, chunks) and adds_to_float(weight.dtype)

    def __init__(self, weight: Tensor, bias: Tensor | None, chunks: int):
        bias = None if bias is None else bias.float()
        super().__init__(
            OPERATORS, pack(weight, chunks), bias, weight.shape[0], chunks, (torch.bfloat16, torch.float32)
        )


def adds_to_float(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are `Halves`, which can add what they give to a float32 residual (autocast).

    torch.compile's graphs have none of them.
    """
    return dtype == torch.bfloat16 and not torch.compiler.is_compiling() and dots_run()


def pack(weight: Tensor, chunks: int) -> Tensor:
    """weight [chunks * M, C] of bfloat16 as panels [chunks, panels, steps, 2, 16, 16, 2] (csrc/launch_linear.h)."""
    M, C = weight.shape[0] // chunks, weight.shape[1]
    whole = functional.pad(weight.reshape(chunks, M, C), (0, -C % 32, 0, -M % PANEL))
    return whole.unflatten(1, (-1, 2, 16)).unflatten(-1, (-1, 16, 2)).permute(0, 1, 4, 2, 5, 3, 6).contiguous()


OPERATORS = declare_layers("halves", torch.bfloat16)
