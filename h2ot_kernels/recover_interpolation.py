"""Recovery by interpolation in time (TRI)."""

import torch
from torch import Tensor

import python_ref

from . import checks
from .backend import copying, dispatch, implement, is_reference, write
from .library import declare, into_out


def recover_interpolate(
    x: Tensor,
    index: Tensor | None,
    num_frames: int,
    *,
    mode: str = "linear",
    align: str = "index",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """All num_frames = F frames from the K kept ones: linear in time between the kept frames around each.

    x: [B, K, ...], float32, float64, bfloat16 or float16 (3D poses, or features). index: int64 [B, K] or [1, K],
    strictly ascending in 0 .. F - 1. Frames before the first kept one or after the last hold its value.
    A kept frame comes back bit for bit, even beside NaN or infinity; only the frames between are spoilt by those.
    mode: "linear", or "nearest" (the earlier on a tie). align: "index", or "uniform", which ignores the index (None
    will do) and reads position t (K - 1) / (F - 1).
    out: contiguous, of the result's shape and dtype, apart from the inputs: takes the result and is returned, without
    gradients (undefined after an error that the index causes).
    Returns [B, F, ...] of x's dtype, weights and sums in float32 (float64 for float64). Gradients to x of any order,
    deterministic. Raises TypeError or ValueError that name the argument, IndexError for an index outside 0 .. F - 1
    or not ascending (a GPU cannot raise: frames beside a wrong entry are NaN there).
    Cost: reads x and writes the result once. Source: H2OT section 3: out[t] = (1 - w) x[i] + w x[i + 1], with
    w = (t - index[i]) / (index[i + 1] - index[i]) between the kept frames i and i + 1 around t;
    `python_ref.recover_interpolation`.

    >>> import torch, h2ot_kernels as h2ot
    >>> h2ot.recover_interpolate(torch.tensor([[0.0, 3.0]]), torch.tensor([[0, 3]]), 4)
    tensor([[0., 1., 2., 3.]])
    """
    checks.tensor("x", x, range(2, 9), "[B, K, ...]")
    B, K = x.shape[:2]
    checks.choice("mode", mode, ("linear", "nearest"))
    checks.choice("align", align, ("index", "uniform"))
    checks.integer("num_frames", num_frames, 1)
    if K == 0:
        raise ValueError(f"x: got shape {checks.shape(x)}, wanted at least one kept frame")
    if align == "uniform":
        index = None
    else:
        checks.integer("num_frames", num_frames, K)
        checks.tensor("index", index, (2,), "[B, K] or [1, K]", (torch.int64,))
        checks.same_device("index", index, "x", x)
        if index.shape[0] not in (1, B) or index.shape[1] != K:
            raise ValueError(f"index: got shape {checks.shape(index)}, wanted [1, {K}] or [{B}, {K}]")
    if not is_reference(backend):
        checks.no_tangent("recover_interpolate", x, out)
    arguments = x, index, num_frames, mode == "nearest"
    if out is None:
        return dispatch("recover_interpolate", x, backend)(*arguments)
    checks.out(out, (B, num_frames, *x.shape[2:]), x=x, index=index)
    return write("recover_interpolate", x, backend, arguments, out)


def _fake(x, index, frames, nearest):
    return x.new_empty(x.shape[0], frames, *x.shape[2:])


def _setup(ctx, inputs, output):
    x, index, _, ctx.nearest = inputs
    ctx.frames = x.shape[1]
    ctx.save_for_backward(index)


def transposed(op):
    """The gradient of a linear operator over frames whose transpose is `op`: forward and backward are each other's."""

    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return op(grad, index, ctx.frames, ctx.nearest), None, None, None

    return backward


FORWARD = {
    "schema": "(Tensor x, Tensor? index, SymInt num_frames, bool nearest) -> Tensor",
    "fake": _fake,
    "setup_context": _setup,
}
BACKWARD = {
    "schema": "(Tensor grad, Tensor? index, SymInt num_kept, bool nearest) -> Tensor",
    "fake": _fake,
    "setup_context": _setup,
}


def _reference(x, index, num_frames, nearest):
    if index is not None and checks.has_values(index):
        if (index < 0).any() or (index >= num_frames).any():
            raise IndexError("recover_interpolate: index holds a value outside its range")
        if (index.diff(dim=1) <= 0).any():
            raise IndexError("recover_interpolate: index is not strictly ascending in every row")
    mode, align = "nearest" if nearest else "linear", "uniform" if index is None else "index"
    return python_ref.recover_interpolate(x, index, num_frames, mode=mode, align=align)


_ops = torch.ops.h2ot_kernels
implement(
    "recover_interpolate",
    "cpp",
    declare(
        "recover_interpolate", **FORWARD, backward=transposed(lambda *args: _ops.recover_interpolate_backward(*args))
    ),
)
declare("recover_interpolate_backward", **BACKWARD, backward=transposed(lambda *args: _ops.recover_interpolate(*args)))
implement("recover_interpolate", "reference", _reference)
implement("recover_interpolate_out", "cpp", declare("recover_interpolate_out", **into_out(FORWARD)))
implement("recover_interpolate_out", "reference", copying(_reference))
