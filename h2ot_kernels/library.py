"""How a stem declares its operators: schema, fake, gradient and FLOPs together, for the C++ and for the Triton op."""

import functools
from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "h2ot_kernels"
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_SCALARS = (int, bool, float, type(None))  # asking whether they are tensors is dear


def declare(
    name: str,
    schema: str,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    flops: Callable | None = None,
):
    """Define h2ot_kernels::<name>; its kernels are registered from C++. Returns the callable overload.

    flops: what FlopCounterMode counts, a multiply-add as 2: matrix products, attention and distances. It takes the
    operator's arguments, shapes for tensors. Operators without one count 0, as PyTorch's own elementwise ones do.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified)(fake)
    if backward is None:
        return _counted(name, flops)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return _recorded(_counted(name, flops), backward, setup_context)


def declare_custom(
    name: str,
    schema: str,
    function: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    flops: Callable | None = None,
):
    """The same for an operator whose kernel is `function`, written in Python (Triton)."""
    qualified = f"{NAMESPACE}::{name}"
    written = ("out",) if "(a!) out" in schema else ()
    op = torch.library.custom_op(qualified, function, mutates_args=written, schema=schema)
    op.register_fake(fake)
    if backward is None:
        return _counted(name, flops)
    op.register_autograd(backward, setup_context=setup_context)
    return _recorded(_counted(name, flops), backward, setup_context)


def into_out(schema: str, fake: Callable, flops: Callable | None = None, **gradient) -> dict:
    """What declares the form of an operator that writes its result into a last argument `out`: without gradient."""
    schema = schema.replace(") -> Tensor", ", Tensor(a!) out) -> ()")
    return {"schema": schema, "fake": lambda *arguments: None, "flops": flops}


def allocating(make: Callable, write: Callable) -> Callable:
    """The kernel of an operator that returns its result, made by its fake, from the one of its `into_out` form."""

    def run(*arguments) -> torch.Tensor:
        out = make(*arguments)
        write(*arguments, out)
        return out

    return run


def _counted(name: str, flops: Callable | None):
    packet = getattr(torch.ops.h2ot_kernels, name)
    if flops is not None:
        register_flop_formula(packet)(lambda *shapes, out_shape, **rest: flops(*shapes))
    return packet.default


def _recorded(op: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """op with its registered gradient, recorded before the dispatcher is asked: half of an eager call's overhead.

    Compiled code, functorch's transforms and tensor subclasses see the operator itself.
    """

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx, *grads)

    def call(*args):
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return op(*args)
        needs_grad = False
        for x in args:
            kind = type(x)
            if kind in _PLAIN:
                needs_grad = needs_grad or x.requires_grad
            elif kind not in _SCALARS and isinstance(x, torch.Tensor):
                return op(*args)
        if torch._C._are_functorch_transforms_active():
            return op(*args)
        if needs_grad and torch.is_grad_enabled():
            return Recorded.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def ranged(name: str) -> Callable:
    """Decorator: each eager call is a range `name` of torch.profiler. Registered operators name themselves."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling() or not torch.autograd.profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            with torch.profiler.record_function(name):
                return function(*args, **kwargs)

        return call

    return decorate


def no_second_order(op: str) -> Callable:
    """A gradient that raises: for backward operators whose own derivative is not written."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{op} has no second derivative; backend='reference' has one")

    return backward
