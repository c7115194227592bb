"""How a stem declares its operators: schema, fake, gradient and FLOPs together, for the C++ and for the Triton op."""

import functools
from collections.abc import Callable

import torch
from torch.utils import _pytree
from torch.utils.flop_counter import register_flop_formula

from . import checks

NAMESPACE = "h2ot_kernels"
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_keys_of, _is_wrapped = torch._C._dispatch_keys, torch._C._functorch.is_functorch_wrapped_tensor
_SCALARS = frozenset((int, bool, float, type(None)))  # asking whether they are tensors is dear


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
    backward = _without_tangent(name, backward)
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
    if backward is not None:
        backward = _without_tangent(name, backward)
        op.register_autograd(backward, setup_context=setup_context)
    return _direct(_counted(name, flops), function, backward, setup_context)


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


def _without_tangent(name: str, backward: Callable) -> Callable:
    """backward, which has no forward-mode derivative: it would silently give zero tangents."""

    @functools.wraps(backward)
    def checked(ctx, *grads):
        checks.no_tangent(f"the gradient of {name}", *grads)
        return backward(ctx, *grads)

    return checked


def _recording(op: Callable, run: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """run with its gradient recorded, in a node of op's name.

    `torch.autograd.Function.apply` without what it does in Python, 2 us: it looks for functorch's transforms and takes
    off what they left on tensors, which `_needs_grad` has done.
    """

    def forward(ctx, *args):
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    name = op.name().removeprefix(f"{NAMESPACE}::")
    return super(torch.autograd.Function, type(name, (torch.autograd.Function,), methods)).apply


def _recorded(op: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """op with its registered gradient, recorded before the dispatcher is asked: half of an eager call's overhead.

    Compiled code, functorch's transforms and tensor subclasses see the operator itself.
    """

    def below_autograd(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    recorded = _recording(op, below_autograd, backward, setup_context)

    def call(*args):
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return op(*args)
        needs_grad = _needs_grad(args)
        if needs_grad is None or torch._C._are_functorch_transforms_active():
            return op(*args)
        if needs_grad and torch.is_grad_enabled():
            return recorded(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _direct(op: Callable, function: Callable, backward: Callable | None, setup_context: Callable | None) -> Callable:
    """The kernel of a custom operator, called without the operator where nobody can see the difference.

    The way through torch.library.custom_op takes longer than the kernel. The operator itself is for compiled code,
    tracing, functorch's transforms, modes, the profiler, tensor subclasses, gradients of what has none, and tensors
    that are not plain to the dispatcher: batched, functional, zeros without memory, those whose memory holds their
    negative (`x.conj().imag`).
    """
    recorded = backward and _recording(op, function, backward, setup_context)

    def call(*args):
        if torch.compiler.is_compiling() or _is_watched():
            return op(*args)
        needs_grad = _needs_grad(args, reads_memory=True)
        if needs_grad and torch.is_grad_enabled():
            return recorded(*args) if recorded else op(*args)
        return op(*args) if needs_grad is None else function(*args)

    return call


def _needs_grad(args: tuple, reads_memory: bool = False) -> bool | None:
    """Whether a tensor among args requires a gradient; None where one wants the operator: it is of a subclass, or a
    transform that is over has left something on it.

    reads_memory: what would run instead of the operator does, so None where one is not plain, whatever makes it so.
    """
    needs_grad = False
    for x in args:
        kind = type(x)
        if kind in _SCALARS:
            continue
        if kind in _PLAIN:
            if _is_wrapped(x) or (reads_memory and _keys_of(x).raw_repr() not in _plain_keys(x.device.type)):
                return None
            needs_grad = needs_grad or x.requires_grad
        elif isinstance(x, torch.Tensor):
            return None
    return needs_grad


@functools.cache
def _plain_keys(device: str) -> frozenset[int]:
    """The dispatcher's keys of a tensor there that has memory and nothing else to it."""
    made = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            made.append(_keys_of(torch.empty(0, device=device)).raw_repr())
    return frozenset(made)


def _is_watched() -> bool:
    """Whether a mode, a transform, a trace or the profiler would see an operator that is called now."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
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
