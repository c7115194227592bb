"""Models in eval mode for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


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
