"""Linear layers and MLPs of CPU inference in float32 on a tile unit (AMX), with what stands around them.

Internal to `linear.Linear`.
"""

import torch
from torch import Tensor

from .inference import declare_for_inference, tiles_run
from .packed import Packed, declare_layers

SMALLEST, LARGEST = 2.0**-48, 2.0**48  # csrc/amx/digits.h: of the largest weight of each output, if any is not 0
CHANNELS = 32, 32768  # a tile has 64; sums of more do not fit
SMALLEST_SHARE = 2.0**-60  # its square is a normal number


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
        packed = pack_tiles(weight, chunks, channel_scales(weight))
        super().__init__(OPERATORS, packed, bias, weight.shape[0], chunks, (torch.float32,))


def channel_scales(weight: Tensor) -> Tensor | None:
    """What the channels [C] of rows are multiplied by, and those of the weights divided; None: all by 1.

    A row's digits go down from its largest number, so where it is large just where weights are small, they would be
    those of products that hardly count. A channel's scale is the root of the squares of its weights, each over that of
    its output, which is taken twice: outputs that one channel rules look small without it. Above a half it is 1.
    """
    inverse = weight.new_ones(weight.shape[1])
    for _ in range(2):
        sizes = torch.linalg.vector_norm(weight * inverse, dim=1, keepdim=True)
        shares = (weight.abs() / sizes.where(sizes > 0, 1)).clamp(min=SMALLEST_SHARE).where(weight != 0, 0)
        scales = torch.linalg.vector_norm(shares, dim=0)
        scales = scales / scales.max()
        inverse = (1 / scales).where(scales > 0, 0)
    scales = scales.where(scales <= 0.5, 1)
    return None if (scales == 1).all() else scales


def _fake_pack(weight, chunks, channels=None):
    panels, steps = -(-(weight.shape[0] // chunks) // 16), -(-weight.shape[1] // 64)
    return weight.new_empty(chunks * panels * (steps * 3 * 1024 + 16 * 4) + (16 + steps * 64) * 4, dtype=torch.int8)


def spread_of(packed: Tensor, C: int) -> Tensor:
    """A view of the spread [] in what `pack_tiles` made of C channels (csrc/amx/packed_tiles.h)."""
    return packed[-(16 + -(-C // 64) * 64) * 4 :].view(torch.float32)[0]


pack_tiles = declare_for_inference(
    "pack_tiles", "(Tensor weight, int chunks, Tensor? channels=None) -> Tensor", _fake_pack
)
OPERATORS = declare_layers("tiles", torch.float32)
