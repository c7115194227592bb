"""The CUDA scoring source, run on the CPU (tests/simt), held to the float64 oracle under every search and distance."""

import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch

import python_ref
from h2ot_kernels import _C

from . import simt
from .cases import TOKEN_CASES, TokenCase, oracle_index, oracle_scores, oracle_tokens
from .compare import assert_scores
from .simt import mutants, product_mutants, stream_mutants
from .simt.planted import build_planted, survivors

needs_simulator = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
pytestmark = needs_simulator

PLANS = [None, *itertools.product(simt.SEARCHES, simt.DISTANCES)]
HALVES = (torch.bfloat16, torch.float16)
CASES = [
    *(case for case in TOKEN_CASES if not case.large),
    TokenCase("smooth", N=70, C=8, k=60, K=30),  # lists that do not fit shared memory; streamed: rows in float64
    TokenCase("duplicates", N=300, C=12, k=5, K=100),  # streamed: several splits
    TokenCase("still", N=300, C=12, k=3, K=100, masked=True, noisy=True),
    # Scaled copies, but of whole rows (C 72) none: float64 decides.
    *(TokenCase(kind, C=C, dtype=torch.bfloat16) for kind in ("huge", "tiny") for C in (5, 68, 72)),
    *(TokenCase(kind, N=70, C=72, k=5, dtype=torch.bfloat16, masked=True, noisy=True) for kind in ("huge", "tiny")),
    *(TokenCase("smooth", C=72, N=70, dtype=dtype) for dtype in HALVES),  # read in place
    *(TokenCase(kind, C=136, N=70, dtype=dtype) for kind in ("duplicates", "nonfinite") for dtype in HALVES),
    *(TokenCase("still", B=1, C=24, N=150, k=5, dtype=dtype, masked=True, noisy=True) for dtype in HALVES),
    *(TokenCase("integers", C=8, N=40, k=31, dtype=dtype) for dtype in HALVES),  # streamed: rows in float64
]
LARGE = [
    TokenCase("smooth", B=1, N=243, C=512, K=81),
    TokenCase("still", B=1, N=2100, C=3, K=700, masked=True),  # several keys per thread; streamed by choice
]


def name_of(plan) -> str:
    return "counted" if plan is None else "-".join(plan)


def call_of(case: TokenCase, **options) -> simt.Call:
    given = case.arguments()
    mask = given.get("mask")
    if "lengths" in given:
        inside = torch.arange(case.N) < given["lengths"][:, None]
        mask = inside if mask is None else mask & inside
    keep = None if case.keep is None else torch.tensor([[case.keep]])
    return simt.Call(case.tokens(), case.k, case.K, mask, given.get("noise"), keep, **options)


