"""Which modules can be replaced: by structure first, then by trying it, in float64 on small random weights and inputs.

The trial runs on a bare twin of the module (no hooks, random weights, on the CPU): it says whether the fast forward
computes what this module's own forward computes, whatever else stands in that forward.
"""

import copy
import functools
import inspect
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import fast
from . import fast_attention as attending
from .trial import NotRecognised, NotTried, agree, trial, tried

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
SMALLEST = 16  # features of a linear layer below which packing gains nothing
CONTAINERS = (list, dict, set, deque)
LONG = 351  # frames, the longest clips of pose models: a window, or the best few keys, show in what is longer than they
JOINTS = 17
LARGE = 100.0  # times the inputs: logits of some 1e4, in which float64 still shows what trials compare
# Sizes of tokens, channels aside: of each rank a short one with several samples, and LONG along each axis of tokens.
TOKENS = ((6, 5), (1, LONG), (2, 3, 5), (1, LONG, 1), (1, 1, LONG))


class Attempt(NamedTuple):
    """Sizes of the inputs, random numbers times a factor but for the first sample's last token (zeros are padding to
    some), and further arguments.
    """

    sizes: tuple[tuple[int, ...], ...]
    beside: dict = {}  # noqa: RUF012
    factor: float = 1.0
    last: float = 0.0

    @property
    def rank(self) -> int:
        return len(self.sizes[0])

    @property
    def numbers(self) -> int:
        return sum(map(math.prod, self.sizes))

    def __call__(self, module: nn.Module, recorded: bool = False):
        """recorded: with gradients to the inputs."""
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randn(size, generator=generator, dtype=torch.float64) * self.factor for size in self.sizes]
        for x in inputs:
            if x.dim() > 2:
                x[0, ..., -1, :] = self.last
        with torch.set_grad_enabled(recorded):
            inputs = [x.requires_grad_().clone() for x in inputs] if recorded else inputs  # may be written to
            return module(*inputs, **self.beside)


def linear_class(module: nn.Module) -> type:
    """The packed twin of a plain nn.Linear's class."""
    if type(module) is not nn.Linear:
        raise NotRecognised("a subclass of nn.Linear, whose forward may do more")
    if min(module.in_features, module.out_features) < SMALLEST:
        raise NotRecognised(f"fewer than {SMALLEST} features: packing gains nothing")
    return fast.PackedLinear


def mlp_class(module: nn.Module) -> type:
    _wants_linears(module, "fc1", "fc2")
    if not fast.is_packed(module.fc1):
        raise NotRecognised("its fc1 has no packed weights to fuse the activation with")
    if type(module.act) is not nn.GELU or module.act.approximate != "none":
        raise NotRecognised(f"its act is {module.act}, not the exact GELU")
    _wants_passive(module, "fc1", "act", "fc2")
    sizes = ((6, 5), (1, LONG), (), (5,), (2, 3, 5), (2, 2, 3, 5))  # it treats tokens alike: one long input will do
    return _that_agrees(module, (fast.FastMlp,), _of_tokens(module.fc1.in_features, sizes))


def head_class(module: nn.Module) -> type:
    if type(module) is not nn.Sequential:
        raise NotRecognised("a subclass of nn.Sequential, whose forward may do more")
    layers = fast.norm_and_linear(module)
    if layers is None:
        wanted = f"wanted LayerNorm(C) and Linear(C, up to {fast.LARGEST_HEAD})"
        raise NotRecognised(f"{wanted}, got {' and '.join(map(repr, module._modules.values()))}")
    return _that_agrees(module, (fast.FastHead,), _of_tokens(layers[1].in_features, ((2, 3, 5),)))


def attention_class(module: nn.Module) -> type:
    _wants_linears(module, "qkv", "proj")
    _wants_heads(module)
    _wants_passive(module, "qkv", "proj")
    C = module.proj.in_features
    frames = inspect.signature(type(module).forward).parameters.keys() & set(attending.FastAttentionInPlace.by_name)
    if frames:
        sizes = [(2, 3, 5), (1, 1, LONG), (1, LONG, 1)]
        sizes += [size for n in _known_lengths(module) for size in ((1, 2, n), (1, n, 2))]
        attempts = [Attempt(((B * F, J, C),), dict.fromkeys(frames, F)) for B, F, J in sizes]
        attempts.append(Attempt(((6, 5, C),)))
        return _that_agrees(module, (attending.FastAttentionInPlace, attending.FastAttentionAcross), attempts)
    return _that_agrees(module, (attending.FastAttention, attending.FastAttentionFrames), _of_tokens(C, _sizes(module)))


