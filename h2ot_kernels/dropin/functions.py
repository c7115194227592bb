"""Functions and methods of public code that can be replaced: found by name, then tried beside the original, in float64
on a small input.

In which order a function returns what it computes is read off its own result: code that descends from TCFormer returns
the selected tokens, the labels and their number in any order.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

from . import hot, tcformer
from .clusters import select_and_assign, tokens_in
from .trial import NotRecognised, agree, trial, tried

Arguments = Callable[[torch.Generator], tuple]


class Form(NamedTuple):
    """compute: the replacement, or, where names are to be arranged, what gives the values by their names. Its required
    parameters are a function's first ones, its optional ones those of their own names.
    arguments: make arguments that tell whether it may replace; masked: the same for functions with a token_mask.
    tried: whether what was tried stands for this token dictionary; calls with another stay the function's.
    """

    compute: Callable
    arguments: tuple[Arguments, ...]
    is_arranged: bool = True
    masked: Arguments | None = None
    tried: Callable[[dict], bool] | None = None


def function_for(function: FunctionType, owner: type | None = None) -> Callable:
    """What replaces a function of FUNCTIONS, or a method of its owner: the form that gives the same on a small input,
    from as many random numbers; raises NotRecognised.
    """
    own = function if owner is None else functools.partial(function, _blank(owner))
    takes_mask = "token_mask" in inspect.signature(own).parameters
    reasons = []
    for form in FUNCTIONS[function.__name__][1]:
        arguments = (*form.arguments, form.masked) if takes_mask and form.masked else form.arguments
        try:
            shared = _shared(function, form.compute, owner)
            with trial():
                compute = _arranged(form, own) if form.is_arranged else form.compute
                as_it_is = not (form.is_arranged or owner or form.tried) and _takes_the_same(function, compute)
                replacement = (
                    compute if as_it_is else _with_the_parameters_of(function, compute, shared, owner, form.tried)
                )
                called = replacement if owner is None else functools.partial(replacement, _blank(owner))
                if all(agree(_result(own, given), _result(called, given)) for given in arguments):
                    return replacement
        except NotRecognised as reason:
            reasons.append(str(reason))
        else:
            reasons.append("it returns something else than the official form")
    raise NotRecognised("; ".join(dict.fromkeys(reasons)))


def _blank(owner: type) -> object:
    """An instance that was never initialised: a method runs on it that needs no more than other methods."""
    return tried(lambda: object.__new__(owner))


def _result(function: Callable, arguments: Arguments) -> tuple:
    """(what it returns, the random state behind it)."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
    given = arguments(torch.Generator().manual_seed(0))
    return tried(lambda: function(*given)), torch.get_rng_state()


def _arranged(form: Form, function: Callable) -> Callable:
    """form's values in the order in which the function returns them."""
    expected, _ = _result(function, form.arguments[0])
    names = _names(expected, _result(form.compute, form.arguments[0])[0])

    @functools.wraps(form.compute)
    def arranged(*args, **kwargs):
        return _filled(names, form.compute(*args, **kwargs))

    return arranged


def _names(expected, values: dict[str, object]):
    """expected, its parts replaced by the names of the values that they are."""
    if type(expected) in (tuple, list):
        return type(expected)(_names(part, values) for part in expected)
    for name, value in values.items():
        if agree(expected, value):
            return name
    raise NotRecognised(f"it returns something else than {', '.join(values)}")


def _filled(names, values: dict[str, object]):
    return values[names] if isinstance(names, str) else type(names)(_filled(part, values) for part in names)


def _shared(function: FunctionType, form: Callable, owner: type | None) -> dict[str, str]:
    """The names of function's parameters that form takes, and form's own."""
    theirs, ours = _parameters(function, owner), _parameters(form)
    shared = {}
    for own, p in zip(ours, theirs, strict=False):
        if p.kind is not p.POSITIONAL_OR_KEYWORD or (own.default is not own.empty and p.name != own.name):
            break
        shared[p.name] = own.name
    required = sum(p.default is p.empty for p in ours)
    if len(shared) < required or any(p.default is p.empty for p in theirs[len(shared) :]):
        names = ", ".join(p.name for p in ours)
        raise NotRecognised(f"its arguments are {inspect.signature(function)}, not ({names})")
    return shared


def _parameters(function: Callable, owner: type | None = None) -> list[inspect.Parameter]:
    """All but a method's own instance and optional ones that can be given by name only."""
    found = list(inspect.signature(function).parameters.values())
    return [p for p in found[owner is not None :] if p.kind is not p.KEYWORD_ONLY or p.default is p.empty]


