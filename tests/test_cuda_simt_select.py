"""The CUDA selection, run on the CPU (tests/simt), held to python_ref.select_tokens."""

from dataclasses import replace

import pytest
import torch

import python_ref

from . import simt
from .simt.planted import build_planted, survivors
from .simt.select import Choice, run

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

INFINITY, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([0.0, -0.0, INFINITY, -INFINITY, NAN, 1.0, -1.0, 5e-324, -5e-324, 1.7e308, -1.7e308])


def few(B: int, N: int, seed: int, values=SPECIAL) -> torch.Tensor:
    """Scores drawn from few values: ties everywhere."""
    drawn = torch.randint(0, len(values), (B, N), generator=torch.Generator().manual_seed(seed))
    return values.double()[drawn]


def spread(B: int, N: int, seed: int) -> torch.Tensor:
    return torch.randn(B, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(B: int, N: int, seed: int, share: float = 0.3) -> torch.Tensor:
    return torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) >= share


def kept_counts(N: int) -> list[int]:
    return sorted({1, min(2, N), N // 3 or 1, N - 1 or 1, N})


def holds(choice: Choice) -> bool:
    keep = choice.keep
    wanted = python_ref.select_tokens(choice.score, choice.num_tokens, keep=keep, mask=choice.mask)
    return choice.error == 0 and torch.equal(choice.index, wanted)


def check(choices: list[Choice], tmp_path, flags=simt.SANITIZED) -> list[Choice]:
    done = run(choices, tmp_path, simt.build(flags, name="select_driver"))
    assert done.returncode == 0, done.stderr[-4000:]
    return choices


def drawn(B: int, N: int, K: int, seed: int) -> list[Choice]:
    """Scores with ties and without, all tokens valid and few, nothing kept, the same for all, and of each sample."""
    g = torch.Generator().manual_seed(seed)
    M = min(K, 3)
    shared, own = (torch.randint(0, N, (rows, M), generator=g) for rows in (1, B))
    return [
        Choice(few(B, N, seed), K, seed=seed),
        Choice(spread(B, N, seed), K, masked(B, N, seed), seed=seed),
        Choice(few(B, N, seed), K, masked(B, N, seed, 0.8), shared, seed=seed),
        Choice(spread(B, N, seed), K, masked(B, N, seed), own, seed=seed),
    ]


@pytest.mark.parametrize("N", [1, 2, 31, 32, 33, 64, 100, 243, 255, 256, 257, 351, 511, 512, 513])
def test_selects_what_the_definition_selects(N, tmp_path):
    choices = [choice for K in kept_counts(N) for choice in drawn(2, N, K, N + K)]
    assert all(map(holds, check(choices, tmp_path)))


@pytest.mark.parametrize("N", [1023, 1024, 1025, 2048, 4095, 4096, 4097, 5000])
def test_several_keys_per_thread(N, tmp_path):
    choices = [choice for K in (1, N // 3, N) for choice in drawn(1, N, K, N + K)]
    assert all(map(holds, check(choices, tmp_path, simt.FAST)))


def test_any_order_of_threads_selects_the_same(tmp_path):
    choices = [Choice(few(1, 300, 5), 77, keep=torch.tensor([[9, 2]]), seed=seed) for seed in range(12)]
    assert all(map(holds, check(choices, tmp_path)))


def test_special_values_order_as_the_definition_says(tmp_path):
    every = torch.cat([SPECIAL, SPECIAL.flip(0)])[None].double()
    choices = [Choice(every, K) for K in range(1, every.shape[1] + 1)]
    choices += [Choice(value.expand(1, 70).double(), K) for value in SPECIAL for K in (1, 33, 70)]
    step = 2.0 ** -torch.arange(52, dtype=torch.float64)  # numbers that differ in one digit each
    choices += [Choice((1 + step * sign)[None], K) for sign in (-1, 1) for K in (1, 20, 51)]
    assert all(map(holds, check(choices, tmp_path)))


def test_no_samples_and_nothing_wanted(tmp_path):
    for choice in check([Choice(spread(0, 5, 1), 2), Choice(spread(2, 5, 1), 0)], tmp_path):
        assert choice.error == 0
        assert choice.index.numel() == 0


@pytest.mark.parametrize("N", [27, 300])
def test_wrong_keep_is_minus_one(N, tmp_path):
    score, mask = spread(4, N, 3), masked(4, N, 3)
    rows = [[0, 1, 2, 2, 1], [1, 0, N, 0, 1], [-1, 0, 0, 0, 0], [N - 1] * 5]
    right, wrong = torch.tensor([rows[0]] * 4), torch.tensor(rows)
    (choice,) = check([Choice(score, 3, mask, wrong)], tmp_path)
    right[3] = wrong[3]
    expected = python_ref.select_tokens(score, 3, keep=right, mask=mask)
    expected[1:3] = -1
    assert choice.error == 0
    assert torch.equal(choice.index, expected)
    many = torch.tensor([[0, 1, 2, N - 1]])  # one more than are selected; the second time as many
    over, full = check([Choice(score, 3, mask, many), Choice(score, 4, mask, many)], tmp_path)
    assert torch.equal(over.index, torch.full((4, 3), -1))
    assert torch.equal(full.index, many.expand(4, -1))


# What must not survive: (file, text, replacement).
MUTANTS = {
    "a keep row of the first sample": ("select.cu", "in.keep_rows > 1 ? b * in.M : 0", "0"),
    "more samples than a grid has": ("select.cu", "SelectJob{args, keys, first}", "SelectJob{args, keys, first + 1}"),
    "0 above -0": ("select.cuh", "const double clean = score == 0 ? 0.0 : score;", "const double clean = score;"),
    "a NaN is a score": ("select.cuh", "if (!valid || score != score) return 0;", "if (!valid) return 0;"),
    "negative scores from the least": ("select.cuh", "return bits >> 63 ? ~bits :", "return bits >> 63 ? bits :"),
    "masked tokens are not kept": ("select.cuh", "if (kept) return", "if (kept && valid) return"),
    "kept keys not first": ("select.cuh", "if (kept) return ~uint64_t(0);", "if (kept) return uint64_t(1) << 63;"),
    "ties from the highest token": (
        "select.cuh",
        "own_ties = tied + __popc(ties & lower);",
        "own_ties = tied + __popc(ties & ~lower) - tie;",
    ),
    "warps from the highest": ("select.cuh", "if (w < warp) {\n        at", "if (w > warp) {\n        at"),
    "a tie too many": ("select.cuh", "(tie && own_ties < least.ties)", "(tie && own_ties <= least.ties)"),
    "what is above leaves the least out": ("select.cuh", "key >= least.key : key >", "key > least.key : key >"),
    "ties count in no place": ("select.cuh", "? earlier : 0)", "? 0 * earlier : 0)"),
    "digits are added up in another order than they were counted": (
        "select.cuh",
        "own += bins[bin_of(kDigits - 1 - (lane * kOwnDigits + u))];",
        "own += bins[kDigits - 1 - (lane * kOwnDigits + u)];",
    ),
    "two arrays of bins in turn": ("select.cuh", "use = use == 2 ? 0 : use + 1;", "use = use == 1 ? 0 : use + 1;"),
    "the next bins are not cleared": ("select.cuh", "shared.bins[use][t] = 0;", "(void)t;"),
    "the leader's digit is counted twice": ("select.cuh", "if (counts && digit != common)", "if (counts)"),
    "the last key is not counted": (
        "select.cuh",
        "const bool counts = from + u * threads < N &&",
        "const bool counts = from + u * threads < N - 1 &&",
    ),
    "keys are read once for all": (
        "select.cuh",
        "const bool fits = N <= kKeysAhead * threads;",
        "const bool fits = N <= kKeysAhead * threads + 1000;",
    ),
    "kept token N": ("select.cuh", "keep.row[m] >= N", "keep.row[m] > N"),
    "kept token -1": ("select.cuh", "keep.row[m] < 0 || ", ""),
    "no more kept than selected": ("select.cuh", "if (wrong || all > K)", "if (wrong || all >= K)"),
    "one more kept than selected": ("select.cuh", "if (wrong || all > K)", "if (wrong || all > K + 1)"),
}
HUNTED = [
    *(choice for N in (33, 300, 700) for K in kept_counts(N) for choice in drawn(2, N, K, N + K)),
    Choice(few(1, 5000, 1, torch.tensor([0.0, -0.0, 1.0])), 1900),
    *(Choice(spread(2, 300, 3), 3, None, torch.tensor([row])) for row in ([299, 1, 2], [0, 1, 2, 3], [-1], [300])),
    Choice(spread(2, 40, 3), 2, None, torch.tensor([[3, 4], [5, 40]])),
    Choice(spread(2, 40, 3), 2, None, torch.tensor([[3, 4, 5], [5, 5, 7]])),
]


def test_mutants_are_caught(tmp_path, drawn_mistakes):
    mistakes = drawn_mistakes(MUTANTS)
    driver = build_planted(mistakes, tmp_path, simt.QUICK, "select_driver")
    expected = [replace(choice) for choice in HUNTED]
    assert run(expected, tmp_path).returncode == 0

    def is_right(expected: list[Choice], mistake: int) -> bool:
        found = [replace(choice) for choice in expected]
        done = run(found, tmp_path, driver, mistake)
        return done.returncode == 0 and all(
            torch.equal(ours.index, right.index) for ours, right in zip(found, expected, strict=True)
        )

    assert not survivors(mistakes, [expected[n : n + 10] for n in range(0, len(expected), 10)], is_right)
