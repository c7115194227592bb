"""Two streams of tokens, weighted token by token, in one pass over memory, in CPU inference.

Internal to MotionBERT and MotionAGFormer.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .add_norm import is_plain, records
from .backend import is_reference, why_no_cpp
from .checks import FLOATS, no_tangent
from .library import declare


def mix_streams(first: Tensor, second: Tensor, layer: nn.Linear) -> Tensor:
    """w first + (1 - w) second where `takes` says so, w the first of softmax(layer(both, side by side)).

    first, second: [..., C] of one dtype; layer: Linear(2 C, 2). In float32 (float64 for float64) throughout. Cost: each
    stream is read from memory once.
    """
    if records(first, second, layer.weight, layer.bias):
        raise RuntimeError("mix_streams is for inference: call it under torch.no_grad() or torch.inference_mode()")
    no_tangent("mix_streams", first, second, layer.weight)
    return _op(first, second, layer.weight, layer.bias)


def takes(first: Tensor, second: Tensor, layer: nn.Linear) -> bool:
    """Whether mix_streams(first, second, layer) gives what PyTorch's operators give, unseen.

    Hooks and a forward on the instance of layer are the caller's business (`linear.is_silent`).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    tensors = [t for t in (first, second, layer.weight, layer.bias) if t is not None]
    plain = all(is_plain(t) and t.dtype == first.dtype for t in tensors) and not records(*tensors)
    fits = first.shape == second.shape and layer.weight.shape == (2, 2 * first.shape[-1])
    return plain and fits and first.dtype in FLOATS and not is_reference(None) and why_no_cpp() is None


def _fake(first, second, weight, bias):
    return first.new_empty(first.shape)


def _setup(ctx, inputs, output):
    """Nothing is kept: there is no gradient."""


def _no_gradient(ctx, *grads):
    raise NotImplementedError("mix_streams has no gradient: it is for inference")


def _flops(first, second, weight, bias):
    return 2 * 2 * 2 * torch.Size(first).numel()


_op = declare(
    "mix_streams",
    "(Tensor first, Tensor second, Tensor weight, Tensor? bias) -> Tensor",
    _fake,
    backward=_no_gradient,
    setup_context=_setup,
    flops=_flops,
)
