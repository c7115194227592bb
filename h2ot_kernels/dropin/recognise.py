"""What can be replaced: by structure first, then by trying it, in float64 on small random weights and inputs.

The trial runs on a bare twin of the module (no hooks, random weights, on the CPU): it says whether the fast forward
computes what this module's own forward computes, whatever else stands in that forward.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..linear import Linear
from . import fast, hot, prunevid, tcformer

SMALLEST = 16  # features of a linear layer below which packing gains nothing
PASSIVE = (nn.Identity, nn.Dropout, nn.Softmax)


class NotRecognised(Exception):
    """Why something is left as it is."""


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
    return _that_agrees(module, (fast.FastMlp,), [(2, 5, module.fc1.in_features)])


def head_class(module: nn.Module) -> type:
    if type(module) is not nn.Sequential:
        raise NotRecognised("a subclass of nn.Sequential, whose forward may do more")
    layers = fast.norm_and_linear(module)
    if layers is None:
        wanted = f"wanted LayerNorm(C) and Linear(C, up to {fast.LARGEST_HEAD})"
        raise NotRecognised(f"{wanted}, got {' and '.join(map(repr, module._modules.values()))}")
    return _that_agrees(module, (fast.FastHead,), [(2, 3, 5, layers[1].in_features)])


def attention_class(module: nn.Module) -> type:
    _wants_linears(module, "qkv", "proj")
    _wants_heads(module)
    _wants_passive(module, "qkv", "proj")
    C = module.proj.in_features
    if "seqlen" in inspect.signature(type(module).forward).parameters:
        candidates = (fast.FastAttentionInPlace, fast.FastAttentionAcross)
        return _that_agrees(module, candidates, [(6, 5, C)], seqlen=3)
    return _that_agrees(module, (fast.FastAttention,), [(6, 5, C)])


def cross_attention_class(module: nn.Module) -> type:
    names = fast.projections(module)
    _wants_linears(module, *names, "proj")
    _wants_heads(module)
    _wants_passive(module, *names, "proj")
    sizes = [(2, n, getattr(module, name).in_features) for n, name in zip((5, 3, 3), names, strict=True)]
    return _that_agrees(module, (fast.FastCrossAttention,), sizes)


def kind_of(module: nn.Module) -> tuple[str, Callable] | None:
    """(the kernel's switch, what finds the fast class) for a module of a known structure."""
    if isinstance(module, fast.Fast):
        return None
    if isinstance(module, nn.Linear):
        return None if isinstance(module, Linear) else ("linear", linear_class)
    has = module._modules.keys().__contains__
    if has("qkv") and has("proj"):
        return "attention", attention_class
    if fast.projections(module) and has("proj"):
        return "cross_attention", cross_attention_class
    if has("fc1") and has("act") and has("fc2"):
        return "mlp", mlp_class
    if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], nn.LayerNorm):
        return ("head", head_class) if isinstance(module[1], nn.Linear) else None
    return None


def _wants_linears(module: nn.Module, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(module, name), nn.Linear):
            raise NotRecognised(f"its {name} is {type(getattr(module, name)).__name__}, not Linear")


def _wants_heads(module: nn.Module) -> None:
    heads, scale = getattr(module, "num_heads", None), getattr(module, "scale", None)
    if not isinstance(heads, int) or not isinstance(scale, float):
        raise NotRecognised(f"num_heads and scale: got {heads!r} and {scale!r}, wanted an int and a float")


def _wants_passive(module: nn.Module, *names: str) -> None:
    for name, child in module._modules.items():
        if name not in names and child is not None and not isinstance(child, PASSIVE):
            raise NotRecognised(f"it holds {name}, a {type(child).__name__}, which the fast form does not know")


def _bare(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module without hooks, in eval mode, its parameters and buffers random float64 numbers on the CPU."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name in (*fast.HOOKS, "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
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


def _that_agrees(module: nn.Module, mixins: tuple[type, ...], sizes: list[tuple], **extra) -> type:
    """The first fast class whose forward gives what the module's own forward gives; raises NotRecognised."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.no_grad():
        twin = _bare(module, generator)
        inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        before = dict(twin.__dict__)
        expected = _tried(lambda: twin(*inputs, **extra))
        stored = [name for name, value in twin.__dict__.items() if before.get(name) is not value]
        if stored:
            raise NotRecognised(f"its forward stores {', '.join(stored)}")
        for mixin in mixins:
            cls = fast.fast_class(mixin, type(module))
            twin.__class__ = cls
            if _agree(expected, _tried(lambda: twin(*inputs, **extra))):
                return cls
    raise NotRecognised("its forward computes something else than its structure says")


def _tried(call: Callable):
    """What the call returns; whatever code that is not ours raises is a reason to leave it as it is."""
    try:
        return call()
    except Exception as error:
        raise NotRecognised(f"it could not be tried: {type(error).__name__}: {error}") from error


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


def _points(generator: torch.Generator) -> tuple:
    return _tokens(generator), torch.tensor([[3, 1, 1, 7], [0, 11, 5, 2]])


# name in public code -> the switch, and its forms: what replaces it, and arguments that tell whether it may.
FUNCTIONS = {
    "cluster_dpc_knn": (
        "cluster",
        (
            (hot.cluster_dpc_knn, lambda g: (_tokens(g), 5, 2)),
            (prunevid.cluster_dpc_knn, lambda g: (_tokens(g), 5, 3)),
            (tcformer.cluster_dpc_knn, lambda g: (_token_dict(g), 5, 3)),
        ),
    ),
    "cluster_dpc_knn_center": ("cluster", ((hot.cluster_dpc_knn_center, lambda g: (_tokens(g), 5, 2, 6)),)),
    "merge_tokens": (
        "merge",
        (
            (tcformer.merge_tokens, lambda g: _merge_arguments(g, map_size=[3, 4], init_grid_size=[3, 4])),
            (tcformer.merge_tokens, lambda g: _merge_arguments(g, mask=None)),
        ),
    ),
    "index_points": ("gather", ((hot.index_points, _points),)),
}


def function_for(function: Callable) -> Callable:
    """What replaces a function of FUNCTIONS: the form that gives the same on a small input; raises NotRecognised."""
    reasons = []
    for form, arguments in FUNCTIONS[function.__name__][1]:
        results = []
        try:
            replacement = _with_the_parameters_of(function, form)
        except NotRecognised as reason:
            reasons.append(str(reason))
            continue
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            for candidate in (function, replacement):
                torch.manual_seed(0)
                given = arguments(torch.Generator().manual_seed(0))
                try:
                    results.append(_tried(lambda: candidate(*given)))
                except NotRecognised as reason:
                    reasons.append(str(reason))
                    break
        if len(results) == 2 and _agree(*results):
            return replacement
        if len(results) == 2:
            reasons.append("it returns something else than the official form")
    raise NotRecognised("; ".join(dict.fromkeys(reasons)))


def _with_the_parameters_of(function: Callable, form: Callable) -> Callable:
    """form, or, where function takes further optional arguments, form for the calls that do not use them."""
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (function, form))
    further = theirs[len(ours) :]
    if [p.name for p in theirs[: len(ours)]] != [p.name for p in ours] or any(p.default is p.empty for p in further):
        raise NotRecognised(f"its arguments are {inspect.signature(function)}, not {inspect.signature(form)}")
    if not further:
        return form

    @functools.wraps(function)
    def with_further_arguments(*args, **kwargs):
        usual = len(args) <= len(ours) and not any(p.name in kwargs for p in further)
        return (form if usual else function)(*args, **kwargs)

    return with_further_arguments
