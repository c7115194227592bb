"""bfloat16 and float16 tokens that the CUDA source reads where they lie, run on the CPU: scores and labels."""

import itertools

import pytest
import torch

import python_ref

from . import simt
from .cases import TokenCase
from .compare import assert_scores
from .simt.cluster import Labelling
from .test_cuda_simt import HALVES, needs_simulator, run
from .test_cuda_simt_cluster import check, drawn_index, holds

pytestmark = needs_simulator

HALF_PLANS = [None, *itertools.product(simt.SEARCHES, ("exact_products", "direct"))]


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_of_any_strides_give_the_same_bits(dtype):
    x = TokenCase("smooth", N=70, C=40, dtype=dtype).tokens()
    views = [
        x,
        torch.cat([x, x], -1)[..., :40],  # in place: rows, samples and both, apart
        torch.cat([x, x], 1)[:, :70],
        x.movedim(0, 1).contiguous().movedim(1, 0),
        torch.cat([x, x[..., :4]], -1)[..., :40],  # the others are copied
        torch.cat([x[..., :3], x], -1)[..., 3:],
        x.movedim(1, 2).contiguous().movedim(2, 1),
    ]
    for plan in HALF_PLANS:
        calls = run([simt.Call(view, num_tokens=9, plan=plan) for view in views])
        assert_scores(calls[0].scores, python_ref.score_tokens(x.double()))
        for call in calls[1:]:
            assert all(map(torch.equal, call.scores, calls[0].scores))
            assert torch.equal(call.index, calls[0].index)
    shared = x[:1].expand(3, -1, -1)
    for plan in HALF_PLANS:
        (call,) = run([simt.Call(shared, num_tokens=9, plan=plan)])
        assert_scores(call.scores, python_ref.score_tokens(shared.double()))


def scaled_samples(case: TokenCase) -> torch.Tensor:
    """One sample that is multiplied as it is, beside the same ones so large and so small that they are not."""
    x = case.tokens()
    return torch.cat([2.0**50 * x, x, 2.0**-50 * x]).to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["duplicates", "lattice", "static", "zeros", "still", "equidistant", "nonfinite"])
def test_samples_that_are_not_multiplied(kind):
    x = scaled_samples(TokenCase(kind, B=1, N=70, C=72))
    mask = torch.rand(3, 70, generator=torch.Generator().manual_seed(1)) > 0.2
    # Every pair of these, with one split of the columns and with two.
    for k, given, machine in ((2, None, 1), (2, mask, 132), (5, None, 132), (5, mask, 1)):
        exact = python_ref.score_tokens(x.double(), k, mask=given)
        index = python_ref.prune_cluster(x.double(), 20, k, mask=given)
        for call in run([simt.Call(x, k, 20, given, plan=plan, multiprocessors=machine) for plan in HALF_PLANS]):
            assert_scores(call.scores, exact)
            assert torch.equal(call.index, index)


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_of_any_strides_give_the_same_labels(dtype, tmp_path):
    x = TokenCase("smooth", N=70, C=40, dtype=dtype).tokens()
    views = [
        x,
        torch.cat([x, x], -1)[..., :40],
        torch.cat([x, x], 1)[:, :70],
        x.movedim(0, 1).contiguous().movedim(1, 0),
        torch.cat([x, x[..., :4]], -1)[..., :40],  # copied
        torch.cat([x[..., :3], x], -1)[..., 3:],
        x[:1].expand(2, -1, -1),
    ]
    plans = (None, ("stored", "exact_products"), ("stored", "direct"))
    index = drawn_index(2, 70, 40, 6)
    assert all(map(holds, check([Labelling(view, index, plan=plan) for view in views for plan in plans], tmp_path)))
    plans = itertools.product(simt.SEARCHES, ("exact_products", "direct"))
    for plan in plans:
        first, *others = check([Labelling(view, 20, plan=plan) for view in views[:-1]], tmp_path)
        wanted = python_ref.prune_cluster(x.double(), 20)
        assert torch.equal(first.kept, wanted)
        assert torch.equal(first.labels, python_ref.assign_clusters(x.double(), wanted))
        for call in others:
            assert torch.equal(call.kept, first.kept)
            assert torch.equal(call.labels, first.labels)


@pytest.mark.parametrize("kind", ["duplicates", "lattice", "static", "zeros", "still", "equidistant"])
def test_labels_of_samples_that_are_not_multiplied(kind, tmp_path):
    x = scaled_samples(TokenCase(kind, B=1, N=140, C=72))
    twice = torch.tensor([[4, 8, 8] + [4] * 40 + [30]] * 3)
    mask = torch.rand(3, 140, generator=torch.Generator().manual_seed(1)) > 0.2
    plan = ("stored", "exact_products")
    for index in (drawn_index(3, 140, 9, 7), drawn_index(3, 140, 90, 8)):
        calls = [
            Labelling(x, index, given, plan=plan, multiprocessors=machine, side=side)
            for given, machine, side in itertools.product((None, mask), (1, 132), (64, 128))
        ]
        assert all(map(holds, check(calls, tmp_path)))
    for machine in (1, 132):
        (call,) = check([Labelling(x, twice, plan=plan, multiprocessors=machine)], tmp_path)
        wanted = python_ref.assign_clusters(x.double(), torch.tensor([[4, 8, 30]] * 3))
        wanted = torch.tensor([0, 1, 43])[wanted]
        wanted[:, 4], wanted[:, 8] = 42, 2
        assert torch.equal(call.labels, wanted)
    for search in simt.SEARCHES:
        (call,) = check([Labelling(x, 30, plan=(search, "exact_products"))], tmp_path)
        kept = python_ref.prune_cluster(x.double(), 30)
        assert torch.equal(call.kept, kept)
        assert torch.equal(call.labels, python_ref.assign_clusters(x.double(), kept))
