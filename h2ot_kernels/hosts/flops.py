"""FLOPs of a host at batch 1, in the two conventions that papers use."""

import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import checks
from ..backend import use_backend
from ..modes import in_eval_mode
from ..nn import TokenRecoveringAttention
from .motionagformer import Graph

CONVENTIONS = ("linear", "total")


def count_flops(model: nn.Module, convention: str = "linear", *, executed: bool = False) -> int:
    """FLOPs (2 a multiply-add) of one forward pass in eval mode at batch 1. Runs on shapes: no arithmetic, no data.

    model: a host: it has `in_shape`, the shape of its input without the batch, and perhaps a `hourglass`.
    convention: "linear": Linear and Conv1d modules only, as HoT's table; "total": every matrix product that
    `torch.utils.flop_counter` knows, and attention. Neither counts the choice of tokens or interpolation.
    executed: False counts the published formulation, in which TRA projects the recovery token once a sample and joint,
    and MotionAGFormer's graphs scale by dense products; True what is run here.
    Raises TypeError or ValueError that name the argument.

    >>> from h2ot_kernels import hosts
    >>> round(hosts.count_flops(hosts.build("h2ot_mixste")) / 1e9, 2)
    121.23
    """
    checks.choice("convention", convention, CONVENTIONS)
    if not hasattr(model, "in_shape"):
        raise TypeError(f"model: got {type(model).__name__}, wanted a host, which has an in_shape")
    return flops_by_convention(model, executed=executed)[convention]


def flops_by_convention(model: nn.Module, *, executed: bool = False) -> dict[str, int]:
    """`count_flops` in every convention, from one pass."""
    counted = {"linear": 0, "repeated query": 0, "dense scaling": 0}

    def count_layer(layer: nn.Linear | nn.Conv1d, inputs, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs = [output] if isinstance(output, Tensor) else output
        counted["linear"] += 2 * sum(y.numel() for y in outputs) * math.prod(layer.weight.shape[1:])

    def count_query(layer: TokenRecoveringAttention, inputs, output: Tensor) -> None:
        token, x = inputs
        repeats = x.numel() // (x.shape[1] * x.shape[-1]) - 1
        counted["repeated query"] += repeats * 2 * token.numel() * layer.linear_q.out_features

    def count_scaling(layer: Graph, inputs, output) -> None:
        counted["dense scaling"] += layer.unexecuted_flops(*inputs)

    handles = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            handles.append(module.register_forward_hook(count_layer))
        elif isinstance(module, TokenRecoveringAttention):
            handles.append(module.register_forward_hook(count_query))
        elif isinstance(module, Graph):
            handles.append(module.register_forward_hook(count_scaling))
    try:
        with in_eval_mode(model):
            total = _run_on_shapes(model)
    finally:
        for handle in handles:
            handle.remove()
    flops = {"linear": counted["linear"], "total": total}
    if not executed:
        flops["linear"] += counted["repeated query"]
        flops["total"] += counted["repeated query"] + counted["dense scaling"]
    return flops


def _run_on_shapes(model: nn.Module) -> int:
    """Every matrix product of one pass, by PyTorch's counter. Gradients on: fused tails have no modules to count."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    like = next(iter(tensors.values()))
    counter = FlopCounterMode(display=False)
    # "cpp": its operators say their shapes without data. MATH: attention as the products that the counter knows.
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        counter,
        sdpa_kernel(SDPBackend.MATH),
        use_backend("cpp"),
        torch.enable_grad(),
    ):
        shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        x = torch.empty(1, *model.in_shape, dtype=like.dtype)
        given = [x]
        if hasattr(model, "hourglass"):
            given.append(tuple(torch.arange(tokens)[None] for tokens in model.hourglass.stages.values()))
        torch.func.functional_call(model, shapes, tuple(given))
    return counter.get_total_flops()
