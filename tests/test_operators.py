"""The operators themselves refuse what does not fit together, whoever calls them (csrc/require.h)."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .linear_layers import samples_of_some_cpus
from .test_torch import OPS, samples

X, SCORE, INDEX = torch.randn(2, 9, 4), torch.randn(2, 9).double(), torch.tensor([[0, 4, 8], [1, 2, 3]])
MASK, QUERY = torch.ones(2, 9, dtype=torch.bool), torch.randn(1, 7, 4)
HEADS = torch.randn(2, 3, 9, 4)
TAIL = torch.randn(9, 4), X, None, None, torch.randn(3, 4), None, 1e-5

REFUSED = {
    "more neighbours than tokens": (OPS.score_tokens, (X, 10, None, None), "k from 1"),
    "more neighbours than others": (OPS.score_variant, (X, 9, None, None, 0.0, True, 0.0), "k from 1"),
    "no neighbours": (OPS.prune_cluster, (X, 3, 0, None, None, None), "k from 1"),
    "a mask of fewer": (OPS.cluster_tokens, (X, 3, 2, None, MASK[:, :8], None), r"mask \[B, N\]"),
    "noise of one sample": (OPS.prune_cluster, (X, 3, 2, None, None, SCORE[:1]), r"noise \[B, N\]"),
    "more tokens than there are": (OPS.prune_cluster, (X, 10, 2, None, None, None), "num_tokens from 1"),
    "more labels than tokens": (OPS.cluster_tokens, (X, 10, 2, None, None, None), "num_tokens from 1"),
    "no tokens": (OPS.select_tokens, (SCORE, 0, None, None), "num_tokens from 1"),
    "more frames than there are": (OPS.prune_motion, (X[..., None], 10, None), "num_tokens from 1"),
    "more attended than there are": (OPS.prune_attention, (HEADS, HEADS, 10, None, 1.0), "num_tokens from 1"),
    "keep of three samples": (OPS.select_tokens, (SCORE, 3, INDEX[[0, 0, 0]], None), r"keep \[1, M\]"),
    "a key of fewer frames": (OPS.attention_scores, (HEADS, HEADS[:, :, 1:], 1.0), "query and key"),
    "a key of another dtype": (OPS.attention_scores, (HEADS, HEADS.half(), 1.0), "query and key"),
    "an int32 index": (OPS.gather_tokens, (X, INDEX.int(), None, 1, 1), "index int64"),
    "an index of three samples": (OPS.assign_clusters, (X, INDEX[[0, 0, 0]], None), "index int64"),
    "an index of half the samples": (OPS.assign_clusters, (X[[0, 1, 0, 1]], INDEX, None), r"index int64 .*\[1, K\]"),
    "the same of parents": (OPS.assign_by_parent, (X[[0, 1, 0, 1]], INDEX, MASK.long()[[0, 1, 0, 1]], None), "index"),
    "the batch as frames": (OPS.gather_tokens, (X, INDEX, None, 0, 1), "frames on one behind the batch"),
    "nine axes": (OPS.gather_tokens, (X[(...,) + (None,) * 6], INDEX, None, 1, 1), "at most 8 axes"),
    "an embedding of fewer": (OPS.gather_tokens, (X, INDEX, torch.randn(2, 4), 1, 1), r"pos_embed \[K, C\]"),
    "out of fewer": (OPS.gather_tokens_out, (X, INDEX, None, 1, 1, torch.zeros(2, 2, 4)), "out, contiguous"),
    "out of another dtype": (OPS.recover_interpolate_out, (X, None, 20, False, torch.zeros(2, 20, 4).half()), "out, "),
    "strided out": (OPS.recover_attention_out, (QUERY, X, X, 1, 0.5, torch.zeros(2, 4, 7).mT), "out, contiguous"),
    "grad of other frames": (OPS.scatter_tokens, (X, INDEX, 12, 1, 1), "as many frames in grad"),
    "parents of fewer": (OPS.assign_by_parent, (X, INDEX, INDEX, None), r"parent \[B, N\]"),
    "labels of one sample": (OPS.merge_tokens, (X, INDEX[:1], 3, None), "labels int64"),
    "weights of fewer": (OPS.merge_tokens, (X, MASK.long(), 3, SCORE[:, 1:]), r"weight \[B, N\]"),
    "no clusters": (OPS.merge_tokens, (X, MASK.long() - 2, 0, None), "num_clusters"),
    "a query of fewer channels": (OPS.recover_attention, (QUERY[..., :2], X, X, 1, 0.5), r"query \[F, C\]"),
    "values of fewer frames": (OPS.recover_attention, (QUERY, X, X[:, 1:], 1, 0.5), "key and value"),
    "a key of halves": (OPS.recover_attention, (QUERY, X.half(), X, 1, 0.5), "of one dtype"),
    "three heads of four channels": (OPS.recover_attention, (QUERY, X, X, 3, 0.5), "num_heads"),
    "grad of fewer frames": (OPS.recover_attention_backward, (X[:, :6], QUERY, X, X, 1, 0.5), "grad"),
    "a token of fewer frames": (OPS.recover_tail, (TAIL[0][:8], *TAIL[1:]), "token"),
    "a head of halves": (OPS.recover_tail, (*TAIL[:4], TAIL[4].half(), *TAIL[5:]), "head_weight"),
    "a norm of fewer channels": (OPS.recover_tail, (*TAIL[:2], torch.ones(3), *TAIL[3:]), "the norm's vectors"),
    "an index of other frames": (OPS.recover_interpolate, (X, INDEX, 20, False), "an index of each"),
    "no kept frames": (OPS.recover_interpolate_backward, (X, None, 0, False), "kept frames"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    operator, arguments, wanted = REFUSED[name]
    with pytest.raises(ValueError, match=f": wanted .*{wanted}"):
        operator(*arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda count: OPS.scatter_tokens(torch.zeros(0, 1, 4), torch.tensor([[5]]), count, 1, 1),
        lambda count: OPS.recover_interpolate_backward(torch.zeros(1, 9, 0), None, count, False),
    ],
    ids=["scatter_tokens", "recover_interpolate_backward"],
)
def test_refuses_more_frames_than_kernels_number(call):
    assert call(2**31 - 1).numel() == 0
    with pytest.raises(ValueError, match=rf"num_\w+: got {2**61} tokens a sample, wanted at most 2147483647"):
        call(2**61)


def misfits(value) -> Iterator[torch.Tensor | int]:
    """Other sizes, ranks and dtypes; other numbers."""
    if isinstance(value, torch.Tensor):
        for axis in range(value.dim()):
            yield torch.cat([value, value.narrow(axis, 0, 1)], axis)
            # Copies: what is read behind their end is nobody's.
            yield from (value.narrow(axis, 0, size).clone() for size in {0, 1, value.shape[axis] - 1})
        yield value[None]
        yield value[0]
        yield value.flatten()[0]
        yield from (value.to(dtype) for dtype in {torch.int32, torch.float16, torch.float64} - {value.dtype})
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from (-1, 0, 100)


def test_takes_what_fits():
    """What is taken of misfits has the result that shapes and dtypes promise; ./dev sanitize watches what is read."""
    taken = refused = 0
    backward = OPS.recover_attention_backward, (torch.randn(2, 7, 4), QUERY, X, X, 1, 0.5)
    for operator, arguments in (*samples(), *samples_of_some_cpus(), backward):
        given = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
        for n, value in enumerate(given):
            for misfit in misfits(value):
                call = [*given[:n], misfit, *given[n + 1 :]]
                try:
                    results = operator(*call)
                except (ValueError, IndexError, RuntimeError):
                    refused += 1
                    continue
                with FakeTensorMode(allow_non_fake_inputs=True):
                    promised = operator(*call)
                for ours, fake in zip(*map(torch.utils._pytree.tree_leaves, (results, promised)), strict=True):
                    if fake is not None:
                        assert (ours.shape, ours.dtype) == (fake.shape, fake.dtype), (operator, n)
                taken += 1
    assert refused > 1500
    assert taken > 500, (taken, refused)