def run(calls, flags=simt.SANITIZED, driver=None):
    with tempfile.TemporaryDirectory() as folder:
        done = simt.run(calls, driver or simt.build(flags), Path(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return calls


def allows(plan, case) -> bool:
    """Whether the plan is one of its own for this case: one product is for tokens of 16 bits."""
    return plan is None or plan[1] != "exact_products" or (case.dtype in HALVES and not case.J)


@functools.cache
def results(plan) -> dict:
    """Every case under one plan, one sample per pass where a plan is named, in one process."""
    cases = [case for case in CASES if allows(plan, case)]
    calls = [call_of(case, plan=plan, samples=1 if plan else 65535, seed=n) for n, case in enumerate(cases)]
    return dict(zip(cases, run(calls), strict=True))


def check(case: TokenCase, call: simt.Call) -> None:
    assert call.error == 0
    assert_scores(call.scores, oracle_scores(case))
    assert torch.equal(call.index, oracle_index(case))


PAIRS = [
    pytest.param(case, plan, id=f"{case}-{name_of(plan)}") for plan in PLANS for case in CASES if allows(plan, case)
]


@pytest.mark.parametrize(("case", "plan"), PAIRS)
def test_scores_and_kept_tokens_equal_the_oracle(case, plan):
    check(case, results(plan)[case])


@pytest.mark.parametrize("plan", PLANS[1:], ids=name_of)
def test_every_plan_gives_the_same_bits(plan):
    for case, ours in results(plan).items():
        counted = results(None)[case]
        assert all(map(torch.equal, ours.scores, counted.scores)), case


def test_large_samples():
    for case, call in zip(LARGE, run([call_of(case) for case in LARGE], simt.FAST), strict=True):
        check(case, call)


def test_large_tiles_of_products_give_the_same_bits():
    for case in (
        TokenCase("random", B=1, N=140, C=100, k=5, K=40, masked=True),
        TokenCase("offset", N=150, C=40, J=2),
        *(TokenCase(kind, N=130, C=72, dtype=dtype) for kind in ("smooth", "nonfinite") for dtype in HALVES),
    ):
        plan = ("stored", "exact_products" if case.dtype in HALVES else "products")
        for side in (128, 64):
            (call,) = run([call_of(case, plan=plan, side=side)])
            check(case, call)


# Around a block's tokens, a warp's lanes, a tile's rows and columns, a block's threads, and the keys that they hold.
COUNTS = [*(n + d for n in (8, 16, 32, 64, 256, 512) for d in (-1, 0, 1)), 1023, 1025]


@pytest.mark.parametrize("N", COUNTS)
def test_every_count_around_a_block(N):
    cases = [TokenCase(kind, B=1, N=N, C=4, K=N // 3, keep=N - 1) for kind in ("random", "integers")]
    for case, call in zip(
        cases, run([call_of(case, plan=("stored", "direct")) for case in cases], simt.FAST), strict=True
    ):
        check(case, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_tiles_of_differences_give_the_same_bits(dtype):
    cases = [
        TokenCase("still", B=1, N=250, C=70, K=80, dtype=dtype),
        TokenCase("nonfinite", B=1, N=192, C=33, k=5, K=80, dtype=dtype, masked=True),
        TokenCase("huge", B=1, N=241, C=40, K=80, dtype=dtype),
    ]
    plan = {"plan": ("stored", "direct")}
    few, many = ([call_of(case, **plan, multiprocessors=n) for case in cases] for n in (1, 132))
    for case, large, small in zip(cases, run(few, simt.FAST), run(many, simt.FAST), strict=True):
        shape = (case.B, case.N, 1, case.C, case.k, "float64")
        tiles = [_C.plan_score(*shape, multiprocessors=n)["tile"] for n in (1, 132)]
        assert tiles == [(32, 64), (16, 32)]
        check(case, large)
        assert all(map(torch.equal, large.scores, small.scores))
        assert torch.equal(large.index, small.index)


def test_the_largest_numbers_are_scaled():
    x = torch.randn(1, 70, 40) * 1e37
    x[0, 5] = 3.3e38
    x[0, 11] = -3.3e38
    for dtype in (torch.float32, torch.bfloat16):
        for distance in ("products", "exact_products", "direct"):
            if (dtype, distance) == (torch.float32, "exact_products"):
                continue
            for search in simt.SEARCHES:
                (call,) = run([simt.Call(x.to(dtype), plan=(search, distance), num_tokens=20)])
                assert_scores(call.scores, python_ref.score_tokens(x.to(dtype).double()))


@pytest.mark.parametrize("search", simt.SEARCHES)
def test_very_many_channels_of_large_numbers(search):
    """Their squares are summed as they are while no sum leaves float32's range."""
    x = torch.randn(1, 5, 20000).sign() * 1.99 * 2.0**55
    x[0, 1], x[0, 2] = -x[0, 0], x[0, 0]
    x[0, 2, :9] /= 2
    (call,) = run([simt.Call(x, 2, 2, plan=(search, "direct"))])
    assert_scores(call.scores, python_ref.score_tokens(x.double(), 2))


@pytest.mark.parametrize("search", simt.SEARCHES)
def test_tokens_whose_differences_vanish_beside_one(search):
    """All bounds of the others are alike: a block's warps share the candidates of a row, and join what they found.

    Without sanitizers, where g++ 12 once left that out (CMakeLists.txt).
    """
    x = torch.randint(-8, 9, (1, 40, 8)) / 4
    x[0, 6] = 2.0**60
    for call in run([simt.Call(x, k, 9, plan=(search, "direct")) for k in (2, 3)], simt.FAST):
        assert_scores(call.scores, python_ref.score_tokens(x.double(), call.k))


@pytest.mark.parametrize("search", simt.SEARCHES)
def test_equal_tokens_whose_products_vanish(search):
    """Of their lower bounds none is 0, and those with nearer norms stand before them on the lists of their splits."""
    x = (1 + torch.randint(0, 8, (1, 300, 8))) / 16
    x[:, 256:] += 2
    x[:, [10, 280, 290]] = 1
    x = (x * 2.0**-92).to(torch.bfloat16)
    x[0, 150] = 2.0**-30
    (call,) = run([simt.Call(x, 2, 20, plan=(search, "exact_products"))], simt.FAST)
    assert_scores(call.scores, python_ref.score_tokens(x.double(), 2))


@pytest.mark.parametrize("distance", ["direct", "products"])
def test_lists_too_long_to_stream_need_nothing_of_the_first_search(distance):
    case = TokenCase("random", B=1, N=400, C=2, k=31, K=30)  # several are the densest of their neighbours
    for call in run([call_of(case, plan=("streamed", distance), seed=seed) for seed in (0, 1)]):
        check(case, call)


def test_any_order_of_threads_gives_the_same_bits():
    case = TokenCase("still", N=65, C=40, J=2, K=9, noisy=True)
    for plan in (("stored", "products"), ("streamed", "direct")):
        first, *others = run([call_of(case, plan=plan, seed=seed) for seed in range(6)])
        check(case, first)
        for other in others:
            assert all(map(torch.equal, first.scores, other.scores))
            assert torch.equal(first.index, other.index)


def test_any_strides_give_the_same_bits():
    x = torch.randn(2, 21, 5, 8)
    views = [
        x,
        x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        x.movedim(1, 3).contiguous().movedim(3, 1),
        torch.cat([x, x], -1)[..., :8],
        torch.cat([x, x[..., :1]], -1)[..., :8],  # rows that quads of channels do not fit
        x.repeat_interleave(2, 1)[:, ::2],
        x[:, :, :1].expand(-1, -1, 5, -1),
    ]
    calls = run([simt.Call(view) for view in views])
    for view, call in zip(views, calls, strict=True):
        assert_scores(call.scores, python_ref.score_tokens(oracle_tokens(view)))
    for call in calls[:-1]:
        assert torch.equal(call.scores.score, calls[0].scores.score)


def test_index_alone_is_the_same_index():
    for noisy in (False, True):
        case = TokenCase("smooth", N=65, C=12, K=20, keep=3, masked=True, noisy=noisy)
        calls = run([call_of(case, only_index=only, plan=plan) for plan in PLANS for only in (False, True)])
        for call in calls:
            assert torch.equal(call.index, calls[0].index)


def test_keep_rows_and_wrong_keep():
    x = TokenCase("smooth", B=3).tokens()
    keeps = [
        torch.tensor([[5, 20]]),
        torch.tensor([[1, 2], [3, 3], [26, 0]]),
        torch.tensor([[1, 2], [3, 27], [-1, 0]]),
        torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 1, 2], [7, 7, 7, 7, 7]]),
    ]
    calls = run([simt.Call(x, num_tokens=4, keep=keep) for keep in keeps])
    for call, keep in zip(calls[:2], keeps, strict=False):
        assert torch.equal(call.index, python_ref.prune_cluster(x.double(), 4, keep=keep))
    wrong = torch.full((4,), -1)
    expected = python_ref.prune_cluster(x.double(), 4, keep=torch.tensor([[1, 2], [0, 0], [0, 0]]))
    assert torch.equal(calls[2].index, torch.stack([expected[0], wrong, wrong]))
    expected = python_ref.prune_cluster(x.double(), 4, keep=torch.tensor([[0, 0, 0], [0, 1, 2], [7, 7, 7]]))
    assert torch.equal(calls[3].index, torch.stack([wrong, expected[1], expected[2]]))


# What must not survive: (file, text, replacement). Each is caught by the comparison below or by the simulator itself.
MUTANTS = {
    **mutants.MUTANTS,
    **product_mutants.MUTANTS,
    "rows of the first sample": ("score_device.cuh", " + b * this->x.stride_b", ""),
    "rows a channel late": ("score_device.cuh", "+ i * this->x.stride_n;", "+ i * this->x.stride_n + 4;"),
    "huge tokens multiplied as they are": (
        "score_products.cuh",
        "raw = is_raw<Operand>(from.scale[2 * b]);",
        "raw = from.scale != nullptr;",
    ),
    "norms of a token's own scale": ("score_pairs.cuh", "* factor * factor;", "* factor;"),
    "no factor of the other token": (
        "score_products.cuh",
        "? 1 : j < 0 ? 0 : job.operands.scale[b * job.x.N + j];",
        "? 1 : j < 0 ? 0 : job.operands.scale[b * job.x.N];",
    ),
    "no bound for products": ("plan.cpp", "bound.spread = float(", "bound.spread = 0 * float("),
    **stream_mutants.MUTANTS,
}
HUNTED = [
    TokenCase("smooth"),
    TokenCase("offset", C=40),
    TokenCase("integers", N=33, C=20, K=11),
    TokenCase("random", B=1, N=70, C=40, k=5, K=40),
    TokenCase("random", B=1, N=96, C=3, K=20),  # lists of two splits, proven to the last
    TokenCase("still", N=65),
    TokenCase("static"),
    TokenCase("equidistant", B=1, N=48, C=24),  # lists whose last entries prove nothing
    TokenCase("still", B=1, N=300, C=64, k=5, K=100),  # the same of products
    TokenCase("alike", B=1, N=600, C=64, K=100),  # equals that are listed, and others that are not
    TokenCase("smooth", N=70, C=8, k=60, K=30),  # too long for lists
    TokenCase("slow", B=2, N=400, C=64, K=100),  # those nearby in time are the nearest
    TokenCase("integers", B=1, N=300, C=2, K=100),  # peaks as dense as others
    TokenCase("random", B=1, N=6, k=5, K=2),  # as many neighbours as m averages tokens
]
HUNTED_PLANS = [plan for plan in PLANS[1:] if plan[1] != "exact_products"]
HUNTED_STORED = [
    TokenCase("still", N=65, k=5),  # a row has more candidates than its warp alone takes
    TokenCase("equidistant", B=1, N=65, k=5),  # the same of direct differences
    TokenCase("duplicates", N=48, noisy=True),  # of two equals one is denser, the other is not
    TokenCase("duplicates", N=30, k=1, K=29, keep=3),
    TokenCase("integers", B=1, N=40, C=2, k=5, K=21, masked=True),
    TokenCase("random", N=20, C=150, K=5, keep=11, masked=True),  # several slabs for each group of channels
    TokenCase("nonfinite", N=12, C=256, K=5),  # in the part of the second warp
    TokenCase("huge", C=40, dtype=torch.bfloat16),  # scaled in other ways
]
HUNTED_AS = [
    *((case, {"plan": plan}) for plan in HUNTED_PLANS[:2] for case in HUNTED_STORED + HUNTED),
    *(
        (TokenCase("random", B=1, N=140, C=100, K=40), {"plan": (search, "products"), "side": 128})
        for search in simt.SEARCHES
    ),
    *((case, {"plan": plan}) for plan in HUNTED_PLANS[2:] for case in HUNTED),
    *(
        (TokenCase(kind, B=1, N=300, C=8, K=40), {"plan": plan, "multiprocessors": 1})  # several tiles of a split
        for plan in HUNTED_PLANS[2:]
        for kind in ("random", "static")
    ),
    (TokenCase("alike", B=1, N=2400, C=64, K=100), {"plan": ("streamed", "products")}),  # searched in two rounds
    *(
        (TokenCase(kind, N=N, C=8, dtype=torch.bfloat16), {"plan": (search, "exact_products")})
        for kind, N in (("smooth", 27), ("huge", 140))  # huge ones that point away from each other
        for search in simt.SEARCHES
    ),
]


def is_right(driver: Path, folder: Path, hunted: tuple[TokenCase, dict], mistake: int = 0) -> bool:
    case, options = hunted
    call = call_of(case, **options)
    if simt.run([call], driver, folder, mistake=mistake).returncode:
        return False
    try:
        check(case, call)
    except AssertionError:
        return False
    return True


def survives(driver: Path) -> bool:
    """Whether all hunted cases are right: asked by tests/mutant_runs.py."""
    with tempfile.TemporaryDirectory() as folder:
        return all(is_right(driver, Path(folder), hunted) for hunted in HUNTED_AS)


def test_mutants_are_caught(tmp_path, drawn_mistakes):
    mistakes = drawn_mistakes(MUTANTS)
    driver = build_planted(mistakes, tmp_path, simt.QUICK)
    assert not survivors(mistakes, HUNTED_AS, functools.partial(is_right, driver, tmp_path))


def test_the_sanitizer_sees_what_leaves_its_memory(tmp_path):
    case = TokenCase("integers", N=33)  # nothing is left at the end of the matrix
    driver = build_planted(mutants.SANITIZED, tmp_path, simt.SANITIZED_QUICK)
    calls = [call_of(case, plan=("stored", "direct"), samples=1)]
    assert simt.run(calls, driver, tmp_path).returncode == 0
    for mistake in range(1, len(mutants.SANITIZED) + 1):
        done = simt.run(calls, driver, tmp_path, mistake=mistake)
        assert done.returncode != 0
        assert "AddressSanitizer: use-after-poison" in done.stderr
