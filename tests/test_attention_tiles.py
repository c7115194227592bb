"""Attention in bfloat16 on the tile unit (AMX) or by products of pairs in vectors (AVX512-BF16).

Natively where the CPU has one of them; the same source on an emulated unit, and compiled for the vectors.
"""

import ctypes
import functools
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from h2ot_kernels import _C
from h2ot_kernels.inference import tiles_run
from h2ot_kernels.recover_attention import recover_attention
from h2ot_kernels.timing import interleave

from .compare import assert_within
from .tiles import BAND, DOTS, UNIT_AND_PAIRS, at, build, fails, guarded, needs_dots, needs_either

BF16 = torch.bfloat16
# B, F, K, H, D: below, at and above a tile of keys, a step of them, a panel of queries, a step of channels
SIZES = [
    (1, 16, 64, 1, 32),
    (2, 33, 65, 2, 16),
    (1, 31, 95, 3, 40),
    (2, 64, 81, 1, 64),
    (1, 17, 112, 2, 39),
    (3, 32, 67, 1, 100),
    (1, 65, 129, 2, 1),
]


def native(query, key, value, num_heads, scale):
    return recover_attention(query, key, value, num_heads, scale=scale, backend="cpp")


class Compiled:
    """The kernel for the emulated unit or for vectors; the bytes beside its result stay as they are."""

    def __init__(self, folder: Path, *replaced: tuple[str, str, str], target: str = UNIT_AND_PAIRS):
        self.library = build(folder, "attention.cpp", *replaced, target=target)

    def __call__(self, query, key, value, num_heads, scale):
        (B, K, C), (query_rows, F, _) = value.shape, query.shape
        # One layout for all three: rows of more than C elements, between bands of NaN.
        apart, batch = C + 5, max(F, K) * (C + 5)
        given = [torch.full((max(B, 1), max(F, K), apart), float("nan"), dtype=BF16) for _ in range(3)]
        for memory, x in zip(given, (query, key, value), strict=True):
            memory[: x.shape[0], : x.shape[1], :C] = x
        whole, out = guarded(B * F * C, BF16)
        sizes = [ctypes.c_int64(size) for size in (B, F, K, C, num_heads, query_rows, apart, batch)]
        assert self.library.attention(*map(at, given), *sizes, ctypes.c_double(scale), at(out)) == 0
        assert (whole[:BAND] == 7).all()
        assert (whole[-BAND:] == 7).all()
        return out.view(B, F, C)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Compiled(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    return Compiled(tmp_path_factory.mktemp("dots"), target=DOTS)


RUNS = {"native": needs_either, "emulated": needs_dots, "dots": needs_dots}


@pytest.fixture(params=[pytest.param(name, marks=needs) for name, needs in RUNS.items()])
def run(request):
    return native if request.param == "native" else request.getfixturevalue(request.param)


def made(B, F, K, H, D, query_rows=None, seed=0):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return tuple(draw(rows, T, H * D).to(BF16) for rows, T in ((query_rows or B, F), (B, K), (B, K)))


def by_torch(query, key, value, num_heads, scale, dtype):
    heads = [x.to(dtype).expand(len(value), -1, -1).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in
             (query, key, value)]  # fmt: skip
    weights = (heads[0] @ heads[1].mT * scale).softmax(-1)
    return (weights @ heads[2]).transpose(1, 2).flatten(2)


def check(run, sizes, scale=None, query_rows=None, factor=1.0):
    query, key, value = made(*sizes, query_rows)
    given = factor * query, key, value, sizes[3], scale or sizes[4] ** -0.5
    assert_within(run(*given), *(by_torch(*given, dtype) for dtype in (torch.float64, BF16)), sizes[2])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_within_bound(run, sizes):
    check(run, sizes)
    check(run, sizes, scale=0.3, query_rows=1)


def test_sharp_and_flat_weights(run):
    """One key takes all of the weight; all take the same."""
    for factor in (40.0, 1e-3, 0.0):
        check(run, SIZES[3], factor=factor)


def test_weights_far_below_the_largest_vanish(run):
    query, key, value = (torch.ones(1, n, 32, dtype=BF16) for n in (16, 70, 70))
    value[:, 1:] = 3e38
    key[:, 1:] = -100
    assert (run(query, key, value, 1, 1.0) == 1).all()


@pytest.mark.parametrize("size", [2.0**31, 2.0**40, 2.0**100])
def test_huge_logits(run, size):
    """One is the largest by far, or all are equal: their multiples are rounded by more than exponents."""
    query, key, value = (torch.zeros(1, n, 32, dtype=BF16) for n in (16, 70, 70))
    query[..., 0] = size**0.5 * 1.07
    key[:, 5, 0], value[:, 5] = size**0.5 * 1.3, 1
    assert (run(query, key, value, 1, 1.0) == 1).all()
    key[..., 0] = key[:, 5, 0]
    given = query, key, made(1, 16, 70, 1, 32)[2], 1, 1.0
    assert_within(run(*given), *(by_torch(*given, dtype) for dtype in (torch.float64, BF16)), 70)


def test_on_average_as_accurate_as_pytorch(run):
    query, key, value = made(2, 64, 133, 2, 64)
    given = query, key, value, 2, 0.125
    exact = by_torch(*given, torch.float64)
    theirs = functional.scaled_dot_product_attention(
        *(x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (query, key, value))
    )
    ours, theirs = run(*given), theirs.transpose(1, 2).flatten(2)
    errors = [(y.double() - exact).square().mean().sqrt() for y in (ours, theirs)]
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(run, bad):
    """What a key or a value holds reaches the queries of its sample and head; what a query holds, that query."""
    sizes = 2, 33, 65, 2, 32
    for which in range(3):
        given = [x.clone() for x in made(*sizes)]
        given[which][1, 7, 40] = bad  # of head 1
        got, exact = run(*given, 2, 0.2), by_torch(*given, 2, 0.2, torch.float64)
        assert got[0].isfinite().all()
        assert got[1, :, :32].isfinite().all()
        assert torch.equal(got.isfinite(), exact.isfinite())
        assert bad == bad or not exact.isfinite().all()


def test_the_same_bits_in_any_batch(run):
    query, key, value = made(3, 40, 65, 2, 32)
    whole = run(query, key, value, 2, 0.2)
    for b in range(3):
        assert torch.equal(run(query[b : b + 1], key[b : b + 1], value[b : b + 1], 2, 0.2), whole[b : b + 1])
    assert torch.equal(run(query[:, 16:32], key, value, 2, 0.2), whole[:, 16:32])


@needs_either
def test_threads_and_strides_change_no_bit():
    query, key, value = made(2, 243, 243, 4, 32)
    wanted = native(query, key, value, 4, 0.2)
    beside = torch.cat([query, key, value], -1).chunk(3, -1)
    assert torch.equal(native(*beside, 4, 0.2), wanted)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(native(query, key, value, 4, 0.2), wanted)
    finally:
        torch.set_num_threads(threads)


@needs_either
def test_sharp_weights_take_no_longer():
    """A subnormal weight would take the machine as long as fifty others: 10 times as long in all, when it was tried."""
    query, key, value = made(4, 128, 128, 4, 64)
    calls = {factor: functools.partial(native, factor * query, key, value, 4, 0.125) for factor in (1.0, 100.0)}
    took = interleave(calls, seconds=0.2, min_calls=20)
    assert took[100.0].p10 < 4 * took[1.0].p10


@needs_either
def test_when_they_are_used():
    """Its bits are not those of the vector units, which have the few keys, the few queries and scales below 0."""
    few = (16, 48) if tiles_run() else (64, 64)  # keys of long heads and of short ones
    for F, K, D, scale, expected in (
        (16, few[0], 32, 0.3, True),
        (16, few[0] - 1, 32, 0.3, False),
        (16, few[1], 31, 0.3, True),
        (16, few[1] - 1, 31, 0.3, False),
        (15, 64, 32, 0.3, False),
        (16, 64, 32, -0.3, False),
    ):
        given = *made(2, F, K, 2, D), 2, scale
        results = []
        for name in ("avx512", "avx2"):
            _C.set_capability(name)
            results.append(native(*given))
        assert torch.equal(*results) != expected
        exact = by_torch(*given, torch.float64)
        assert_within(results[0], exact, by_torch(*given, BF16), K)


MISTAKES_OF_LOGITS = {  # of attention scores, too
    "a step of channels is left out": ("half_products.h", "p < pairs; p += kSide", "p + kSide < pairs; p += kSide"),
    "the halves of a panel are the same": ("half_products.h", "columns + columns_apart, kDepth", "columns, kDepth"),
    "a pair of channels is left out": ("attention_logits.h", "groups_of(D, 2)", "D / 2 / kSide * kSide"),
    "tokens are not transposed": ("attention_logits.h", "      transpose(rows);", ""),
}  # fmt: skip
MISTAKES = MISTAKES_OF_LOGITS | {
    "the unit itself": ("emulated.h", "to += sum[0] + sum[1];", "to += sum[0];"),
    "padded keys count": ("attention.cpp", "k + i + kSide < K ? weight", "k < K ? weight"),
    "values of a pair are neighbours": ("attention.cpp", "other = k + kSide, c", "other = k + 1, c"),
    "queries beyond the last are written": ("attention.cpp", "if (q >= queries) break;", ""),
    "channels beyond the last are written": ("attention.cpp", "if (channels >= kStepChannels) {", "if (true) {"),
    "channels are not in turn": ("attention.cpp", "lane % 2 * kFloats + lane / 2", "lane"),
    "one tile of values twice": ("attention.cpp", "multiply<2>(values, next,", "multiply<2>(values, 0,"),
    "all heads share a query": ("attention.cpp", "(h * head.panels + panel)", "panel"),
    "the largest of a lane misses keys": ("softmax.h", "for (; k < K; k++,", "for (; k + 1 < K; k++,"),
    "weights are cut": ("attention.cpp", "(as_words(first) + 0x8000u) >> 16", "as_words(first) >> 16"),
    "keys of the sample before": ("heads.h", "(task == begin || panel == 0)", "(task == begin)"),
    "every sample has the first one's query": ("attention.cpp", "a.query_rows == 1 ? 0 : b", "0"),
    "the difference comes last": ("attention.cpp", "(logit - most) * rate", "logit * rate - most * rate"),
}  # fmt: skip
MISTAKES_OF_DOTS = {
    "the last pair of channels is left out": ("half_products.h", "pairs < kSide ? pairs", "pairs < kSide ? pairs - 1"),
    "one tile of keys twice": ("half_products.h", "rows + tile * rows_apart", "rows"),
    "one half of a panel twice": ("half_products.h", "columns + half * columns_apart", "columns"),
    "sums of both halves in one": ("half_products.h", "kSumsStep + half * kSide)", "kSumsStep)"),
    "a row's pairs of its neighbour": ("half_products.h", "r * kStepHalves + 2 * pair", "r * kStepHalves + 2"),
}  # fmt: skip
PLANTED = [pytest.param(UNIT_AND_PAIRS, mistake, id=name, marks=needs_dots) for name, mistake in MISTAKES.items()]
PLANTED += [pytest.param(DOTS, mistake, id=name, marks=needs_dots) for name, mistake in MISTAKES_OF_DOTS.items()]


@pytest.mark.parametrize(("target", "mistake"), PLANTED)
def test_planted_mistakes_are_seen(target, mistake, tmp_path):
    wrong = Compiled(tmp_path, mistake, target=target)
    tests = [functools.partial(check, wrong, sizes, query_rows=rows) for sizes in SIZES for rows in (None, 1)]
    tests += [functools.partial(test, wrong) for test in (test_on_average_as_accurate_as_pytorch, test_large_logits)]
    tests += [functools.partial(test_huge_logits, wrong, 2.0**40)]
    assert any(fails(test) for test in tests)


def test_large_logits(run):
    """Without the lane's largest they would overflow: the largest of 67 keys is the last."""
    query, key, value = (torch.ones(1, n, 32, dtype=BF16) for n in (16, 67, 67))
    key *= 8
    key[:, -1] = 16
    value[:, -1] = 3
    assert (run(query, key, value, 1, 1.0) == 3).all()
