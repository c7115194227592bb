"""Layers for the tests of linear layers, and what PyTorch makes of them."""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from h2ot_kernels.inference import tiles_run
from h2ot_kernels.linear_floats import floats_run

# The operator of a packed linear layer in float32.
FLOAT_PRODUCTS = "h2ot_kernels::linear_floats" if floats_run() else "mkldnn::_linear_pointwise"
FLOAT_PRODUCTS = "h2ot_kernels::linear_tiles" if tiles_run() else FLOAT_PRODUCTS


def made(
    rows: int, C: int, M: int, chunks: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, weight) of dtype, (bias, residual) of float32."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    return draw(rows, C).to(dtype), (draw(chunks * M, C) / C**0.5).to(dtype), draw(chunks * M), draw(rows, M)


def by_torch(x, weight, bias, residual, chunks, gelu, dtype) -> Tensor:
    """residual + gelu(product), in dtype; of several chunks one below the other."""
    x, weight, bias, residual = (t if t is None else t.to(dtype) for t in (x, weight, bias, residual))
    y = functional.linear(x, weight, bias)
    y = torch.stack(y.chunk(chunks, -1)) if chunks > 1 else y
    y = functional.gelu(y) if gelu else y
    return y if residual is None else residual + y
