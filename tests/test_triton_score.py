"""The Triton scores beyond the cases that all backends share: the bounds, the streaming path, odd shapes."""

from dataclasses import replace

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels.triton import common, score

from .cases import OPTION_CASES, TOKEN_CASES, TokenCase, oracle_index, oracle_scores
from .compare import assert_scores
from .runners import DEVICE, Runner


def recorded_bounds(x):
    """(low, slack) that gram_kernel stores for x: bounds of all squared distances, each token's share of the slack."""
    with common.record() as launches:
        score.score_tokens(x, 2, None, None)
    gram = next(launch for launch in launches if launch.kernel.__name__ == "gram_kernel")
    low, slack = gram.arguments[3:5]
    return low.double(), (slack[:, :, None] + slack[:, None, :]).double()


@pytest.mark.parametrize("kind", ["random", "smooth", "offset", "small", "large"])
@pytest.mark.parametrize(("N", "C"), [(33, 16), (40, 70)])
def test_bounds_hold_and_are_tight(kind, N, C):
    """low <= d^2 <= low + slack; and the slack is that of the spread of the tokens, not of their common offset."""
    x = TokenCase(kind, B=1, N=N, C=C).tokens().to(DEVICE)
    low, slack = recorded_bounds(x)
    exact = python_ref.score.squared_distances(x.double(), x.double())
    apart = ~torch.eye(N, dtype=torch.bool, device=DEVICE)
    assert (low <= exact)[:, apart].all()
    assert (exact <= low + slack)[:, apart].all()
    spread = (x.double() - x.double().mean(1, keepdim=True)).square().sum(-1).max()
    assert slack.max() <= spread * (C + 128) * 2.0**-21


CASES = [case for case in TOKEN_CASES if not case.large and case.B and (case.N <= 33 or case.C <= 7)]
STREAMED = [
    case
    for case in CASES
    if case.N in (1, 2, 5, 33)
    or case.kind in ("still", "static", "duplicates", "integers", "nonfinite", "huge", "offset")
    or case.dtype != torch.float32
    or case.k == 16
]
# Equal distances within and beyond the list of nearest tokens, in two tiles of columns.
STREAMED += [TokenCase("integers", B=1, N=70, C=3, k=k) for k in (2, 4)]
STREAMED += [
    case
    for case in OPTION_CASES
    if case.N < 99 and "metric" not in dict(case.options) and (case.kind == "nonfinite" or case.N < 3 or case.noisy)
]
STREAMED += [
    TokenCase("integers", B=1, N=40, C=3, k=3, options=(("exclude_self", True),)),
    TokenCase("still", B=1, N=40, C=3, options=(("density", "gaussian"), ("cutoff", 0.4))),
    *(
        TokenCase("duplicates", B=1, dtype=dtype, options=(("density", "gaussian"), ("cutoff", 0.4)))
        for dtype in (torch.float64, torch.bfloat16)
    ),
]


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_streaming_equals_the_oracle(case, monkeypatch):
    """What runs above 512 tokens, made to run on small cases."""
    monkeypatch.setattr(score, "SMALL", 0)
    triton = Runner("triton", DEVICE)
    assert_scores(triton(h2ot.score_tokens, case.tokens(), case.k, **case.arguments()), oracle_scores(case))
    index = triton(h2ot.prune_cluster, case.tokens(), case.K, case.k, keep=case.keep, **case.arguments())
    assert torch.equal(index, oracle_index(case))


@pytest.mark.parametrize("N", [243, 351])
def test_selection_of_a_clip_length(N):
    case = replace(TOKEN_CASES[1], kind="smooth", B=1, N=N, C=3, K=N // 3)
    x = case.tokens().to(DEVICE)
    ours = h2ot.prune_cluster(x, case.K, 2, keep=N // 2, backend="triton")
    assert torch.equal(ours, python_ref.prune_cluster(x.double(), case.K, 2, keep=N // 2))


def test_many_channels():
    x = torch.randn(1, 27, 512, device=DEVICE)
    assert_scores(h2ot.score_tokens(x, 2, backend="triton"), python_ref.score_tokens(x.double(), 2))


def test_the_same_bits_over_runs_and_batches():
    x = TokenCase("still", B=3, N=27, C=16).tokens().to(DEVICE)
    first = h2ot.score_tokens(x, 3, backend="triton")
    for other in (h2ot.score_tokens(x, 3, backend="triton"), h2ot.score_tokens(x.flip(0), 3, backend="triton")):
        flipped = [y.flip(0) for y in other] if not torch.equal(other.score, first.score) else other
        assert all(torch.equal(a, b) for a, b in zip(flipped, first, strict=True))


@pytest.mark.gpu
def test_16384_tokens_in_little_memory():
    x = torch.randn(1, 16384, 256, device="cuda", dtype=torch.bfloat16)
    h2ot.prune_cluster(x[:, :600], 100)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index = h2ot.prune_cluster(x, 4096, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 16384 * 300
    assert (index.diff() > 0).all()
