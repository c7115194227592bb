"""Layers for the tests of linear layers, and what PyTorch makes of them."""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from h2ot_kernels import linear_halves
from h2ot_kernels.inference import dots_run, tiles_run
from h2ot_kernels.linear_floats import has_floats
from h2ot_kernels.linear_products import is_widened

OPS = torch.ops.h2ot_kernels
# The operator of a packed linear layer in float32, of few channels (a tile unit leaves them).
FLOAT_PRODUCTS = "h2ot_kernels::linear_floats" if has_floats() else "mkldnn::_linear_pointwise"
# The same in bfloat16.
HALF_PRODUCTS = FLOAT_PRODUCTS if is_widened(torch.bfloat16) else "mkldnn::_linear_pointwise"
HALF_PRODUCTS = "h2ot_kernels::linear_halves" if linear_halves.adds_to_float(torch.bfloat16) else HALF_PRODUCTS


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


def samples_of_some_cpus():
    """(operator, arguments) of linear layers on a tile unit, and by products of pairs."""
    rand = torch.randn
    weight, qkv, proj, y = rand(6, 33), rand(99, 33), rand(33, 33), rand(2, 5, 33)
    if tiles_run():
        yield OPS.pack_tiles, (weight, 2)
        packed, first, second = (OPS.pack_tiles(*of) for of in ((weight, 2), (rand(40, 33), 1), (rand(6, 40), 1)))
        yield (
            OPS.linear_tiles,
            (rand(2, 5, 33), packed, rand(6), None, 6, 2, True, rand(33), None, 1e-5),
        )
        yield (
            OPS.mlp_tiles,
            (
                rand(2, 5, 33),
                first,
                rand(40),
                40,
                second,
                None,
                rand(2, 5, 6),
                6,
                rand(33),
                None,
                1e-5,
            ),
        )
        projections = OPS.pack_tiles(qkv, 3), rand(99), 1, 3, OPS.pack_tiles(proj, 1)
        yield OPS.attend_tiles, (y, *projections, None, y + 1, rand(33), None, 1e-5)
        yield OPS.attend_tiles_out, (y, *projections, None, y + 1, rand(33), None, 1e-5, rand(2, 5, 33))
        yield OPS.linear_tiles_out, (y, projections[-1], None, y, 33, 1, False, None, None, -1.0, rand(2, 5, 33))
    if dots_run():
        packed = linear_halves.pack(weight.bfloat16(), 2)
        yield (
            OPS.linear_halves,
            (rand(2, 5, 33), packed, rand(6), None, 6, 2, True, rand(33), None, 1e-5),
        )
        yield OPS.linear_halves, (rand(5, 33).bfloat16(), packed[:1], None, rand(5, 3), 3, 1, False)
        both = (
            packed[:1],
            rand(3),
            3,
            linear_halves.pack(rand(5, 3).bfloat16(), 1),
            None,
            rand(2, 5, 5),
            5,
        )
        yield OPS.mlp_halves, (rand(2, 5, 33), *both, rand(33), None, 1e-5)
        first, second = linear_halves.pack(qkv.bfloat16(), 3), linear_halves.pack(proj.bfloat16(), 1)
        yield OPS.attend_halves, (y, first, rand(99), 1, 3, second, None, y + 1, rand(33), None, 1e-5)
        yield (
            OPS.attend_halves_out,
            (y, first, rand(99), 1, 3, second, None, y, rand(33), None, 1e-5, rand(2, 5, 33)),
        )
        yield OPS.linear_halves_out, (y, second, None, y, 33, 1, False, None, None, -1.0, rand(2, 5, 33))
