"""What decides how a module computes, weights aside, so that modules that are alike share a trial."""

from types import BuiltinFunctionType, FunctionType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

NUMBERS = (bool, int, float, complex)
# What is the same for as long as it is equal: of functions and classes, the same object.
VALUES = (str, bytes, type(None), torch.dtype, torch.device, FunctionType, BuiltinFunctionType, type)
# Attributes that any module or packed layer has, and that the trial leaves out.
BESIDE = frozenset(vars(nn.Module())) | {"_kept", "forward"}


class NotComparable(Exception):
    """A module has an attribute that may differ without a sign of it."""


def settings_of(module: nn.Module) -> tuple:
    """What decides how a module computes, weights aside: its class, attributes, shapes, and its children's."""
    own = ((n, v) for n, v in module.__dict__.items() if n not in BESIDE)
    attributes = tuple((n, _chance(v) if n == "drop_prob" else _value(v)) for n, v in own)
    tensors = (*module._parameters.items(), *module._buffers.items())
    shapes = tuple((n, None if x is None or is_lazy(x) else x.shape) for n, x in tensors)
    children = tuple((n, None if child is None else settings_of(child)) for n, child in module._modules.items())
    return type(module), attributes, shapes, children


def _chance(attribute) -> tuple:
    """Of dropping: one between none and all is like another. A model's blocks differ in it, and compute the same."""
    return (float, "some") if type(attribute) is float and 0 < attribute < 1 else _value(attribute)


def _value(attribute) -> tuple:
    """Equal for equal numbers, strings, functions and plain containers of such; raises NotComparable."""
    cls = type(attribute)
    if cls in NUMBERS:
        return cls, repr(attribute)  # -0.0 is not 0.0
    if cls in (tuple, list, torch.Size):
        return cls, tuple(map(_value, attribute))
    if cls is dict:
        return cls, tuple((_value(key), _value(value)) for key, value in attribute.items())
    if cls in (set, frozenset):
        return cls, frozenset(map(_value, attribute))
    if cls in VALUES:
        return cls, attribute
    raise NotComparable
