"""Linear layers on the tile unit (AMX): natively where there is one, and the same source on an emulated one."""

import ctypes
import functools
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from h2ot_kernels.linear_tiles import OPERATORS, channel_scales, pack_tiles

from .compare import assert_within
from .linear_layers import by_torch, made
from .tiles import RUNS, Wide, alone, at, between_bands, build, fails, guarded, needs_emulation, needs_unit

ROOT = Path(__file__).resolve().parents[1]
linear_tiles, mlp_tiles = OPERATORS.linear, OPERATORS.mlp
# rows, C, M, chunks: below, at and above a tile, a group of rows, a block of groups (70 x 4096), a step of channels
SIZES = [
    (1, 32, 1, 1),
    (31, 63, 31, 1),
    (33, 65, 33, 2),
    (16, 64, 32, 1),
    (65, 48, 40, 3),
    (70, 4096, 5, 1),
    (9, 512, 96, 3),
    (3, 64, 520, 1),
]
MLPS = [(1, 32, 32, 1), (33, 65, 130, 40), (70, 48, 520, 530)]  # rows, C, hidden, M


def packed_as_used(weight, chunks):
    return pack_tiles(weight, chunks, channel_scales(weight))


def native(x, weight, bias=None, residual=None, chunks=1, gelu=False, norm=()):
    return linear_tiles(x, packed_as_used(weight, chunks), bias, residual, len(weight), chunks, gelu, *norm)


def native_mlp(x, first, second, residual=None, norm=()):
    (w1, b1), (w2, b2) = first, second
    return mlp_tiles(x, packed_as_used(w1, 1), b1, len(w1), packed_as_used(w2, 1), b2, residual, len(w2), *norm)


native.mlp = native_mlp


