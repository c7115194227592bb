"""The recovery tail in rotated channels by bytes, on an emulated tile unit and between guard bands."""

import ctypes
import functools

import pytest
import torch
from torch import nn

import h2ot_kernels.recover_rotated as recover_rotated

from .compare import assert_within
from .test_linear_tiles import Emulated as Layers
from .test_recover_rotated import TAILS, Tail
from .tiles import alone, at, between_bands, build, fails, guarded, needs_emulation

pytestmark = [pytest.mark.usefixtures("inference"), needs_emulation]
# Channels of the unit; (1, 70, 2048): three blocks of rows.
SIZES = [tail for tail in TAILS if tail[2] >= 32] + [(1, 70, 2048, 3, (True,) * 4), (2, 33, 96, 2, (True,) * 4)]


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    return Layers(tmp_path_factory.mktemp("layers"))


class Emulated:
    """The kernel on an emulated unit; the bytes beside its results stay, and none beside its operands counts."""

    def __init__(self, folder, layers, *replaced):
        self.library, self.layers = build(folder, "rotated_tiles.cpp", *replaced), layers

    def __call__(self, tail, token, attended):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recover_rotated, "pack_tiles", self.layers.pack)
            patch.setattr(recover_rotated.Tiles, "take", lambda weight, chunks: True)
            triangle, rotation = recover_rotated._rotation(tail.proj.weight, torch.float32, True)
        vectors = token, tail.proj.bias, *tail.vectors()
        token, head, bias = recover_rotated._rotated(rotation, *vectors)
        (R, F, C), M = attended.shape, head.shape[0]
        aligned = torch.empty(triangle.numel() + 64, dtype=torch.int8)
        packed = aligned[-aligned.data_ptr() % 64 :][: triangle.numel()].copy_(triangle)
        whole, out = guarded(R * F * M, torch.float32)
        inside = [alone(x) for x in (attended, token, head, bias)]
        sizes = [ctypes.c_int64(size) for size in (R, F, C)]
        given = at(inside[1]), at(packed), at(inside[2]), at(inside[3])
        eps = ctypes.c_double(tail.norm.eps)
        assert self.library.rotated(at(inside[0]), *sizes, *given, ctypes.c_int64(M), eps, at(out)) == 0
        return between_bands(whole, out, (R, F, M))


@pytest.fixture(scope="module")
def run(tmp_path_factory, layers):
    return Emulated(tmp_path_factory.mktemp("rotated"), layers)


def check(run, size):
    R, F, C, outputs, there = size
    tail, token, attended = Tail(C, outputs, there), torch.randn(F, C), torch.randn(R, F, C)
    assert_within(run(tail, token, attended), tail.exactly(token, attended), tail(token, attended), C)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rotated_within_bound(run, size):
    check(run, size)


def test_rows_without_digits_and_with_outliers(run):
    """Among others: rows of tiny, large and no numbers, and one number far above those beside it."""
    tail, token, attended = Tail(100), torch.randn(40, 100), torch.randn(2, 40, 100)
    attended[0, 3] *= 1e-20
    attended[0, 20] *= 1e16
    attended[1, 7, 50] = 1e5
    attended[1, 39, 99] = 1e5
    exact, same = tail.exactly(token, attended), tail(token, attended)
    ours = run(tail, token, attended)
    for rows in (0, 20), (1, 7), (1, 39):  # errors of their own size
        assert_within(ours[rows][None], exact[rows][None], same[rows][None], 100)
        ours[rows], exact[rows], same[rows] = 0, 0, 0
    assert_within(ours, exact, same, 100)
    attended[0, 0, 3], attended[1, 39, 0] = float("nan"), float("inf")
    spoilt = run(tail, token, attended)
    assert spoilt[0, 0].isnan().all()
    assert spoilt[1, 39].isnan().all()
    assert spoilt.isnan().sum() == 6


def test_weights_of_the_mean_alone(run):
    """Nothing is left of a weight whose outputs are all equal, nor of zeros."""
    tail, token, attended = Tail(40), torch.randn(9, 40), torch.randn(2, 9, 40)
    for weight in (torch.randn(1, 40).expand(40, -1), torch.zeros(40, 40), torch.eye(40)):
        nn.init.zeros_(tail.proj.weight).add_(weight)
        assert_within(run(tail, token, attended), tail.exactly(token, attended), tail(token, attended), 40)


@pytest.mark.parametrize("span", [6, 14])
def test_channels_that_differ_in_scale(run, span):
    """Where weights make up for it, rows of the triangle that are small beside the others are no rounding."""
    tail, token, attended = Tail(128), torch.randn(33, 128), torch.randn(2, 33, 128)
    sizes = 10 ** (span * (torch.rand(128).sort().values - 0.5))
    attended *= sizes
    tail.proj.weight.div_(sizes)
    assert_within(run(tail, token, attended), tail.exactly(token, attended), tail(token, attended), 128)


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e4])
def test_nearer_than_float32s_projection(run, outlier):
    """Of rows with a number that stands far above the others the lowest products are taken, too."""
    tail, token, attended = Tail(256), torch.randn(40, 256), torch.randn(2, 40, 256)
    attended[..., 17] *= outlier
    exact = tail.exactly(token, attended)
    ours, theirs = (
        (result.double() - exact).square().mean().sqrt()
        for result in (run(tail, token, attended), tail(token, attended))
    )
    assert ours <= 0.8 * theirs


LAST = "    finish(before);\n    add_plain_rows();"
MISTAKES = {
    "the diagonal counts twice": ("rotated_tiles.cpp", "above + x * load", "above + x * 2 * load"),
    "the diagonal is that of the first panel": ("rotated_tiles.cpp", "triangle.diagonal + c)", "triangle.diagonal)"),
    "channels behind the last count": ("rotated_tiles.cpp", "at.rows.stride + c, C - c)", "at.rows.stride + c, kSide)"),
    "a product begins a step late": ("rotated_tiles.cpp", "panel * kSide / kDepth", "(panel * kSide + 48) / kDepth"),
    "the last product is not finished": ("rotated_tiles.cpp", LAST, "add_plain_rows();"),
    "frames begin anew with each block": ("rotated_tiles.cpp", "(first + row) * width", "row * width"),
    "results begin anew with each part": ("rotated_tiles.cpp", "(a, b, first + r, sums", "(a, b, r, sums"),
    "rows without digits are left out": ("rotated_tiles.cpp", "at.rows.has_plain && r", "false && r"),
    "their sums are added to": ("rotated_tiles.cpp", "memset(sums_of(r), 0,", "memset(sums_of(r), 0, 0 *"),
    "outliers hide the others": ("digit_rows.h", "spread = p.spread();", "spread = 0;"),
    "one weight's row for all": ("digit_rows.h", "panel += from * kWeightStep;", ""),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(mistake, layers, tmp_path):
    wrong = Emulated(tmp_path, layers, MISTAKES[mistake])
    tests = [functools.partial(check, wrong, size) for size in SIZES]
    tests += [
        functools.partial(test, wrong)
        for test in (
            test_rows_without_digits_and_with_outliers,
            test_weights_of_the_mean_alone,
            functools.partial(test_nearer_than_float32s_projection, outlier=30.0),
        )
    ]
    assert any(fails(test) for test in tests)
