"""Models in eval mode for a while; whether autocast is on."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_KINDS = ("cpu", "cuda", "xpu", "mps", "xla", "hpu", "mtia", "maia")  # torch 2.10 cannot ask in what it compiles
_CASTING = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block model and all its modules are in eval mode; after it each is in the mode it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)  # what a module's own train() does, happens
        for module, training in modes:
            module.training = training


def is_autocast_on(device: str) -> bool:
    """For a device's type, which may have no autocast."""
    has_it = device in _CASTING if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)
    return has_it and torch.is_autocast_enabled(device)
