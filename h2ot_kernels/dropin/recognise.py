"""Which modules can be replaced: by structure first, then by trying it, in float64 on small random weights and inputs.

The trial runs on a bare twin of the module (no hooks, random weights, on the CPU): it says whether the fast forward
computes what this module's own forward computes, whatever else stands in that forward.
"""

import copy
import inspect
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..linear import HOOKS, Linear
from . import fast
from .trial import NotRecognised, NotTried, agree, trial, tried

SMALLEST = 16  # features of a linear layer below which packing gains nothing
CONTAINERS = (list, dict, set, deque)


def linear_class(module: nn.Module) -> type:
    """The packed twin of a plain nn.Linear's class."""
    if type(module) is not nn.Linear:
        raise NotRecognised("a subclass of nn.Linear, whose forward may do more")
    if min(module.in_features, module.out_features) < SMALLEST:
        raise NotRecognised(f"fewer than {SMALLEST} features: packing gains nothing")
    return fast.fast_class(fast.FastLinear, nn.Linear)


def mlp_class(module: nn.Module) -> type:
    _wants_linears(module, "fc1", "fc2")
    if not isinstance(module.fc1, Linear):
        raise NotRecognised("its fc1 has no packed weights to fuse the activation with")
    if type(module.act) is not nn.GELU or module.act.approximate != "none":
        raise NotRecognised(f"its act is {module.act}, not the exact GELU")
    _wants_passive(module, "fc1", "act", "fc2")
    return _that_agrees(module, ([(2, 5, module.fc1.in_features)], (fast.FastMlp,)))


def head_class(module: nn.Module) -> type:
    if type(module) is not nn.Sequential:
        raise NotRecognised("a subclass of nn.Sequential, whose forward may do more")
    layers = fast.norm_and_linear(module)
    if layers is None:
        wanted = f"wanted LayerNorm(C) and Linear(C, up to {fast.LARGEST_HEAD})"
        raise NotRecognised(f"{wanted}, got {' and '.join(map(repr, module._modules.values()))}")
    return _that_agrees(module, ([(2, 3, 5, layers[1].in_features)], (fast.FastHead,)))


def attention_class(module: nn.Module) -> type:
    _wants_linears(module, "qkv", "proj")
    _wants_heads(module)
    _wants_passive(module, "qkv", "proj")
    C = module.proj.in_features
    if "seqlen" in inspect.signature(type(module).forward).parameters:
        candidates = (fast.FastAttentionInPlace, fast.FastAttentionAcross)
        return _that_agrees(module, ([(6, 5, C)], candidates), seqlen=3)
    of_rows = [(6, 5, C)], (fast.FastAttention,)
    of_frames = [(2, 3, 5, C)], (fast.FastAttention, fast.FastAttentionFrames)
    return _that_agrees(module, of_rows, of_frames)


def of_two_inputs(module: nn.Module) -> type:
    raise NotRecognised("its queries (q) and its keys and values (kv) may come from different tokens")


def block_class(module: nn.Module) -> type:
    if not fast.is_fusible(module):
        raise NotRecognised("its attention or its MLP is not fast, or of layers without packed weights")
    C = module.attn.proj.in_features
    for name, child in module._modules.items():
        if name in ("norm1", "norm2"):
            if type(child) is not nn.LayerNorm or child.normalized_shape != (C,):
                raise NotRecognised(f"its {name} is {child}, not LayerNorm({C})")
        elif name not in ("attn", "mlp") and child is not None and (*child.parameters(), *child.buffers()):
            raise NotRecognised(f"it holds {name}, a {type(child).__name__}, which the fast form does not know")
    return _that_agrees(module, ([(6, 5, C)], (fast.FastBlock,)), ([(2, 3, 5, C)], (fast.FastBlock,)))


def cross_attention_class(module: nn.Module) -> type:
    names = fast.projections(module)
    _wants_linears(module, *names, "proj")
    _wants_heads(module)
    _wants_passive(module, *names, "proj")
    channels = [getattr(module, name).in_features for name in names]
    fewer_keys, as_many = (
        [(2, n, C) for n, C in zip(lengths, channels, strict=True)] for lengths in ((5, 3, 3), (5,) * 3)
    )
    candidates = (fast.FastCrossAttention,)
    return _that_agrees(module, (fewer_keys, candidates), (as_many, candidates))


def kind_of(module: nn.Module) -> tuple[str, Callable] | None:
    """(the kernel's switch, what finds the fast class) for a module of a known structure."""
    if isinstance(module, fast.Fast):
        return None
    if isinstance(module, nn.Linear):
        return None if isinstance(module, Linear) else ("linear", linear_class)
    has = module._modules.keys().__contains__
    if has("qkv") and has("proj"):
        return "attention", attention_class
    if has("q") and has("kv") and has("proj"):
        return "attention", of_two_inputs
    if fast.projections(module) and has("proj"):
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
        if name not in names and child is not None and not isinstance(child, fast.PASSIVE):
            raise NotRecognised(f"it holds {name}, a {type(child).__name__}, which the fast form does not know")


def _bare(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """The module without hooks, in eval mode, its parameters and buffers float64 numbers on the CPU, random but always
    the same.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    twin = type(module).__new__(type(module))
    own = module.__dict__.items()
    twin.__dict__.update((name, copy.copy(x) if isinstance(x, CONTAINERS) else x) for name, x in own)
    for name in (*HOOKS, "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
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


def _that_agrees(module: nn.Module, *attempts: tuple[list[tuple], tuple[type, ...]], **extra) -> type:
    """The first fast class whose forward gives what the module's own forward gives; raises NotRecognised.

    attempts: (sizes of the inputs, the candidates). The first attempt whose sizes the own forward takes decides.
    """
    reasons = []
    with trial():
        for sizes, mixins in attempts:
            generator = torch.Generator().manual_seed(1)
            inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
            try:
                return _the_same(module, mixins, lambda twin: twin(*inputs, **extra))
            except NotTried as reason:
                reasons.append(reason)
    raise reasons[0]


def _the_same(module: nn.Module, mixins: tuple[type, ...], call: Callable[[nn.Module], object]) -> type:
    twin = tried(lambda: _bare(module))
    before = {name: _contents(value) for name, value in twin.__dict__.items()}
    expected = tried(lambda: call(twin))
    stored = [name for name, value in twin.__dict__.items() if before.get(name) != _contents(value)]
    if stored:
        raise NotRecognised(f"its forward stores {', '.join(stored)}")
    trains = _trains(_bare(module), call, expected)
    for mixin in mixins:
        cls = fast.fast_class(mixin, type(module), trains)
        twin.__class__ = cls
        if agree(expected, tried(lambda: call(twin))):
            return cls
    raise NotRecognised("its forward computes something else than its structure says")


def _contents(value) -> tuple:
    """What tells whether an attribute was set, or a container changed."""
    if not isinstance(value, CONTAINERS):
        return (id(value),)
    return id(value), *map(id, value), *map(id, value.values() if isinstance(value, dict) else ())


def _trains(twin: nn.Module, call: Callable[[nn.Module], object], expected) -> bool:
    """Whether the forward gives the same in training mode, the dropout of its child modules set to 0."""
    for module in twin.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    try:
        return agree(expected, tried(lambda: call(twin)))
    except NotTried:
        return False
