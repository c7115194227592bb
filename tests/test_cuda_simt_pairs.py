"""float32 tokens as they enter products on CUDA (score_pairs.cuh), run on the CPU: any origin, any powers of two."""

import itertools

import pytest
import torch

import python_ref

from . import simt
from .cases import oracle_tokens
from .compare import assert_scores
from .simt import cluster
from .simt.planted import build_planted, survivors

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

MOST = torch.finfo(torch.float32).max


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def powers(N: int, low: int, high: int) -> torch.Tensor:
    return 2.0 ** torch.randint(low, high, (N, 1), generator=torch.Generator().manual_seed(N)).double()


def first(value: float, channels: slice = slice(None)) -> torch.Tensor:
    """Tokens far from zero and near each other, but for the first one."""
    x = 30 + 0.01 * drawn(1, 40, 20)
    x[0, 0, channels] = value
    return x


def first_far_above(x: torch.Tensor, value: float) -> torch.Tensor:
    """No number in one channel, numbers far above the tokens in the others: no scale is made for them."""
    x[:, 0] = 1e22 * x[:, 0].sign()
    x[:, 0, 0] = value
    return x


def without(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ones are masked."""
    return x, (torch.arange(x.shape[1]) >= count).expand(x.shape[:2]).contiguous()


def mixed(low: int, high: int) -> torch.Tensor:
    """Tokens of very different magnitudes, each with one that is nearly the same."""
    x = drawn(1, 20, 24).double() * powers(20, low, high)
    return torch.stack([x, x * (1 + 1e-5 * drawn(1, 20, 24))], 2).reshape(1, 40, 24).float()


def at_the_largest() -> torch.Tensor:
    """Differences that are no numbers, and tokens of the smallest ones."""
    x = drawn(1, 40, 16).sign() * MOST
    x[0, 10:20] *= 0.24
    x[0, 20:30] = 1e-45 * drawn(10, 16).sign()
    x[0, 30:] = drawn(10, 16)
    return x


def beyond_the_largest() -> torch.Tensor:
    """The same less a token that is nearly as large."""
    x = at_the_largest()
    x[0, 0] *= 0.249
    return x


def read_again() -> torch.Tensor:
    """More channels than a warp holds, the largest ones first."""
    x = 5 + torch.cat([drawn(1, 10, 1572), 1e-4 * drawn(1, 3, 1572)], 1)
    x[..., :8] *= 1e4 * drawn(1, 13, 8)
    return x


def nearly_the_first() -> torch.Tensor:
    """Large channels alike, small ones not: differences that vanish beside them."""
    x = torch.full((1, 40, 16), 3e4)
    x[0, :, 8:] = 1e-41 * torch.randint(-9, 9, (40, 8), generator=torch.Generator().manual_seed(1))
    x[0, 35:, :8] = 1 + drawn(5, 8)
    return x


TOKENS = {
    "first masked, large": without(first(1e30), 1),
    "first ones masked": without(first(MOST), 35),
    "first masked, not finite": without(first(float("nan")), 3),
    "all masked": without(first(1.0), 40),
    "first not a number": first(float("nan")),
    "first infinite in parts": first(float("inf"), slice(3, 7)),
    "first no number, far above": first_far_above(drawn(1, 40, 8), float("nan")),
    "first infinite, far above": first_far_above(1e-30 * drawn(2, 40, 20), float("-inf")),
    "first of those not masked, far above": without(first_far_above(drawn(1, 40, 8), float("nan")).roll(1, 1), 1),
    "first no number, far above, read again": first_far_above(read_again(), float("nan")),
    "first large in parts": first(3e38, slice(3, 7)),
    "first large": first(-1e20),
    "all alike": first(30.0)[:, :1].expand(1, 40, 20).contiguous(),
    "magnitudes": mixed(-12, 12),
    "magnitudes, small": mixed(-148, -124),
    "magnitudes, in one step or two": mixed(-66, -54),
    "magnitudes, large": mixed(96, 120),
    "magnitudes, first large": mixed(-20, 0).flip(1) + torch.eye(40, 24) * 2.0**100,
    "at the largest": at_the_largest(),
    "beyond the largest": beyond_the_largest(),
    "largest of a block's last warp": torch.cat([drawn(1, 7, 16), 1e30 * drawn(1, 1, 16)], 1),
    "at the smallest": 1e-44 * drawn(1, 40, 33),
    "nearly the first": nearly_the_first(),
    "one token": drawn(1, 1, 5),
    "a few channels": drawn(1, 40, 1) + 100,
    "held to the last": torch.cat([drawn(1, 10, 1536), drawn(1, 1, 1536).expand(1, 3, 1536)], 1),
    "read again": without(read_again(), 1),
    "read again, large": 1e38 * drawn(1, 9, 3200).clamp(-3, 3),
    "pooled": 7 + drawn(1, 40, 3, 20),
    "copied": drawn(1, 40, 23)[..., 1:],
}


@pytest.mark.parametrize("search", simt.SEARCHES)
def test_any_tokens_enter_products(search, tmp_path):
    calls = []
    for n, (given, side) in enumerate(itertools.product(TOKENS.values(), (64, 128))):
        x, mask = given if isinstance(given, tuple) else (given, None)
        kept, plan = (x.shape[1] + 2) // 3, (search, "products")
        calls.append(simt.Call(x, 3, kept, mask, plan=plan, side=side, seed=n))
    done = simt.run(calls, simt.build(simt.SANITIZED), tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for call in calls:
        x = oracle_tokens(call.x)
        assert_scores(call.scores, python_ref.score_tokens(x, 3, mask=call.mask))
        assert torch.equal(call.index, python_ref.prune_cluster(x, call.num_tokens, 3, mask=call.mask))


def test_any_tokens_get_their_labels(tmp_path):
    calls = []
    for n, (given, search) in enumerate(itertools.product(TOKENS.values(), simt.SEARCHES)):
        x, mask = given if isinstance(given, tuple) else (given, None)
        index = torch.arange(0, x.shape[1], 3)[None]
        if mask is not None:
            index = torch.where(mask[0, index], index, -1)
        calls.append(cluster.Labelling(x, index, mask, plan=(search, "products"), side=64, seed=n))
    done = cluster.run(calls, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for call in calls:
        x = oracle_tokens(call.x)
        wanted = python_ref.assign_clusters(x, call.index, mask=call.mask)
        assert torch.equal(call.labels < 0, wanted < 0)
        ours, theirs = (
            (x - x[:, call.index[0].clamp(min=0)][:, labels[0].clamp(min=0)]).square().sum(-1)
            for labels in (call.labels, wanted)
        )
        assert (ours - theirs <= 1e-14 * theirs)[wanted >= 0].all()  # float64's own ties, beside centres far smaller


# Others of scales and of reading again leave sums of 0 or NaN, which are lower bounds of 0: float64 then decides all.
MISTAKES = {
    "no quarter of the largest": ("score_pairs.cuh", "? 1.0f : 0.25f;", "? 1.0f : 1.0f;"),
    "an origin that is no token": ("score_pairs.cuh", "? row : nullptr;", "? row : row;"),
}
# Which of TOKENS show them, in several orders of threads.
SHOWING = ("beyond the largest", "largest of a block's last warp", "first no number, far above")
HUNTED = list(itertools.product(SHOWING, simt.SEARCHES, range(8)))


def test_mistakes_are_caught(tmp_path, drawn_mistakes):
    mistakes = drawn_mistakes(MISTAKES)
    driver = build_planted(mistakes, tmp_path, simt.QUICK)

    def is_right(hunted: tuple[str, str, int], mistake: int) -> bool:
        name, search, seed = hunted
        given = TOKENS[name]
        x, mask = given if isinstance(given, tuple) else (given, None)
        call = simt.Call(x, 3, 1, mask, plan=(search, "products"), seed=seed)
        if simt.run([call], driver, tmp_path, mistake=mistake).returncode:
            return False
        try:
            assert_scores(call.scores, python_ref.score_tokens(oracle_tokens(x), 3, mask=mask))
        except AssertionError:
            return False
        return True

    assert not survivors(mistakes, HUNTED, is_right)
