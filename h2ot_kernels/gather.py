"""Taking the kept frames out of a tensor, in the layout that the next block wants."""

import torch
from torch import Tensor

import python_ref

from . import checks
from .backend import copying, dispatch, implement, is_reference, write
from .library import declare, into_out


def gather_tokens(
    x: Tensor,
    index: Tensor,
    pos_embed: Tensor | None = None,
    *,
    dim: int = 1,
    out_dim: int | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The frames of x that index names: out[b, ..., i, ...] = x[b, ..., index[b, i], ...] (+ pos_embed[0, i]).

    x: [B, ..., F, ...], float32, float64, bfloat16 or float16, any strides; axis 0 is the batch.
    index: int64, [B, K] or [1, K], strictly ascending; or [B / R, K], each row serving R consecutive rows of x
        (the layout [(B J), F, C] with an index per sample). Entries of -1 at the end of a row are padding
        (`select_tokens` with a num_tokens per sample): zeros, without gradient. Not together with pos_embed.
    pos_embed: [1, K, C] or [K, C], added along the frame axis and the last axis (HoT's embedding after pruning); one of
        another dtype is rounded to x's first.
    dim: the frame axis of x (2 of keys and values [B, H, F, D]). out_dim: where it stands in the result (default: dim).
    out: contiguous, of the result's shape and dtype, apart from the inputs: takes the result and is returned, without
        gradients (undefined after an error that the index causes).
    Returns a contiguous tensor of x's dtype. Gradients to x and pos_embed, first and second order, deterministic.

    Raises TypeError or ValueError for a wrong type, shape, dtype or device, IndexError for an index outside 0 .. F - 1
    that is no padding (on a GPU the row is NaN), IndexError in the backward pass for an index that is not ascending
    (on a GPU the gradient is then undefined). Cost: reads and writes B K ... elements once.
    Source: HoT section 3 (token pruning); `python_ref.gather`.

    >>> import torch, h2ot_kernels as h2ot
    >>> h2ot.gather_tokens(torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[0, 2]]))
    tensor([[[0., 1.],
             [4., 5.]]])
    """
    checks.tensor("x", x, range(2, 9), "[B, ..., F, ...] with 2 to 8 axes")
    dim = _axis("dim", dim, x)
    out_dim = dim if out_dim is None else _axis("out_dim", out_dim, x)
    checks.index("index", index, x)
    if pos_embed is not None:
        pos_embed = _embedding(pos_embed, x, index.shape[1], dim, out_dim)
    if not is_reference(backend):
        checks.no_tangent("gather_tokens", x, pos_embed, out)
    arguments = x, index, pos_embed, dim, out_dim
    if out is None:
        return dispatch("gather_tokens", x, backend)(*arguments)
    checks.out(out, _moved_size(x, dim, out_dim, index.shape[1]), x=x, index=index, pos_embed=pos_embed)
    return write("gather_tokens", x, backend, arguments, out)


def _axis(name: str, value: int, x: Tensor) -> int:
    checks.integer(name, value, -x.dim(), x.dim() - 1)
    value = value % x.dim()
    if value == 0:
        raise ValueError(f"{name}: got 0, the batch axis, wanted 1 to {x.dim() - 1}")
    return value


def _embedding(pos_embed: Tensor, x: Tensor, K: int, dim: int, out_dim: int) -> Tensor:
    checks.tensor("pos_embed", pos_embed, (2, 3), "[1, K, C]")
    checks.same_device("pos_embed", pos_embed, "x", x)
    if out_dim == x.dim() - 1:
        raise ValueError(f"pos_embed: needs channels on the last axis, but out_dim = {out_dim} puts the frames there")
    channels = x.shape[-1] if dim < x.dim() - 1 else x.shape[-2]  # the last axis of the result
    wanted = (1, K, channels)[3 - pos_embed.dim() :]
    checks.has_shape("pos_embed", pos_embed, wanted, "[1, K, C] or [K, C]")
    return pos_embed.reshape(wanted[-2:]).to(x.dtype)


def _moved_size(x: Tensor, from_dim: int, to_dim: int, frames: int) -> list[int]:
    """The shape of x, its frame axis (from_dim) moved to to_dim and `frames` long."""
    size = list(x.shape)
    del size[from_dim]
    size.insert(to_dim, frames)
    return size


def _gather_fake(x, index, pos_embed, dim, out_dim):
    return x.new_empty(_moved_size(x, dim, out_dim, index.shape[1]))


def _gather_setup(ctx, inputs, output):
    x, index, pos_embed, ctx.dim, ctx.out_dim = inputs
    ctx.num_frames = x.shape[ctx.dim]
    ctx.save_for_backward(index)


def gather_backward(scatter):
    """The gradient of a gather operator whose reverse is the operator `scatter`."""

    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        grad_x = grad_embed = None
        if ctx.needs_input_grad[0]:
            grad_x = scatter(grad, index, ctx.num_frames, ctx.dim, ctx.out_dim)
        if ctx.needs_input_grad[2]:
            others = [axis for axis in range(grad.dim() - 1) if axis != ctx.out_dim]
            grad_embed = grad.sum(others)
        return grad_x, None, grad_embed, None, None

    return backward


def _scatter_fake(grad, index, num_frames, dim, out_dim):
    return grad.new_empty(_moved_size(grad, out_dim, dim, num_frames))


def _scatter_setup(ctx, inputs, output):
    _, index, _, ctx.dim, ctx.out_dim = inputs
    ctx.save_for_backward(index)


def scatter_backward(gather):
    """The gradient of a scatter operator: the gather operator again."""

    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return gather(grad, index, None, ctx.dim, ctx.out_dim), None, None, None, None

    return backward


GATHER = {
    "schema": "(Tensor x, Tensor index, Tensor? pos_embed, int dim, int out_dim) -> Tensor",
    "fake": _gather_fake,
    "setup_context": _gather_setup,
}
SCATTER = {
    "schema": "(Tensor grad, Tensor index, SymInt num_frames, int dim, int out_dim) -> Tensor",
    "fake": _scatter_fake,
    "setup_context": _scatter_setup,
}


def _reference(x, index, pos_embed, dim, out_dim):
    least = -1 if pos_embed is None else 0
    if index.numel() and checks.has_values(index) and (index.min() < least or index.max() >= x.shape[dim]):
        raise IndexError("gather_tokens: index holds a value outside its range")
    return python_ref.gather_tokens(x, index, pos_embed, dim=dim, out_dim=out_dim)


_ops = torch.ops.h2ot_kernels
_gather = declare("gather_tokens", **GATHER, backward=gather_backward(lambda *args: _ops.scatter_tokens(*args)))
_gather_out = declare("gather_tokens_out", **into_out(GATHER))
declare("scatter_tokens", **SCATTER, backward=scatter_backward(lambda *args: _ops.gather_tokens(*args)))
for _backend in ("cpp", "cuda"):
    implement("gather_tokens", _backend, _gather)
    implement("gather_tokens_out", _backend, _gather_out)
implement("gather_tokens", "reference", _reference)
implement("gather_tokens_out", "reference", copying(_reference))
