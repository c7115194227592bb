"""The fast forwards that patched modules get: mixed into the module's own class, falling back to its own forward.

A patched module differs from the unpatched one only in its class. So parameters, buffers, hooks, state_dict and mode
are untouched, and copies (deepcopy, DataParallel's replicas) run on their own weights.
"""

import copy
import functools
import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import FLOATS
from ..inference import is_transformed
from ..linear import Linear
from ..linear_fused import mlp
from ..recover_tail import has_plain_tail, norm_and_head
from ..watched import is_silent
from .trial import NotRecognised

# What a fast forward leaves out: it does nothing there, or is the softmax. Parts are known by their exact types, here
# and everywhere below: a subclass may have a forward that does more.
PASSIVE = (nn.Identity, nn.Dropout, nn.Softmax)
LARGEST_HEAD = 8  # outputs, four of which share a pass over a row: with more the product by itself is as fast


class Calls(NamedTuple):
    """How a module's own forward is called, and which calls the fast one takes."""

    positional: tuple[str, ...]  # what can be given by place, without self
    defaults: dict[str, object]
    taken: tuple[str, ...]  # what the fast forward takes
    by_place: int  # arguments of a call that gives just these, by place; -1: there are others between them
    ranks: tuple[int, ...]  # numbers of axes of the first input, as they were tried

    def bound(self, args: tuple, kwargs: dict) -> tuple | None:
        """What the fast forward takes; None where others have no default, or where the call is wrong."""
        given = dict(zip(self.positional, args, strict=False)) | kwargs
        known = self.defaults | given
        if len(given) != len(args) + len(kwargs) or any([name not in known for name in self.taken]):
            return None  # one too many, one twice, one too few
        for name, value in given.items():
            if name not in self.taken and not (name in self.defaults and _same(value, self.defaults[name])):
                return None
        return tuple([known[name] for name in self.taken])


class Known(NamedTuple):
    """What the trial found out about a module's own forward."""

    trains: bool = False  # in training it computes what it computes in eval mode, the children's dropout aside
    drops_last: bool = False  # it gives what `proj_drop` makes of the output projection
    softmaxes: tuple[tuple[str, int | None], ...] = ()  # of the children: (name, axis)
    beside: tuple[tuple[str, type], ...] = ()  # a block's other children: (name, class)


UNKNOWN = Known()


class Fast:
    """Mixed in by `fast_class`: `original` is the module's own class, `calls` how its forward is called.

    `kernel`: the switch. `known`: what was found out about the own forward. All are read from the class: a module may
    have attributes of these names. `inputs`: how many of the first arguments are tokens; `by_name`: further ones that
    the fast forward takes, where the own one does; `in_training`: whether it runs there.
    """

    kernel: str
    original: type
    calls: Calls
    known: Known
    inputs = 1
    by_name: tuple[str, ...] = ()
    in_training = False

    def __reduce_ex__(self, protocol):
        """A patched module is pickled as the unpatched one: it loads without this package."""
        return object.__new__, (self.original,), self.__getstate__()

    def __deepcopy__(self, memo):
        own = getattr(super(), "__deepcopy__", None)
        if own is not None:
            return own(memo)
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


class Tried(Fast):
    """A fast forward that was tried beside the own one, which runs in all other calls."""

    def forward(self, *args, **kwargs):
        calls = type(self).calls
        given = args if len(args) == calls.by_place and not kwargs else calls.bound(args, kwargs)
        x = given and given[0]
        usual = isinstance(x, Tensor) and x.dim() in calls.ranks and not is_transformed()
        if usual and self._is_fast_for(*given):
            return self._fast_forward(*given)
        return super().forward(*args, **kwargs)

    def _is_fast_for(self, *given) -> bool:
        """Whether the fast forward gives what the own one gives, here and now."""
        raise NotImplementedError

    def _fast_forward(self, *given) -> Tensor:
        raise NotImplementedError


def _same(value, default) -> bool:
    return value is default or (type(value) is type(default) and type(value) in (int, float, str) and value == default)


