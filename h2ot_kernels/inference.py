"""Operators for CPU inference that stand in for several of PyTorch's where nobody sees the difference."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .backend import is_reference, why_no_cpp
from .checks import no_tangent
from .library import declare

if why_no_cpp() is None:
    from ._C import capability, dots_run, floats_panel, tiles_run
else:

    def capability() -> str:
        return ""

    def tiles_run() -> bool:
        return False

    def floats_panel() -> int:
        return 0

    dots_run = tiles_run


def is_transformed() -> bool:
    """Forward-mode AD or a functorch transform wants to see each operation."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_unseen(*tensors: Tensor | None) -> bool:
    """Whether such an operator may have these: plain CPU tensors, nothing recorded, traced, transformed or compiled.

    Hooks and a forward on the instance of a module are the caller's business (`watched.is_silent`).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    for tensor in tensors:
        if not (tensor is None or _is_plain(tensor)):
            return False
    return not (_records(*tensors) or is_reference(None)) and why_no_cpp() is None


def require_inference(name: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError where a gradient would be needed, NotImplementedError where a tangent would."""
    if _records(*tensors):
        raise RuntimeError(f"{name} is for inference: call it under torch.no_grad() or torch.inference_mode()")
    no_tangent(name, *tensors)


def declare_for_inference(name: str, schema: str, fake: Callable, flops: Callable | None = None) -> Callable:
    """`library.declare` of an operator whose gradient raises."""

    def setup(ctx, inputs, output):
        """Nothing is kept."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{name} has no gradient: it is for inference")

    return declare(name, schema, fake, backward, setup, flops)


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.layout is torch.strided and not t.is_nested


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
