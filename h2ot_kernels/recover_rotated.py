"""Recovery by attention with the end of its module, at half the projection, in CPU inference.

Internal to `recover_pose`.

With y = token + W a + b, centred over its C channels, LayerNorm and a linear head need |y| and M products of y with
vectors. Let Q R be the centred W, Q orthogonal, R upper triangular. Then y = Q z with z = Q^T (token + b) + R a, so
|y| = |z| and y v = z (Q^T v): C (C + 1) / 2 multiply-adds a row in place of C^2, and neither a, the attended tokens,
nor y is ever stored.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .add_norm import HALVES
from .inference import declare_for_inference, dots_run, is_unseen, tiles_run
from .linear import Linear
from .linear_products import is_widened
from .linear_tiles import SMALLEST_SHARE, Tiles, pack_tiles, spread_of
from .watched import is_silent

PANEL, TILE = 32, 1024  # csrc/launch.h: kRotatedPanel, kRotatedTile


def recover_rotated(
    token: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    scale: float,
    proj: Linear,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """head(norm(token + proj(attended))) [R, F, M] where `takes` says so.

    token [F, C]; query, key, value, num_heads, scale: as `recover_attention` takes them, attended [R, F, C] is what it
    gives. What is made of the parameters (a QR decomposition in float64, C^3 multiply-adds) and of the token is kept in
    proj, as packed weights are, until one of them changes.
    """
    vectors = token, proj.bias, norm_weight, norm_bias, head_weight, head_bias
    sources = [tensor for tensor in (proj.weight, *vectors) if tensor is not None]
    dtype = _rotated_dtype(value.dtype)
    form = dtype, tiles_run()
    triangle, rotation = proj.kept("rotation", form, [proj.weight], lambda: _rotation(proj.weight.detach(), *form))
    sizes = (*token.shape, *(vector is None for vector in vectors))
    token, head, bias = proj.kept("rotated", sizes, sources, lambda: _rotated(rotation, *vectors))
    attending = (x.to(dtype) for x in (query, key, value))
    return _op(*attending, num_heads, scale, token, triangle, head, bias, eps).to(value.dtype)


def takes(inputs: tuple[Tensor, ...], proj: torch.nn.Module, *vectors: Tensor | None) -> bool:
    """Whether recover_rotated of these gives what the definition gives, unseen.

    inputs: token, query, key, value; vectors: of norm and head.
    """
    token, value = inputs[0], inputs[-1]
    kept = token, proj.weight, proj.bias, *vectors
    if not is_unseen(*inputs, *kept) or type(proj) is not Linear or proj.training or not is_silent(proj):
        return False
    return (
        torch._C.has_lapack
        and not torch.is_autocast_enabled("cpu")
        and _rotated_dtype(value.dtype) is not None
        and all(tensor is None or tensor.dtype == value.dtype for tensor in kept)
        and not any(tensor is not None and tensor.is_inference() for tensor in kept)  # such do not say when they change
        and min(value.numel(), token.numel(), vectors[-2].numel()) > 0
    )


def _rotated_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What the triangle is multiplied in: as `Linear` does, in float32 where the CPU has nothing for a 16-bit dtype."""
    if dtype == torch.bfloat16 and dots_run():
        return dtype
    return torch.float32 if dtype == torch.float32 or (dtype in HALVES and is_widened(dtype)) else None


def _rotation(weight: Tensor, dtype: torch.dtype, tiles: bool) -> tuple[Tensor, Tensor]:
    """R as the kernel reads it (csrc/launch.h: RecoverRotatedArgs), and Q in float64."""
    rotation, triangle = torch.linalg.qr(weight.double() - weight.double().mean(0))
    if tiles and dtype == torch.float32:
        above = triangle.triu(1)
        size = triangle.norm(dim=0)  # of a channel: they may be of any
        largest = (above.abs() / size.where(size > 0, 1)).amax(1, keepdim=True)
        above = torch.where(largest < 2.0**-40, 0, above).float()  # a row that centring has emptied is rounding
        if Tiles.take(above, 1):
            return _as_bytes(above, triangle.diagonal()), rotation
    C = weight.shape[0]
    halves, padding = dtype != torch.float32, -C % PANEL
    rows = functional.pad(triangle, (0, halves * padding, 0, padding)).to(dtype)
    panels = [rows[c : c + PANEL, c:].mT for c in range(0, C, PANEL)]
    if halves:  # channel, pair, which of it; half of the panel, column
        panels = [x.reshape(-1, 16, 2, 2, 16).permute(0, 3, 1, 4, 2).reshape(-1, TILE) for x in panels]
    return torch.cat(panels), rotation


def _as_bytes(above: Tensor, diagonal: Tensor) -> Tensor:
    """R for the tile unit: what is above its diagonal in bytes, the diagonal, whose numbers are far larger, in float32.

    A channel's scale (`linear_tiles.channel_scales`) is its norm in R, whose rows are of one size but not one length.
    With r^2 / C of a row, the spread says how much the lowest products matter (csrc/amx/digits.h), here beside the
    diagonal's share of a result: C times C sum(largest of a row ^ 2) / |R|^2.
    """
    C = len(diagonal)
    norm = (above.double().square().sum(0) + diagonal.square()).sqrt()
    scale = torch.where((norm == 0) | (norm > norm.max() / 2), 1, norm / norm.max()).clamp(min=SMALLEST_SHARE).float()
    packed = pack_tiles(above, 1, None if (scale == 1).all() else scale)
    scaled = above / scale
    squares = scaled.square().sum() + (diagonal / scale).square().sum()
    spread = C * C * scaled.abs().amax(1).square().sum() / squares if squares > 0 else squares
    spread_of(packed, C).copy_(spread)
    return torch.cat([packed, functional.pad(diagonal, (0, -C % PANEL)).float().view(torch.int8)])


def _rotated(rotation, token, proj_bias, norm_weight, norm_bias, head_weight, head_bias) -> tuple[Tensor, ...]:
    """Token and head in rotated channels, padded to whole panels, and what is left of the biases."""
    shifted = token.double() if proj_bias is None else token.double() + proj_bias.double()
    shifted = shifted - shifted.mean(-1, keepdim=True)
    head = head_weight.double()
    bias = head.new_zeros(head.shape[0]) if head_bias is None else head_bias.double()
    bias = bias if norm_bias is None else bias + head @ norm_bias.double()
    head = head if norm_weight is None else head * norm_weight.double()
    padding = 0, -rotation.shape[0] % PANEL
    return *(functional.pad(x @ rotation, padding).float() for x in (shifted, head)), bias.float()


def _fake(query, key, value, num_heads, scale, token, triangle, head, bias, eps):
    return value.new_empty(value.shape[0], query.shape[-2], head.shape[0])


def _flops(query, key, value, num_heads, scale, token, triangle, head, bias, eps) -> int:
    (R, K, C), F = value, query[-2]
    return R * F * C * (4 * K + C + 1 + 2 * head[0])


_op = declare_for_inference(
    "recover_rotated",
    "(Tensor query, Tensor key, Tensor value, int num_heads, float scale, Tensor token, Tensor triangle, Tensor head, "
    "Tensor bias, float eps) -> Tensor",
    _fake,
    flops=_flops,
)
