"""Linear layers and MLPs of CPU inference in float32 by vectors (AVX2, AVX-512), with what stands around them.

Internal to `linear.Linear`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .inference import capability, declare_for_inference, tiles_run
from .packed import Packed, count_flops, count_mlp_flops

PANEL = 64  # outputs
FEWEST = 16  # channels, and outputs


class Floats(Packed):
    """float32 weights [chunks * M, C] and a bias: a LayerNorm before the product, GELU and an addition behind it.

    A product takes rows * C * M multiply-adds. A result has the same bits in any batch, with any number of threads.
    """

    @staticmethod
    def take(weight: Tensor, chunks: int) -> bool:
        """Whether such a product is about as fast as oneDNN's alone (bench/notes_linear.md)."""
        M, C = weight.shape
        fits = M % chunks == 0 and min(M // chunks, C) >= FEWEST
        return fits and weight.dtype == torch.float32 and floats_run()

    def __init__(self, weight: Tensor, bias: Tensor | None, chunks: int):
        super().__init__(linear_floats, pack(weight, chunks), bias, weight.shape[0], chunks, (torch.float32,))


def floats_run() -> bool:
    """Whether products of float32 are `Floats`: nothing is known of their time on other instruction sets."""
    return capability() in ("avx2", "avx512") and not tiles_run()


def pack(weight: Tensor, chunks: int) -> Tensor:
    """weight [chunks * M, C] of float32 as panels [chunks, panels, C, 64] (csrc/launch.h)."""
    M, C = weight.shape[0] // chunks, weight.shape[1]
    whole = functional.pad(weight.reshape(chunks, M, C), (0, 0, 0, -M % PANEL))
    return whole.unflatten(1, (-1, PANEL)).transpose(-1, -2).contiguous()


def _fake(x, packed, bias, residual, out_features, chunks, gelu, norm_weight=None, norm_bias=None, eps=-1.0):
    size = (*x.shape[:-1], out_features // chunks)
    return x.new_empty(size if chunks == 1 else (chunks, *size))


linear_floats = declare_for_inference(
    "linear_floats",
    "(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int out_features, int chunks, bool gelu, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=-1.0) -> Tensor",  # eps below 0: no norm
    _fake,
    flops=count_flops,
)


def _fake_mlp(x, packed, bias, hidden_features, second_packed, second_bias, residual, out_features, *norm):
    return x.new_empty((*x.shape[:-1], out_features))


# residual + second(gelu(first(norm(x)))); what is between them is never stored whole.
mlp_floats = declare_for_inference(
    "mlp_floats",
    "(Tensor x, Tensor packed, Tensor? bias, int hidden_features, Tensor second_packed, Tensor? second_bias, "
    "Tensor? residual, int out_features, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=-1.0) -> Tensor",
    _fake_mlp,
    flops=count_mlp_flops,
)