@functools.cache
def fast_class(mixin: type, original: type, ranks: tuple[int, ...] = (), known: Known = UNKNOWN) -> type:
    """original with mixin's forward, under original's name; raises NotRecognised where names of theirs are the same."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    taken = (*positional[: mixin.inputs], *[p.name for p in parameters if p.name in mixin.by_name])
    in_front = positional[: len(taken)] == taken
    calls = Calls(positional, defaults, taken, len(taken) if in_front else -1, ranks)
    documented = {"__module__": original.__module__, "__doc__": original.__doc__}
    names = {"original": original, "calls": calls, "known": known} | documented
    if not issubclass(mixin, nn.Module):
        ours = sorted({*dir(mixin), *names} - {"forward"})
        clash = [name for name in ours if not name.startswith("__") and hasattr(original, name)]
        if clash:
            raise NotRecognised(f"its class has {', '.join(clash)}, which the fast form would hide")
    return type(original.__name__, (mixin, original), names)


class FastLinear(Fast, Linear):
    """Packed weights in CPU inference."""

    kernel = "linear"


PackedLinear = fast_class(FastLinear, nn.Linear)  # of every patched layer


def is_packed(layer: nn.Module | None) -> bool:
    return type(layer) in (Linear, PackedLinear)


class FastMlp(Tried):
    """fc2(act(fc1(x))) with an exact GELU in the same pass as fc1."""

    kernel = "mlp"

    def _is_fast_for(self, x: Tensor) -> bool:
        if self.training or torch.is_grad_enabled():
            return False
        return is_plain_mlp(self) and is_silent(*[module for name, module in self._modules.items() if name != "fc2"])

    def _fast_forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1, self.fc2)


def is_plain_mlp(module: nn.Module) -> bool:
    """Whether its parts, which may have been exchanged, are packed layers and an exact GELU, and others do nothing."""
    act = module._modules.get("act")
    exact = type(act) is nn.GELU and act.approximate == "none"
    return exact and is_packed(module.fc1) and are_passive(module, "fc1", "act", "fc2")


def is_passive(part: nn.Module | None) -> bool:
    return part is None or type(part) in PASSIVE


def are_passive(module: Fast, *but: str) -> bool:
    """Whether all parts but these are passive, and those that are a softmax the same as they were tried."""
    if not all([name in but or is_passive(part) for name, part in module._modules.items()]):
        return False
    return softmaxes(module) == type(module).known.softmaxes


def softmaxes(module: nn.Module) -> tuple[tuple[str, int | None], ...]:
    """(name, axis) of the parts that are a softmax."""
    return tuple([(name, part.dim) for name, part in module._modules.items() if type(part) is nn.Softmax])


class FastHead(Fast):
    """LayerNorm and a Linear to few outputs in one pass, where a kernel of the tail without projection runs (C++).

    torch.compile gets the module's own forward, as of packed Linear layers.
    """

    kernel = "head"

    def forward(self, input: Tensor) -> Tensor:
        layers = norm_and_linear(self)
        records = self.training or torch.is_grad_enabled()
        others = layers is None or records or torch.compiler.is_compiling()
        if others or is_transformed() or not is_silent(*layers):
            return super().forward(input)
        norm, linear = layers
        given = input, norm.weight, norm.bias, linear.weight, linear.bias
        dtypes = _head_dtypes(given, linear.in_features, linear.out_features)
        if dtypes is None or not has_plain_tail(input):
            return super().forward(input)
        inside, outside = dtypes
        x, *vectors = (t if t is None else t.to(inside) for t in given)
        return norm_and_head(x, *vectors, eps=norm.eps).to(outside)


def norm_and_linear(module: nn.Module) -> tuple[nn.LayerNorm, nn.Linear] | None:
    """The two children of a head: LayerNorm over the last axis, Linear to few outputs; None for anything else."""
    children = tuple(module._modules.values())
    if tuple(map(type, children)) != (nn.LayerNorm, nn.Linear):
        return None
    norm, linear = children
    fits = norm.normalized_shape == (linear.in_features,) and linear.out_features <= LARGEST_HEAD
    return children if fits else None


def _head_dtypes(given: tuple[Tensor | None, ...], C: int, M: int) -> tuple[torch.dtype, torch.dtype] | None:
    """(of the kernel, of the result: the linear layer's) for x [..., C] and a head's vectors; None: not for the kernel.

    Plain tensors of the CPU; the kernel trusts the shapes, so what does not fit is left to the own forward to refuse.
    """
    tensors = [t for t in given if t is not None]
    if not all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and not t.is_nested for t in tensors):
        return None
    x, *vectors = given
    sizes = zip(vectors, ((C,), (C,), (M, C), (M,)), strict=True)
    if x.shape[-1:] != (C,) or any(t is not None and t.shape != size for t, size in sizes):
        return None
    dtypes = {t.dtype for t in tensors}
    if torch.is_autocast_enabled("cpu"):
        casts = dtypes <= {torch.float32, torch.bfloat16, torch.float16}
        return (torch.float32, torch.get_autocast_dtype("cpu")) if casts else None
    return (x.dtype, x.dtype) if len(dtypes) == 1 and x.dtype in FLOATS else None
