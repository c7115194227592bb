"""Speeds up a model, or a module of code, without editing it; undone by `unpatch`."""

import functools
import sys
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import NamedTuple

from torch import nn

from .fast import Fast
from .functions import FUNCTIONS, function_for
from .recognise import kind_of
from .settings import NotComparable, settings_of
from .trial import NotRecognised

KERNELS = ("cluster", "merge", "gather", "cross_attention", "attention", "linear", "mlp", "block", "head")
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
    kernels: switches, all True: cluster (`cluster_dpc_knn`, `cluster_dpc_knn_center`, of tensors or token dictionaries,
    their values returned in any order), merge (`merge_tokens`), gather (`index_points`), cross_attention, attention (no
    N x N weights are stored), linear (packed weights in CPU inference, followed when they change), mlp (the GELU in the
    same pass), block (norms and residuals of a pre-norm block of fast `attn` and `mlp` in the same passes, in inference
    where nothing inside is hooked), head (an nn.Sequential of a LayerNorm and a Linear to at most 8 outputs in one
    pass, in CPU inference; the residual before it stands in the parent's forward, which no module shows, and stays
    there).

    Functions are replaced under every name, in every loaded module, that holds the same function object: for a model,
    those that the modules defining its classes and their bases hold. Methods of these names are replaced in their
    class, if they need no attributes of an instance; where a subclass or an instance has exchanged what one calls, the
    original runs. A model's submodules get a subclass of their own class; parameters, hooks, mode, dtype and state_dict
    stay as they are. Of a module object, the instances that its classes make from now on are treated as such models (of
    a subclass from elsewhere: its parts). Each replacement was first tried beside the original, in float64 on small
    random inputs; what gives another result, or is not known, is left as it is: see `report()`. Several patches of one
    thing are undone in any order: it is fast until the last of them is.
    Modules are tried with short inputs, with 17 and 351 tokens (joints, the longest clips of pose models), with as many
    as attention's attributes and tables have, with zeros, NaN and large numbers, and in each number of axes that they
    take: what only other inputs (numbers of tokens, batches, 16-bit dtypes) show is not seen, nor what a forward hands
    to functions or globals of its own; calls with another number of axes run the original.
    Those of one class, shapes and equal attributes (numbers, strings, functions and plain containers of such) share a
    trial; a module with an attribute of another kind is tried itself.
    In training and where autograd records, the differentiable forms run (first order); arguments are bound by the
    original's signature. A patched model pickles as the unpatched one, and a copy stays fast until it is patched and
    unpatched itself, unless its class has a `__deepcopy__` of its own, which then makes it. Weights, `num_heads`,
    `scale` and the parts of attention and MLP that are exchanged later are followed; what a forward is (its code, other
    attributes such as MotionBERT's `mode`, a drop path that does nothing in inference) is that of the patch. Parts are
    known by their exact class: with a subclass of nn.Dropout or the like, which may do more, the original runs.
    torch.compile sees a later patch and its end; before torch 2.12 a graph compiled earlier keeps its numbers and its
    speed until torch._dynamo.reset(). Calls that are in progress in other threads while a patch ends may fail.

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


@dataclass(eq=False)
class Swap:
    """A name in a module of code, or in a class, that holds a replacement, for as long as a patch wants it."""

    holder: ModuleType | type
    name: str
    original: FunctionType
    replacement: FunctionType
    patches: set = field(default_factory=set)

    @property
    def owner(self) -> type | None:
        """Of a method."""
        return self.holder if isinstance(self.holder, type) else None

    def put_back(self) -> bool:
        """False where somebody else has replaced it since."""
        if _SWAPS.get((id(self.holder), self.name)) is self:
            del _SWAPS[id(self.holder), self.name]
        is_ours = self.holder.__dict__.get(self.name) is self.replacement
        if is_ours:
            setattr(self.holder, self.name, self.original)
        return is_ours


_LOCK = threading.RLock()  # of the two below and of what they describe
_SWAPS: dict[tuple[int, str], Swap] = {}
_PATCHES: weakref.WeakKeyDictionary[nn.Module, set] = weakref.WeakKeyDictionary()  # those that want the module fast


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
        self._functions: list[Swap] = []
        self._modules: list[tuple[weakref.ref, type]] = []
        self._constructors: list[tuple[type, FunctionType]] = []
        self._found: dict[tuple, type | str] = {}
        self._noted: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # where in entries
        self._searched: set[ModuleType | type] = set()  # for functions
        self._classes: list[str] = []  # of which new instances are patched
        try:
            with _LOCK:
                for one in targets:
                    self._patch(one)
        except BaseException:
            self.unpatch()
            raise
        if not (self._functions or self._modules or self._constructors):
            raise ValueError(f"target: nothing in it could be replaced\n{self.report()}")

    def _patch(self, target: nn.Module | ModuleType) -> None:
        if isinstance(target, ModuleType):
            classes = [
                cls for cls in vars(target).values() if isinstance(cls, type) and cls.__module__ == target.__name__
            ]
            self._patch_functions([target, *dict.fromkeys(classes)])
            self._patch_constructors(classes)
        else:
            self._patch_model(target)

    def _patch_model(self, model: nn.Module) -> None:
        classes = list(dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__))
        names = dict.fromkeys(cls.__module__ for cls in classes)
        self._patch_functions([*(sys.modules[name] for name in names if name in sys.modules), *classes])
        self._patch_modules(model)

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
        if self._classes:
            lines.append(f"new instances of {_abbreviated(self._classes)}")
        return "\n".join(lines) or "nothing was looked at"

    __str__ = report

    def unpatch(self) -> None:
        """Put back what no other patch still wants. What somebody else has replaced since raises RuntimeError, after
        all else is back.
        """
        with _LOCK:
            taken = self._put_back()
        if taken:
            raise RuntimeError(f"unpatch: replaced by others since: {', '.join(taken)}")

    def _put_back(self) -> list[str]:
        """What somebody else has replaced since."""
        taken = []
        for swap in self._functions:
            swap.patches.discard(self)
            if not swap.patches and not swap.put_back():
                taken.append(f"{_path(swap.holder)}.{swap.name}")
        for cls, constructor in self._constructors:
            constructor.patches.remove(self)
            if constructor.patches:
                continue
            if cls.__dict__.get("__init__") is not constructor:
                taken.append(f"{cls.__name__}.__init__")
            elif constructor.original is None:
                del cls.__init__
            else:
                cls.__init__ = constructor.original
        for reference, fast in self._modules:
            module = reference()
            if module is None or self not in _PATCHES[module]:
                continue
            _PATCHES[module].remove(self)
            if _PATCHES[module]:
                continue
            if type(module) is fast and "forward" not in module.__dict__:
                module.__class__ = fast.original
                module.__dict__.pop("_kept", None)
            else:
                taken.append(f"a {fast.original.__name__}")
        self._functions, self._constructors, self._modules = [], [], []
        return taken

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception) -> None:
        self.unpatch()

    def _note(self, entry: Entry, module: nn.Module | None = None) -> None:
        """module: has one entry, the last, with the path from the outermost module that was built of it."""
        at = self._noted.get(module) if module is not None else None
        if at is not None:
            self.entries[at] = entry
        elif module is not None or entry not in self.entries:
            self.entries.append(entry)
            if module is not None:
                self._noted[module] = len(self.entries) - 1

    def _patch_functions(self, holders: list[ModuleType | type]) -> None:
        """Of modules of code: under every name, in every loaded module; of classes: their own methods."""
        functions = {}
        holders = [holder for holder in holders if holder not in self._searched]
        self._searched.update(holders)
        for holder in holders:
            if _path(holder).split(".")[0] not in (_OURS, "torch"):
                originals = (_original(holder, name) for name in tuple(vars(holder)))
                owner = holder if isinstance(holder, type) else None
                functions |= {(id(f), owner): f for f in originals if _is_known(f)}
        for (_, owner), function in functions.items():
            kernel = FUNCTIONS[function.__name__][0]
            if kernel not in self.kernels:
                continue
            where = f"{_path(owner) if owner else function.__module__}.{function.__name__}"
            if function.__module__.split(".")[0] == _OURS:
                self._note(Entry(kernel, where, "it is this package's already"))
                continue
            replacement = next(
                (s.replacement for s in _SWAPS.values() if s.original is function and s.owner is owner), None
            )
            try:
                replacement = replacement or function_for(function, owner)
            except NotRecognised as reason:
                self._note(Entry(kernel, where, str(reason)))
                continue
            everywhere = (*sys.modules.values(), *(holder for holder in holders if not _is_loaded(holder)))
            for holder in (owner,) if owner else everywhere:
                for name in tuple(vars(holder)) if isinstance(holder, type if owner else ModuleType) else ():
                    if _original(holder, name) is function:
                        self._swap(holder, name, function, replacement)
                        self._note(Entry(kernel, f"{_path(holder)}.{name}", ""))

    def _swap(self, holder: ModuleType | type, name: str, function: FunctionType, replacement: FunctionType) -> None:
        if holder.__dict__[name] is function:
            setattr(holder, name, replacement)
            _SWAPS[id(holder), name] = Swap(holder, name, function, replacement)
        swap = _SWAPS[id(holder), name]
        if self not in swap.patches:
            swap.patches.add(self)
            self._functions.append(swap)

    def _patch_modules(self, root: nn.Module) -> None:
        modules = dict(root.named_modules())
        kinds = {p: (type(m).kernel, type) if isinstance(m, Fast) else kind_of(m) for p, m in modules.items()}
        # Linear layers first: a fused MLP wants its fc1 packed; blocks last, as they want both.
        order = {"linear": 0, "block": 2}
        for path, module in sorted(modules.items(), key=lambda item: order.get((kinds[item[0]] or ("",))[0], 1)):
            kind = kinds[path]
            if kind is None or kind[0] not in self.kernels:
                continue
            kernel, find = kind
            where = path or type(module).__name__
            try:
                module.__class__ = fast = self._fast_class(module, find)
            except (NotRecognised, TypeError) as reason:  # TypeError: a class whose instances cannot change it
                self._note(Entry(kernel, where, str(reason)), module)
                continue
            if self not in _PATCHES.setdefault(module, set()):
                _PATCHES[module].add(self)
                self._modules.append((weakref.ref(module), fast))
            self._note(Entry(kernel, where, ""), module)

    def _fast_class(self, module: nn.Module, find) -> type:
        """What `find` says: once for all modules of one class, shapes and settings, where these can be compared."""
        if "forward" in module.__dict__:
            raise NotRecognised("its forward was replaced on the instance")
        try:
            key = settings_of(module)
        except NotComparable:
            return find(module)
        if key not in self._found:
            try:
                self._found[key] = find(module)
            except NotRecognised as reason:
                self._found[key] = str(reason)
        if isinstance(self._found[key], str):
            raise NotRecognised(self._found[key])
        return self._found[key]

    def _patch_constructors(self, classes: list[type]) -> None:
        for cls in classes:
            if not issubclass(cls, nn.Module):
                continue
            constructor = cls.__dict__.get("__init__")
            if not hasattr(constructor, "patches"):
                constructor = cls.__init__ = _constructor(cls)
            if self not in constructor.patches:
                constructor.patches.append(self)
                self._constructors.append((cls, constructor))
                self._classes.append(_path(cls))


