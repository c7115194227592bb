"""Attention scores in bfloat16 on the tile unit (AMX): natively where the CPU has one, and on an emulated one.

What every kernel of prune_attention is held to: test_select.py.
"""

import ctypes
import functools
from pathlib import Path

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref

from .compare import assert_within
from .test_attention_tiles import MISTAKES_OF_LOGITS
from .tiles import RUNS, at, between_bands, build, fails, guarded, needs_emulation, needs_unit

BF16 = torch.bfloat16
# B, P, H, F, D: below, at and above a tile of keys, a panel of queries, a step of channels
SIZES = [
    (1, 1, 1, 16, 32),
    (2, 1, 2, 33, 16),
    (1, 3, 1, 31, 40),
    (2, 1, 1, 64, 64),
    (1, 2, 2, 17, 39),
    (1, 1, 3, 243, 100),
    (1, 1, 2, 65, 1),
]


def native(query, key, scale):
    return torch.ops.h2ot_kernels.attention_scores(query, key, scale)


class Compiled:
    """The kernel for the emulated unit; the bytes beside its result stay as they are."""

    def __init__(self, folder: Path, *replaced: tuple[str, str, str]):
        self.library = build(folder, "attention_score.cpp", *replaced)

    def __call__(self, query, key, scale):
        *_, F, D = query.shape
        given = [torch.full((*x.shape[:-1], D + 5), float("nan"), dtype=BF16) for x in (query, key)]
        for memory, x in zip(given, (query, key), strict=True):
            memory[..., :D] = x
        whole, score = guarded(len(query) * F, torch.float32)
        sizes = [ctypes.c_int64(size) for size in (*query.shape, D + 5)]
        assert self.library.attention_score(*map(at, given), *sizes, ctypes.c_double(scale), at(score)) == 0
        return between_bands(whole, score, (len(query), F))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Compiled(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(params=RUNS)
def run(request):
    return native if request.param == "native" else request.getfixturevalue(request.param)


def made(*sizes):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return draw(sizes).to(BF16), draw(sizes).to(BF16)


def check(run, query, key, scale):
    exact = python_ref.attention_scores(query.double(), key.double(), scale)
    assert_within(run(query, key, scale), exact, python_ref.attention_scores(query, key, scale), query.shape[-1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_within_bound(run, sizes):
    check(run, *made(*sizes), sizes[-1] ** -0.5)


@pytest.mark.parametrize("factor", [40.0, 1e-3, 0.0])
def test_sharp_and_flat_weights(run, factor):
    """One frame has all of a query's weight; all have the same."""
    query, key = made(*SIZES[3])
    check(run, factor * query, key, 0.125)


def test_large_logits(run):
    """Without the lane's largest they would overflow: the largest of 67 keys is the last."""
    query, key = (torch.ones(1, 1, 1, 67, 32, dtype=BF16) for _ in range(2))
    query *= 8
    key[..., -1, :] = 16
    score = run(query, key, 1.0)
    assert (score[0, :-1] == 0).all()
    assert score[0, -1] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(run, bad):
    """What a head holds reaches the scores of its sample."""
    for which in range(2):
        given = [x.clone() for x in made(2, 1, 2, 33, 32)]
        given[which][1, 0, 1, 7, 3] = bad
        score = run(*given, 0.2)
        assert score[0].isfinite().all()
        assert torch.equal(score.isnan(), python_ref.attention_scores(*given, 0.2).isnan())


def test_the_same_bits_in_any_batch(run):
    query, key = made(3, 1, 2, 65, 32)
    whole = run(query, key, 0.2)
    for b in range(3):
        assert torch.equal(run(query[b : b + 1], key[b : b + 1], 0.2), whole[b : b + 1])


@needs_unit
def test_threads_and_strides_change_no_bit():
    query, key = made(2, 3, 4, 100, 32)
    wanted = native(query, key, 0.2)
    beside = torch.cat([query, key], -1).chunk(2, -1)
    assert torch.equal(native(*beside, 0.2), wanted)
    assert torch.equal(native(query.transpose(1, 3).contiguous().transpose(1, 3), key, 0.2), wanted)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(native(query, key, 0.2), wanted)
    finally:
        torch.set_num_threads(threads)


@needs_unit
def test_when_it_is_used():
    """Its bits are not those of the vector units, which have few frames, scales below 0, channels apart."""
    query, key = made(2, 1, 2, 40, 32)
    turned = key.mT.contiguous().mT
    for given, expected in (
        ((query, key, 0.3), True),
        ((query[..., :24, :], key[..., :24, :], 0.3), True),
        ((query[..., :23, :], key[..., :23, :], 0.3), False),
        ((query[..., :8], key[..., :8], 0.3), True),
        ((query[..., :7], key[..., :7], 0.3), False),
        ((query, key, -0.3), False),
        ((query, turned, 0.3), False),
        ((turned, query, 0.3), False),
    ):
        score = native(*given)
        in_floats = native(given[0].float(), given[1].float(), given[2])
        assert torch.equal(score, in_floats) != expected
        check(lambda *_, score=score: score, *given)


@needs_unit
def test_what_is_kept():
    query, key = made(2, 3, 4, 100, 32)
    kept = h2ot.prune_attention(query, key, 25, scale=0.3)
    assert torch.equal(kept, python_ref.prune_attention(query.double(), key.double(), 25, scale=0.3))


MISTAKES = MISTAKES_OF_LOGITS | {
    "keys of one step twice": ("attention_logits.h", "keys + 2 * step * next, next", "keys, next"),
    "every panel has the first one's queries": ("attention_score.cpp", "(query) + first * a", "(query) + 0 * a"),
    "padded queries count": ("received.h", "used ? weight : Vector<E>{}", "weight"),
    "one half of a panel twice": ("received.h", "load(weights + kLanes<E>)", "load(weights)"),
    "a head's weights stay": ("received.h", "      memset(received", "      if (task == begin) memset(received"),
    "keys of the head before": ("received.h", "      work.take_key", "      if (task == begin) work.take_key"),
}  # fmt: skip


@needs_emulation
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_planted_mistakes_are_seen(mistake, tmp_path):
    wrong = Compiled(tmp_path, mistake)
    assert any(fails(functools.partial(test_within_bound, wrong, sizes)) for sizes in SIZES)
