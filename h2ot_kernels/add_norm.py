"""A residual addition and the LayerNorm after it in one pass over memory, in CPU inference.

Internal to linear layers and patched blocks.
"""

import torch
from torch import Tensor, nn

from .checks import FLOATS
from .inference import declare_for_inference, is_unseen, require_inference

HALVES = (torch.bfloat16, torch.float16)


def add_norm(x: Tensor, y: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x + y, norm(x + y).to(dtype)) where `takes` says so; y None: (x, norm(x).to(dtype)).

    x, y: [..., C] of any strides, read in the order of x's memory, and so are the results laid out, of which the sum
    has x's dtype. As PyTorch does it, the norm reads the sum as it is stored, in float32 (float64 for float64).
    """
    weight, bias = norm.weight, norm.bias
    require_inference("add_norm", x, y, weight, bias)
    if x.is_contiguous() or not x.numel():
        total, normed = _op(x, y, weight, bias, norm.eps, dtype)
        return x if y is None else total, normed
    axes = range(x.dim() - 1)
    order = sorted(axes, key=x.stride, reverse=True)
    laid_out = x.permute(*order, -1)
    C = x.shape[-1]
    rows = laid_out.reshape(-1, C), None if y is None else y.permute(*order, -1).reshape(-1, C)
    results = _op(*rows, weight, bias, norm.eps, dtype)
    total, normed = (x if t.dim() == 1 else t.reshape(laid_out.shape).movedim(list(axes), order) for t in results)
    return total, normed


def takes(x: Tensor, y: Tensor | None, norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether add_norm(x, y, norm, dtype) gives what PyTorch's own operators give, and nobody sees the difference.

    Hooks and a forward on the instance of norm are the caller's business (`watched.is_silent`).
    """
    if type(norm) is not nn.LayerNorm:
        return False
    weight, bias = norm.weight, norm.bias
    if not is_unseen(x, y, weight, bias):
        return False
    C = norm.normalized_shape[-1]
    if not (x.shape[-1:] == norm.normalized_shape and C > 0 and (y is None or y.shape == x.shape)):
        return False
    for t in (x, y):
        if not (t is None or C == 1 or t.stride(-1) == 1):
            return False
    beside = (torch.float32, *HALVES) if x.dtype == torch.float32 else (x.dtype,)
    allowed = (x.dtype, torch.float32) if x.dtype in HALVES else (x.dtype,)
    for t in (weight, bias):
        if not (t is None or (t.shape == (C,) and t.dtype in allowed)):
            return False
    alike = weight is None or bias is None or weight.dtype == bias.dtype
    return x.dtype in FLOATS and alike and dtype in beside and (y is None or y.dtype in beside)


def _fake(x, y, weight, bias, eps, dtype):
    return x.new_empty(0 if y is None else x.shape), x.new_empty(x.shape, dtype=dtype)


# FLOPs count 0, as those of PyTorch's own elementwise operators and norms do. Without y the sum is an empty tensor: an
# operator's result must not be its argument.
_op = declare_for_inference(
    "add_norm",
    "(Tensor x, Tensor? y, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _fake,
)
