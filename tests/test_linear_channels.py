"""Float32 layers on the tile unit whose channels differ in scale: weights that make up for it lose no digits."""

import functools
import math

import pytest
import torch
from torch.nn import functional

from .compare import assert_within
from .linear_layers import made
from .test_linear_tiles import Emulated, emulated, run
from .tiles import fails, needs_emulation

__all__ = ["emulated", "run"]  # fixtures


def of_scales(C, apart, rows=64, M=48):
    """Tokens whose channels are up to `apart` times as large as others, and weights that make up for it."""
    x, weight, bias, _ = made(rows, C, M)
    scale = 10.0 ** (torch.linspace(-0.5, 0.5, C)[torch.randperm(C)] * math.log10(apart))
    return x * scale, weight / scale, bias, scale


@pytest.mark.parametrize("apart", [1.0, 4.0, 10.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("C", [70, 512])
def test_channels_of_different_scales(run, C, apart):
    """Off by no more than three times what float32 is off by, on average, with a norm before it too."""
    x, weight, bias, scale = of_scales(C, apart)
    normal = x / scale
    for tokens, norm in ((x, (None, None, -1.0)), (normal, (scale, None, 1e-5))):
        given = tokens.double()
        if norm[0] is not None:
            given = functional.layer_norm(given, (C,), scale.double(), None, 1e-5)
        exact = functional.linear(given, weight.double(), bias.double())
        same = functional.linear(given.float(), weight, bias)
        errors = [(y.double() - exact).square().mean().sqrt() for y in (run(tokens, weight, bias, norm=norm), same)]
        assert errors[0] <= 3 * errors[1]


def test_channels_without_weights_take_no_digits(run):
    """What no output reads may be of any size; infinity times 0 is no number there, as in PyTorch."""
    x, weight, bias, _ = made(33, 64, 20, 1)
    weight[:, 5] = 0
    before = run(x, weight, bias)
    x[:, 5] = torch.logspace(-30, 30, 33)
    assert torch.equal(run(x, weight, bias), before)
    x[4, 5] = torch.inf
    got = run(x, weight, bias)
    assert got[4].isnan().all()
    assert torch.equal(got[5:], before[5:])


def test_an_mlp_of_channels_of_different_scales(run):
    x, w1, b1, _ = of_scales(48, 1e4, M=96)
    w2 = made(1, 96, 20)[1] * 10.0 ** torch.linspace(-3, 3, 96)
    expected = run(run(x, w1, b1, gelu=True), w2)
    assert torch.equal(run.mlp(x, (w1, b1), (w2, None)), expected)


def test_rows_without_digits_of_channels_of_different_scales(run):
    """The weights' own numbers come back; rows beside them notice nothing."""
    x, weight, bias, _ = of_scales(64, 1e6)
    before = run(x, weight, bias)
    x[3], x[40] = x[3] * 1e-30, x[40] * 1e30
    got, exact, same = (
        run(x, weight, bias),
        *(functional.linear(*(t.to(dtype) for t in (x, weight, bias))) for dtype in (torch.float64, torch.float32)),
    )
    for row in (3, 40):
        assert_within(got[row], exact[row], same[row], 64)
        got[row] = before[row]
    assert torch.equal(got, before)


MISTAKES = {
    "neither rows nor weights are scaled": ("digits.h", "channels ? v * load(channels + c) : v", "v"),
    "normed rows are measured before they are scaled": ("digit_rows.h", "(channels || !a.has_norm)", "!a.has_norm"),
    "rows without digits take scaled weights": ("digit_rows.h", "channels ? weight * scale * channels[c] : ", ""),
    "a channel without weights has a scale": ("linear_tiles.cpp", "a.channels[c] != 0 ? 1 / a.channels[c] : 0", "1"),
}  # fmt: skip


@needs_emulation
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(mistake, tmp_path):
    wrong = Emulated(tmp_path, MISTAKES[mistake])
    tests = test_channels_without_weights_take_no_digits, test_rows_without_digits_of_channels_of_different_scales
    tests = [functools.partial(test, wrong) for test in tests]
    tests += [functools.partial(test_channels_of_different_scales, wrong, 70, apart) for apart in (1e3, 1e6)]
    assert any(fails(test) for test in tests)
