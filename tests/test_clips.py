"""Real motion: how often the kept tokens are those of the float64 oracle, beside the official formulation."""

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref
from python_ref import official

from .cases import CLIP_NAMES, CLIPS, TOKEN_CASES, Clip, oracle_tokens
from .runners import runners

needs_clips = pytest.mark.skipif(
    not CLIPS.is_dir(), reason=f"the motion clips are not at {CLIPS.name}/ beside the checkout"
)


def agreement(a, b, N):
    """Per sample, the share of the tokens kept by b that a keeps too."""
    flags = torch.zeros(2, len(a), N, dtype=torch.bool)
    flags[0].scatter_(1, a, True)
    flags[1].scatter_(1, b, True)
    return (flags[0] & flags[1]).sum(1) / flags[1].sum(1)


def count(x, K, k, noise=None):
    """(ours right, official right, samples) over the batch; right = all kept tokens are the float64 oracle's."""
    exact = python_ref.prune_cluster(oracle_tokens(x), K, k, noise=noise)
    ours = h2ot.prune_cluster(x, K, k, noise=noise)
    # The official formulation needs noise: without it its own float64 version decides ties by topk's whim.
    drawn = torch.rand(x.shape[:2]) * 1e-6 if noise is None else noise
    target = official.cluster_dpc_knn(x.double(), K, k, noise=drawn.double())[0].sort(-1).values
    theirs = official.cluster_dpc_knn(x, K, k, noise=drawn.to(x.dtype))[0].sort(-1).values
    N = x.shape[1]
    return (agreement(ours, exact, N) == 1).sum().item(), (agreement(theirs, target, N) == 1).sum().item(), len(x)


@needs_clips
@pytest.mark.parametrize("name", CLIP_NAMES)
@pytest.mark.parametrize("noisy", [False, True])
def test_clips_equal_the_oracle(name, noisy, record_property):
    x = Clip(name).tokens(stride=162)
    noise = torch.rand(x.shape[:2], dtype=torch.float64) * 1e-6 if noisy else None
    ours, theirs, windows = count(x, 81, 2, noise)
    record_property("count", f"{name}, noise {noisy}: windows right, ours {ours} / official {theirs} of {windows}")
    assert ours == windows
    assert ours >= theirs


@needs_clips
@pytest.mark.parametrize("runner", runners("prune_cluster"))
@pytest.mark.parametrize("name", CLIP_NAMES)
def test_short_windows_on_every_backend(name, runner):
    x = Clip(name).tokens(C=16, window=27, stride=240)
    assert torch.equal(runner(h2ot.prune_cluster, x, 9), python_ref.prune_cluster(oracle_tokens(x), 9))


def _official_can(case):
    """The official formulation takes neither joints nor masks of this kind, and overflows on huge tokens."""
    special = case.J or case.masked or case.ragged or case.kind in ("nonfinite", "huge")
    return case.B and case.N < 400 and not special


def test_right_at_least_as_often_as_the_official_formulation(record_property):
    ours = theirs = samples = 0
    for case in TOKEN_CASES:
        if not _official_can(case):
            continue
        right, official_right, B = count(case.tokens(), case.K, case.k, case.arguments().get("noise"))
        assert right == B, case
        ours, theirs, samples = ours + right, theirs + official_right, samples + B
    record_property("count", f"made cases: samples right, ours {ours} / official {theirs} of {samples}")
    assert theirs < ours


def test_static_input_keeps_the_first_frames():
    assert h2ot.prune_cluster(torch.randn(1, 1, 64).expand(2, 50, 64), 5).tolist() == [[0, 1, 2, 3, 4]] * 2
