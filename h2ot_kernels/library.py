"""How a stem declares its operators: schema, fake and gradient together, for the C++ and for the Triton op."""

from collections.abc import Callable

import torch

NAMESPACE = "h2ot_kernels"


def declare(
    name: str, schema: str, fake: Callable, backward: Callable | None = None, setup_context: Callable | None = None
):
    """Define h2ot_kernels::<name>; its kernels are registered from C++. Returns the callable overload."""
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.register_fake(qualified)(fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return getattr(torch.ops.h2ot_kernels, name).default


def declare_custom(
    name: str,
    schema: str,
    function: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
):
    """The same for an operator whose kernel is `function`, written in Python (Triton)."""
    qualified = f"{NAMESPACE}::{name}"
    op = torch.library.custom_op(qualified, function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return getattr(torch.ops.h2ot_kernels, name).default


def no_second_order(op: str) -> Callable:
    """A gradient that raises: for backward operators whose own derivative is not written."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{op} has no second derivative; backend='reference' has one")

    return backward
