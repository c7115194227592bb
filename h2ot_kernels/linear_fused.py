"""Two linear layers and what stands between them in one call: an MLP; self-attention from norm to residual."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .inference import tiles_run
from .linear import FUSED, PACKABLE, Linear, call, inside_product, normed, product_dtype, takes_packed
from .linear_floats import floats_run
from .linear_halves import adds_to_float
from .linear_products import Widened, is_widened
from .packed import NO_NORM, Packed, has_even_rows
from .watched import is_own


def mlp(
    x: Tensor,
    fc1: Linear,
    fc2: nn.Linear,
    *,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """residual + scale * fc2(gelu(fc1(norm(x)))), as two calls of them give it; in one pass where an operator can.

    Where 16-bit weights are `Widened`, what is between them is not rounded in one pass.
    """
    fused = None
    if x.is_cpu and not torch.compiler.is_compiling():
        dtype = product_dtype(x)
        in_floats = (floats_run() or tiles_run()) and (dtype == torch.float32 or is_widened(dtype))
        if in_floats or adds_to_float(dtype):
            fused = mlp_in_one_call(x, fc1, fc2, norm, residual, scale)
    if fused is not None:
        return fused
    return call(fc2, call(fc1, x, "gelu", norm=norm), residual=residual, scale=scale)


def mlp_in_one_call(
    x: Tensor,
    first: Linear,
    last: nn.Linear,
    norm: nn.LayerNorm | None,
    residual: Tensor | None,
    scale: Tensor | None,
) -> Tensor | None:
    """residual + scale * last(gelu(first(norm(x)))); None where no operator does that."""
    layers = _both_packed(x, first, last, (1, None), norm, residual, scale)
    if layers is None:
        return None
    one, other = layers.first, layers.last
    given = one.packed, one.bias, one.out_features, other.packed, other.bias, layers.residual, other.out_features
    return layers.rounded(one.operators.mlp(layers.x, *given, *layers.norm))


def attention_in_one_call(
    x: Tensor,
    first: Linear,
    last: nn.Linear,
    dim: int,
    num_heads: int,
    *,
    norm: nn.LayerNorm | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """residual + scale * last(self-attention over axis dim of first(norm(x))), first making query, key and value; None
    where no operator does that.

    out: where it is written, laid out as the residual.
    """
    layers = _both_packed(x, first, last, (3, x.shape[-1]), norm, residual, scale)
    if layers is None or layers.last.out_features != x.shape[-1]:
        return None
    one, other, x, inside = layers.first, layers.last, layers.x, layers.norm
    given = one.packed, one.bias, dim, num_heads, other.packed, other.bias, layers.residual
    if out is None or layers.dtype is not None:
        attended = layers.rounded(one.operators.attend(x, *given, *inside))
        return attended if out is None else out.copy_(attended)
    laid_out = residual is not None and out.shape == residual.shape and out.stride() == residual.stride()
    if not laid_out or out.dtype != residual.dtype or not has_even_rows(out):
        return None
    one.operators.attend_out(x, *given, *(inside or NO_NORM), out)
    return out


class _Both(NamedTuple):
    """Two layers of one kind, and what their operator takes: x, of its norm () where x is normed already, the residual.

    dtype: what the result is rounded to where the operator gives another; else None.
    """

    first: Packed
    last: Packed
    x: Tensor
    norm: tuple
    residual: Tensor | None
    dtype: torch.dtype | None = None

    def rounded(self, y: Tensor) -> Tensor:
        return y if self.dtype is None else y.to(self.dtype)


def _both_packed(
    x: Tensor,
    first: Linear,
    last: nn.Linear,
    outputs: tuple[int, int | None],
    norm: nn.LayerNorm | None,
    residual: Tensor | None,
    scale: Tensor | None,
) -> _Both | None:
    """None where nothing of one kind multiplies both unseen.

    outputs: of the first, how many times as many as the last takes, and these (None: as many as it has).
    """
    if not (is_own(first, Linear) and is_own(last, Linear)):
        return None
    chunks, features = outputs
    features = first.out_features if features is None else features
    dtype = product_dtype(x)
    one = first.packed_for(x, x.shape[-1], dtype, None, chunks) if takes_packed(x, dtype) else None
    widened = isinstance(one, Widened) and x.dtype == dtype
    one = one.product if widened else one
    if not isinstance(one, Packed):
        return None
    other = last.packed_for(x, features, dtype, scale, 1)
    other = other.product if widened and isinstance(other, Widened) else other
    adds = (dtype,) if widened else one.adds
    if type(other) is not type(one) or x.dtype not in adds or one.out_features != chunks * features:
        return None
    if residual is not None and not (residual.dtype in adds and residual.shape == (*x.shape[:-1], other.out_features)):
        return None
    inside = () if norm is None else inside_product(norm, x, PACKABLE if widened else FUSED)
    if inside is None:
        x, inside = normed(norm, x, dtype), ()
    if not widened:
        return _Both(one, other, x, inside, residual)
    inside = tuple(v.float() if isinstance(v, Tensor) else v for v in inside)
    return _Both(one, other, x.float(), inside, None if residual is None else residual.float(), dtype)