def _takes_the_same(function: FunctionType, form: Callable) -> bool:
    theirs, ours = ([(p.name, p.default) for p in _parameters(f)] for f in (function, form))
    return theirs == ours


def _with_the_parameters_of(
    function: FunctionType,
    form: Callable,
    shared: dict[str, str],
    owner: type | None,
    is_tried: Callable[[dict], bool] | None,
) -> Callable:
    """form with function's parameters and defaults; calls that use further, optional arguments of function stay
    function's, as do those with a token dictionary that was not tried, and those of instances and subclasses of the
    owner that exchange what the function calls.
    """
    theirs = _parameters(function, owner)
    defaults = {p.name: p.default for p in theirs if p.name in shared and p.default is not p.empty}
    wanted, its_own = shared.keys() - defaults.keys(), _exchangeable(function, owner) if owner else ()
    instance, first = 0 if owner is None else 1, next(iter(shared))

    @functools.wraps(function)
    def with_its_parameters(*args, **kwargs):
        given = args[instance:]
        taken = dict(zip(shared, given, strict=False)) | kwargs
        is_usual = len(taken) == len(given) + len(kwargs)  # by `in`: torch 2.10 compiles no comparison of sets
        is_usual = is_usual and all(name in taken for name in wanted) and all(name in shared for name in taken)
        if not is_usual or any(_is_exchanged(args[0], owner, name) for name in its_own):
            return function(*args, **kwargs)
        if is_tried is not None and not is_tried(taken[first]):
            return function(*args, **kwargs)
        return form(**{shared[name]: value for name, value in (defaults | taken).items()})

    with_its_parameters.__module__ = __name__  # this package's, not to be replaced again
    return with_its_parameters


def _exchangeable(function: FunctionType, owner: type) -> list[str]:
    """What the method may call of its class, torch's own aside."""
    classes = [cls for cls in owner.__mro__ if cls.__module__.split(".")[0] not in ("torch", "builtins")]
    return [name for name in _names_in(function.__code__) if any(name in vars(cls) for cls in classes)]


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


def _is_exchanged(instance: object, owner: type, name: str) -> bool:
    cls = type(instance)
    if name in getattr(instance, "__dict__", ()):
        return True
    return cls is not owner and getattr(cls, name) is not getattr(owner, name)


def _clusters(
    x: Tensor, cluster_num: int, k: int, token_mask: Tensor | None = None, *, noise_dtype: torch.dtype | None
) -> dict[str, object]:
    """Masked tokens have the labels of official code, for consumers that are not this package's."""
    index_down, idx_cluster = select_and_assign(x, cluster_num, k, token_mask, noise_dtype=noise_dtype, masked_label=0)
    return {"index_down": index_down, "idx_cluster": idx_cluster, "cluster_num": cluster_num}


def _clusters_of_dict(
    token_dict: dict, cluster_num: int, k: int, token_mask: Tensor | None = None, *, noise_dtype: torch.dtype | None
) -> dict[str, object]:
    return _clusters(tokens_in(token_dict), cluster_num, k, token_mask, noise_dtype=noise_dtype)


def _clusters_without(
    x: Tensor, cluster_num: int, k: int, center: int, token_mask: Tensor | None = None
) -> dict[str, object]:
    index_down, idx_cluster = select_and_assign(x, cluster_num, k, token_mask, without=(center,), masked_label=0)
    return {"index_down": index_down, "idx_cluster": idx_cluster, "cluster_num": cluster_num}


def _merged_dict(
    token_dict: dict, idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None
) -> dict[str, object]:
    """As in official code the labels alone say where a token goes: there masked ones have one."""
    if "mask" in token_dict:
        token_dict = {**token_dict, "mask": None}
    return tcformer.merge_tokens(token_dict, idx_cluster, cluster_num, token_weight)


def _of_these(*names: str, masked: bool = True) -> Callable[[dict], bool]:
    """Whether a token dictionary has of what a merge may read or hand on only these, and a mask only if masked."""

    def tried(token_dict: dict) -> bool:
        others = [name for name in (*tcformer.KEPT, "mask") if name in token_dict and name not in names]
        return not others and (masked or token_dict.get("mask") is None)

    return tried


def _merged(x: Tensor, idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None) -> dict[str, object]:
    out = tcformer.merge_tokens({"x": x}, idx_cluster, cluster_num, token_weight)
    return {"x": out["x"], "idx_cluster": idx_cluster, "cluster_num": cluster_num}


