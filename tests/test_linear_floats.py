"""Linear layers and MLPs in float32 by vectors, on every instruction set."""

import functools

import pytest
import torch
from torch import nn

from h2ot_kernels.add_norm import add_norm
from h2ot_kernels.linear_floats import OPERATORS, pack

from .compare import assert_within
from .linear_layers import by_torch, made

linear_floats, mlp_floats = OPERATORS.linear, OPERATORS.mlp

pytestmark = pytest.mark.usefixtures("inference")
NONE = (None, None, -1.0)  # no norm
# rows, C, M, chunks: below, at and above a tile's rows, a block, a vector, a tile's vectors, a panel
SIZES = [
    (1, 16, 16, 1),
    (5, 17, 31, 1),
    (6, 32, 64, 2),
    (7, 3, 40, 1),
    (13, 63, 65, 3),
    (49, 96, 128, 1),
    (100, 200, 24, 1),
    (9, 512, 96, 3),
]
# rows, C, hidden, M
MLPS = [(1, 16, 16, 16), (6, 17, 65, 33), (50, 64, 130, 70), (97, 100, 40, 7)]


class Native:
    """The operators, in the kernels of the instruction set in use."""

    @staticmethod
    def linear(x, weight, bias=None, residual=None, chunks=1, gelu=False, norm=NONE):
        return linear_floats(x, pack(weight, chunks), bias, residual, len(weight), chunks, gelu, *norm)

    @staticmethod
    def mlp(x, first, second, residual=None, norm=NONE):
        (w1, b1), (w2, b2) = first, second
        return mlp_floats(x, pack(w1, 1), b1, len(w1), pack(w2, 1), b2, residual, len(w2), *norm)


def made_mlp(rows, C, H, M):
    x, w1, b1, _ = made(rows, C, H)
    _, w2, b2, residual = made(rows, H, M, seed=1)
    return x, (w1, b1), (w2, b2), residual


def mlp_by_torch(x, first, second, residual, dtype):
    hidden = by_torch(x, *first, None, 1, True, dtype)
    return by_torch(hidden, *second, residual, 1, False, dtype)


def check(run, sizes, gelu, with_bias, added):
    x, weight, bias, residual = made(*sizes)
    given = x, weight, bias if with_bias else None, residual if added and sizes[3] == 1 else None, sizes[3], gelu
    exact, same = by_torch(*given, torch.float64), by_torch(*given, torch.float32)
    assert_within(run.linear(*given), exact, same, sizes[1])


def check_normed(run, sizes, affine):
    x, weight, bias, _ = made(*sizes)
    norm, x = norm_of(sizes[1], affine), x * 3 + 1
    given = weight, bias, None, sizes[3], True
    tokens = add_norm(x, None, norm, torch.float32)[1]
    got, expected = run.linear(x, *given, (norm.weight, norm.bias, norm.eps)), run.linear(tokens, *given)
    assert torch.equal(got, expected)


def check_mlp(run, sizes, affine, added):
    """The bits of two layers, one behind the other."""
    x, first, second, residual = made_mlp(*sizes)
    norm, residual = norm_of(sizes[1], affine), residual if added else None
    given = norm.weight, norm.bias, norm.eps
    hidden = run.linear(x, *first, gelu=True, norm=given)
    assert torch.equal(run.mlp(x, first, second, residual, given), run.linear(hidden, *second, residual))
    plain = run.mlp(x, first, second, residual)
    exact, same = (mlp_by_torch(x, first, second, residual, dtype) for dtype in (torch.float64, torch.float32))
    assert_within(plain, exact, same, sizes[1] + sizes[2])


def check_gelu(run):
    """To 3 units in the last place, and the rounding of x^2 / 2 in the exponent: nothing cancels below 0."""
    x = torch.cat([torch.linspace(-12, 20, 4001), torch.tensor([-0.0, 1e-30, 3e38, torch.inf, -torch.inf, torch.nan])])
    got = run.linear(torch.zeros(1, 32), torch.zeros(len(x), 32), x, gelu=True)[0]
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    limit = (3 + x.double().square().clamp(max=144) / 2) * 2**-23 * exact.abs() + 2**-126
    assert ((got - exact).abs() <= limit)[x.isfinite()].all()
    torch.testing.assert_close(got[-3:], torch.tensor([torch.inf, 0.0, torch.nan]), equal_nan=True)


def check_batches(run):
    x, weight, bias, residual = made(150, 80, 40)
    whole = run.linear(x, weight, bias, residual)
    for rows in (slice(0, 1), slice(37, 70), slice(149, 150)):
        assert torch.equal(run.linear(x[rows], weight, bias, residual[rows]), whole[rows])


def check_leftovers(run):
    """What was in the memory of a thread does not count."""
    x, weight, bias, _ = made(70, 96, 40)
    expected = run.linear(x[:5, :33], weight[:, :33], bias)
    run.linear(torch.full_like(x, float("nan")), weight, bias, gelu=True, norm=(None, None, 1e-5))
    assert torch.equal(run.linear(x[:5, :33], weight[:, :33], bias), expected)


def norm_of(C, affine):
    norm = nn.LayerNorm(C, eps=1e-6, elementwise_affine=affine)
    if affine:
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("gelu", "with_bias"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("added", [False, True])
def test_within_bound(sizes, gelu, with_bias, added, capability):
    check(Native, sizes, gelu, with_bias, added)


@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if sizes[1] >= 16], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_normed_tokens_are_those_of_add_norm(sizes, affine, capability):
    check_normed(Native, sizes, affine)


@pytest.mark.parametrize("sizes", MLPS, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("added", [False, True])
def test_an_mlp_is_two_layers(sizes, affine, added, capability):
    check_mlp(Native, sizes, affine, added)


def test_gelu_of_any_number(capability):
    check_gelu(Native)


def test_the_same_bits_in_any_batch(capability):
    check_batches(Native)


def test_what_was_there_before_does_not_count(capability):
    check_leftovers(Native)


def test_threads_change_no_bit(capability):
    """More threads than groups of rows share a row's panels."""
    threads = torch.get_num_threads()
    for rows in (1, 20, 1000):
        x, weight, bias, _ = made(rows, 64, 100, 3)
        mlp = made_mlp(rows, 64, 100, 40)
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((Native.linear(x, weight, bias, chunks=3, gelu=True), Native.mlp(*mlp)))
        torch.set_num_threads(threads)
        for layer, both in results[1:]:
            assert torch.equal(layer, results[0][0])
            assert torch.equal(both, results[0][1])


def test_strides_of_every_kind(capability):
    x, weight, bias, residual = made(24, 32, 40)
    expected = Native.linear(x, weight, bias, residual)
    apart = torch.randn(24, 64)[:, ::2].copy_(x), torch.randn(80)[::2].copy_(bias), residual.mT.contiguous().mT
    assert torch.equal(Native.linear(apart[0], weight, *apart[1:]), expected)
    assert torch.equal(
        Native.linear(x.view(2, 3, 4, 32), weight, bias), Native.linear(x, weight, bias).view(2, 3, 4, 40)
    )


def checks(run):
    """All of the above, short: for kernels that are built apart."""
    tests = [functools.partial(check, run, sizes, True, True, True) for sizes in SIZES]
    tests += [functools.partial(check_normed, run, sizes, True) for sizes in SIZES if sizes[1] >= 16]
    tests += [functools.partial(check_mlp, run, sizes, True, True) for sizes in MLPS]
    return tests + [functools.partial(test, run) for test in (check_gelu, check_batches, check_leftovers)]
