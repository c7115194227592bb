"""ONNX: models that use these operations as graphs of standard operators, for onnxruntime and other runtimes.

`export` writes a file whose batch axis is dynamic. `decompositions` is the table behind it: every forward operator in
plain PyTorch that ONNX knows, with the decisions of `python_ref` (distances in float64, ties by the lowest index).
Unlike the kernels it stores N x N matrices, and does not refuse an index out of range.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import python_ref
from python_ref.recover_interpolation import blend
from python_ref.score import GAUSSIAN_STEPS, rank_tokens

from .backend import use_backend
from .modes import in_eval_mode

CHUNK = 32  # channels whose differences are held at once: [B, N, N, CHUNK] float64


def export(model: torch.nn.Module, inputs: tuple[Tensor, ...], path: str | os.PathLike) -> None:
    """Write model as it runs in eval mode to `path`, weights included; the first axis of every input is the batch.

    model: a host, or any module that torch.export can trace, on the CPU. inputs: an example with a batch of 2 or more,
    [B, ...] each; the file takes any batch, 1 too. Inputs are named "input_0", ..., results "output_0", ...
    Raises TypeError for other inputs, ValueError for a smaller batch or another one than the first input's, and what
    torch.export and torch.onnx raise. Needs onnx and onnxscript. Other free axes (tokens, frames): what `export` does,
    with `dynamic_shapes` of your own: torch.export.export, run_decompositions(decompositions()), torch.onnx.export.
    Cost: as the model; scoring, without its kernel, 3 N^2 C float64 operations and N^2 values a sample, some 100 times
    the kernel: a sampler prunes for free. Source: `python_ref`.

    >>> import os, tempfile, torch, h2ot_kernels.onnx
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.onnx")
    ...     h2ot_kernels.onnx.export(model, (torch.zeros(2, 2),), path)
    ...     os.path.getsize(path) > 0
    True
    """
    if not isinstance(inputs, tuple):
        raise TypeError(f"inputs: got {type(inputs).__name__}, wanted a tuple of tensors")
    for position, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs: got {type(x).__name__} as number {position}, wanted a tensor")
        if x.dim() == 0 or x.shape[0] < 2:
            raise ValueError(f"inputs: got shape {list(x.shape)} as number {position}, wanted a batch of 2 or more")
        if x.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"inputs: got a batch of {x.shape[0]} as number {position}, wanted {inputs[0].shape[0]}")
    batch = torch.export.Dim("batch")
    with in_eval_mode(model), torch.no_grad(), use_backend("cpp"):
        dynamic = tuple({0: batch} for _ in inputs)
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    program = program.run_decompositions(decompositions())
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=tuple({0: "batch"} for _ in inputs),
        input_names=[f"input_{position}" for position in range(len(inputs))],
        output_names=[f"output_{position}" for position in range(len(program.graph_signature.user_outputs))],
    )


def decompositions() -> dict[Callable, Callable]:
    """Operator -> the same in PyTorch operators that have ONNX counterparts, for `ExportedProgram.run_decompositions`.

    Forward operators only, and none that writes into a caller's buffer (`out=`). Shapes, dtypes and results are those
    of `python_ref`; integers and bools exactly, floats to the last bits of their order of sums. Raises nothing; nor do
    the decompositions, for what only the data can tell.

    >>> import torch, h2ot_kernels.onnx
    >>> table = h2ot_kernels.onnx.decompositions()
    >>> table[torch.ops.h2ot_kernels.select_tokens.default](torch.tensor([[0.1, 0.9, 0.5]]), 2, None, None)
    tensor([[1, 2]])
    """
    ops = torch.ops.h2ot_kernels
    return {
        ops.score_tokens.default: _score_tokens,
        ops.score_variant.default: _score_tokens,
        ops.select_tokens.default: _select_tokens,
        ops.prune_cluster.default: _prune_cluster,
        ops.prune_motion.default: _prune_motion,
        ops.prune_attention.default: _prune_attention,
        ops.attention_scores.default: python_ref.attention_scores,
        ops.gather_tokens.default: _gather_tokens,
        ops.cluster_tokens.default: _cluster_tokens,
        ops.assign_clusters.default: _assign_clusters,
        ops.assign_by_parent.default: _assign_by_parent,
        ops.merge_tokens.default: _merge_tokens,
        ops.recover_attention.default: _recover_attention,
        ops.recover_tail.default: python_ref.recover_tail,
        ops.recover_interpolate.default: _recover_interpolate,
    }


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [B, N, M] by direct difference: 0 for equal tokens, and the same for (i, j) as for (j, i)."""
    chunks = zip(x.split(CHUNK, -1), y.split(CHUNK, -1), strict=True)
    return sum((a[:, :, None] - b[:, None]).square().sum(-1) for a, b in chunks)


