"""Scoring against the float64 oracle: values to float64 rounding, parents, kept tokens and clusters exactly."""

import functools
from functools import partial

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref

from .cases import OPTION_CASES, TOKEN_CASES, TokenCase, oracle_index, oracle_labels, oracle_scores
from .compare import SCORE_ATOL, SCORE_RTOL, assert_scores
from .runners import runners


def affordable(case, runner):
    """Not: large cases in the reference, which the oracle runs, or in Triton's interpreter, or very large ones as PTX;
    nor missing options."""
    is_variant = bool(set(dict(case.options)) - {"metric"})
    if is_variant and not h2ot.can_run("score_variant", runner.backend, runner.device)[0]:
        return False
    most = 99 if is_variant else 400
    if runner.simulated and most < case.N:
        return False
    return not (case.large and (runner.interpreted or runner.backend == "reference"))


def pairs(op, *kinds):
    """Every affordable case with every runner of op; in Triton's interpreter options with these kinds only, if any:
    kept tokens follow from the scores, which all kinds test.
    """
    return [
        pytest.param(case, runner.values[0], id=f"{case}-{runner.id}")
        for runner in runners(op)
        for case in TOKEN_CASES + OPTION_CASES
        if affordable(case, runner.values[0])
        and not (kinds and case.options and runner.values[0].simulated and case.kind not in kinds)
    ]


@functools.cache
def scores(case, runner):
    """What the runner gives for a case, computed once for the tests of this file."""
    return runner(h2ot.score_tokens, case.tokens(), case.k, **case.arguments())


@pytest.mark.parametrize(("case", "runner"), pairs("score_tokens"))
def test_scores_equal_the_oracle(case, runner):
    assert_scores(scores(case, runner), oracle_scores(case))


@pytest.mark.parametrize(("case", "runner"), pairs("prune_cluster", "random", "static"))
def test_kept_tokens_equal_the_oracle(case, runner):
    ours = runner(h2ot.prune_cluster, case.tokens(), case.K, case.k, keep=case.keep, **case.arguments())
    assert torch.equal(ours, oracle_index(case))


def one_call(case, runner) -> bool:
    """Options that the call has; and where it is made of other calls, which meet all cases themselves, few cases."""
    return set(dict(case.options)) <= {"metric"} and (runner.backend == "cpp" or case.N <= 27)


@pytest.mark.parametrize(("case", "runner"), [p for p in pairs("cluster_tokens") if one_call(*p.values)])
def test_clusters_in_one_call_equal_the_oracle(case, runner):
    index, labels, score = runner(
        h2ot.cluster_tokens, case.tokens(), case.K, case.k, keep=case.keep, **case.arguments()
    )
    assert torch.equal(index, oracle_index(case))
    assert torch.equal(labels, oracle_labels(case))
    assert torch.equal(score, scores(case, runner).score)


@pytest.mark.parametrize("runner", runners("score_tokens"))
@pytest.mark.parametrize("kind", ["smooth", "duplicates", "static"])
def test_selecting_on_the_score_is_pruning(kind, runner):
    case = next(case for case in TOKEN_CASES if case.kind == kind)
    x, given = case.tokens(), {"mask": torch.rand(case.B, case.N) > 0.2}
    score = runner(h2ot.score_tokens, x, case.k, **given).score
    assert torch.equal(
        runner(h2ot.select_tokens, score, case.K, **given), runner(h2ot.prune_cluster, x, case.K, case.k, **given)
    )


@pytest.mark.parametrize("runner", runners("score_tokens"))
def test_noise_and_mask_of_any_strides(runner):
    x, noise, mask = torch.randn(3, 9, 4), torch.rand(9, 3), torch.rand(9, 3) > 0.2
    expected = runner(h2ot.score_tokens, x, noise=noise.mT.contiguous(), mask=mask.mT.contiguous())
    for given in (noise.mT, noise.double().mT, torch.stack([noise.mT] * 2, -1)[..., 1]):
        assert all(map(torch.equal, runner(h2ot.score_tokens, x, noise=given, mask=mask.mT), expected))
    shared = runner(h2ot.prune_cluster, x, 3, noise=noise[:, :1].mT.expand(3, 9))
    assert torch.equal(shared, runner(h2ot.prune_cluster, x, 3, noise=noise[:, :1].mT.repeat(3, 1)))


@pytest.mark.parametrize("runner", runners("score_tokens"))
def test_with_noise_equal_densities_are_not_denser(runner):
    x, noise = torch.randint(-2, 3, (2, 20, 3)).float(), torch.zeros(2, 20)
    assert_scores(runner(h2ot.score_tokens, x, noise=noise), python_ref.score_tokens(x.double(), noise=noise))


@pytest.mark.parametrize("runner", runners("score_tokens"))
def test_noise_of_float64_counts_to_its_last_bits_and_nothing_has_a_gradient(runner):
    x = torch.zeros(2, 9, 4, requires_grad=True)  # densities of 1, which the noise alone orders
    noise = (0.5 + 1e-12 * torch.rand(2, 9, dtype=torch.float64)).requires_grad_()
    ours = runner(h2ot.score_tokens, x, noise=noise)
    assert_scores(ours, python_ref.score_tokens(x.detach(), noise=noise.detach()))
    assert not any(values.requires_grad for values in ours)


