"""The public functions, which the documentation and the table of bad input cover."""

import inspect
from collections.abc import Callable
from types import ModuleType

import h2ot_kernels as h2ot
import h2ot_kernels.onnx
import h2ot_kernels.wrapped

MODULES = (
    *(h2ot, h2ot.hosts, h2ot.dropin, h2ot.dropin.hot, h2ot.dropin.prunevid, h2ot.dropin.tcformer),
    *(h2ot_kernels.wrapped, h2ot_kernels.onnx),
)
INTERNAL = {"shared_rows"}


def functions() -> dict[str, Callable]:
    """By qualified name: what a module lists in __all__, or else defines."""
    return {f"{module.__name__}.{name}": function for module in MODULES for name, function in _public(module)}


def _public(module: ModuleType) -> list[tuple[str, Callable]]:
    listed = getattr(module, "__all__", None)
    found = inspect.getmembers(module, inspect.isfunction)
    if listed is not None:
        return [(name, function) for name, function in found if name in listed]
    own = [pair for pair in found if pair[1].__module__ == module.__name__]
    return [pair for pair in own if not pair[0].startswith("_") and pair[0] not in INTERNAL]