def _tokens(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pooled tokens in float64, 0 where they are not valid, and which are valid."""
    tokens = python_ref.pool_joints(x).double()
    valid = python_ref.score.valid_tokens(tokens, mask)
    return tokens.masked_fill(~valid[..., None], 0.0), valid


def _scores(tokens, valid, k, noise, scale=0.0, exclude_self=False, cutoff=0.0) -> tuple[Tensor, ...]:
    N, C = tokens.shape[1:]
    area = scale * scale or C
    position = torch.arange(N, device=tokens.device)
    pair = valid[:, :, None] & valid[:, None, :]
    near = pair & (position[None, :] != position[:, None]) if exclude_self else pair
    squared = _squared(tokens, tokens)
    if cutoff:
        terms = torch.exp(-squared / (area * cutoff * cutoff)).mul(GAUSSIAN_STEPS).round().masked_fill(~near, 0.0)
        density = terms.to(torch.int64).sum(-1).double() / GAUSSIAN_STEPS
        key, log_density = -density, density.log()
    else:
        nearest = squared.masked_fill(~near, float("inf")).topk(k, largest=False).values
        count = (valid.sum(-1, keepdim=True) - int(exclude_self)).clamp(0, k)
        total = sum(torch.where(rank < count, nearest[..., rank], 0.0) for rank in range(k))
        key = total / (count.clamp(min=1) * area)
        density, log_density = torch.exp(-key), -key
    return tuple(rank_tokens(squared, key, density, log_density, valid, noise, area))


def _score_tokens(x, k, mask, noise, *options):
    return _scores(*_tokens(x, mask), k, noise, *options)


def _select_tokens(score, num_tokens, keep, mask):
    """Rank by counting how many tokens come before each: (kept, valid), score, index decide in this order."""
    N = score.shape[1]
    position = torch.arange(N, device=score.device)
    valid = ~score.isnan() if mask is None else mask & ~score.isnan()
    score = score.double().masked_fill(~valid, float("-inf"))
    group = valid.to(torch.int64)
    if keep is not None:
        group = group + 2 * (keep[:, :, None] == position).any(1).to(torch.int64)
    better = score[:, None, :] > score[:, :, None]
    before = (score[:, None, :] == score[:, :, None]) & (position[None, :] < position[:, None])
    same = group[:, None, :] == group[:, :, None]
    rank = ((group[:, None, :] > group[:, :, None]) | (same & (better | before))).sum(-1)
    return N - torch.where(rank < num_tokens, N - position, 0).topk(num_tokens).values


def _prune_cluster(x, num_tokens, k, keep, mask, noise):
    return _select_and_score(x, num_tokens, k, keep, mask, noise)[0]


def _select_and_score(x, num_tokens, k, keep, mask, noise):
    tokens, valid = _tokens(x, mask)
    score = _scores(tokens, valid, k, noise)[2]
    return _select_tokens(score, num_tokens, keep, valid), score


def _prune_motion(pose, num_tokens, keep):
    step = (pose[:, 1:].double() - pose[:, :-1].double()).abs().flatten(2)
    return _select_tokens(functional.pad(step.sum(-1), (1, 0)), num_tokens, keep, None)


def _prune_attention(query, key, num_tokens, keep, scale):
    return _select_tokens(python_ref.attention_scores(query, key, scale), num_tokens, keep, None)


def _gather_tokens(x, index, pos_embed, dim, out_dim):
    """One gather of whole rows: along the axis where the index is shared, else over samples and frames as one axis."""
    frames = x.movedim(dim, 1)
    B, F = frames.shape[:2]
    if index.shape[0] == 1:
        kept = frames.index_select(1, index[0].clamp(min=0))
    else:
        index = index[:, None].expand(-1, B // index.shape[0], -1).reshape(B, -1)
        at = index.clamp(min=0)
        rows = (at + F * torch.arange(B, device=x.device)[:, None]).flatten()
        kept = frames.flatten(0, 1).index_select(0, rows).unflatten(0, (B, index.shape[1]))
    kept = kept.masked_fill((index < 0).reshape(*index.shape, *[1] * (x.dim() - 2)), 0.0)
    if pos_embed is not None:
        embed = pos_embed.reshape(pos_embed.shape[-2], *[1] * (x.dim() - 3), pos_embed.shape[-1])
        kept = (kept.to(torch.promote_types(x.dtype, torch.float32)) + embed).to(x.dtype)
    return kept.movedim(1, out_dim).contiguous()


def _cluster_tokens(x, num_tokens, k, keep, mask, noise):
    index, score = _select_and_score(x, num_tokens, k, keep, mask, noise)
    return index, _assign_clusters(x, index, mask), score


def _assign_clusters(x, index, mask):
    tokens, valid = _tokens(x, mask)
    index = index.expand(tokens.shape[0], -1)
    position, at = torch.arange(index.shape[1], device=x.device), index.clamp(min=0)
    centres = _gather_tokens(tokens, at, None, 1, 1)
    is_centre = valid.gather(1, at) & (index >= 0)
    squared = _squared(tokens, centres).masked_fill(~is_centre[:, None, :], float("inf"))
    least = squared.amin(-1, keepdim=True)
    labels = torch.where(squared == least, position, index.shape[1]).amin(-1)
    own = python_ref.cluster.own_labels(index, tokens.shape[1])
    labels = torch.where(own >= 0, own, labels)
    return labels.masked_fill(~valid | least[..., 0].isinf(), -1)


def _assign_by_parent(x, index, parent, mask):
    return python_ref.assign_clusters(x, index, mask=mask, parent=parent)


def _merge_tokens(x, labels, num_clusters, weight):
    merged = python_ref.merge_tokens(x, labels, num_clusters, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    member = (labels[:, None, :] == torch.arange(num_clusters, device=x.device)[:, None]).to(wide)
    return merged, member.sum(-1) if weight is None else python_ref.cluster.sums(member, weight[..., None])[..., 0]


def _recover_attention(query, key, value, num_heads, scale):
    return python_ref.recover_attention(query, key, value, num_heads, scale=scale)


def _recover_interpolate(x, index, num_frames, nearest):
    """`python_ref` with the search written as a count: ONNX has no searchsorted."""
    K, F = x.shape[1], num_frames
    wide = torch.promote_types(x.dtype, torch.float32)
    frame = torch.arange(F, device=x.device)
    if index is None:
        step = max(F - 1, 1)
        before, past = (frame * (K - 1) // step)[None], (frame * (K - 1) % step)[None]
        span = torch.full_like(past, step)
    else:
        before = ((index[:, None, :] <= frame[:, None]).sum(-1) - 1).clamp(min=0)
        start, end = index.gather(1, before), index.gather(1, (before + 1).clamp(max=K - 1))
        span = (end - start).clamp(min=1)
        past = torch.where(end == start, 0, (frame - start).clamp(min=0))
    weight = (2 * past > span).to(wide) if nearest else past.to(wide) / span
    weight = weight.reshape(*weight.shape, *[1] * (x.dim() - 2))
    first = _gather_tokens(x.to(wide), before, None, 1, 1)
    second = _gather_tokens(x.to(wide), (before + 1).clamp(max=K - 1), None, 1, 1)
    return blend(first, second, weight).to(x.dtype)
