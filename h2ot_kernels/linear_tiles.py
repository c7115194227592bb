"""Linear layers and MLPs of CPU inference in float32 on a tile unit (AMX), with what stands around them.

Internal to `linear.Linear`.
"""

import torch
from torch import Tensor

from .inference import declare_for_inference, tiles_run
from .packed import Packed, declare_layers

SMALLEST, LARGEST = 2.0**-48, 2.0**48  # csrc/amx/digits.h: of the largest weight of each output, if any is not 0
CHANNELS = 32, 32768  # a tile has 64; sums of more do not fit


class Tiles(Packed):
    """float32 weights [chunks * M, C] and a bias as whole numbers of bytes: a LayerNorm before the product, GELU and an
    addition behind it.

    A product takes six times rows * C * M multiply-adds of bytes. A result has the same bits in any batch, with any
    number of threads.
    """

    @staticmethod
    def take(weight: Tensor, chunks: int) -> bool:
        """Whether such a product is about as accurate as float32's, and the CPU has it."""
        if not tiles_run() or weight.dtype != torch.float32 or weight.numel() == 0 or weight.shape[0] % chunks:
            return False
        if not CHANNELS[0] <= weight.shape[1] <= CHANNELS[1]:
            return False
        largest = weight.abs().amax(1)
        return bool(((largest == 0) | (largest >= SMALLEST) & (largest < LARGEST)).all())

    def __init__(self, weight: Tensor, bias: Tensor | None, chunks: int):
        packed = pack_tiles(weight, chunks)
        super().__init__(OPERATORS, packed, bias, weight.shape[0], chunks, (torch.float32,))


def _fake_pack(weight, chunks):
    panels, steps = -(-(weight.shape[0] // chunks) // 16), -(-weight.shape[1] // 64)
    return weight.new_empty(chunks * panels * (steps * 3 * 1024 + 16 * 4) + (16 + steps * 64) * 4, dtype=torch.int8)


def spread_and_channels(packed: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Views of what `pack_tiles` made of C channels: their spread [], and the channels' scales [C], the first of them
    negative where there are none (csrc/amx/packed_tiles.h).
    """
    behind = packed[-(16 + -(-C // 64) * 64) * 4 :].view(torch.float32)
    return behind[0], behind[16 : 16 + C]


pack_tiles = declare_for_inference("pack_tiles", "(Tensor weight, int chunks) -> Tensor", _fake_pack)
OPERATORS = declare_layers("tiles", torch.float32)
