"""Labels exactly, merged tokens within bound, gradients against finite differences."""

from functools import partial

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref

from .cases import DTYPES, TokenCase, oracle_index, oracle_labels, oracle_scores
from .compare import assert_within
from .runners import runners
from .test_score import pairs


def label_arguments(case):
    return {name: value for name, value in case.arguments().items() if name in ("mask", "lengths", "metric")}


@pytest.mark.parametrize(("case", "runner"), [p for p in pairs("assign_clusters") if p.values[0].B])
def test_labels_equal_the_oracle(case, runner):
    ours = runner(h2ot.assign_clusters, case.tokens(), oracle_index(case), **label_arguments(case))
    assert torch.equal(ours, oracle_labels(case))


@pytest.mark.parametrize(
    "runner", [p for p in runners("cluster_tokens") if p.values[0].backend in ("cpp", "reference")]
)
def test_wrong_kept_tokens_are_errors(runner):
    x = torch.randn(3, 9, 4)
    for keep in (torch.tensor([[0], [1], [9]]), torch.tensor([[3, 3], [0, 1], [0, 0]])):
        with pytest.raises(IndexError, match="cluster_tokens|keep"):
            runner(h2ot.cluster_tokens, x, 1, keep=keep)


@pytest.mark.parametrize("runner", runners("cluster_tokens"))
def test_each_sample_keeps_tokens_of_its_own(runner):
    x, keep = torch.randn(3, 20, 4), torch.tensor([[1, 19], [0, 7], [2, 2]])
    expected = python_ref.prune_cluster(x.double(), 4, keep=keep)
    assert torch.equal(runner(h2ot.prune_cluster, x, 4, keep=keep), expected)
    clusters = runner(h2ot.cluster_tokens, x, 4, keep=keep)
    assert torch.equal(clusters.index, expected)
    assert torch.equal(clusters.labels, python_ref.assign_clusters(x.double(), expected))


@pytest.mark.parametrize("runner", [p for p in runners("cluster_tokens") if p.values[0].backend == "cpp"])
@pytest.mark.parametrize(("kind", "N"), [("random", 20), ("places", 100), ("places", 1601)])
def test_centres_whose_squared_distance_overflows_attract_nobody(kind, N, runner):
    x = 1e155 * TokenCase(kind, B=1, N=N, C=20, dtype=torch.float64).tokens()
    clusters = runner(h2ot.cluster_tokens, x, 10 if N > 20 else 2)
    expected = python_ref.assign_clusters(x, clusters.index)
    assert (expected < 0).any()
    assert torch.equal(clusters.labels, expected)
    assert torch.equal(runner(h2ot.assign_clusters, x, clusters.index), expected)


@pytest.mark.parametrize("runner", runners("cluster_tokens"))
@pytest.mark.parametrize("exponent", [464, 511])
def test_centres_at_the_end_of_the_range_of_squares(exponent, runner):
    x = torch.zeros(1, 40, 1, dtype=torch.float64)
    x[:, 20:] = 2.0**exponent * (1 - 2.0**-24)
    clusters = runner(h2ot.cluster_tokens, x, 1)
    assert clusters.index.tolist() == [[0]]
    assert (clusters.labels == 0).all()


@pytest.mark.parametrize(("case", "runner"), [p for p in pairs("assign_by_parent") if p.values[0].B])
def test_labels_by_parent_equal_the_oracle(case, runner):
    given = label_arguments(case) | {"parent": oracle_scores(case).parent}
    ours = runner(h2ot.assign_clusters, case.tokens(), oracle_index(case), **given)
    assert torch.equal(ours, oracle_labels(case, by_parent=True))


@pytest.mark.parametrize("runner", runners("assign_by_parent"))
def test_chains_that_meet_no_selected_token(runner):
    x, index = torch.zeros(1, 8, 2), torch.tensor([[3, 6, -1]])
    parent = torch.tensor([[-1, 0, 3, 1, 5, 4, -1, 2]])  # 4 and 5 in a circle, which scoring never makes
    assert runner(h2ot.assign_clusters, x, index, parent=parent).tolist() == [[-1, -1, 0, 0, -1, -1, 1, 0]]
    mask = torch.tensor([[True, True, False, True, True, True, True, True]])
    ours = runner(h2ot.assign_clusters, x, index, parent=parent, mask=mask)
    assert ours.tolist() == [[-1, -1, -1, 0, -1, -1, 1, -1]]


