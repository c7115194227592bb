"""What multiplies tokens in CPU inference: this package's kernels where they are faster, else oneDNN.

Internal to `linear.Linear`.
"""

import torch
from torch import Tensor

from .linear_floats import Floats
from .linear_halves import Halves
from .linear_tiles import Tiles
from .packed import Packed

HAS_ONEDNN = torch.backends.mkldnn.is_available()


class OneDnn:
    """Weights in oneDNN's layout for about `rows` rows: a product per chunk."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, chunks: int):
        weights = [torch.ops.mkldnn._reorder_linear_weight(part, rows) for part in weight.chunk(chunks)]
        biases = [None] * chunks if bias is None else bias.chunk(chunks)
        self.parts = list(zip(weights, biases, strict=True))

    def __call__(self, x: Tensor, activation: str, residual: Tensor | None) -> tuple[Tensor, ...]:
        return tuple([self._product(x, activation, residual, part) for part in self.parts])

    def _product(self, x: Tensor, activation: str, residual: Tensor | None, part: tuple) -> Tensor:
        if residual is None or activation != "none" or residual.dtype != x.dtype:
            fused = "none" if activation == "relu" else activation  # whose own relu makes 0 of NaN
            y = torch.ops.mkldnn._linear_pointwise(x, *part, fused, [], "none")
            y = y.relu_() if activation == "relu" else y
            return y if residual is None else residual + y
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, *part, "add")


class Widened:
    """16-bit weights as float32 ones: one rounding, of the result. Without instructions for float16 PyTorch's product
    takes five times as long as this (Zen 4), with bfloat16 on AVX2 a MixSTE eight times (Zen 3). Also in place of a
    product that mixes rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, chunks: int):
        self.dtype = weight.dtype
        self.product = product_of(weight.float(), None if bias is None else bias.float(), rows, chunks)

    def __call__(self, x: Tensor, activation: str, residual: Tensor | None) -> tuple[Tensor, ...]:
        products = tuple(y.to(self.dtype) for y in self.product(x.float(), activation, None))
        return products if residual is None else tuple(residual + y for y in products)


Product = Packed | OneDnn | Widened


def product_of(weight: Tensor, bias: Tensor | None, rows: int, chunks: int) -> Product:
    """The fastest one of this dtype on this CPU."""
    if is_widened(weight.dtype):
        return Widened(weight, bias, rows, chunks)
    for kind in (Floats, Tiles, Halves):
        if kind.take(weight, chunks):
            return kind(weight, bias, chunks)
    if _mixes_rows(weight):
        return Widened(weight, bias, rows, chunks)
    return OneDnn(weight, bias, rows, chunks)


def _mixes_rows(weight: Tensor) -> bool:
    """Whether oneDNN's product may let a NaN reach the row before its own: on a tile unit it takes channels in pairs,
    more than 32 in whole blocks, the last with the first channels of the next row (not of every such number).
    """
    C = weight.shape[1]
    in_part = C % 2 == 1 or (C > 32 and C % 32 != 0)
    return weight.dtype == torch.bfloat16 and in_part and torch.cpu._is_amx_tile_supported()


def is_widened(dtype: torch.dtype) -> bool:
    """Whether the CPU has no product of this dtype that is worth calling (oneDNN's word)."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
