"""How a replacement is tried beside what it would replace, and why something is left as it is."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class NotRecognised(Exception):
    """Why something is left as it is."""


class NotTried(NotRecognised):
    """The same, of what raised with the inputs that it was given."""


@contextmanager
def trial() -> Iterator[None]:
    """On the CPU, without gradients, autocast and inference mode (whose tensors do not say when they change), without
    warnings (of inputs that nobody gave), and the random state as before at the end.
    """
    plain = torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False)
    quiet = warnings.catch_warnings(action="ignore")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), quiet, plain[0], plain[1], plain[2]:
        yield


def tried(call: Callable):
    """What the call returns; whatever code that is not ours raises is a reason to leave it as it is."""
    try:
        return call()
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise NotTried(f"it could not be tried: {type(error).__name__}: {first_line:.100}") from error


def agree(expected, got) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor) or expected.shape != got.shape or expected.dtype != got.dtype:
            return False
        if not expected.is_floating_point():
            return torch.equal(expected, got)
        return torch.allclose(expected, got, 1e-9, equal_nan=True)
    if isinstance(expected, dict):
        return isinstance(got, dict) and expected.keys() == got.keys() and all(agree(expected[n], got[n]) for n in got)
    if isinstance(expected, (tuple, list)):
        return len(expected) == len(got) and all(map(agree, expected, got))
    return type(expected) is type(got) and expected == got
