"""Who watches the call of a module: what a fast path may leave out or do inside a layer, and what it must not.

The one rule of hosts: norm, activation, layer scale, residual and chunks go into a layer's call only where `is_own`
says so (`linear.call`); else the layer is called as the official model calls it (`in_turn`), so that hooks, wrappers
(LoRA) and subclasses see the inputs and outputs that its name promises.
"""

from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _has_any_global_hook,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .packed import ACTIVATIONS


def is_silent(*modules: nn.Module | None) -> bool:
    """Nothing happens in these modules' calls, which are left out or changed: no active dropout (of a module in
    training mode, in an MLP that is not, too), no hook, no forward put on the instance.
    """
    for module in modules:
        if module is None:
            continue
        if module.training and getattr(module, "p", 0):
            return False
        own = module.__dict__
        if (
            "forward" in own
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            return False
    return not _has_any_global_hook()


def is_own(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of layer is the forward of this class and nothing else: no subclass's, no instance's, no hook.

    It is asked at every call: by the dictionary, which is fast, and of no function, which is a call.
    """
    own = layer.__dict__
    return type(layer).forward is kind.forward and not (
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )


def is_plain(weight: Tensor) -> bool:
    """Whether it has parts that can be taken, and memory that kernels can read: subclasses (torchao's quantized ones)
    may know products only. A tracer's stand-ins are as plain as what they stand for.
    """
    return type(weight) in (nn.Parameter, Tensor) or not is_traceable_wrapper_subclass(weight)


def in_turn(
    layer: nn.Module,
    x: Tensor,
    activation: str = "none",
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    chunks: int = 1,
    norm: nn.Module | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """What `Linear.forward` gives of these, of any layer that takes x and gives [..., out_features]."""
    y = layer(x if norm is None else norm(x))
    if chunks > 1:
        return tuple(ACTIVATIONS[activation](part) for part in y.chunk(chunks, -1))
    y = ACTIVATIONS[activation](y)
    if scale is not None:
        y = scale * y
    if residual is not None:
        y = residual + y
    return y if out is None else out.copy_(y)