def _constructor(cls: type) -> FunctionType:
    """cls.__init__, after which the patches in its attribute `patches` treat the instance; `original`: its own."""
    initialise = cls.__init__

    @functools.wraps(initialise)
    def constructor(module, *args, **kwargs):
        initialise(module, *args, **kwargs)
        if type(module) is cls:
            with _LOCK:
                for patch in tuple(patches):
                    patch._patch_model(module)

    constructor.patches = patches = []
    constructor.original = cls.__dict__.get("__init__")
    return constructor


def _path(holder: ModuleType | type) -> str:
    return holder.__name__ if isinstance(holder, ModuleType) else f"{holder.__module__}.{holder.__qualname__}"


def _original(holder: ModuleType | type, name: str):
    """What the holder has under name, or had before a patch."""
    value, swap = holder.__dict__.get(name), _SWAPS.get((id(holder), name))
    return swap.original if swap and value is swap.replacement else value


def _is_loaded(holder: ModuleType | type) -> bool:
    return sys.modules.get(holder.__name__) is holder


def _is_known(value) -> bool:
    return isinstance(value, FunctionType) and value.__name__ in FUNCTIONS


def _abbreviated(where: list[str]) -> str:
    return ", ".join(where) if len(where) <= 4 else f"{where[0]}, {where[1]} ... {where[-1]} ({len(where)})"
