"""Linear layers of CPU inference in bfloat16 by products of pairs (AVX512-BF16), with what stands around them.

Internal to `linear.Linear`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .inference import declare_for_inference, dots_run, tiles_run

PANEL = 32  # outputs
FEWEST = 16  # channels, and outputs


class Halves:
    """bfloat16 weights [chunks * M, C] and a bias: all chunks in one product, a LayerNorm before it, GELU and an
    addition behind it.

    A product takes rows * C * M multiply-adds. A result has the same bits in any batch, with any number of threads.
    """

    @staticmethod
    def take(weight: Tensor, chunks: int) -> bool:
        """Whether such a product is as fast as oneDNN's alone (bench/notes_linear.md)."""
        M, C = weight.shape
        fits = M % chunks == 0 and min(M // chunks, C) >= FEWEST
        return fits and adds_to_float(weight.dtype)

    def __init__(self, weight: Tensor, bias: Tensor | None, chunks: int):
        self.packed, self.bias = pack(weight, chunks), None if bias is None else bias.float()
        self.chunks, self.out_features = chunks, weight.shape[0]

    def __call__(
        self, x: Tensor, activation: str, residual: Tensor | None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, ...]:
        """activation(product of norm(x)) + residual, one tensor for each chunk; a residual goes with one chunk."""
        inside = activation in ("none", "gelu")
        added = residual if inside and self._adds(x, residual) else None
        normed = () if norm is None else (norm.weight, norm.bias, norm.eps)
        given = self.packed, self.bias, added, self.out_features, self.chunks, activation == "gelu"
        y = linear_halves(x, *given, *normed)
        if not inside:
            y = torch.tanh(y) if activation == "tanh" else torch.relu(y)
        if residual is not None and added is None:
            y = residual + y
        return (y,) if self.chunks == 1 else y.unbind()

    def _adds(self, x: Tensor, residual: Tensor | None) -> bool:
        if residual is None or residual.dtype not in (torch.bfloat16, torch.float32):
            return False
        return residual.shape == (*x.shape[:-1], self.out_features)


def adds_to_float(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are `Halves`, which can add what they give to a float32 residual (autocast)."""
    return dtype == torch.bfloat16 and dots_run() and not tiles_run()


def pack(weight: Tensor, chunks: int) -> Tensor:
    """weight [chunks * M, C] of bfloat16 as panels [chunks, panels, steps, 2, 16, 16, 2] (csrc/launch.h)."""
    M, C = weight.shape[0] // chunks, weight.shape[1]
    whole = functional.pad(weight.reshape(chunks, M, C), (0, -C % 32, 0, -M % PANEL))
    return whole.unflatten(1, (-1, 2, 16)).unflatten(-1, (-1, 16, 2)).permute(0, 1, 4, 2, 5, 3, 6).contiguous()


def _fake(x, packed, bias, residual, out_features, chunks, gelu, norm_weight=None, norm_bias=None, eps=-1.0):
    size = (*x.shape[:-1], out_features // chunks)
    dtype = packed.dtype if residual is None else residual.dtype
    return x.new_empty(size if chunks == 1 else (chunks, *size), dtype=dtype)


def _flops(x, packed, bias, residual, out_features, chunks, gelu, *norm):
    return 2 * torch.Size(x).numel() * out_features


linear_halves = declare_for_inference(
    "linear_halves",
    "(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int out_features, int chunks, bool gelu, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=-1.0) -> Tensor",  # eps below 0: no norm
    _fake,
    flops=_flops,
)