def assert_same(runner, ours, expected):
    """The same bits. Native Triton lays its tiles out by the strides: there sums of float64 have another order."""
    native = runner.backend == "triton" and not runner.interpreted
    bound = 1e-12 if native else 0
    torch.testing.assert_close(ours, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("runner", runners("score_tokens"))
def test_any_strides_give_the_same_bits(runner):
    x = torch.randn(3, 21, 5, 8)
    views = {
        "joints last": x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        "frames last": x.movedim(1, 3).contiguous().movedim(3, 1),
        "sliced": torch.cat([x, x], -1)[..., :8],
        "every second": x.repeat_interleave(2, 1)[:, ::2],
    }
    expected = runner(h2ot.score_tokens, x)
    for view in views.values():
        assert_same(runner, runner(h2ot.score_tokens, view).score, expected.score)
    tokens = x[:, :, 0].contiguous()
    expected = runner(h2ot.score_tokens, tokens)
    for view in (tokens.mT.contiguous().mT, tokens.repeat_interleave(2, -1)[..., ::2], x[:, :, 0]):
        assert_same(runner, runner(h2ot.score_tokens, view).score, expected.score)
    row = x[:, :, 0].mean(0, keepdim=True)
    expanded = runner(h2ot.score_tokens, row.expand(3, -1, -1)).score
    assert_same(runner, expanded, runner(h2ot.score_tokens, row).score.expand(3, -1))


@pytest.mark.parametrize("runner", runners("score_tokens"))
def test_largest_distance_belongs_to_the_densest(runner):
    x = torch.tensor([[[0.0], [1.0], [3.0], [11.0]]])
    scores = runner(h2ot.score_tokens, x)
    assert scores.parent.tolist() == [[-1, 0, 1, 2]]
    torch.testing.assert_close(scores.distance, torch.tensor([[11.0, 1, 2, 8]], dtype=torch.float64))
    assert scores.score[0, 0] == float("inf")


@pytest.mark.parametrize("runner", runners("score_variant"))
@pytest.mark.parametrize("k", [None, 10**20])
def test_the_gaussian_density_uses_no_k(k, runner):
    x = torch.randn(2, 7, 3)
    without = runner(h2ot.score_tokens, x, k, density="gaussian", cutoff=0.5)
    assert_same(runner, without.score, runner(h2ot.score_tokens, x, density="gaussian", cutoff=0.5).score)


ON_CPP = [p for p in runners("score_tokens") if p.values[0].backend == "cpp"]


@pytest.mark.parametrize("runner", ON_CPP)
@pytest.mark.parametrize("k", [2, 70])
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_noise_that_is_nan_is_denser_than_nobody(kind, k, runner):
    """Of many tokens, gathered or not: those with such noise spoil no order of the others."""
    case = TokenCase(kind, B=1, N=1601, C=8, k=k)
    noise = 1e-6 * torch.rand(1, case.N, dtype=torch.float64)
    noise[:, ::20] = float("nan")
    ours, exact = (
        f(case.tokens(), k, noise=noise) for f in (partial(runner, h2ot.score_tokens), python_ref.score_tokens)
    )
    assert_scores(
        h2ot.TokenScores(*(x.nan_to_num(-1.0) for x in ours)), h2ot.TokenScores(*(x.nan_to_num(-1.0) for x in exact))
    )
    assert (exact.parent[:, ::20] == -1).all()


@pytest.mark.parametrize("runner", ON_CPP)
@pytest.mark.parametrize(("N", "C"), [(40, 3), (300, 512), (1601, 8)])
@pytest.mark.parametrize("exponent", [400, 508, 540, 1020])
def test_float64_tokens_of_any_size(exponent, N, C, runner):
    """Ordinary tokens beside some so large that squares nearly overflow, or do: then distances are infinite."""
    x = TokenCase("smooth", B=1, N=N, C=C, dtype=torch.float64).tokens()
    x[:, ::3] *= 2.0**exponent / 8
    ours, exact = runner(h2ot.score_tokens, x), python_ref.score_tokens(x)
    torch.testing.assert_close(ours[:3], exact[:3], rtol=SCORE_RTOL, atol=SCORE_ATOL, equal_nan=True)
    near = exact.distance.isfinite()
    assert torch.equal(ours.parent[near], exact.parent[near])
    clusters = runner(h2ot.cluster_tokens, x, N // 3)
    labels = python_ref.assign_clusters(x, clusters.index)
    assert torch.equal(clusters.labels, labels)
    assert torch.equal(runner(h2ot.assign_clusters, x, clusters.index), labels)


def test_a_tf32_product_would_be_caught():
    """Negative control: distances from products rounded as TF32 does fail the comparison that every backend passes."""
    x = next(case for case in TOKEN_CASES if case.kind == "offset").tokens()
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    exact = python_ref.score_tokens(x.double())
    with pytest.raises(AssertionError):
        assert_scores(python_ref.score_tokens(rounded.double()), exact)
