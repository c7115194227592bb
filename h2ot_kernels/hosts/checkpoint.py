"""Official checkpoints: a state_dict, bare or inside a training dictionary, with or without `module.` prefixes."""

import os
import pickle

import numpy as np
import torch
from torch import Tensor, nn

WRAPPERS = ("model_pos", "model", "state_dict")
# Training dictionaries hold numpy scalars (the best error so far): they are read, nothing else of numpy is.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS = [_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
_NUMPY_SCALARS += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)]


def load_checkpoint(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load the weights in the file `path` into model, strictly, and return model.

    The file is read with `weights_only=True`: a state_dict, or a dictionary that holds one as "model_pos", "model" or
    "state_dict". A `module.` prefix (DataParallel) is dropped.
    Raises ValueError that names every missing and unexpected key and every wrong shape (the model is then unchanged),
    or says why the file cannot be read; FileNotFoundError.

    >>> import tempfile, torch
    >>> from h2ot_kernels import hosts
    >>> model = torch.nn.Linear(2, 3)
    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save({"model": {"module.weight": torch.ones(3, 2), "module.bias": torch.zeros(3)}}, file.name)
    ...     hosts.load_checkpoint(model, file.name).weight[0]
    tensor([1., 1.], grad_fn=<SelectBackward0>)
    """
    state, wanted = _read(path), model.state_dict()
    problems = [f"missing: {name}" for name in wanted if name not in state]
    problems += [f"unexpected: {name}" for name in state if name not in wanted]
    problems += [
        f"shape: {name} is {list(state[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError("\n  ".join([f"{path} does not fit {type(model).__name__}:", *problems]))
    model.load_state_dict(state)
    return model


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint of plain tensors: {error}") from error
    while isinstance(state, dict) and (inner := [name for name in WRAPPERS if isinstance(state.get(name), dict)]):
        state = state[inner[0]]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict, bare or under {', '.join(map(repr, WRAPPERS))}")
    return {name.removeprefix("module."): value for name, value in state.items()}