class Emulated:
    """The kernel on an emulated unit; the bytes beside its results stay, and none beside its operands counts."""

    def __init__(self, folder: Path, *replaced: tuple[str, str, str]):
        self.library = build(folder, "linear_tiles.cpp", *replaced)
        self.library.pack.restype = ctypes.c_int64

    def pack(self, weight, chunks, channels=None):
        sizes = [ctypes.c_int64(size) for size in (chunks, len(weight) // chunks, weight.shape[1])]
        count = self.library.pack(None, *sizes, None, None)
        whole, inside = guarded(count, torch.int8)
        given, scales = alone(weight), None if channels is None else alone(channels)
        self.library.pack(at(given), *sizes, at(scales), at(inside))
        return between_bands(whole, inside, (count,))

    def __call__(self, x, weight, bias=None, residual=None, chunks=1, gelu=False, norm=(None, None, -1.0)):
        rows, M, C = x.numel() // x.shape[-1], len(weight) // chunks, x.shape[-1]
        sizes = [ctypes.c_int64(size) for size in (rows, chunks, M, C)]
        of_norm = at(norm[0]), at(norm[1]), ctypes.c_float(norm[2])
        wide, packed = Wide(x, M, chunks, torch.float32), self.pack(weight, chunks, channel_scales(weight))
        added = wide.residual(residual)
        given = at(packed), at(bias), at(added), int(gelu), at(wide.out), *of_norm, *wide.apart
        assert self.library.linear(at(wide.x), *sizes, *given) == 0
        return wide.result()

    def mlp(self, x, first, second, residual=None, norm=(None, None, -1.0)):
        (w1, b1), (w2, b2) = first, second
        rows, C = x.numel() // x.shape[-1], x.shape[-1]
        sizes = [ctypes.c_int64(size) for size in (rows, C, len(w1), len(w2))]
        whole, out = guarded(rows * len(w2), torch.float32)
        of_norm = at(norm[0]), at(norm[1]), ctypes.c_float(norm[2])
        inside, packed = alone(x), [self.pack(w, 1, channel_scales(w)) for w in (w1, w2)]
        given = *map(at, packed), at(b1), at(b2), at(residual), at(out), *of_norm
        assert self.library.mlp(at(inside), *sizes, *given) == 0
        return between_bands(whole, out, (*x.shape[:-1], len(w2)))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulated(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(params=RUNS)
def run(request):
    return native if request.param == "native" else request.getfixturevalue("emulated")


def check(run, sizes, gelu, with_bias):
    """Of few results, which may be next to nothing all, several draws are judged by the largest of all."""
    rows, C, M, chunks = sizes
    drawn = []
    for seed in range(max(1, 16 // (rows * chunks * M))):
        x, weight, bias, residual = made(*sizes, seed=seed)
        added = bias if with_bias else None, residual if chunks == 1 and gelu == with_bias else None
        given = x, weight, *added, chunks, gelu
        drawn.append((by_torch(*given, torch.float64), by_torch(*given, torch.float32), run(*given)))
    exact, same, got = (torch.stack(of_draws) for of_draws in zip(*drawn, strict=True))
    assert_within(got, exact, same, C)
    return (got - exact).square().mean().sqrt().item(), (same - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("gelu", "with_bias"), [(False, True), (True, True), (False, False)])
def test_within_bound(run, sizes, gelu, with_bias):
    check(run, sizes, gelu, with_bias)


def test_as_accurate_as_float32(run):
    """On average, too: no digit is lost."""
    ours, theirs = check(run, (64, 512, 64, 1), False, True)
    assert ours <= 1.5 * theirs


def test_gelu_of_any_number(run):
    """To 3 units in the last place, and the rounding of x^2 / 2 in the exponent: nothing cancels below 0."""
    x = torch.cat([torch.linspace(-12, 20, 4001), torch.tensor([-0.0, 1e-30, 3e38, torch.inf, -torch.inf, torch.nan])])
    got = run(torch.zeros(1, 32), torch.zeros(len(x), 32), x, gelu=True)[0]
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    finite = x.isfinite()
    limit = (3 + x.double().square().clamp(max=144) / 2) * 2**-23 * exact.abs() + 2**-126
    assert ((got - exact).abs() <= limit)[finite].all()
    torch.testing.assert_close(got[-3:], torch.tensor([torch.inf, 0.0, torch.nan]), equal_nan=True)


def test_numbers_without_digits(run):
    """Rows with infinities, NaN, the largest or only the smallest numbers: as in float32. The others notice nothing."""
    x, weight, bias, _ = made(40, 48, 33, 1)
    before = run(x, weight, bias)
    odd = {3: torch.inf, 11: -torch.inf, 17: torch.nan, 32: 3.4e38}
    for row, value in odd.items():
        x[row, row] = value
    x[39] *= 1e-38
    got, same = run(x, weight, bias), functional.linear(x, weight, bias)
    rows = [*odd, 39]
    for kind in (torch.isposinf, torch.isneginf, torch.isnan):
        assert torch.equal(kind(got[rows]), kind(same[rows]))
    for row in (32, 39):
        exact = functional.linear(*(t.double() for t in (x[row], weight, bias)))
        assert_within(got[row], exact, same[row], 48)
    others = [row for row in range(40) if row not in rows]
    assert torch.equal(got[others], before[others])


def far_above(C):
    """Tokens of which one channel stands far above the others, in every other row; weights."""
    x, weight, _, _ = made(64, C, 48, 1)
    x[::2, 3] = 1000.0
    return x, weight


@pytest.mark.parametrize("C", [64, 512, 2048])
def test_numbers_far_above_the_others(run, C):
    """Off by no more than twice what float32 is off by, on average: what the sums of order 3 are for."""
    x, weight = far_above(C)
    got, exact, same = run(x, weight), functional.linear(x.double(), weight.double()), functional.linear(x, weight)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        errors = [(y.double() - exact)[rows].square().mean().sqrt().item() for y in (got, same)]
        assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_normed_tokens(run, sizes, affine):
    """The product of layer_norm(x), tokens that are all equal and an offset among them."""
    x, weight, bias, _ = made(*sizes)
    C = sizes[1]
    x[0] = 3.0
    x[-1] += 1e3
    scale, shift = (torch.linspace(0.5, 2, C), torch.linspace(-1, 1, C)) if affine else (None, None)
    got = run(x, weight, bias, None, sizes[3], False, (scale, shift, 1e-5))

    def expected(dtype):
        scale_and_shift = (v if v is None else v.to(dtype) for v in (scale, shift))
        y = functional.layer_norm(x.to(dtype), (C,), *scale_and_shift, 1e-5)
        return by_torch(y, weight, bias, None, sizes[3], False, dtype)

    assert_within(got, expected(torch.float64), expected(torch.float32), C)


@pytest.mark.parametrize("C", [33, 72, 512])
def test_tokens_far_from_zero_are_normed_as_in_float64(run, C):
    """What rounding takes from their mean neither counts as a deviation nor shifts those that there are."""
    x, weight, bias, _ = made(16, C, 40)
    x[:8] = 0
    x += 12.345678 * 10.0 ** torch.arange(8).repeat(2)[:, None]
    normed = functional.layer_norm(x.double(), (C,), eps=1e-6)  # PyTorch's in float32 would be as far off
    exact, same = (by_torch(normed.to(to), weight, bias, None, 1, False, to) for to in (torch.float64, torch.float32))
    assert_within(run(x, weight, bias, None, 1, False, (None, None, 1e-6)), exact, same, C)


@pytest.mark.parametrize("sizes", MLPS, ids=str)
@pytest.mark.parametrize("added", [True, False])
def test_an_mlp_is_two_layers(run, sizes, added):
    """The same bits, of rows without digits too: in the tokens, and in what is between the layers."""
    rows, C, hidden, M = sizes
    x, w1, b1, _ = made(rows, C, hidden)
    _, w2, b2, residual = made(rows, hidden, M, seed=1)
    w2[0], residual = 0, residual if added else None
    if rows > 1:
        x[1, 3], x[7] = torch.inf, 2.0**46
        x[9::3, 5] = 1000.0
    for norm in ((torch.linspace(0.5, 2, C), None, 1e-5), (None, None, -1.0)):
        between = run(x, w1, b1, gelu=True, norm=norm)
        expected = run(between, w2, b2, residual)
        torch.testing.assert_close(
            run.mlp(x, (w1, b1), (w2, b2), residual, norm), expected, rtol=0, atol=0, equal_nan=True
        )


def test_every_scale(run):
    """Rows and weights of any size are as accurate as float32's, by their own scale; what overflows is infinite."""
    x, weight, _, _ = made(64, 96, 33, 1)
    x *= 10.0 ** torch.linspace(-30, 24, 64)[:, None]
    for scale in (2.0**-45, 1.0, 2.0**47):
        given = x, scale * weight
        exact, same = functional.linear(*(t.double() for t in given)), functional.linear(*given)
        got = run(*given)
        finite = exact.abs().amax(1) < 1e37
        error, theirs = ((y.double() - exact).abs().amax(1)[finite] for y in (got, same))
        limit = 2 * torch.finfo(torch.float32).eps * 96**0.5 * exact.abs().amax(1)[finite]
        assert (error <= torch.maximum(4 * theirs, limit) + 2**-126).all()
        assert torch.equal(got[~finite].isinf(), same[~finite].isinf())


def test_the_same_bits_in_any_batch(run):
    x, weight, bias, _ = made(100, 96, 40, 1)
    x[::2, 3] = 1000.0
    whole = run(x, weight, bias, gelu=True)
    for first, last in ((0, 1), (1, 2), (31, 33), (64, 100)):
        assert torch.equal(run(x[first:last].clone(), weight, bias, gelu=True), whole[first:last])


@needs_unit
@needs_emulation
def test_the_emulation_gives_the_bits_of_the_unit(emulated):
    for sizes in SIZES:
        x, weight, bias, _ = made(*sizes)
        assert torch.equal(native(x, weight, bias, None, sizes[3]), emulated(x, weight, bias, None, sizes[3]))


@needs_unit
@pytest.mark.parametrize("rows", [1, 34, 64, 1000])  # few: the threads share the weights
def test_threads_change_no_bit(rows):
    x, weight, bias, _ = made(rows, 96, 264, 2)
    second, residual = made(rows, 528, 96, 1, seed=1)[1:3]
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append((native(x, weight, bias, chunks=2), native_mlp(x, (weight, bias), (second, residual), x)))
    torch.set_num_threads(threads)
    for layer, mlp in results:
        assert torch.equal(layer, results[0][0])
        assert torch.equal(mlp, results[0][1])


@needs_unit
def test_the_operator_refuses_other_sizes():
    x, weight, bias, residual = made(5, 80, 40, 1)
    packed = pack_tiles(weight, 1)
    for wrong in (
        (x[:, :8], packed, bias, None, 40, 1, False),
        (x, packed[:-1], bias, None, 40, 1, False),
        (x, packed, bias[1:], None, 40, 1, False),
        (x, packed, bias, residual[1:], 40, 1, False),
        (x, packed, bias, None, 40, 3, False),
        (x, packed, bias, None, 40, 1, False, x[0, 1:], None, 1e-5),
        (x, packed, bias, None, 40, 1, False, None, x[0, 1:], 1e-5),
        (x.double(), packed, bias, None, 40, 1, False),
        (x, packed, bias.double(), None, 40, 1, False),
        (x, packed, bias, None, 40, 0, False),
        (x[:0], packed, bias, None, 40, 1, False),
    ):
        with pytest.raises(ValueError, match="^linear_tiles: wanted"):
            linear_tiles(*wrong)
    second, added = pack_tiles(torch.randn(24, 40), 1), torch.randn(5, 24)
    assert mlp_tiles(x, packed, bias, 40, second, None, added, 24).shape == (5, 24)
    for wrong in (
        (x[:0], packed, bias, 40, second, None, added, 24),
        (x, packed, bias, 39, second, None, added, 24),
        (x, packed, bias, 40, second[1:], None, added, 24),
        (x, packed, bias, 40, second, bias, added, 24),
        (x, packed, bias, 40, second, None, residual, 24),
        (x, packed, bias, 40, second, None, added, 0),
        (x, packed, bias, 40, second, None, added, 24, x[0, 1:], None, 1e-5),
    ):
        with pytest.raises(ValueError, match="^linear_tiles: wanted"):
            mlp_tiles(*wrong)
    for wrong in ((weight, 3), (weight, 0), (weight.double(), 1), (weight[:, :8], 1), (weight[0], 1)):
        with pytest.raises(ValueError, match="^linear_tiles: wanted"):
            pack_tiles(*wrong)


LANES = "count > 0 ? __mmask16((1u << count) - 1)"
THIRD = "  load_weights(weights, 0);\n  if constexpr"
LOW = "rows.has_low[g]) multiply_low<1>"
LAST = "    load_rows(rows, 2, 1);\n    _tile_dpbssd(5, 7, 6);\n"
MISTAKES = {
    "the unit itself": ("emulated.h", "sum += a * b;", "sum += k % 4 ? a * b : 0;"),
    "the last of the products is dropped": ("tiles.h", LAST, ""),
    "a product is taken with the next digit": ("tiles.h", THIRD, "  if constexpr"),
    "the second tile of rows is the first": ("tiles.h", "(2 * digit + half)", "(2 * digit)"),
    "what stands far above the others hides them": ("digit_rows.h", "rows.has_low[g] |= has_low;", ""),
    "half a group has no products of order 3": ("digit_rows.h", LOW, "false) multiply_low<1>"),
    "the last group is half of one": ("digit_rows.h", "2 * group + 1 < halves", "2 * group + 2 < halves"),
    "digits do not carry": ("digits.h", "kHalf = 0x80808080", "kHalf = 0x80800080"),
    "sums of order 3 count for rows that are even": ("digit_rows.h", "has_low ? 1.0f / 256 : 0", "1.0f / 256"),
    "outputs beyond the last are written": ("linear_tiles.cpp", "i + kFloats <= width", "i < width"),
    "rows beyond the last are written": (
        "linear_tiles.cpp",
        "put_out(a, to, first, rows.count,",
        "put_out(a, to, first, rows.halves * kSide,",
    ),
    "the last product of a block is not finished": (
        "linear_tiles.cpp",
        "  finish<kGelu>(rows, before, to, 0, before.height);\n",
        "",
    ),
    "the second stretch is the first": (
        "linear_tiles.cpp",
        "const int64_t panel = chunk * p.panels + (column + at) / kSide;\n    const int8_t* next",
        "const int64_t panel = chunk * p.panels + at / kSide;\n    const int8_t* next",
    ),
    "the second chunk is left out": ("linear_tiles.cpp", "panel += groups_of(width, kSide);", "panel += 32;"),
    "rows of x are adjacent": ("linear_tiles.cpp", "x_row(a), x_row(a), count", "x_row(a), a.C, count"),
    "rows of results are adjacent": ("linear_tiles.cpp", "(first + r) * out_row(a)", "(first + r) * a.M"),
    "a share of the rows has no GELU": ("linear_tiles.cpp", "          done = end;\n", "          done = end + 1;\n"),
    "an MLP's residual is that of the first block": (
        "linear_tiles.cpp",
        "nullptr, first, 0, q.panels,",
        "nullptr, 0, 0, q.panels,",
    ),
    "there is no room for the digits of what is between": (
        "linear_tiles.cpp",
        "hidden_rows(memory, hidden_channels, halves)",
        "hidden_rows(memory, 1, halves)",
    ),
    "lanes beyond the last channel count in a norm": ("norm.h", LANES, "count > 0 ? kAll"),
    "infinities have digits": ("linear_tiles.cpp", "rows.has_plain && r", "false && r"),
}


@needs_emulation
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(mistake, tmp_path):
    wrong = Emulated(tmp_path, MISTAKES[mistake])
    tests = [functools.partial(check, wrong, sizes, False, True) for sizes in SIZES]
    tests += [
        functools.partial(test, wrong)
        for test in (
            functools.partial(test_normed_tokens, sizes=SIZES[1], affine=True),
            functools.partial(test_an_mlp_is_two_layers, sizes=MLPS[2], added=True),
            test_gelu_of_any_number,
            test_as_accurate_as_float32,
            test_numbers_without_digits,
            functools.partial(test_numbers_far_above_the_others, C=512),
            test_the_same_bits_in_any_batch,
        )
    ]
    assert any(fails(test) for test in tests)