def of_two_inputs(module: nn.Module) -> type:
    raise NotRecognised("its queries (q) and its keys and values (kv) may come from different tokens")


def block_class(module: nn.Module) -> type:
    if not attending.is_fusible(module):
        raise NotRecognised("its attention or its MLP is not fast, or of layers without packed weights")
    C = module.attn.proj.in_features
    for name, child in module._modules.items():
        if name in ("norm1", "norm2"):
            if not attending.is_norm(child, C):
                raise NotRecognised(f"its {name} is {child} of {type(child).__module__}, not torch's LayerNorm({C})")
        elif name not in ("attn", "mlp") and child is not None and (*child.parameters(), *child.buffers()):
            raise NotRecognised(f"it holds {name}, a {type(child).__name__}, which the fast form does not know")
    return _that_agrees(module, (attending.FastBlock,), _of_tokens(C, _sizes(module, module.attn)))


def cross_attention_class(module: nn.Module) -> type:
    names = attending.projections(module)
    _wants_linears(module, *names, "proj")
    _wants_heads(module)
    _wants_passive(module, *names, "proj")
    channels = [getattr(module, name).in_features for name in names]
    attempts = [
        Attempt(tuple((B, N, C) for N, C in zip((queries, keys, keys), channels, strict=True)))
        for B, queries, keys in (
            *((2, 5, 3), (2, 5, 5), (1, LONG, 9), (1, LONG, LONG)),
            *((1, n, keys) for n in _known_lengths(module) for keys in (9, n)),
        )
    ]
    return _that_agrees(module, (attending.FastCrossAttention,), attempts)


def kind_of(module: nn.Module) -> tuple[str, Callable] | None:
    """(the kernel's switch, what finds the fast class) for a module of a known structure."""
    if isinstance(module, fast.Fast):
        return None
    if isinstance(module, nn.Linear):
        return None if fast.is_packed(module) else ("linear", linear_class)
    has = module._modules.keys().__contains__
    if has("qkv") and has("proj"):
        return "attention", attention_class
    if has("q") and has("kv") and has("proj"):
        return "attention", of_two_inputs
    if attending.projections(module) and has("proj"):
        return "cross_attention", cross_attention_class
    if has("fc1") and has("act") and has("fc2"):
        return "mlp", mlp_class
    if all(map(has, ("norm1", "attn", "norm2", "mlp"))):
        return "block", block_class
    if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], nn.LayerNorm):
        return ("head", head_class) if isinstance(module[1], nn.Linear) else None
    return None


def _wants_linears(module: nn.Module, *names: str) -> None:
    for name in names:
        child = getattr(module, name)
        if not isinstance(child, nn.Linear):
            raise NotRecognised(f"its {name} is {type(child).__module__}.{type(child).__name__}, not nn.Linear")


def _wants_heads(module: nn.Module) -> None:
    heads, scale = getattr(module, "num_heads", None), getattr(module, "scale", None)
    if not isinstance(heads, int) or not isinstance(scale, float):
        raise NotRecognised(f"num_heads and scale: got {heads!r} and {scale!r}, wanted an int and a float")


def _wants_passive(module: nn.Module, *names: str) -> None:
    for name, child in module._modules.items():
        if name not in names and not fast.is_passive(child):
            raise NotRecognised(f"it holds {name}, a {type(child).__name__}, which the fast form does not know")


def _known_lengths(*modules: nn.Module) -> list[int]:
    """Numbers of tokens that forwards may treat in a way of their own: 17 joints, whole numbers among the attributes of
    these modules, sides of their own parameters and buffers.
    """
    known = {JOINTS}
    for module in modules:
        known |= {value for value in vars(module).values() if type(value) is int}
        own = (*module._parameters.values(), *module._buffers.values())
        known |= {side for x in own if x is not None and not is_lazy(x) for side in x.shape}
    return sorted(n for n in known if 1 < n < LONG)


