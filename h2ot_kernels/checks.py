"""Argument checks of the public functions. Every message names the argument, what came and what was wanted."""

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from . import constants

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_TOKENS = 2**31 - 1  # of a sample: kernels number them in 32 bits (of CUDA C++ those that score in 30)


def shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def size_of(x: Tensor, axis: int) -> int:
    """x.shape[axis] as a number under torch.jit.trace, too, where shapes are made of tensors."""
    size = x.shape[axis]
    return operator.index(size) if isinstance(size, Tensor) else size


def tensor(name: str, x: Tensor, dims: Sequence[int], wanted: str, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """x is a dense tensor of one of these ranks and dtypes; `wanted` describes its shape in the message."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor {wanted}")
    if x.layout is not torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name}: got a tensor of layout {layout}, wanted a dense one {wanted}")
    if x.dim() not in dims:
        raise ValueError(f"{name}: got shape {shape(x)}, wanted {wanted}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {str(x.dtype).removeprefix('torch.')}, wanted {names}")


def is_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor")


def has_values(*tensors: Tensor | None) -> bool:
    """Whether what tensors hold can be looked at: not while a graph is compiled, nor where only shapes are known, nor
    of all samples of `torch.func.vmap` at once.
    """
    if torch.compiler.is_compiling():
        return False
    return not any(x is not None and (x.is_meta or is_fake(x) or is_mapped(x)) for x in tensors)


def is_mapped(x: Tensor) -> bool:
    """x is a sample of `torch.func.vmap`, beneath other transforms, too."""
    transforms = torch._C._functorch
    while transforms.is_functorch_wrapped_tensor(x):
        if transforms.is_batchedtensor(x):
            return True
        x = transforms.get_unwrapped(x)
    return False


def has_shape(name: str, x: Tensor, size: Sequence[int], wanted: str) -> None:
    if tuple(x.shape) != tuple(size):
        raise ValueError(f"{name}: got shape {shape(x)}, wanted {wanted} = [{', '.join(map(str, size))}]")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: got device {x.device}, wanted {other.device}, that of {other_name}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, wanted {other.dtype}, that of {other_name}")


def integer(name: str, value: int, low: int, high: int | None = None, high_name: str = "") -> None:
    """value is an integer in low .. high (high_name says what high is)."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt))):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an integer")
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" to {high}" + (f" ({high_name})" if high_name else "")
        raise ValueError(f"{name}: got {value}, wanted {low}{upper or ' or more'}")


def positive(name: str, value: float) -> float:
    """value as a float; it is a number above 0 whose square is finite and above 0, too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a positive number")
    value = float(value)
    if not 1e-150 <= value <= 1e150:
        raise ValueError(f"{name}: got {value}, wanted a positive number (1e-150 to 1e150)")
    return value


def scale(value: float | None, D: int) -> float:
    """What attention's logits are multiplied with: value, a finite number, or D ** -0.5."""
    if value is None:
        return D**-0.5
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"scale: got {type(value).__name__}, wanted a number")
    if not math.isfinite(value):
        raise ValueError(f"scale: got {value}, wanted a finite number")
    return float(value)


def token_counts(num_tokens, B: int, N: int) -> int | list[int]:
    """num_tokens as it came, an int in 1 .. N, or as one int in 0 .. N per sample (from a list or a tensor [B])."""
    if isinstance(num_tokens, Tensor):
        tensor("num_tokens", num_tokens, (1,), "[B]", (torch.int64, torch.int32))
        num_tokens = num_tokens.tolist()
    elif type(num_tokens) is not int and hasattr(num_tokens, "tolist"):  # an array of numpy
        num_tokens = num_tokens.tolist()
    if not isinstance(num_tokens, Sequence) or isinstance(num_tokens, str):
        integer("num_tokens", num_tokens, 1, N, "the number of tokens")
        return num_tokens
    if len(num_tokens) != B:
        raise ValueError(f"num_tokens: got {len(num_tokens)} numbers, wanted one per sample, {B}")
    for value in num_tokens:
        integer("num_tokens", value, 0, N, "the number of tokens")
    return list(num_tokens)


def choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, allowed))}")


def token_limit(name: str, x: Tensor) -> None:
    """x [B, N, ...] has no more tokens a sample than kernels can number.

    Of what is exported, where N stays free, the operator itself asks (`csrc/require.h`).
    """
    if not torch.compiler.is_exporting() and x.shape[1] > MOST_TOKENS:
        raise ValueError(f"{name}: got {x.shape[1]} tokens a sample, wanted at most {MOST_TOKENS}")


def tokens(x: Tensor) -> None:
    """x is [B, N, C] or [B, F, J, C] with at least one token, joint and channel, and not too many tokens."""
    tensor("x", x, (3, 4), "[B, N, C] or [B, F, J, C]")
    if 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {shape(x)}, wanted at least one token, joint and channel")
    token_limit("x", x)


def index(name: str, value: Tensor, x: Tensor) -> None:
    """value is an int64 index [B, K] or [1, K] on x's device whose rows divide x's batch; K at least 1."""
    tensor(name, value, (2,), "[B, K] or [1, K]", (torch.int64,))
    same_device(name, value, "x", x)
    rows, B = value.shape[0], x.shape[0]
    if value.shape[1] == 0 or (rows != B and (rows == 0 or B % rows)):
        raise ValueError(f"{name}: got shape {shape(value)}, wanted rows that divide {B}, x's samples, and a column")