@pytest.mark.parametrize("runner", runners("assign_clusters"))
def test_a_number_of_tokens_per_sample_through_the_whole_path(runner):
    x, counts = torch.randn(3, 30, 5), [7, 0, 3]
    index = runner(h2ot.prune_cluster, x, counts)
    assert (index >= 0).sum(1).tolist() == counts
    labels = runner(h2ot.assign_clusters, x, index)
    assert torch.equal(labels, python_ref.assign_clusters(x.double(), index))
    merges = h2ot.can_run("merge_tokens", runner.backend, runner.device)[0]  # the CUDA library does not
    merged = runner(h2ot.merge_tokens, x, labels, 7) if merges else h2ot.merge_tokens(x, labels, 7)
    for b, count in enumerate(counts):
        alone = slice(b, b + 1)
        assert (merged[b, count:] == 0).all()
        assert (labels[b].max() + 1).item() == count
        if count:
            expected = runner(h2ot.prune_cluster, x[alone], count)
            assert torch.equal(index[alone, :count], expected)
            assert torch.equal(labels[alone], runner(h2ot.assign_clusters, x[alone], expected))


@pytest.mark.parametrize("runner", runners("assign_clusters"))
def test_labels_share_one_index_row_and_skip_masked_centres(runner):
    x, index = torch.randn(3, 12, 4), torch.tensor([[1, 5, 9]])
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 5] = mask[1, [1, 5, 9]] = False
    ours = runner(h2ot.assign_clusters, x, index, mask=mask)
    assert torch.equal(ours, python_ref.assign_clusters(x.double(), index, mask=mask))
    assert (ours[1] == -1).all()
    assert 1 not in ours[0]