def _sizes(*modules: nn.Module) -> tuple[tuple[int, ...], ...]:
    return (*TOKENS, *(size for n in _known_lengths(*modules) for size in ((1, n), (1, n, 1), (1, 1, n))))


def _bare(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """The module in eval mode, without hooks and forwards put on instances (each call looks for them), its parameters
    and buffers float64 numbers on the CPU, random but always the same; other attributes are its own, tensors copied.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    twin = type(module).__new__(type(module))

    known: dict[int, object] = {}
    others = [name for name in module.__dict__ if name not in ("forward", "_parameters", "_buffers", "_modules")]
    twin.__dict__.update((name, _apart(module.__dict__[name], known)) for name in others)
    for name in (*HOOKS, "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[name] = type(module.__dict__[name])()

    def random(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return torch.randn(x.shape, generator=generator, dtype=torch.float64) / max(x.shape[-1:] or [1]) ** 0.5

    as_parameter = {name: random(x) for name, x in module._parameters.items()}
    twin._parameters = {n: x if x is None else nn.Parameter(x, requires_grad=False) for n, x in as_parameter.items()}
    twin._buffers = {name: random(x) for name, x in module._buffers.items()}
    twin._modules = {
        name: child if child is None else _bare(child, generator) for name, child in module._modules.items()
    }
    twin.training = False
    return twin


def _of_tokens(C: int, sizes: tuple[tuple[int, ...], ...]) -> list[Attempt]:
    return [Attempt(((*size, C),)) for size in sizes]


def _that_agrees(module: nn.Module, mixins: tuple[type, ...], attempts: list[Attempt]) -> type:
    """The fast class of the ranks in which its forward gives what the module's own gives; raises NotRecognised.

    What the own forward refuses decides nothing, but a rank counts only where the largest inputs were taken. Of several
    mixins, the first that agrees in most ranks.
    """
    for name, buffer in module.named_buffers():
        if not (is_lazy(buffer) or buffer.is_floating_point()):
            raise NotRecognised(f"its buffer {name} of {buffer.dtype} may be a switch: no random value stands for it")
    # Of each rank values that clamps would show, and a token that is not a number.
    smallest = {a.rank: a for a in sorted(attempts, key=lambda a: -a.numbers)}.values()
    attempts = [
        *attempts,
        *(a._replace(factor=LARGE) for a in smallest),
        *(a._replace(last=math.nan) for a in smallest),
    ]
    with trial():
        twin = tried(lambda: _bare(module))
        before = _held(twin)
        expected, refused, reasons = [], [], []
        for attempt in attempts:
            try:
                expected.append((attempt, tried(lambda: attempt(twin))))
            except NotTried as reason:
                refused.append(attempt)
                reasons.append(reason)
        if expected:
            _wants_nothing_stored(before, twin, "")
            attempt, own = expected[0]
            with suppress(NotTried):  # where its own forward raises, nothing can differ
                if not agree(own, tried(lambda: attempt(twin, recorded=True))):
                    raise NotRecognised("its forward computes something else where autograd records")
            _wants_nothing_stored(before, twin, " where autograd records")
        largest = {rank: max(a.numbers for a in attempts if a.rank == rank) for rank in (a.rank for a in attempts)}
        without = {a.rank for a in refused if a.numbers == largest[a.rank]}
        ranks = tuple(rank for rank in largest if rank not in without)
        if not ranks:
            raise reasons[0]
        agreeing = {mixin: _ranks_that_agree(twin, mixin, ranks, expected) for mixin in mixins}
        mixin = max(mixins, key=lambda mixin: len(agreeing[mixin]))
        if not agreeing[mixin]:
            raise NotRecognised("its forward computes something else than its structure says")
        ranks, known = agreeing[mixin], fast.Known(softmaxes=fast.softmaxes(twin), beside=attending.beside(twin))
        if mixin.in_training:
            alike = [(attempt, own) for attempt, own in expected if attempt.rank in ranks]
            known = known._replace(trains=_trains(_bare(module), alike), drops_last=_drops_last(twin, alike))
        return fast.fast_class(mixin, type(module), ranks, known)


def _ranks_that_agree(twin: nn.Module, mixin: type, ranks: tuple[int, ...], expected: list) -> tuple[int, ...]:
    original = type(twin)
    known = fast.Known(softmaxes=fast.softmaxes(twin), beside=attending.beside(twin))
    twin.__class__ = fast.fast_class(mixin, original, ranks, known)
    try:
        differ = {a.rank for a, own in expected if a.rank in ranks and not agree(own, tried(lambda: a(twin)))}
    finally:
        twin.__class__ = original
    return tuple(rank for rank in ranks if rank not in differ)


def _held(module: nn.Module) -> dict[str, list[tuple[object, int]]]:
    """The contents of each attribute of the module and, under paths, of all in it."""
    parts = [(f"{path}." if path else "", part) for path, part in module.named_modules()]
    return {f"{path}{name}": _contents(value) for path, part in parts for name, value in vars(part).items()}


def _contents(value) -> list[tuple[object, int]]:
    """What tells whether an attribute was set, or something in it, however deep, changed: its parts, which are held so
    that no other object gets their place in memory, and versions of tensors.
    """
    parts, ahead = [], [value]
    seen = set()
    while ahead:
        part = ahead.pop()
        parts.append((part, part._version if isinstance(part, Tensor) and not part.is_inference() else 0))
        if id(part) not in seen:
            seen.add(id(part))
            ahead += _held_by(part)
    return parts


def _held_by(value) -> list:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, CONTAINERS):
        return [*value]
    return [*vars(value).values()] if _is_record(value) else []


def _is_record(value) -> bool:
    """Whether it is an object with attributes of somebody's own class: one that keeps what a forward shows it, say."""
    others = (type, nn.Module, Tensor, ModuleType, FunctionType, MethodType, functools.partial)
    return type(getattr(value, "__dict__", None)) is dict and not isinstance(value, others)


def _apart(value, known: dict[int, object]):
    """A copy of what a forward may change: tensors, containers and records, with what is in them; else the value.

    known: what was copied already, by the identity of the original. A record that cannot be copied stays itself.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if not (isinstance(value, CONTAINERS) or _is_record(value)):
        return value
    if id(value) not in known:
        try:
            twin = known[id(value)] = copy.copy(value)
        except Exception:  # whatever its class says
            return value
        if twin is value:  # one of a kind, as members of an Enum are
            return value
        if isinstance(value, dict):
            twin.update((name, _apart(part, known)) for name, part in value.items())
        elif isinstance(value, (list, deque)):
            for i, part in enumerate(value):
                twin[i] = _apart(part, known)
        elif not isinstance(value, set):
            vars(twin).update((name, _apart(part, known)) for name, part in vars(value).items())
    return known[id(value)]


def _differ(before: list[tuple[object, int]] | None, after: list[tuple[object, int]]) -> bool:
    if before is None or len(before) != len(after):
        return True
    return any(a is not b or old != new for (a, old), (b, new) in zip(before, after, strict=True))


def _stored(before: dict[str, list[tuple[object, int]]], module: nn.Module) -> list[str]:
    return [name for name, parts in _held(module).items() if _differ(before.get(name), parts)]


def _wants_nothing_stored(before: dict[str, list[tuple[object, int]]], module: nn.Module, when: str) -> None:
    stored = _stored(before, module)
    if stored:
        raise NotRecognised(f"its forward stores {', '.join(stored)}{when}")


def _trains(twin: nn.Module, expected: list[tuple[Attempt, object]]) -> bool:
    """Whether the forward gives the same in training mode, recorded or not, the dropout of its child modules set to 0,
    and stores nothing then.
    """
    for module in twin.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = _held(twin)
    try:
        alike = all(agree(own, tried(lambda: attempt(twin))) for attempt, own in expected)
        attempt, own = expected[0]
        alike = alike and agree(own, tried(lambda: attempt(twin, recorded=True)))
    except NotTried:
        return False
    return alike and not _stored(before, twin)


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _drops_last(twin: nn.Module, expected: list[tuple[Attempt, object]]) -> bool:
    """Whether what `proj_drop` gives is the result: twice as much, where it gives twice as much."""
    if twin._modules.get("proj_drop") is None:
        return False
    twin._modules["proj_drop"] = _Twice()
    try:
        return all(agree(2 * own, tried(lambda: attempt(twin))) for attempt, own in expected)
    except NotTried:
        return False