def signal(name: str, value: Tensor, frames: int, axis: int = 1) -> None:
    """A pruner's signal of that many frames on axis 1 or -2, which may also be missing: then the pruner says it."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[axis] != frames:
        raise ValueError(f"{name}: got shape {shape(value)}, wanted {frames} frames on axis {axis}")


def validity(x: Tensor, mask: Tensor | None, lengths: Tensor | Sequence[int] | None) -> Tensor | None:
    """The mask [B, N] that mask and lengths make together, or None."""
    B, N = x.shape[:2]
    if mask is not None:
        tensor("mask", mask, (2,), "[B, N]", (torch.bool,))
        has_shape("mask", mask, (B, N), "[B, N]")
        same_device("mask", mask, "x", x)
    if lengths is None:
        return mask
    if not isinstance(lengths, Tensor) and hasattr(lengths, "tolist"):  # an array of numpy
        lengths = lengths.tolist()
    if isinstance(lengths, Sequence) and not isinstance(lengths, str):
        for value in lengths:
            if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
                raise TypeError(f"lengths: got a list with {type(value).__name__}, wanted integers")
            if not 0 <= value <= N:
                raise ValueError(f"lengths: got {value}, wanted 0 to {N}, the number of tokens")
        lengths = constants.integers(lengths, x.device)
    tensor("lengths", lengths, (1,), "[B]", (torch.int64, torch.int32))
    has_shape("lengths", lengths, (B,), "[B]")
    same_device("lengths", lengths, "x", x)
    inside = torch.arange(N, device=x.device) < lengths[:, None]
    return inside if mask is None else inside & mask


def kept(keep, B: int, N: int, K: int, device: torch.device) -> Tensor | None:
    """`keep` (None, an int, a list, [M] or [B, M]) as an int64 tensor [1, M] or [B, M], which is not written to.

    Values given as Python integers are checked here; those in a tensor by the kernel, which knows them.
    """
    if keep is None:
        return None
    if isinstance(keep, Tensor):
        tensor("keep", keep, (0, 1, 2), "[M] or [B, M]", (torch.int64,))
        keep = keep.reshape(1, -1) if keep.dim() < 2 else keep
        if keep.shape[0] not in (1, B):
            raise ValueError(f"keep: got shape {shape(keep)}, wanted [M] or [B, M] with B = {B}")
        if keep.device != device:
            raise ValueError(f"keep: got device {keep.device}, wanted {device}")
        return keep if keep.shape[1] else None
    values = kept_values(keep, N, K)
    return constants.shared(values, device) if values else None


def kept_values(keep, N: int, K: int) -> tuple[int, ...]:
    """`keep` (None, an int or a sequence of them) as integers in 0 .. N - 1, at most K different ones."""
    if keep is None:
        return ()
    keep = keep.tolist() if hasattr(keep, "tolist") else keep  # a tensor, an array of numpy
    values = tuple(keep) if isinstance(keep, Sequence) and not isinstance(keep, str) else (keep,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"keep: got {type(value).__name__}, wanted integers or an int64 tensor")
        if not 0 <= value < N:
            raise IndexError(f"keep: got {value}, wanted 0 to {N - 1}")
    if len(values) > K and len(set(values)) > K:  # a set fixes what is free in a graph
        raise ValueError(f"keep: got {len(set(values))} tokens to keep, wanted at most num_tokens = {K}")
    return values


def _memory(x: Tensor) -> tuple[int, int]:
    """The addresses from the first to behind the last byte of x; both 0 where there is none."""
    start, size = x.data_ptr(), x.nbytes
    if start == 0 or size == 0:
        return 0, 0
    if x.is_contiguous():
        return start, start + size
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size()


def out(given: Tensor, size: Sequence[int], **inputs: Tensor | None) -> None:
    """given can take a result [size] like the first of the inputs: dense, apart from them all, with nothing to record.

    Whether it lies apart is checked in eager mode: a compiled graph sees every write, and keeps its meaning.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"out: got {type(given).__name__}, wanted a tensor")
    name, like = next(iter(inputs.items()))
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "out: got a call within torch.func, wanted one without out=: its transforms make the results"
        )
    has_shape("out", given, size, "the shape of the result")
    same_dtype("out", given, name, like)
    same_device("out", given, name, like)
    if not given.is_contiguous():
        raise ValueError(f"out: got strides {list(given.stride())}, wanted a contiguous tensor")
    if torch.is_grad_enabled():
        for x in (given, *inputs.values()):
            if x is not None and x.requires_grad:
                raise RuntimeError(
                    "out: out= does not record gradients, but an input or out requires one: use torch.no_grad()"
                )
    if torch.compiler.is_compiling() or (type(given) is not Tensor and is_fake(given)):
        return
    start, end = _memory(given)
    for name, x in inputs.items():
        first, last = (0, 0) if x is None else _memory(x)
        if start < last and first < end:
            raise ValueError(f"out: got memory within that of {name}, wanted its own")


def no_tangent(op: str, *inputs: Tensor | None) -> None:
    """Forward-mode AD would silently give zero tangents: raise instead."""
    if forward_ad._current_level < 0:
        return
    for x in inputs:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            reference = "backend='reference' has one where one is defined"
            raise NotImplementedError(f"{op} has no forward-mode derivative; {reference}")
