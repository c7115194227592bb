"""What can be replaced: by structure first, then by trying it, in float64 on small random weights and inputs.

The trial runs on a bare twin of the module (no hooks, random weights, on the CPU): it says whether the fast forward
computes what this module's own forward computes, whatever else stands in that forward.
"""

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import Tensor, nn

from ..linear import HOOKS, Linear
from . import fast, hot, prunevid, tcformer

SMALLEST = 16  # features of a linear layer below which packing gains nothing
CONTAINERS = (list, dict, set, deque)


class NotRecognised(Exception):
    """Why something is left as it is."""


class NotTried(NotRecognised):
    """The same, of what raised with the inputs that it was given."""


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


@contextmanager
def _trial() -> Iterator[None]:
    """On the CPU, without gradients and autocast, and the random state as before at the end."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _that_agrees(module: nn.Module, *attempts: tuple[list[tuple], tuple[type, ...]], **extra) -> type:
    """The first fast class whose forward gives what the module's own forward gives; raises NotRecognised.

    attempts: (sizes of the inputs, the candidates). The first attempt whose sizes the own forward takes decides.
    """
    reasons = []
    with _trial():
        for sizes, mixins in attempts:
            generator = torch.Generator().manual_seed(1)
            inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
            try:
                return _the_same(module, mixins, lambda twin: twin(*inputs, **extra))
            except NotTried as reason:
                reasons.append(reason)
    raise reasons[0]


def _the_same(module: nn.Module, mixins: tuple[type, ...], call: Callable[[nn.Module], object]) -> type:
    twin = _tried(lambda: _bare(module))
    before = {name: _contents(value) for name, value in twin.__dict__.items()}
    expected = _tried(lambda: call(twin))
    stored = [name for name, value in twin.__dict__.items() if before.get(name) != _contents(value)]
    if stored:
        raise NotRecognised(f"its forward stores {', '.join(stored)}")
    trains = _trains(_bare(module), call, expected)
    for mixin in mixins:
        cls = fast.fast_class(mixin, type(module), trains)
        twin.__class__ = cls
        if _agree(expected, _tried(lambda: call(twin))):
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
        return _agree(expected, _tried(lambda: call(twin)))
    except NotTried:
        return False


def _tried(call: Callable):
    """What the call returns; whatever code that is not ours raises is a reason to leave it as it is."""
    try:
        return call()
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise NotTried(f"it could not be tried: {type(error).__name__}: {first_line:.100}") from error


def _agree(expected, got) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor) or expected.shape != got.shape or expected.dtype != got.dtype:
            return False
        return torch.equal(expected, got) if not expected.is_floating_point() else torch.allclose(expected, got, 1e-9)
    if isinstance(expected, dict):
        return isinstance(got, dict) and expected.keys() == got.keys() and all(_agree(expected[n], got[n]) for n in got)
    if isinstance(expected, (tuple, list)):
        return len(expected) == len(got) and all(map(_agree, expected, got))
    return type(expected) is type(got) and expected == got


def _tokens(generator: torch.Generator) -> Tensor:
    """Small: below 25 tokens `torch.cdist` is exact in official code."""
    return torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)


def _token_dict(generator: torch.Generator) -> dict:
    x = _tokens(generator)
    return {"x": x, "token_num": 12, "idx_token": torch.arange(12).repeat(2, 1), "agg_weight": x.new_ones(2, 12, 1)}


def _merge_arguments(generator: torch.Generator, **beside) -> tuple:
    labels = torch.arange(12).remainder(5).repeat(2, 1)
    weight = torch.rand(2, 12, 1, generator=generator, dtype=torch.float64)
    return _token_dict(generator) | beside, labels, 5, weight


def _mask(generator: torch.Generator) -> Tensor:
    return torch.rand(2, 12, generator=generator, dtype=torch.float64).argsort() < torch.tensor([[12], [8]])


def _clusters(tokens: Callable, *rest: int) -> tuple[Callable, Callable]:
    """Arguments of clustering, without and with a mask."""
    return lambda g: (tokens(g), *rest), lambda g: (tokens(g), *rest, _mask(g))


def _points(generator: torch.Generator) -> tuple:
    return _tokens(generator), torch.tensor([[3, 1, 1, 7], [0, 11, 5, 2]])


# Masked tokens have the labels of official code, for consumers that are not this package's.
_hot, _center, _prunevid, _tcformer = (
    functools.partial(form, masked_label=0)
    for form in (
        hot.cluster_dpc_knn,
        hot.cluster_dpc_knn_center,
        prunevid.cluster_dpc_knn,
        tcformer.cluster_dpc_knn,
    )
)
# name in public code -> the switch, and its forms: what replaces it, and arguments that tell whether it may, the last
# ones only of functions with a token_mask.
FUNCTIONS = {
    "cluster_dpc_knn": (
        "cluster",
        (
            (_hot, _clusters(_tokens, 5, 2)),
            (_prunevid, _clusters(_tokens, 5, 3)),
            (functools.partial(_prunevid, noise_dtype=None), _clusters(_tokens, 5, 3)),
            (_tcformer, _clusters(_token_dict, 5, 3)),
            (functools.partial(_tcformer, noise_dtype=torch.float32), _clusters(_token_dict, 5, 3)),
        ),
    ),
    "cluster_dpc_knn_center": ("cluster", ((_center, _clusters(_tokens, 5, 2, 6)),)),
    "merge_tokens": (
        "merge",
        (
            (tcformer.merge_tokens, (lambda g: _merge_arguments(g, map_size=[3, 4], init_grid_size=[3, 4]),)),
            (tcformer.merge_tokens, (lambda g: _merge_arguments(g, mask=None),)),
        ),
    ),
    "index_points": ("gather", ((hot.index_points, (_points,)),)),
}


def function_for(function: Callable) -> Callable:
    """What replaces a function of FUNCTIONS: the form that gives the same on a small input, from as many random
    numbers; raises NotRecognised.
    """
    reasons = []
    takes_mask = "token_mask" in inspect.signature(function).parameters
    for form, arguments in FUNCTIONS[function.__name__][1]:
        try:
            replacement = _with_the_parameters_of(function, form)
            with _trial():
                agree = all(_agree_on(given, function, replacement) for given in arguments[: 1 + takes_mask])
        except NotRecognised as reason:
            reasons.append(str(reason))
            continue
        if agree:
            return replacement
        reasons.append("it returns something else than the official form")
    raise NotRecognised("; ".join(dict.fromkeys(reasons)))


def _agree_on(arguments: Callable, *candidates: Callable) -> bool:
    """Whether two functions give the same, from as many random numbers."""
    results = []
    for candidate in candidates:
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
        given = arguments(torch.Generator().manual_seed(0))
        results.append([_tried(lambda: candidate(*given)), torch.get_rng_state()])
    return _agree(*results)


def _with_the_parameters_of(function: Callable, form: Callable) -> Callable:
    """form with function's defaults; calls that use further, optional arguments of function stay function's."""
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (function, form))
    ours = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p, own in zip(theirs, ours, strict=False) if p.name == own.name]
    shared, further = theirs[: len(names)], theirs[len(names) :]
    if (
        [p.name for p in shared] != names
        or len(names) < min(3, len(ours))
        or any(p.default is p.empty for p in further)
    ):
        wanted = ", ".join(p.name for p in ours)
        raise NotRecognised(f"its arguments are {inspect.signature(function)}, not ({wanted})")
    if type(form) is FunctionType and [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in ours]:
        return form

    @functools.wraps(function)
    def with_its_defaults(*args, **kwargs):
        if len(args) > len(names) or not kwargs.keys() <= set(names):
            return function(*args, **kwargs)
        absent = {p.name: p.default for p in shared[len(args) :] if p.default is not p.empty}
        return form(*args, **absent | kwargs)

    with_its_defaults.__module__ = __name__  # this package's, not to be replaced again
    return with_its_defaults
