"""Official checkpoints: a state_dict, bare or inside a training dictionary, with or without `module.` prefixes."""

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping

import torch
from torch import Tensor, nn

WRAPPERS = ("model_pos", "model", "state_dict")
# What torch.load raises for files that are no checkpoints, or damaged ones.
BROKEN = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, AttributeError, TypeError, ValueError)
BROKEN += (ArithmeticError, AssertionError, struct.error, zipfile.BadZipFile)
# What numpy's scalars (the best error so far), arrays and random generators are pickled by, whatever its release.
_NUMPY = ("dtype", "ndarray", "random._mt19937.MT19937")
_NUMPY += tuple(f"{core}.multiarray.{maker}" for core in ("core", "_core") for maker in ("scalar", "_reconstruct"))
_NUMPY += tuple(f"random._pickle.__{maker}_ctor" for maker in ("bit_generator", "randomstate"))


class _Beside:
    """Stands for what a training dictionary holds of numpy's beside the weights: nothing of it is made."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load the weights in the file `path` into model, strictly, and return model.

    The file is read with `weights_only=True`: a state_dict, or a dictionary that holds one as "model_pos", "model" or
    "state_dict", beside plain data and numpy's (the state of a generator, as in MixSTE's files), which is not looked
    at. A `module.` prefix (DataParallel) is dropped.
    Raises ValueError that names every missing and unexpected key and every wrong shape or kind of tensor (the model is
    then unchanged), or says why the file cannot be read, or that the model is on "meta"; OSError where there is no
    file, or a folder; TypeError for a path or model of another kind.

    >>> import tempfile, torch
    >>> from h2ot_kernels import hosts
    >>> model = torch.nn.Linear(2, 3)
    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save({"model": {"module.weight": torch.ones(3, 2), "module.bias": torch.zeros(3)}}, file.name)
    ...     hosts.load_checkpoint(model, file.name).weight[0]
    tensor([1., 1.], grad_fn=<SelectBackward0>)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted an nn.Module")
    if not isinstance(path, (str, os.PathLike)):
        known = "; model.load_state_dict takes it as it is" if isinstance(path, Mapping) else ""
        raise TypeError(f"path: got {type(path).__name__}, wanted the name of a file{known}")
    wanted = model.state_dict()
    if without := [name for name, tensor in wanted.items() if tensor.is_meta]:
        raise ValueError(f"model: got {without[0]} on meta, wanted weights with memory (model.to_empty)")
    state = _read(path)
    problems = [f"missing: {name}" for name in wanted if name not in state]
    problems += [f"unexpected: {name}" for name in state if name not in wanted]
    for name, tensor in wanted.items():
        if name in state and (problem := _unlike(name, state[name], tensor)):
            problems.append(problem)
    if problems:
        raise ValueError("\n  ".join([f"{path} does not fit {type(model).__name__}:", *problems]))
    model.load_state_dict(state)
    return model


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([(_Beside, f"numpy.{name}") for name in _NUMPY]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        # Of torch's words the reason: its advice is to load the file without looking at what is in it.
        lines = str(error).splitlines() or [""]
        reason = next((line for line in lines if "WeightsUnpickler error" in line), lines[0]).partition(" Please ")[0]
        raise ValueError(
            f"{path} is not a checkpoint of plain tensors: {type(error).__name__}: {reason.strip()}"
        ) from error
    found = _state_in(found)
    if found is None:
        raise ValueError(f"{path} holds no state_dict, bare or under {', '.join(map(repr, WRAPPERS))}")
    state = {name.removeprefix("module."): value for name, value in found.items()}
    if len(state) != len(found):
        twice = ", ".join(name for name in state if name in found and f"module.{name}" in found)
        raise ValueError(f"{path} holds {twice} twice, with and without `module.`")
    return state


def _state_in(found, around: tuple[dict, ...] = ()) -> dict[str, Tensor] | None:
    """The state_dict that `found` is, or the first one that it holds under the names of wrappers."""
    if not isinstance(found, dict) or any(found is outer for outer in around):
        return None
    if found and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        return found
    inner = (_state_in(found.get(name), (*around, found)) for name in WRAPPERS)
    return next((state for state in inner if state is not None), None)


def _unlike(name: str, value: Tensor, wanted: Tensor) -> str | None:
    """Why value cannot be copied into wanted."""
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        return f"tensor: {name} is {'without data' if value.is_meta else kind}, wanted plain dense numbers"
    if value.shape != wanted.shape:
        return f"shape: {name} is {list(value.shape)}, wanted {list(wanted.shape)}"
    if value.is_complex() and not wanted.is_complex():
        return f"dtype: {name} is {value.dtype}, wanted {wanted.dtype}"
    return None
