"""Selection: exact on every input, ties included; and the pruners that make scores."""

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref

from .cases import DTYPES
from .compare import assert_within
from .runners import runners

SCORES = {
    "random": lambda B, N: torch.randn(B, N),
    "ties": lambda B, N: torch.randint(0, 3, (B, N)).double(),
    "equal": lambda B, N: torch.zeros(B, N),
    "signed zeros": lambda B, N: torch.where(torch.rand(B, N) > 0.5, 0.0, -0.0),
    "infinities": lambda B, N: torch.randn(B, N).masked_fill(torch.rand(B, N) > 0.6, float("-inf")),
    "nan": lambda B, N: torch.randn(B, N).masked_fill(torch.rand(B, N) > 0.6, float("nan")),
}


@pytest.mark.parametrize("runner", runners("select_tokens"))
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 5), (243, 81), (351, 117), (2048, 3)])
def test_selection_is_exact(kind, N, K, runner):
    score, mask = SCORES[kind](3, N), torch.rand(3, N) > 0.4
    keep = torch.randint(0, N, (3, min(K, 4)))
    for given in ({}, {"mask": mask}, {"keep": N // 2}, {"keep": keep, "mask": mask}, {"keep": keep[0]}):
        ours = runner(h2ot.select_tokens, score, K, **given)
        assert torch.equal(ours, python_ref.select_tokens(score, K, **given)), given


@pytest.mark.parametrize("runner", runners("select_tokens"))
def test_a_number_of_tokens_per_sample(runner):
    score, lengths, counts = torch.randn(4, 50), torch.tensor([50, 3, 0, 20]), [5, 12, 3, 5]
    mask, keep = torch.arange(50) < lengths[:, None], torch.tensor([[1, 40], [0, 7], [2, 2], [9, 8]])
    for given in ({}, {"keep": 3}, {"keep": keep}):
        expected = python_ref.select_ragged(score, counts, mask=mask, **given)
        assert (expected >= 0).sum(1).tolist() == counts
        for form in (counts, tuple(counts), torch.tensor(counts), torch.tensor(counts).int()):
            assert torch.equal(runner(h2ot.select_tokens, score, form, lengths=lengths, **given), expected)
    assert runner(h2ot.select_tokens, score, [0, 0, 0, 0]).shape == (4, 0)
    for keep in (3, torch.tensor([3])):
        assert runner(h2ot.select_tokens, score[:0], [], keep=keep).shape == (0, 0)


@pytest.mark.parametrize("runner", runners("prune_cluster"))
@pytest.mark.parametrize("num_tokens", [3, [3]])
def test_tokens_that_are_not_finite_come_after_duplicates(num_tokens, runner):
    """Both have a score of -inf."""
    x = torch.tensor([[[float("nan")], [1.0], [1.0], [1.0], [5.0]]])
    assert runner(h2ot.prune_cluster, x, num_tokens).tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("runner", runners("select_tokens"))
def test_a_token_to_keep_that_is_named_again_counts_once(runner):
    score = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    for keep in ([3, 3, 3], torch.tensor([3, 3, 3])):
        assert runner(h2ot.select_tokens, score, 2, keep=keep).tolist() == [[1, 3]]


@pytest.mark.parametrize("runner", runners("select_tokens"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_every_dtype(dtype, runner):
    score = torch.randn(2, 50).to(dtype)
    assert torch.equal(runner(h2ot.select_tokens, score, 7), python_ref.select_tokens(score, 7))


@pytest.mark.parametrize("runner", runners("prune_motion"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_motion_is_exact(dtype, runner):
    pose = torch.randn(2, 243, 17, 2).to(dtype)
    pose[0, 40:60] = pose[0, 40]
    pose[1, 7, 3, 0] = float("nan")
    for x in (pose, pose.transpose(2, 3).contiguous().transpose(2, 3), pose[:, ::2]):
        ours = runner(h2ot.prune_motion, x, 81, keep=[0, 50])
        assert torch.equal(ours, python_ref.prune_motion(x, 81, keep=[0, 50]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 27, 64), (2, 3, 4, 51, 20), (1, 1, 1, 1, 1), (0, 2, 9, 8)])
def test_attention_scores_within_bound(shape, dtype):
    query, key = (torch.randn(shape).to(dtype) for _ in range(2))
    scale = shape[-1] ** -0.5
    ours = torch.ops.h2ot_kernels.attention_scores(query, key, scale)
    exact = python_ref.attention_scores(query.double(), key.double())
    assert_within(ours, exact, python_ref.attention_scores(query, key), shape[-1])


@pytest.mark.parametrize("runner", runners("prune_attention"))
@pytest.mark.parametrize("shape", [(2, 8, 27, 64), (2, 3, 4, 27, 20)])
def test_attention_pruning(shape, runner):
    query, key = torch.randn(shape), torch.randn(shape)
    for scale in (None, -0.3):
        ours = runner(h2ot.prune_attention, query, key, 9, keep=13, scale=scale)
        assert torch.equal(ours, python_ref.prune_attention(query.double(), key.double(), 9, keep=13, scale=scale))
    strided = runner(
        h2ot.prune_attention,
        query.mT.contiguous().mT,
        torch.cat([key, key], -1)[..., : shape[-1]],
        9,
        keep=13,
        scale=scale,
    )
    assert torch.equal(ours, strided)


@pytest.mark.parametrize("runner", runners("prune_attention"))
def test_first_frames_whose_products_overflow_receive_nothing(runner):
    query, key = torch.full((1, 1, 280, 8), 1e20), torch.full((1, 1, 280, 8), -1e20)
    key[:, :, 220:] = torch.randn(1, 1, 60, 8) * 1e-20
    ours = runner(h2ot.prune_attention, query, key, 20)
    assert torch.equal(ours, 220 + python_ref.prune_attention(query[:, :, 220:].double(), key[:, :, 220:].double(), 20))


def test_sampler_follows_the_integer_rule():
    for F, K in ((243, 81), (243, 1), (9, 9), (351, 117), (2, 1), (1, 1)):
        expected = [(F - 1) // 2] if K == 1 else [i * (F - 1) // (K - 1) for i in range(K)]
        assert h2ot.prune_sample(F, K).tolist() == [expected]


def test_sampler_composed_over_stages_keeps_the_centre():
    first = h2ot.prune_sample(243, 121, keep=121)
    centre = first[0].tolist().index(121)
    second = first[0][h2ot.prune_sample(121, 81, keep=centre)[0]]
    plain = h2ot.prune_sample(243, 121)[0][h2ot.prune_sample(121, 81)[0]]
    assert plain[:6].tolist() == [0, 2, 6, 8, 12, 14]
    assert plain[-2:].tolist() == [237, 242]
    assert 121 in second
    assert len(set(second.tolist())) == 81


def test_sampler_keep_replaces_the_nearest_lower_on_a_tie():
    assert h2ot.prune_sample(9, 3, keep=2).tolist() == [[2, 4, 8]]
    assert h2ot.prune_sample(9, 3, keep=[4, 5]).tolist() == [[0, 4, 5]]
    assert h2ot.prune_sample(9, 3, keep=[0, 1, 2]).tolist() == [[0, 1, 2]]


def test_sampler_result_is_the_callers_own():
    h2ot.prune_sample(9, 3).zero_()
    assert h2ot.prune_sample(9, 3).tolist() == [[0, 4, 8]]


@pytest.mark.parametrize("K", [1, 3])
def test_samples_of_any_clip_length_in_one_graph(K):
    torch._dynamo.reset()
    compiled = torch.compile(h2ot.nn.TokenPruningSampler(K), backend="eager", fullgraph=True)
    for F in (9, 13, 20):
        assert torch.equal(compiled(torch.zeros(2, F, 4))[1], h2ot.prune_sample(F, K))
    frames = torch.export.Dim("F", min=4, max=400)
    sampler = h2ot.nn.TokenPruningSampler(K)
    exported = torch.export.export(sampler, (torch.zeros(2, 9, 4),), dynamic_shapes={"x": {1: frames}})
    assert torch.equal(exported.module()(torch.zeros(2, 30, 4))[1], h2ot.prune_sample(30, K))


def test_numbers_of_tokens_a_sample_that_are_free_in_a_graph():
    def shares(x, lengths):
        return h2ot.prune_cluster(x, [max(length // 4, 1) for length in lengths], lengths=lengths)

    torch._dynamo.reset()
    compiled, x = torch.compile(shares, backend="eager", fullgraph=True, dynamic=True), torch.randn(3, 40, 4)
    for lengths in ([40, 20, 9], [32, 24, 3]):
        assert torch.equal(compiled(x, lengths), shares(x, lengths))


@pytest.mark.parametrize("keep", [lambda F: 3, lambda F: [F - 1, F // 2, F // 2 - 1, 0]])
def test_sampled_frames_to_keep_of_any_clip_length_in_one_graph(keep):
    def sampled(x):
        return h2ot.prune_sample(x.shape[1], 5, keep=keep(x.shape[1]))

    class Sampled(torch.nn.Module):
        forward = staticmethod(sampled)

    torch._dynamo.reset()
    compiled = torch.compile(sampled, backend="eager", fullgraph=True, dynamic=True)
    example, frames = torch.zeros(2, 20), torch.export.Dim("F", min=8)
    program = torch.export.export(
        Sampled(), (example,), dynamic_shapes=({1: frames},), prefer_deferred_runtime_asserts_over_guards=True
    ).module()
    for x in (example, *(torch.zeros(2, F) for F in range(9, 40, 3))):
        assert torch.equal(compiled(x), sampled(x))
        assert torch.equal(program(x), sampled(x))


@pytest.mark.parametrize("select", [lambda x, K: h2ot.select_tokens(x[..., 0], K), h2ot.prune_cluster])
def test_a_share_of_any_number_of_tokens_in_one_graph(select):
    def share(x):
        return select(x, max(x.shape[1] // 4, 1))

    class Share(torch.nn.Module):
        forward = staticmethod(share)

    torch._dynamo.reset()
    compiled = torch.compile(share, backend="eager", fullgraph=True, dynamic=True)
    example, N = torch.randn(2, 20, 4), torch.export.Dim("N", min=8)
    program = torch.export.export(
        Share(), (example,), dynamic_shapes=({1: N},), prefer_deferred_runtime_asserts_over_guards=True
    ).module()
    for x in (example, torch.randn(2, 9, 4), torch.randn(2, 40, 4)):
        assert torch.equal(compiled(x), share(x))
        assert torch.equal(program(x), share(x))


@pytest.mark.parametrize("strict", [False, True])
def test_the_last_token_of_any_number_is_kept_in_one_graph(strict):
    class Last(torch.nn.Module):
        def forward(self, x):
            return h2ot.prune_cluster(x, 4, keep=[0, x.shape[1] - 1])

    x, N = torch.randn(2, 20, 4), torch.export.Dim("N", min=8)
    program = torch.export.export(Last(), (x,), dynamic_shapes=({1: N},), strict=strict).module()
    for tokens in (x, torch.randn(2, 40, 4)):
        assert torch.equal(program(tokens), Last()(tokens))


def test_explain_and_lazy_modules():
    assert h2ot.explain("prune_sample").startswith("prune_sample on cpu: Python on the host")
    assert h2ot.onnx.export.__name__ == "export"
    assert h2ot.evaluation.__name__ == "h2ot_kernels.evaluation"
    with pytest.raises(AttributeError, match="has no attribute 'faster'"):
        _ = h2ot.faster
