"""The CUDA labels, run on the CPU (tests/simt), held to the float64 oracle under every search and distance."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch

import python_ref

from . import simt
from .cases import TOKEN_CASES, TokenCase, oracle_index, oracle_labels, oracle_tokens
from .simt.cluster import Labelling, run
from .simt.cluster_mutants import MUTANTS
from .simt.planted import build_planted, survivors

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

HALVES = (torch.bfloat16, torch.float16)
CASES = [
    *(case for case in TOKEN_CASES if not case.large),
    *(TokenCase("smooth", C=72, N=70, K=33, dtype=dtype) for dtype in HALVES),  # read in place
    # Scaled copies, but of whole rows (C 72) none: float64 decides.
    *(TokenCase(kind, C=C, dtype=torch.bfloat16) for kind in ("huge", "tiny") for C in (5, 68, 72)),
    *(TokenCase(kind, N=130, C=8, K=70, dtype=torch.bfloat16, masked=True) for kind in ("huge", "tiny")),
    *(TokenCase(kind, C=136, N=70, K=40, dtype=dtype) for kind in ("duplicates", "static") for dtype in HALVES),
    TokenCase("still", B=1, N=130, C=12, k=3, K=70, masked=True),  # several splits of the centres
    TokenCase("static", B=1, N=130, C=6, K=100),  # more candidates than a list holds, at distance 0
    TokenCase("clump", B=1, N=130, C=33, K=70),  # and at others
]
# Whether the index is given, the search of the scoring before, the distances.
WAYS = [(True, None), *((True, ("stored", distance)) for distance in simt.DISTANCES)]
WAYS += [(False, None), *((False, plan) for plan in itertools.product(simt.SEARCHES, simt.DISTANCES))]


def name_of(way) -> str:
    given, plan = way
    return f"{'given' if given else 'scored'}-{'counted' if plan is None else '-'.join(plan)}"


def allows(way, case) -> bool:
    """Whether a way is one of its own for this case: one product is for tokens of 16 bits, noise is scoring's."""
    given, plan = way
    if not given and case.noisy:
        return False
    return plan is None or plan[1] != "exact_products" or (case.dtype in HALVES and not case.J)


def mask_of(case: TokenCase):
    given = case.arguments()
    mask = given.get("mask")
    if "lengths" in given:
        inside = torch.arange(case.N) < given["lengths"][:, None]
        mask = inside if mask is None else mask & inside
    return mask


def call_of(case: TokenCase, given=True, **options) -> Labelling:
    keep = None if case.keep is None or given else torch.tensor([[case.keep]])
    return Labelling(case.tokens(), oracle_index(case) if given else case.K, mask_of(case), case.k, keep, **options)


def check(calls: list[Labelling], tmp_path, flags=simt.SANITIZED) -> list[Labelling]:
    done = run(calls, tmp_path, simt.build(flags, name="cluster_driver"))
    assert done.returncode == 0, done.stderr[-4000:]
    return calls


def is_right(case: TokenCase, call: Labelling) -> bool:
    found, wanted = (call.kept, call.labels), (oracle_index(case), oracle_labels(case))
    return call.error == 0 and all(map(torch.equal, found, wanted))


@functools.cache
def results(way, folder) -> dict:
    """Every case in one way, one sample per pass where a plan is named, in one process."""
    given, plan = way
    cases = [case for case in CASES if allows(way, case)]
    calls = [
        call_of(case, given, plan=plan, samples=1 if plan else 65535, seed=n, multiprocessors=n % 3 * 66 + 1)
        for n, case in enumerate(cases)
    ]
    return dict(zip(cases, check(calls, folder), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


PAIRS = [pytest.param(case, way, id=f"{case}-{name_of(way)}") for way in WAYS for case in CASES if allows(way, case)]


@pytest.mark.parametrize(("case", "way"), PAIRS)
def test_labels_equal_the_oracle(case, way, folder):
    assert is_right(case, results(way, folder)[case])


def drawn_index(B: int, N: int, K: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=g)[:K].sort().values for _ in range(B)])


