"""Speeds up a model, or a module of code, without editing it; undone by `unpatch`."""

import functools
import sys
import weakref
from collections import Counter
from types import FunctionType, ModuleType
from typing import NamedTuple

from torch import nn

from .recognise import FUNCTIONS, NotRecognised, function_for, kind_of

KERNELS = ("cluster", "merge", "gather", "cross_attention", "attention", "linear", "mlp", "head")
PLAIN = (bool, int, float, str, tuple, type(None))
_OURS = __name__.split(".")[0]


class Entry(NamedTuple):
    """One thing that was looked at. reason: why it was left as it is, "" where it was replaced."""

    kernel: str
    where: str
    reason: str

    @property
    def is_replaced(self) -> bool:
        return not self.reason


def patch(target, **kernels: bool) -> "Patch":
    """Replace what is recognised in target by the operations of this package; the handle undoes it.

    target: a model (instance of nn.Module), a module object (`import model.mixste as m; patch(m)`), or a list of such.
    kernels: switches, all True: cluster (`cluster_dpc_knn`, `cluster_dpc_knn_center`), merge (`merge_tokens`), gather
    (`index_points`), cross_attention, attention (no N x N weights are stored), linear (packed weights in CPU inference,
    followed when they change), mlp (the GELU in the same pass), head (an nn.Sequential of a LayerNorm and a Linear to
    at most 8 outputs in one pass, in CPU inference; the residual before it stands in the parent's forward, which no
    module shows, and stays there).

    Functions are replaced under every name, in every loaded module, that holds the same function object: for a model,
    those that the modules defining its classes hold. A model's submodules get a subclass of their own class;
    parameters, hooks, mode, dtype and state_dict stay as they are. Of a module object, the instances that its classes
    make from now on are treated so. Each replacement was first tried beside the original, in float64 on small random
    inputs; what gives another result, or is not known, is left as it is: see `report()`.
    In training and where autograd records, the differentiable forms run (first order); a patched model pickles as
    the unpatched one.

    Raises TypeError for another target or an unknown switch, ValueError (with the reasons) where nothing at all could
    be replaced. The patch itself changes no random state.

    >>> import torch
    >>> from h2ot_kernels import dropin
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 3))
    >>> with dropin.patch(model) as handle:
    ...     print(handle.report())
    replaced 1 linear: 0
    left linear 1: fewer than 16 features: packing gains nothing
    """
    return Patch(target, **kernels)