@pytest.mark.parametrize("runner", runners("merge_tokens"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("C", [33, 150])  # less than eight vectors, and more with a rest
def test_merging_within_bound(C, weighted, dtype, runner):
    x, labels = torch.randn(3, 60, C).to(dtype), torch.randint(-1, 7, (3, 60))
    labels[labels == 4] = 2
    weight = torch.rand(3, 60, 1) if weighted else None
    for view in (x, x.mT.contiguous().mT):
        ours = runner(h2ot.merge_tokens, view, labels, 7, weight)
        exact = python_ref.merge_tokens(x.double(), labels, 7, weight)
        assert_within(ours, exact, python_ref.merge_tokens(x, labels, 7, weight), 60)
        assert (ours[:, 4] == 0).all()


@pytest.mark.parametrize("runner", runners("merge_tokens"))
def test_integer_means_are_exact(runner):
    x, labels = torch.tensor([[[1.0], [3.0], [5.0], [100.0]]]), torch.tensor([[0, 0, 2, -1]])
    assert runner(h2ot.merge_tokens, x, labels, 3).tolist() == [[[2.0], [0.0], [5.0]]]
    weight = torch.tensor([[3.0, 1.0, 0.0, 7.0]])
    assert runner(h2ot.merge_tokens, x, labels, 3, weight).tolist() == [[[1.5], [0.0], [0.0]]]


@pytest.mark.parametrize("runner", runners("merge_tokens"))
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_cluster(special, runner):
    x = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [special, 4.0], [special, special], [6.0, 8.0]]])
    weight = torch.tensor([[1.0, 1.0, 1.0, special, 3.0]])
    labels = torch.tensor([[0, 1, 2, -1, 0]])
    for given, wanted in (([], [3.5, 4.5]), ([weight], [4.75, 6.25])):
        mean = torch.tensor([[wanted, [2.0, 2.0], [special, 4.0]]])
        merged = runner(h2ot.merge_tokens, x, labels, 3, *given)
        torch.testing.assert_close(merged, mean, rtol=0, atol=0, equal_nan=True)
    x.requires_grad_()
    weight.requires_grad_()
    seed = torch.tensor([[[special, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    to_x, to_weight = torch.autograd.grad(runner(h2ot.merge_tokens, x, labels, 3, weight), (x, weight), seed)
    assert (to_x[0, 3] == 0).all()
    assert to_weight[0, 3] == 0
    assert to_x[0, [1, 0, 4], 1].tolist() == [1.0, 0.25, 0.75]


@pytest.mark.parametrize("runner", runners("merge_tokens"))
def test_infinities_of_both_signs_make_no_number(runner):
    x = torch.tensor([[[float("inf")], [float("-inf")], [3.0]]])
    merged = runner(h2ot.merge_tokens, x, torch.tensor([[0, 0, 1]]), 2)
    assert merged[0, 0].isnan()
    assert merged[0, 1] == 3


@pytest.mark.parametrize("runner", runners("merge_tokens"))
def test_gradcheck_first_and_second_order(runner):
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 9, dtype=torch.float64).add(0.1).requires_grad_()
    labels = torch.tensor([[0, 1, 1, -1, 2, 2, 0, 1, 2], [0, 0, 0, 0, 1, 1, -1, -1, 1]])
    for function, inputs in (
        (lambda x: runner(h2ot.merge_tokens, x, labels, 4), (x,)),
        (lambda x, weight: runner(h2ot.merge_tokens, x, labels, 4, weight), (x, weight)),
    ):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("runner", runners("merge_tokens"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_merging_within_bound(dtype, runner):
    """The gradient to the weights knows the means as they were before they were rounded to 16 bits."""
    x, labels, seed = torch.randn(2, 60, 33).add(8).to(dtype), torch.randint(-1, 7, (2, 60)), torch.randn(2, 7, 33)
    weight = torch.rand(2, 60, dtype=torch.promote_types(dtype, torch.float32))

    def gradients(call, *given):
        given = [x.detach().clone().requires_grad_() for x in given]
        merged = call(given[0], labels, 7, given[1])
        return torch.autograd.grad(merged, given, seed.to(dtype).to(merged.dtype))

    ours = gradients(partial(runner, h2ot.merge_tokens), x, weight)
    exact = gradients(python_ref.merge_tokens, x.double(), weight.double())
    same_precision = gradients(python_ref.merge_tokens, x, weight)
    for one in zip(ours, exact, same_precision, strict=True):
        assert_within(*one, 33)


@pytest.mark.parametrize("runner", [p for p in runners("merge_tokens") if p.values[0].backend != "reference"])
def test_the_inverse_of_a_small_weight_is_not_needed(runner):
    """1 / 1e-40 is infinite in float32; the share of a weight is not."""
    x, labels = torch.randn(1, 3, 2, requires_grad=True), torch.tensor([[0, 0, 1]])
    weight = torch.tensor([[1e-40, 3e-40, 1e-40]])
    to_x = torch.autograd.grad(runner(h2ot.merge_tokens, x, labels, 2, weight).sum(), x)[0]
    torch.testing.assert_close(to_x[0, :, 0], torch.tensor([0.25, 0.75, 1.0]), rtol=1e-4, atol=0)


def test_tokens_may_be_overwritten_where_only_a_gradient_to_the_weights_needs_them():
    x, labels = torch.randn(2, 9, 4), torch.randint(0, 3, (2, 9))
    for weight in (None, torch.rand(2, 9)):
        leaf = x.clone().requires_grad_()
        tokens = leaf * 1
        merged = h2ot.merge_tokens(tokens, labels, 3, weight)
        wanted = torch.autograd.grad(h2ot.merge_tokens(leaf, labels, 3, weight).sum(), leaf)[0]
        tokens.add_(1)
        assert torch.equal(torch.autograd.grad(merged.sum(), leaf)[0], wanted)
    weight.requires_grad_()
    merged = h2ot.merge_tokens(x, labels, 3, weight)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        merged.sum().backward()


@pytest.mark.parametrize("runner", runners("merge_tokens"))
def test_labels_and_index_out_of_range_are_refused_or_count_as_none(runner):
    x = torch.randn(1, 5, 2)
    raises = runner.backend in ("cpp", "reference")
    for label in (-2, 3, 1 << 40):
        labels = torch.tensor([[0, 1, 2, 0, label]])
        if raises:
            with pytest.raises(IndexError, match="labels|index"):
                runner(h2ot.merge_tokens, x, labels, 3)
        else:
            leaf = x.clone().requires_grad_()
            merged = runner(h2ot.merge_tokens, leaf, labels, 3)
            assert torch.equal(merged, h2ot.merge_tokens(x[:, :4], labels[:, :4], 3))
            assert (torch.autograd.grad(merged.sum(), leaf)[0][0, 4] == 0).all()
    for position in (-2, 5, 1 << 40):
        index = torch.tensor([[0, position]])
        if raises:
            with pytest.raises(IndexError, match="index"):
                runner(h2ot.assign_clusters, x, index)
        else:
            assert runner(h2ot.assign_clusters, x, index).tolist() == [[0] * 5]
    if raises:
        with pytest.raises(IndexError, match="parent"):
            runner(h2ot.assign_clusters, x, torch.tensor([[0, 1]]), parent=torch.tensor([[-1, 0, 5, 0, 0]]))
