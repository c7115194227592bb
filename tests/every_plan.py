"""Every plan of the CUDA library once: each search, distance and tile, of every dtype (tests/every_op.py is all small).

    python -m tests.every_plan [--device cuda] [--guard]

CASES reach what an H200 plans (test_cuda_plan.py). Here they are run, for sanitizers to watch; test_cuda_native.py
holds them to the float64 oracle.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

import h2ot_kernels as h2ot
import python_ref

from . import every_op
from .cases import DTYPES, TokenCase, oracle_tokens
from .compare import assert_scores

HALVES = (torch.bfloat16, torch.float16)
CHECKED = 2  # samples that are held to the oracle


def _cases(dtypes: Sequence[torch.dtype], ks: Sequence[int] = (2,), **size) -> list[TokenCase]:
    """Of each dtype and k, masked and noisy by turns, for both where there are several k."""
    made = [TokenCase("still", K=size["N"] // 3, dtype=dtype, k=k, **size) for dtype in dtypes for k in ks]
    ways = itertools.cycle([{"masked": True}, {"kind": "duplicates", "noisy": True}])
    masked = [replace(case, **way) for case, way in zip(made, ways, strict=False)]
    return masked + [replace(case, kind="random") for case in made if len(ks) > 1]


LISTED = (2, 40)  # neighbours: from lists, and of whole rows in float64
FLOAT32 = (torch.float32,)
CASES = [
    # Stored: tiles of differences, then of products. Tokens read in place, and copied.
    *(case for C in (16, 20, 3) for case in _cases(DTYPES, B=2, N=65, C=C)),
    *(case for C in (8, 3) for case in _cases(DTYPES, B=1, N=700, C=C)),
    *(case for C in (256, 254) for case in _cases(FLOAT32, B=2, N=700, C=C)),
    *(case for C in (20, 22) for case in _cases(FLOAT32, B=8, N=2048, C=C)),
    *_cases(HALVES, B=2, N=700, J=3, C=256),
    *_cases(HALVES, B=8, N=2048, J=3, C=20),
    *(case for C in (512, 510) for case in _cases(HALVES, B=96, N=27, C=C)),
    *(case for C in (8, 3) for case in _cases(HALVES, B=48, N=700, C=C)),
    # Streamed.
    *(case for C in (8, 3) for case in _cases(DTYPES, LISTED, B=1, N=2100, C=C)),
    *(case for C in (20, 22) for case in _cases(FLOAT32, LISTED, B=1, N=2100, C=C)),
    *(case for C in (24, 20) for case in _cases(HALVES, LISTED, B=1, N=2100, C=C)),
    *_cases(HALVES, LISTED, B=1, N=2100, J=3, C=20),
    # Labels by given tokens: the large tiles.
    *(case for C in (8, 3) for case in _cases(DTYPES, B=24, N=351, C=C)),
    *(case for C in (24, 20) for case in _cases(HALVES, B=8, N=700, C=C)),
    # Bounds that decide little.
    *(TokenCase(kind, B=1, N=2100, C=32, K=700) for kind in ("static", "slow", "nonfinite", "huge", "offset")),
]


def results(case: TokenCase, device: str) -> tuple[h2ot.TokenScores, torch.Tensor, torch.Tensor]:
    """Scores, kept tokens and labels. AssertionError: these are others in one call."""
    backend = "cuda" if device == "cuda" else "cpp"
    x = case.tokens().to(device)
    given = {"backend": backend, **{name: value.to(device) for name, value in case.arguments().items()}}
    scores = h2ot.score_tokens(x, case.k, **given)
    index = h2ot.prune_cluster(x, case.K, case.k, **given)
    clusters = h2ot.cluster_tokens(x, case.K, case.k, **given)
    labels = h2ot.assign_clusters(x, index, mask=given.get("mask"), backend=backend)
    assert torch.equal(clusters.index, index), "kept tokens, and those of the call that labels, too"
    assert torch.equal(clusters.labels, labels), "labels of the call that keeps, too, and those of kept tokens"
    return scores, index, labels


def check(case: TokenCase, device: str) -> None:
    """AssertionError: what differs from the oracle, in the first CHECKED samples."""
    scores, index, labels = results(case, device)
    x = oracle_tokens(case.tokens()[:CHECKED])
    given = {name: value[:CHECKED] for name, value in case.arguments().items()}
    exact = python_ref.score_tokens(x, case.k, **given)
    assert_scores(h2ot.TokenScores(*(value[:CHECKED].cpu() for value in scores)), exact)
    kept = python_ref.select_tokens(exact.score, case.K, mask=given.get("mask"))
    assert torch.equal(index[:CHECKED].cpu(), kept), "kept tokens"
    wanted = python_ref.assign_clusters(x, kept, mask=given.get("mask"))
    assert torch.equal(labels[:CHECKED].cpu(), wanted), "labels"


def run(device: str) -> tuple[int, list[str]]:
    """(cases, what was wrong)."""
    wrong = []
    for case in CASES:
        try:
            results(case, device)
        except Exception as error:  # whatever stops one case is its result: the others are run
            wrong.append(f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return len(CASES), wrong


if __name__ == "__main__":
    sys.exit(every_op.main(run=run))
