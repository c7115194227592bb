"""The same CUDA source with products by warpgroups (sm_90a), run on the CPU: tests/simt built with -DSIMT_GROUPS."""

import functools
import itertools

import pytest
import torch

from . import simt
from .cases import TokenCase
from .simt import product_mutants
from .simt.planted import build_planted, survivors
from .test_cuda_simt import CASES, HALVES, allows, call_of, check, is_right, name_of, needs_simulator, run
from .test_cuda_simt_cluster import call_of as labelling_of
from .test_cuda_simt_cluster import check as check_labels
from .test_cuda_simt_cluster import is_right as is_labelled

pytestmark = needs_simulator

GROUPS = (*simt.SANITIZED, "-DSIMT_GROUPS")
PLANS = [plan for plan in itertools.product(simt.SEARCHES, simt.DISTANCES) if plan[1] != "direct"]
LARGE = [
    TokenCase("random", B=1, N=140, C=100, k=5, K=40, masked=True),
    TokenCase("offset", N=150, C=40, J=2),
    TokenCase("random", B=1, N=131, C=300, K=40),  # more lines than there is room for
    TokenCase("still", B=1, N=131, C=600, K=40, dtype=torch.bfloat16),
    *(TokenCase(kind, N=130, C=72, dtype=dtype) for kind in ("smooth", "nonfinite") for dtype in HALVES),
]


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_scores_and_kept_tokens_equal_the_oracle(plan):
    cases = [case for case in CASES if allows(plan, case)]
    calls = [call_of(case, plan=plan, seed=n) for n, case in enumerate(cases)]
    for case, call in zip(cases, run(calls, GROUPS), strict=True):
        check(case, call)


@pytest.mark.parametrize("side", [128, 64])
def test_every_tile_equals_the_oracle(side):
    plans = [("stored", "exact_products" if case.dtype in HALVES else "products") for case in LARGE]
    calls = [call_of(case, plan=plan, side=side) for case, plan in zip(LARGE, plans, strict=True)]
    for case, call in zip(LARGE, run(calls, GROUPS), strict=True):
        check(case, call)


@pytest.mark.parametrize("side", [128, 64])
def test_labels_equal_the_oracle(side, tmp_path):
    cases = [
        TokenCase("random", B=1, N=140, C=100, K=40, masked=True),
        TokenCase("smooth", B=2, N=70, C=72, K=30, dtype=torch.bfloat16),
    ]
    distances = ["exact_products" if case.dtype in HALVES else "products" for case in cases]
    calls = [labelling_of(case, plan=("stored", how), side=side) for case, how in zip(cases, distances, strict=True)]
    for case, call in zip(cases, check_labels(calls, tmp_path, GROUPS), strict=True):
        assert is_labelled(case, call)


HUNTED = [
    *((TokenCase("random", B=1, N=70, C=40, k=5, K=40), {"plan": plan, "side": 64}) for plan in PLANS[::2]),
    *(
        (TokenCase("random", B=1, N=140, C=C, K=40), {"plan": plan, "side": 128})
        for plan in PLANS[::2]
        for C in (100, 300)
    ),
    *(
        (case, {"plan": PLANS[0]})
        for case in (TokenCase("smooth"), TokenCase("offset", C=40), TokenCase("still", N=65))
    ),
]


def test_mutants_are_caught(tmp_path, drawn_mistakes):
    mistakes = drawn_mistakes(product_mutants.GROUP_MUTANTS)
    driver = build_planted(mistakes, tmp_path, (*simt.QUICK, "-DSIMT_GROUPS"))
    assert not survivors(mistakes, HUNTED, functools.partial(is_right, driver, tmp_path))
