"""What tests leave out in CI: by rule, and no more than that."""

import math
from pathlib import Path
from types import SimpleNamespace

import torch

from . import unchanged
from .arm import Selection
from .cases import TokenCase
from .sample import ELSEWHERE, LARGE, LARGEST, PLANTED, SHARE, UNCHANGED, left_out, planted_share

TRITON, CPP = (SimpleNamespace(backend=name) for name in ("triton", "cpp"))
FORMS = {
    dtype: [TokenCase(kind, N=N, dtype=dtype) for kind in ("smooth", "random", "ties") for N in range(20, 30)]
    for dtype in (torch.float32, torch.float64)
}


class Item:
    """What the rule asks of a test."""

    def __init__(self, name: str, file="test_score.py", **params):
        self.nodeid, self.name, self.path = f"{name}[{params}]", name, Path(file)
        self.callspec = SimpleNamespace(params=params)


def items(runner):
    return [Item("test_scores", case=case, runner=runner) for cases in FORMS.values() for case in cases]


def test_the_interpreter_takes_the_first_and_the_last_of_each_form():
    given = items(TRITON)
    out = left_out(given, as_ptx=False)
    assert [one for one in given if one not in out] == [given[0], given[29], given[30], given[59]]


def test_of_what_is_no_forms_first_a_share_runs_as_ptx_and_the_seed_says_which():
    given = items(TRITON)
    out = left_out(given, True, seed=5)
    assert out == left_out(given, True, seed=5) != left_out(given, True, seed=6)
    assert given[0] not in out
    assert given[30] not in out
    assert len(given) - len(out) == 2 + math.ceil(58 / SHARE)


def test_of_large_cases_the_first_of_each_size_runs_as_ptx():
    sizes = {case: case.B * case.N**2 * case.C for case in (TokenCase("smooth", B=1, N=N, C=512) for N in (243, 300))}
    assert all(LARGE < size <= LARGEST for size in sizes.values())
    given = [Item("test_scores", case=case, runner=TRITON) for case in sizes for _ in range(3)]
    assert left_out(given, True) == [*given[1:3], *given[4:6]]
    too_large = Item("test_scores", case=TokenCase("smooth", B=8, N=2048, C=512), runner=TRITON)
    assert left_out([too_large], True) == [too_large]


def test_other_backends_lose_nothing_and_what_needs_no_ptx_runs_once():
    assert left_out(items(CPP), True) == left_out(items(CPP), False) == []
    given = [Item(name, runner=CPP) for name in sorted(ELSEWHERE)]
    assert left_out(given, True) == given
    assert left_out(given, False) == []


def test_of_unchanged_kernels_a_share_of_what_is_left_runs():
    given = [*items(TRITON), *items(CPP)]
    for as_ptx, of_triton in ((False, given[:60]), (True, given)):
        usual = [one for one in of_triton if one not in left_out(given, as_ptx, 5)]
        out = left_out(given, as_ptx, 5, [unchanged.TRITON])
        kept = [one for one in of_triton if one not in out]
        assert len(kept) == math.ceil(len(usual) / UNCHANGED)
        assert set(kept) < set(usual)
        assert all(one not in out for one in given if one not in of_triton)
        assert out != left_out(given, as_ptx, 6, [unchanged.TRITON])
    assert left_out(given, False, 5, [unchanged.CUDA]) == left_out(given, False, 5)


def test_of_the_unchanged_cuda_source_a_share_of_the_plans_runs_each_with_all_its_cases():
    plans = [("streamed", str(n)) for n in range(10)]
    cases = FORMS[torch.float32]
    given = [Item("test_scores", "test_cuda_simt.py", case=case, plan=plan) for plan in plans for case in cases]
    out = left_out(given, False, 5, [unchanged.CUDA])
    left = [item.callspec.params["plan"] for item in given if item not in out]
    assert len(set(left)) == math.ceil(len(plans) / UNCHANGED)
    assert len(left) == len(set(left)) * len(cases)
    assert left_out(given, False, 5, [unchanged.TRITON]) == []


def test_of_unchanged_kernels_a_share_runs_on_arm_with_a_seed_only():
    given = items(SimpleNamespace(backend="cpp", capability="neon"))
    every, share = list(given), list(given)
    Selection(None).pytest_collection_modifyitems(every)
    Selection(5).pytest_collection_modifyitems(share)
    assert every == given
    assert len(share) == math.ceil(len(given) / UNCHANGED)
    assert share == [one for one in given if one in share]


def test_of_mistakes_with_tests_of_their_own_a_share_is_planted():
    given = [Item("tests/test_x.py::test_planted_mistakes_are_seen", "test_x.py", mistake=str(n)) for n in range(20)]
    left = [item for item in given if item not in left_out(given, False, 5)]
    assert len(left) == math.ceil(len(given) / PLANTED)
    assert left != [item for item in given if item not in left_out(given, False, 6)]


def test_planted_mistakes_are_drawn_by_the_seed():
    mistakes = {name: name.upper() for name in "abcdefgh"}
    draws = [planted_share(mistakes, seed) for seed in range(20)]
    assert draws[3] == planted_share(mistakes, 3)
    assert {len(drawn) for drawn in draws} == {3}
    assert all(list(drawn) == sorted(drawn) and drawn.items() <= mistakes.items() for drawn in draws)
    assert {name for drawn in draws for name in drawn} == set(mistakes)
    assert planted_share({}, 0) == {}
