"""What the linear layers by kernels of this package share (`Tiles`, `Halves`, `Floats`)."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .huge_pages import in_huge_pages
from .inference import declare_for_inference
from .library import declare, into_out

FEWEST = 16  # channels, and outputs, of `Floats` and `Halves`
LAYER = (
    "(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int out_features, int chunks, bool gelu, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=-1.0) -> Tensor"  # eps below 0: no norm
)
MLP = (
    "(Tensor x, Tensor packed, Tensor? bias, int hidden_features, Tensor second_packed, Tensor? second_bias, "
    "Tensor? residual, int out_features, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=-1.0) -> Tensor"
)
ATTENTION = (
    "(Tensor x, Tensor packed, Tensor? bias, int dim, int num_heads, Tensor proj_packed, Tensor? proj_bias, "
    "Tensor? residual, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=-1.0) -> Tensor"
)
NO_NORM = None, None, -1.0
ACTIVATIONS = {"none": lambda y: y, "gelu": functional.gelu, "tanh": torch.tanh, "relu": torch.relu}


class Operators(NamedTuple):
    """linear: residual + activation(product of norm(x)), all chunks in one product. mlp: residual + second(gelu(first(
    norm(x)))), in the bits of two layers; what is between them is never stored whole. attend: residual +
    proj(self-attention along axis dim of the three chunks of first(norm(x))), in the bits of three operators, at the
    cost of one call. *_out: the same into rows of `out` that may stand apart, as those of the residual then do; it may
    be the residual, and of attend the tokens.
    """

    linear: Callable
    mlp: Callable
    attend: Callable
    linear_out: Callable
    attend_out: Callable


class Packed:
    """Weights and a bias as its operators take them, for all chunks in one product.

    adds: the dtypes of residuals that they add themselves.
    """

    def __init__(
        self,
        operators: Operators,
        packed: Tensor,
        bias: Tensor | None,
        out_features: int,
        chunks: int,
        adds: tuple[torch.dtype, ...],
    ):
        self.operators, self.packed, self.bias, self.adds = operators, in_huge_pages(packed), bias, adds
        self.out_features, self.chunks = out_features, chunks

    def __call__(self, x: Tensor, activation: str, residual: Tensor | None, norm: tuple = ()) -> tuple[Tensor, ...]:
        """activation(product of norm(x)) + residual, one tensor for each chunk; a residual goes with one chunk.

        norm: a LayerNorm's (weight, bias, eps).
        """
        inside, added = activation in ("none", "gelu"), None
        if residual is not None and inside and residual.dtype in self.adds:
            added = residual if residual.shape == (*x.shape[:-1], self.out_features) else None
        given = self.packed, self.bias, added, self.out_features, self.chunks, activation == "gelu"
        y = self.operators.linear(x, *given, *norm)
        if not inside:
            y = ACTIVATIONS[activation](y)
        if residual is not None and added is None:
            y = residual + y
        return (y,) if self.chunks == 1 else y.unbind()

    def write(self, x: Tensor, residual: Tensor, out: Tensor) -> bool:
        """residual + product of x into out, which are alike: of one dtype, x's or another, with rows as far apart.

        Returns False, with nothing written, where that is not for this operator.
        """
        fits = x.dtype in self.adds and residual.dtype in self.adds and residual.dtype == out.dtype
        fits = fits and residual.stride() == out.stride() and has_even_rows(out)
        if (
            not fits
            or self.chunks > 1
            or out.shape != (*x.shape[:-1], self.out_features)
            or residual.shape != out.shape
        ):
            return False
        given = self.packed, self.bias, residual, self.out_features, 1, False, *NO_NORM
        self.operators.linear_out(x, *given, out)
        return True


def has_even_rows(x: Tensor) -> bool:
    """Whether all rows of x [..., C] are equally far apart, in order, as those of a part of wider rows are."""
    if x.is_contiguous():
        return True
    apart = None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size > 1 and apart not in (None, stride):
            return False
        apart = size * stride if size > 1 else apart
    return x.stride(-1) == 1 or x.shape[-1] == 1


def count_flops(x, packed, bias, residual, out_features, chunks, gelu, *norm) -> int:
    """Of such an operator."""
    return 2 * torch.Size(x).numel() * out_features


def count_mlp_flops(x, packed, bias, hidden_features, second_packed, second_bias, residual, out_features, *norm) -> int:
    """Of an operator that does two such layers."""
    rows = torch.Size(x).numel() // x[-1]
    return 2 * rows * hidden_features * (x[-1] + out_features)


def count_attention_flops(x, packed, bias, dim, num_heads, *others) -> int:
    """Of an operator that attends along axis dim, with the projections before and behind."""
    elements, C = torch.Size(x).numel(), x[-1]
    return elements * (2 * 4 * C + 4 * x[dim])


def declare_layers(end: str, dtype: torch.dtype) -> Operators:
    """The operators of weights of one kind, named for its `end`; results have the residual's dtype, else this one."""

    def fake(x, packed, bias, residual, out_features, chunks, *others):
        size = (*x.shape[:-1], out_features // chunks)
        result = dtype if residual is None else residual.dtype
        return x.new_empty(size if chunks == 1 else (chunks, *size), dtype=result)

    def fake_mlp(x, packed, bias, hidden, second_packed, second_bias, residual, out_features, *norm):
        return fake(x, second_packed, second_bias, residual, out_features, 1)

    def fake_attention(x, packed, bias, dim, num_heads, proj_packed, proj_bias, residual, *norm):
        return fake(x, proj_packed, proj_bias, residual, x.shape[-1], 1)

    def written(name: str, schema: str, flops: Callable) -> Callable:
        bare = re.sub(r"=[^,)]+", "", schema)  # nothing may be left out before `out`
        return declare(f"{name}_{end}_out", **into_out({"schema": bare, "flops": flops}))

    return Operators(
        declare_for_inference(f"linear_{end}", LAYER, fake, flops=count_flops),
        declare_for_inference(f"mlp_{end}", MLP, fake_mlp, flops=count_mlp_flops),
        declare_for_inference(f"attend_{end}", ATTENTION, fake_attention, flops=count_attention_flops),
        written("linear", LAYER, count_flops),
        written("attend", ATTENTION, count_attention_flops),
    )


def fits(weight: Tensor, chunks: int) -> bool:
    """Whether weight [chunks * M, C] is one for such operators."""
    M, C = weight.shape
    return M % chunks == 0 and min(M // chunks, C) >= FEWEST
