"""The same bits: over runs, thread counts, poisoned memory, alone or in any batch."""

import contextlib

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot
from h2ot_kernels.add_norm import add_norm
from h2ot_kernels.graph import graph_update
from h2ot_kernels.linear import Linear
from h2ot_kernels.recover_rotated import recover_rotated

from .cases import TokenCase

X = TokenCase("still", B=3, N=243, C=64, J=3, K=81).tokens()
INDEX = h2ot.prune_cluster(X, 81)
POSE = torch.randn(3, 81, 17, 3)
QUERY, KEY, VALUE = torch.randn(243, 64), torch.randn(3, 81, 64), torch.randn(3, 81, 64)
PARENT = h2ot.score_tokens(X).parent
LABELS = h2ot.assign_clusters(X, INDEX)
TAIL = [module.requires_grad_(False) for module in (nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 3))]
ROTATED = Linear(64, 64).eval().requires_grad_(False), None
NODES = nn.BatchNorm1d(243).eval().requires_grad_(False)


def gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


# Each call on samples [rows] of a batch; results have the batch first, but those named shared.
CALLS = {
    "score_tokens": lambda rows: h2ot.score_tokens(X[rows]),
    "prune_cluster": lambda rows: [h2ot.prune_cluster(X[rows], 81)],
    "score_tokens with options": lambda rows: h2ot.score_tokens(
        X[rows], 3, metric="cosine", density="gaussian", cutoff=0.02, exclude_self=True
    ),
    "prune_cluster per sample": lambda rows: [h2ot.prune_cluster(X[rows], [81, 81, 81][rows], exclude_self=True)],
    "select_tokens": lambda rows: [h2ot.select_tokens(X[rows, :, 0, 0], 81, keep=5)],
    "prune_sample": lambda rows: [h2ot.prune_sample(243, 81).expand(rows.stop - rows.start, -1)],
    "prune_motion": lambda rows: [h2ot.prune_motion(X[rows], 81)],
    "prune_attention": lambda rows: [h2ot.prune_attention(X[rows].mT, X[rows].mT.flip(1), 31)],
    "attention_scores": lambda rows: [
        torch.ops.h2ot_kernels.attention_scores(X[rows].movedim(2, 1), X[rows].movedim(2, 1), 1.0)
    ],
    "gather_tokens": lambda rows: [h2ot.gather_tokens(X[rows], INDEX[rows], out_dim=2)],
    "gather gradient": lambda rows: gradients(lambda x: h2ot.gather_tokens(x, INDEX[rows]), X[rows]),
    "cluster_tokens": lambda rows: h2ot.cluster_tokens(X[rows], 81),
    "assign_clusters": lambda rows: [h2ot.assign_clusters(X[rows], INDEX[rows])],
    "labels by parent": lambda rows: [h2ot.assign_clusters(X[rows], INDEX[rows], parent=PARENT[rows])],
    "merge_tokens": lambda rows: [h2ot.merge_tokens(X[rows, :, 0], LABELS[rows], 81)],
    "merge gradient": lambda rows: gradients(lambda x: h2ot.merge_tokens(x, LABELS[rows], 81), X[rows, :, 0]),
    "recover_attention": lambda rows: [h2ot.recover_attention(QUERY, KEY[rows], VALUE[rows], 8)],
    "recover_pose": lambda rows: [h2ot.recover_pose(QUERY, QUERY, KEY[rows], VALUE[rows], *TAIL, 8, num_joints=1)],
    "recover_rotated": lambda rows: [
        recover_rotated(QUERY, QUERY, KEY[rows], VALUE[rows], 8, 0.1, *ROTATED, None, TAIL[2].weight, None, 1e-5)
    ],
    "recover_attention gradient": lambda rows: gradients(
        lambda k, v: h2ot.recover_attention(QUERY, k, v, 8), KEY[rows], VALUE[rows]
    ),
    "attention of 16 bits": lambda rows: [
        h2ot.recover_attention(QUERY.bfloat16(), KEY[rows].bfloat16(), VALUE[rows].bfloat16(), 2)
    ],
    "add_norm": lambda rows: add_norm(X[rows], X[rows], TAIL[1], torch.bfloat16),
    "graph_update": lambda rows: [graph_update(*[X[rows]] * 4, QUERY[0], NODES, 1, None, 4)],
    "recover_interpolate": lambda rows: [h2ot.recover_interpolate(POSE[rows], INDEX[rows], 243)],
    "interpolate gradient": lambda rows: gradients(lambda x: h2ot.recover_interpolate(x, INDEX[rows], 243), POSE[rows]),
}


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_over_runs_threads_and_batches(name):
    call, whole = CALLS[name], slice(0, 3)
    first = call(whole)
    for _ in range(20):
        assert same(call(whole), first)
    for count in (1, 2, 5):
        with threads(count):
            assert same(call(whole), first), f"{count} threads"
    for b in range(3):
        assert same(call(slice(b, b + 1)), [x[b : b + 1] for x in first]), f"sample {b} alone"


@pytest.mark.parametrize("name", CALLS)
def test_every_output_byte_is_written(name):
    """Fresh tensors filled with NaN (and the largest integer) must not show through."""
    expected = CALLS[name](slice(0, 3))
    deterministic = torch.utils.deterministic
    before = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        assert same(CALLS[name](slice(0, 3)), expected)
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = before


def test_the_shared_query_gradient_is_summed_in_order():
    kept = torch.randn(2, 35, 81, 64)

    def gradient():
        return gradients(lambda q: h2ot.recover_attention(q, *kept, 8), QUERY)

    with threads(1):
        first = gradient()
    for count in (1, 2, 3):
        with threads(count):
            assert same(gradient(), first)


def test_inputs_are_not_modified():
    before = [x.clone() for x in (X, INDEX, POSE, QUERY, KEY, VALUE, LABELS)]
    for call in CALLS.values():
        call(slice(0, 3))
    assert same(before, [X, INDEX, POSE, QUERY, KEY, VALUE, LABELS])