def _merged_with_origins(
    x: Tensor,
    idx_token: Tensor,
    agg_weight: Tensor,
    idx_cluster: Tensor,
    cluster_num: int,
    token_weight: Tensor | None = None,
) -> dict[str, object]:
    token_dict = {"x": x, "idx_token": idx_token, "agg_weight": agg_weight}
    return tcformer.merge_tokens(token_dict, idx_cluster, cluster_num, token_weight)


def _tokens(generator: torch.Generator) -> Tensor:
    """Small: below 25 tokens `torch.cdist` is exact in official code."""
    return torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)


def _more_tokens(generator: torch.Generator) -> Tensor:
    """With two that are zeros, as padding is, and channels whose root is no whole number."""
    x = torch.randn(2, 24, 7, generator=generator, dtype=torch.float64)
    x[0, -2:] = 0
    return x


def _token_dict(generator: torch.Generator, tokens: Callable = _tokens) -> dict:
    x = tokens(generator)
    B, N, _ = x.shape
    return {"x": x, "token_num": N, "idx_token": torch.arange(N).repeat(B, 1), "agg_weight": x.new_ones(B, N, 1)}


def _assignment(generator: torch.Generator) -> tuple:
    weight = torch.rand(2, 12, 1, generator=generator, dtype=torch.float64)
    return torch.arange(12).remainder(5).repeat(2, 1), 5, weight


def _mask(generator: torch.Generator) -> Tensor:
    return torch.rand(2, 12, generator=generator, dtype=torch.float64).argsort() < torch.tensor([[12], [8]])


def _of(tokens: Callable, more_tokens: Callable, *rest: int) -> tuple[Arguments, ...]:
    """Arguments of clustering; of more tokens, clusters and neighbours."""
    return lambda g: (tokens(g), *rest), lambda g: (more_tokens(g), 9, 11, *rest[2:])


def _masked(tokens: Callable, *rest: int) -> Arguments:
    return lambda g: (tokens(g), *rest, _mask(g))


def _dicts_to_merge(*beside: dict) -> tuple[Arguments, ...]:
    """With the scores, too, that TCFormer's blocks leave there, and no merge hands on."""
    return tuple(
        lambda g, more=more: (_token_dict(g) | {"token_score": torch.ones(2, 12, 1)} | more, *_assignment(g))
        for more in beside
    )


def _points(generator: torch.Generator) -> tuple:
    return _tokens(generator), torch.tensor([[3, 1, 1, 7], [0, 11, 5, 2]])


def _origins(generator: torch.Generator) -> tuple:
    """Tokens that were merged before: 15 of the first layer in 12."""
    x, first = _tokens(generator), torch.arange(15).remainder(12).repeat(2, 1)
    return x, first, torch.rand(2, 15, 1, generator=generator, dtype=torch.float64), *_assignment(generator)


_MASK = torch.tensor([[1.0] * 12, [1.0] * 7 + [0.0] * 5])

# name in public code -> the switch, and the forms, of which the first that gives the same is taken
FUNCTIONS: dict[str, tuple[str, tuple[Form, ...]]] = {
    "cluster_dpc_knn": (
        "cluster",
        tuple(
            Form(
                functools.partial(compute, noise_dtype=noise_dtype),
                _of(tokens, more, 5, 3),
                masked=_masked(tokens, 5, 3),
            )
            for compute, tokens, more in (
                (_clusters, _tokens, _more_tokens),
                (_clusters_of_dict, _token_dict, functools.partial(_token_dict, tokens=_more_tokens)),
            )
            for noise_dtype in (None, torch.float32)
        ),
    ),
    "cluster_dpc_knn_center": (
        "cluster",
        (Form(_clusters_without, _of(_tokens, _more_tokens, 5, 2, 6), masked=_masked(_tokens, 5, 2, 6)),),
    ),
    "merge_tokens": (
        "merge",
        (
            *(
                Form(_merged_dict, _dicts_to_merge(*beside), is_arranged=False, tried=tried)
                for beside, tried in (
                    (({"map_size": [3, 4], "init_grid_size": [3, 4]},), _of_these("map_size", "init_grid_size")),
                    (({"mask": None}, {"mask": _MASK}), _of_these("mask")),
                    (({"mask": None},), _of_these("mask", masked=False)),
                )
            ),
            Form(_merged, (lambda g: (_tokens(g), *_assignment(g)),)),
            Form(_merged_with_origins, (_origins,)),
        ),
    ),
    "index_points": ("gather", (Form(hot.index_points, (_points,), is_arranged=False),)),
}