class Patch:
    """What `patch` did. A context manager: leaving it calls `unpatch`."""

    def __init__(self, target, **kernels: bool):
        unknown = kernels.keys() - set(KERNELS)
        if unknown:
            raise TypeError(f"patch: got {', '.join(sorted(unknown))}, wanted some of {', '.join(KERNELS)}")
        targets = list(target) if isinstance(target, (list, tuple)) else [target]
        for one in targets:
            if not isinstance(one, (nn.Module, ModuleType)):
                raise TypeError(
                    f"target: got {type(one).__name__}, wanted an nn.Module, a module object or a list of them"
                )
        self.kernels = {kernel for kernel in KERNELS if kernels.get(kernel, True)}
        self.entries: list[Entry] = []
        self._functions: list[tuple[ModuleType, str, FunctionType, FunctionType]] = []
        self._modules: list[tuple[weakref.ref, type, type]] = []
        self._constructors: list[tuple[type, FunctionType | None, FunctionType]] = []
        self._found: dict[tuple, type | str] = {}
        try:
            for one in targets:
                if isinstance(one, ModuleType):
                    self._patch_functions([one])
                    self._patch_constructors(one)
                else:
                    names = dict.fromkeys(type(module).__module__ for module in one.modules())
                    self._patch_functions([sys.modules[name] for name in names if name in sys.modules])
                    self._patch_modules(one)
        except BaseException:
            self.unpatch()
            raise
        if not (self._functions or self._modules or self._constructors):
            raise ValueError(f"target: nothing in it could be replaced\n{self.report()}")

    def report(self) -> str:
        """What was replaced, by kernel, and what was left as it is, with the reason; one line each."""
        lines = []
        for kernel in KERNELS:
            where = [entry.where for entry in self.entries if entry.kernel == kernel and entry.is_replaced]
            if where:
                lines.append(f"replaced {len(where)} {kernel}: {_abbreviated(where)}")
        left = Counter((entry.kernel, entry.reason) for entry in self.entries if not entry.is_replaced)
        for kernel, reason in left:
            where = [entry.where for entry in self.entries if (entry.kernel, entry.reason) == (kernel, reason)]
            lines.append(f"left {kernel} {_abbreviated(where)}: {reason}")
        return "\n".join(lines) or "nothing was looked at"

    __str__ = report

    def unpatch(self) -> None:
        """Put everything back. What somebody else has replaced since raises RuntimeError, after all else is back."""
        taken = []
        for module, name, original, replacement in self._functions:
            if module.__dict__.get(name) is replacement:
                setattr(module, name, original)
            else:
                taken.append(f"{module.__name__}.{name}")
        for cls, original, replacement in self._constructors:
            if cls.__dict__.get("__init__") is not replacement:
                taken.append(f"{cls.__name__}.__init__")
            elif original is None:
                del cls.__init__
            else:
                cls.__init__ = original
        for reference, original, fast in self._modules:
            module = reference()
            if module is None:
                continue
            if type(module) is fast:
                module.__class__ = original
                module.__dict__.pop("_packed", None)
            else:
                taken.append(f"a {original.__name__}")
        self._functions, self._constructors, self._modules = [], [], []
        if taken:
            raise RuntimeError(f"unpatch: replaced by others since: {', '.join(taken)}")

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception) -> None:
        self.unpatch()

    def _note(self, kernel: str, where: str, reason: str = "") -> None:
        entry = Entry(kernel, where, reason)
        if entry not in self.entries:
            self.entries.append(entry)

    def _patch_functions(self, holders: list[ModuleType]) -> None:
        functions = {}
        for holder in holders:
            if holder.__name__.split(".")[0] not in (_OURS, "torch"):
                functions |= {id(f): f for f in vars(holder).values() if _is_known(f)}
        for function in functions.values():
            kernel = FUNCTIONS[function.__name__][0]
            if kernel not in self.kernels:
                continue
            where = f"{function.__module__}.{function.__name__}"
            if function.__module__.split(".")[0] == _OURS:
                self._note(kernel, where, "it is this package's already")
                continue
            try:
                replacement = function_for(function)
            except NotRecognised as reason:
                self._note(kernel, where, str(reason))
                continue
            for module in list(sys.modules.values()):
                for name, value in list(getattr(module, "__dict__", {}).items()):
                    if value is function and isinstance(module, ModuleType):
                        setattr(module, name, replacement)
                        self._functions.append((module, name, function, replacement))
                        self._note(kernel, f"{module.__name__}.{name}")

    def _patch_modules(self, root: nn.Module) -> None:
        modules = dict(root.named_modules())
        # Linear layers first: a fused MLP wants its fc1 packed.
        for path, module in sorted(modules.items(), key=lambda item: not isinstance(item[1], nn.Linear)):
            kind = kind_of(module)
            if kind is None or kind[0] not in self.kernels:
                continue
            kernel, find = kind
            where = path or type(module).__name__
            try:
                fast = self._fast_class(module, find)
                original = type(module)
                module.__class__ = fast
            except (NotRecognised, TypeError) as reason:  # TypeError: a class whose instances cannot change it
                self._note(kernel, where, str(reason))
                continue
            self._modules.append((weakref.ref(module), original, fast))
            self._note(kernel, where)

    def _fast_class(self, module: nn.Module, find) -> type:
        """What `find` says, once for all modules of one class, shapes and settings."""
        if "forward" in module.__dict__:
            raise NotRecognised("its forward was replaced on the instance")
        key = _settings(module)
        if key not in self._found:
            try:
                self._found[key] = find(module)
            except NotRecognised as reason:
                self._found[key] = str(reason)
        if isinstance(self._found[key], str):
            raise NotRecognised(self._found[key])
        return self._found[key]

    def _patch_constructors(self, holder: ModuleType) -> None:
        for cls in list(vars(holder).values()):
            if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == holder.__name__):
                continue
            original = cls.__dict__.get("__init__")
            replacement = self._constructor(cls)
            cls.__init__ = replacement
            self._constructors.append((cls, original, replacement))

    def _constructor(self, cls: type) -> FunctionType:
        initialise = cls.__init__

        @functools.wraps(initialise)
        def constructor(module, *args, **kwargs):
            initialise(module, *args, **kwargs)
            if type(module) is cls:
                self._patch_modules(module)

        return constructor


def _is_known(value) -> bool:
    return isinstance(value, FunctionType) and value.__name__ in FUNCTIONS


def _settings(module: nn.Module) -> tuple:
    """What decides how a module computes, weights aside: its class, plain attributes, shapes, and its children's."""
    attributes = tuple((n, repr(v)) for n, v in module.__dict__.items() if isinstance(v, PLAIN) and n != "training")
    tensors = (*module._parameters.items(), *module._buffers.items())
    shapes = tuple((n, None if x is None else x.shape) for n, x in tensors)
    children = tuple((n, None if child is None else _settings(child)) for n, child in module._modules.items())
    return type(module), attributes, shapes, children


def _abbreviated(where: list[str]) -> str:
    return ", ".join(where) if len(where) <= 4 else f"{where[0]}, {where[1]} ... {where[-1]} ({len(where)})"