def holds(call: Labelling) -> bool:
    wanted = python_ref.assign_clusters(oracle_tokens(call.x), call.index, mask=call.mask)
    return call.error == 0 and torch.equal(call.labels, wanted)


# Around a block's tokens, a warp's lanes, a tile's rows and columns, of tokens and of centres.
COUNTS = [n + d for n in (8, 16, 32, 64, 128) for d in (-1, 0, 1)]


@pytest.mark.parametrize("distance", ["direct", "products"])
def test_every_count_around_a_tile(distance, tmp_path):
    calls = []
    for n, count in enumerate(COUNTS):
        for kind, (N, K) in (("random", (count, max(count // 3, 1))), ("integers", (131, count))):
            x = TokenCase(kind, B=1, N=N, C=4 + n % 3).tokens()
            options = {"plan": ("stored", distance), "seed": n, "multiprocessors": 1 + n % 2 * 131}
            calls.append(Labelling(x, drawn_index(1, N, K, n), side=(64, 128)[n % 2], **options))
    assert all(map(holds, check(calls, tmp_path, simt.FAST)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_tile_gives_the_same_labels(dtype, tmp_path):
    case = TokenCase("still", B=3, N=150, C=70, K=80, dtype=dtype, masked=True)
    plans = [("stored", "direct")]
    if dtype != torch.float64:
        plans.append(("stored", "exact_products" if dtype in HALVES else "products"))
    for plan, side, machine in itertools.product(plans, (64, 128), (1, 132)):
        calls = [call_of(case, plan=plan, side=side, multiprocessors=machine, samples=n) for n in (1, 2)]
        assert all(is_right(case, call) for call in check(calls, tmp_path, simt.FAST))


def test_large_samples(tmp_path):
    cases = [
        TokenCase("smooth", B=1, N=243, C=512, K=81),
        TokenCase("still", B=1, N=2100, C=3, K=700, masked=True),  # streamed by choice
    ]
    calls = [call_of(case, given) for case in cases for given in (True, False)]
    for call, case in zip(check(calls, tmp_path, simt.FAST), [case for case in cases for _ in range(2)], strict=True):
        assert is_right(case, call)


def plateaus(distances: list[float], masked: bool = False) -> Labelling:
    """Tokens near the origin, and centres so far from it: lists run full, and are emptied."""
    x = 0.01 * torch.randn(1, 24 + len(distances), 8, generator=torch.Generator().manual_seed(len(distances)))
    x[0, 24:] = 0.0
    x[0, 24:, 0] = torch.tensor(distances)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, -5:] = not masked
    return Labelling(x, torch.arange(24, x.shape[1])[None], mask)


PLATEAUS = [
    plateaus([d for d in (6.0, 5.0, 4.0, 3.0, 2.0) for _ in range(20)]),
    plateaus([d for d in (4.0, 3.0, 2.0) for _ in range(33)], masked=True),
    plateaus([2.0] * 70 + [1.0] * 70),
    plateaus([1.0] * 32 + [0.9] * 32 + [0.8] * 31),
    plateaus([5.0] * 20 + [9.0] * 12 + [4.0] * 5 + [9.0] * 27 + [4.0] * 10),  # some of a list stay
    plateaus([5.0] * 20 + [9.0] * 44 + [4.0] * 5 + [9.0] * 59 + [4.0] * 10),
    plateaus([1.0] * 40 + [2.0] * 30),  # the nearest come first
    plateaus([3.0] * 40 + [1.0] * 5, masked=True),  # the nearest are masked
]


def test_lists_that_run_full(tmp_path):
    ways = itertools.product(PLATEAUS, ("direct", "products"), (1, 132))
    calls = [
        replace(call, plan=("stored", distance), multiprocessors=machine, side=64) for call, distance, machine in ways
    ]
    assert all(map(holds, check(calls, tmp_path)))


def test_what_bounds_cannot_tell_apart_float64_does(tmp_path):
    for sphere in ({}, {"radius": 0.01, "spread": 1e-4}):
        ways = itertools.product(simt.SEARCHES, ("direct", "products"))
        scored = check([on_a_sphere(plan=plan, **sphere) for plan in ways], tmp_path)
        given = check([replace(call, index=call.kept) for call in scored], tmp_path)
        assert torch.equal(scored[0].kept, torch.arange(20).expand(8, -1))
        assert all(map(holds, given))
        assert all(torch.equal(call.labels, given[0].labels) for call in scored)
        assert given[0].labels[:, -1].unique().numel() > 3
    assert all(map(holds, check([behind_others()], tmp_path)))


def test_what_an_index_may_hold(tmp_path):
    x = TokenCase("integers", B=3, N=40, C=3).tokens()
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    right = torch.tensor([[5, 9, 20], [0, 39, -1], [-1, -1, -1]])
    for index in (right, right[:1], torch.tensor([[20, 3, 39]]), torch.zeros(3, 0, dtype=torch.int64)):
        ways = itertools.product((None, mask), (None, ("stored", "products")))
        calls = [Labelling(x, index, given, plan=plan) for given, plan in ways]
        assert all(map(holds, check(calls, tmp_path)))
    wrong = torch.tensor([[5, 40, 20], [-2, 0, 2**40], [-1, 7, -(2**40)]])
    (call,) = check([Labelling(x, wrong)], tmp_path)
    wanted = python_ref.assign_clusters(x.double(), torch.where((wrong >= 0) & (wrong < 40), wrong, -1))
    assert torch.equal(call.labels, wanted)
    twice = torch.tensor([[4, 8, 8] + [4] * 40 + [30]] * 3)  # in several tiles
    for machine in (1, 132):
        (call,) = check([Labelling(x, twice, multiprocessors=machine)], tmp_path)
        wanted = python_ref.assign_clusters(x.double(), torch.tensor([[4, 8, 30]] * 3))
        wanted = torch.tensor([0, 1, 43])[wanted]
        wanted[:, 4], wanted[:, 8] = 42, 2
        assert torch.equal(call.labels, wanted)


@pytest.mark.parametrize("plan", [("stored", "direct"), ("streamed", "products")], ids="-".join)
def test_a_wrong_keep_leaves_its_sample_without_labels(plan, tmp_path):
    x, keep = torch.randn(3, 9, 4), torch.tensor([[0], [9], [-1]])
    (call,) = check([Labelling(x, 1, keep=keep, plan=plan)], tmp_path)
    assert call.kept.tolist() == [[0], [-1], [-1]]
    assert call.labels.tolist() == [[0] * 9, [-1] * 9, [-1] * 9]


def test_no_samples_and_one_token(tmp_path):
    none, one = check(
        [Labelling(torch.randn(0, 5, 3), torch.tensor([[1, 3]])), Labelling(torch.randn(1, 1, 1), torch.tensor([[0]]))],
        tmp_path,
    )
    assert none.labels.shape == (0, 5)
    assert one.labels.tolist() == [[0]]


def test_centres_whose_squared_distance_overflows_attract_nobody(tmp_path):
    for kind, N, K in (("random", 20, 2), ("places", 100, 10)):
        x = 1e155 * TokenCase(kind, B=1, N=N, C=20, dtype=torch.float64).tokens()
        for index in (drawn_index(1, N, K, 1), drawn_index(1, N, 1, 2)):
            (call,) = check([Labelling(x, index)], tmp_path)
            assert (call.labels < 0).any()
            assert holds(call)


def test_the_largest_numbers_are_scaled(tmp_path):
    x = torch.randn(1, 70, 40) * 1e37
    x[0, 5], x[0, 11] = 3.3e38, -3.3e38
    ways = itertools.product((torch.float32, torch.bfloat16), simt.DISTANCES)
    calls = [Labelling(x.to(dtype), drawn_index(1, 70, 30, 3), plan=("stored", name)) for dtype, name in ways]
    assert all(map(holds, check(calls, tmp_path)))


def test_any_order_of_threads_gives_the_same_labels(tmp_path):
    case = TokenCase("still", N=65, C=40, J=2, K=30)
    for given, plan in ((True, ("stored", "products")), (True, ("stored", "direct")), (False, ("streamed", "direct"))):
        calls = [call_of(case, given, plan=plan, seed=seed) for seed in range(6)]
        assert all(is_right(case, call) for call in check(calls, tmp_path))


def test_any_strides_give_the_same_labels(tmp_path):
    x = torch.randn(2, 21, 5, 8)
    views = [
        x,
        x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        x.movedim(1, 3).contiguous().movedim(3, 1),
        torch.cat([x, x[..., :1]], -1)[..., :8],  # rows that quads of channels do not fit
        x.repeat_interleave(2, 1)[:, ::2],
        x[:, :, 0],
        torch.cat([x, x], 1)[:, :21, 0].to(torch.float16),
    ]
    assert all(map(holds, check([Labelling(view, drawn_index(2, 21, 6, 4)) for view in views], tmp_path)))


def on_a_sphere(radius: float = 1.0, spread: float = 0.0, **options) -> Labelling:
    """Centres as far from the last token of each sample as any, but for rounding and spread; k 1 keeps them.

    The first one stands apart: products are those of tokens less it.
    """
    g = torch.Generator().manual_seed(1)
    x = torch.nn.functional.normalize(torch.randn(8, 21, 100, generator=g), dim=-1)
    x[:, 1:] *= radius * (1 + spread * torch.randn(8, 20, 1, generator=g))
    x[:, -1] = 0.0
    return Labelling(x, 20, k=1, **options)


def behind_others() -> Labelling:
    """The same centres in a split of their own; those of the one before are no ties."""
    call = on_a_sphere(plan=("stored", "direct"))
    x = torch.cat([call.x[:, :1] * (3 + 0.1 * torch.arange(32))[:, None], call.x], 1)
    return replace(call, x=x, index=torch.arange(52)[None])


def hunted() -> list[Labelling]:
    direct, products = ("stored", "direct"), ("stored", "products")
    integers = TokenCase("integers", N=33, C=3, K=11, masked=True)
    calls = [
        call_of(integers, plan=direct, samples=1),
        *(call_of(TokenCase(kind, B=2, N=40, C=40, K=20), plan=products) for kind in ("clump", "offset")),
        behind_others(),
        on_a_sphere(plan=direct),
        on_a_sphere(0.01, 1e-4, plan=products),
        replace(on_a_sphere(plan=direct), index=torch.arange(20)[None]),
        replace(on_a_sphere(0.01, 1e-4, plan=products), index=torch.arange(20)[None]),
        call_of(TokenCase("duplicates", B=1, N=70, K=66), plan=direct, multiprocessors=1),
        call_of(TokenCase("random", B=1, N=130, C=40, K=120), plan=products, side=64),
        call_of(TokenCase("still", B=1, N=130, C=40, K=120), plan=products, side=64, multiprocessors=1),
        call_of(TokenCase("random", B=1, N=100, C=40, K=97), plan=direct),
        Labelling(integers.tokens(), drawn_index(1, 33, 9, 5), plan=direct),
        *(
            call_of(case, False, plan=plan, samples=1)
            for plan in (direct, products, ("streamed", "direct"))
            for case in (integers, TokenCase("duplicates", N=40))
        ),
        Labelling(torch.randn(3, 9, 4), 1, keep=torch.tensor([[0], [9], [-1]]), plan=direct),
        *(replace(call, plan=plan, side=64, multiprocessors=1) for call in PLATEAUS for plan in (direct, products)),
        Labelling(1e155 * TokenCase("random", B=1, N=20, C=20, dtype=torch.float64).tokens(), drawn_index(1, 20, 1, 2)),
    ]
    return [replace(call, seed=seed) for call in calls for seed in (1, 2)]


def test_mutants_are_caught(tmp_path, drawn_mistakes):
    mistakes = drawn_mistakes(MUTANTS)
    calls = hunted()
    driver = build_planted(mistakes, tmp_path, simt.QUICK, "cluster_driver")
    done = run(calls, tmp_path, driver)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(holds(call) for call in calls if call.is_given)

    def is_right(expected: Labelling, mistake: int) -> bool:
        call = replace(expected)
        if run([call], tmp_path, driver, mistake).returncode or call.error:
            return False
        return torch.equal(call.kept, expected.kept) and torch.equal(call.labels, expected.labels)

    assert not survivors(mistakes, calls, is_right)
