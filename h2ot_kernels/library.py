"""How a stem declares its operators: schema, fake, gradient and FLOPs together, for the C++ and for the Triton op."""

import functools
from collections.abc import Callable

import torch
from torch.utils import _pytree
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "h2ot_kernels"
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CPU, _CUDA = (torch._C.DispatchKeySet(key) for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA))
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
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
    op = _counted(name, flops)
    if backward is None:
        return op
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return _direct(op, _kernel(op), backward, setup_context, is_custom=False)


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
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return _direct(_counted(name, flops), function, backward, setup_context, is_custom=True)


def into_out(returning: dict) -> dict:
    """From what declares an operator: what declares the one that writes its result into a last argument `out`.

    It has no gradient.
    """
    schema = returning["schema"].replace(") -> Tensor", ", Tensor(a!) out) -> ()")
    return {"schema": schema, "fake": lambda *arguments: None, "flops": returning.get("flops")}


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


def _recording(run: Callable, backward: Callable, setup_context: Callable) -> Callable:
    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = run(*args)
            if setup_context is not None:
                setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx, *grads)

    return super(torch.autograd.Function, Recorded).apply  # what is left out looks for functorch's transforms: 2 us


def _kernel(op: Callable) -> Callable:
    """op's kernel for where its first argument is, without what a call of op looks for on the way to it: half the time
    of a small one.
    """
    redispatch = op._handle.redispatch_boxed

    def run(*args):
        first = args[0]
        keys = _CPU if first.is_cpu else _CUDA if first.is_cuda else None
        return op(*args) if keys is None else redispatch(keys, *args)

    return run


def _direct(
    op: Callable, function: Callable, backward: Callable | None, setup_context: Callable | None, *, is_custom: bool
) -> Callable:
    """op by `function`, its kernel, without the operator where nobody can see the difference.

    The way there takes longer than a small kernel. The operator itself is for compiled code, tracing, functorch's
    transforms and what they left, modes, the profiler, tensor subclasses, gradients of what has none, tensors on
    several devices, and those whose memory holds their negative (`x.conj().imag`) or that are zeros without any: the
    dispatcher hands over their values.
    is_custom: a kernel in Python, whose operator is as slow in inference mode; there the way to others is short.
    """
    recorded = backward and _recording(function, backward, setup_context)

    def call(*args):
        if torch.compiler.is_compiling() or (torch.is_inference_mode_enabled() and not is_custom) or _is_watched():
            return op(*args)
        needs_grad = _needs_grad(args)
        if needs_grad and torch.is_grad_enabled():
            return recorded(*args) if recorded else op(*args)
        return op(*args) if needs_grad is None else function(*args)

    return call


def _needs_grad(args: tuple) -> bool | None:
    """Whether a tensor among args requires a gradient; None where a kernel cannot read them all as they stand."""
    needs_grad, on_cpu = False, None
    for x in args:
        kind = type(x)
        if kind in _PLAIN:
            if on_cpu is None:
                on_cpu = x.is_cpu
            if x.is_cpu is not on_cpu or x.is_neg() or x._is_zerotensor() or _is_wrapped(x):
                return None
            needs_grad = needs_grad or x.requires_grad
        elif kind not in _SCALARS and isinstance(x, torch.Tensor):
            return None
    return needs_grad


def _is_watched() -> bool:
    """Whether a mode, a transform, a trace or the profiler would see an operator that is called now."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch.autograd.profiler._is_profiler_enabled
    )


def exportable(result: type[tuple]) -> type[tuple]:
    """Decorator of a named tuple of tensors: what holds it can be saved and loaded, exported programs and files of
    `torch.save`, which `torch.load` reads with weights_only, too.
    """
    _pytree._register_namedtuple(result, serialized_type_name=f"{NAMESPACE}.{result.__name__}")
    torch.serialization.add_safe_globals([result])
    return result


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
