"""Linear layers in bfloat16, on a tile unit (AMX) or by products of pairs in vectors (AVX512-BF16): natively as the CPU
has them, and apart, between bands of memory, the first on an emulated unit.
"""

import ctypes
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from h2ot_kernels import _C
from h2ot_kernels.add_norm import add_norm
from h2ot_kernels.hosts.blocks import Mlp
from h2ot_kernels.linear import Linear
from h2ot_kernels.linear_halves import OPERATORS, Halves, pack
from h2ot_kernels.linear_products import OneDnn

from . import linear_layers
from .compare import assert_within
from .linear_layers import by_torch
from .runners import Recorder
from .tiles import DOTS, UNIT_AND_PAIRS, Wide, alone, at, between_bands, build, fails, guarded, needs_dots

linear_halves, mlp_halves = OPERATORS.linear, OPERATORS.mlp

BF16, F32 = torch.bfloat16, torch.float32
made = functools.partial(linear_layers.made, dtype=BF16)
needs_pairs = pytest.mark.skipif(
    not _C.dots_run(), reason="this CPU has no products of pairs of bfloat16 numbers (AVX512-BF16)"
)
# rows, C, M, chunks: below, at and above a group of rows, a block, a step of channels, a panel; odd channels
SIZES = [
    (1, 16, 16, 1),
    (15, 17, 31, 1),
    (17, 32, 32, 2),
    (64, 63, 33, 3),
    (65, 96, 64, 1),
    (130, 200, 40, 1),
    (9, 512, 96, 3),
    (130, 600, 33, 1),
]
# rows, C, hidden, M
MLPS = [(1, 16, 16, 16), (17, 33, 65, 40), (70, 64, 130, 96), (40, 48, 600, 24)]


def native(x, weight, bias=None, residual=None, chunks=1, gelu=False, norm=(None, None, -1.0)):
    return linear_halves(x, pack(weight, chunks), bias, residual, len(weight), chunks, gelu, *norm)


def native_mlp(x, first, second, residual=None, norm=(None, None, -1.0)):
    (w1, b1), (w2, b2) = first, second
    return mlp_halves(x, pack(w1, 1), b1, len(w1), pack(w2, 1), b2, residual, len(w2), *norm)


native.mlp = native_mlp


class Compiled:
    """The kernel by itself; the bytes beside its results stay as they are, and none beside its operands counts.

    target: DOTS, or UNIT_AND_PAIRS, emulated.
    """

    def __init__(self, folder: Path, *replaced: tuple[str, str, str], target: str = DOTS):
        self.library = build(folder, "linear_halves.cpp", *replaced, target=target)

    def __call__(self, x, weight, bias=None, residual=None, chunks=1, gelu=False, norm=(None, None, -1.0)):
        rows, C, M = x.numel() // x.shape[-1], x.shape[-1], len(weight) // chunks
        dtype = BF16 if residual is None else residual.dtype
        wide = Wide(x, M, chunks, dtype)
        added, packed = wide.residual(residual), pack(weight, chunks)
        sizes = [ctypes.c_int64(size) for size in (rows, chunks, M, C)]
        of_norm = at(norm[0]), at(norm[1]), ctypes.c_double(norm[2])
        given = at(bias), at(added), int(dtype == F32), int(gelu), at(wide.out), *of_norm, *wide.apart
        assert self.library.linear_halves(at(wide.x), int(x.dtype == F32), at(packed), *sizes, *given) == 0
        return wide.result()

    def mlp(self, x, first, second, residual=None, norm=(None, None, -1.0)):
        (w1, b1), (w2, b2) = first, second
        rows, C = x.numel() // x.shape[-1], x.shape[-1]
        dtype = BF16 if residual is None else residual.dtype
        whole, out = guarded(rows * len(w2), dtype)
        sizes = [ctypes.c_int64(size) for size in (rows, C, len(w1), len(w2))]
        inside, packed = alone(x), (pack(w1, 1), pack(w2, 1))
        of_norm = at(norm[0]), at(norm[1]), ctypes.c_double(norm[2])
        given = at(b1), at(b2), at(residual), int(dtype == F32), at(out), *of_norm
        assert self.library.mlp_halves(at(inside), int(x.dtype == F32), *map(at, packed), *sizes, *given) == 0
        return between_bands(whole, out, (*x.shape[:-1], len(w2)))


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    return Compiled(tmp_path_factory.mktemp("dots"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Compiled(tmp_path_factory.mktemp("emulated"), target=UNIT_AND_PAIRS)


RUNS = {"native": needs_pairs, "dots": needs_dots, "emulated": needs_dots}


@pytest.fixture(params=[pytest.param(name, marks=mark) for name, mark in RUNS.items()])
def run(request):
    return native if request.param == "native" else request.getfixturevalue(request.param)


def check(run, sizes, gelu, with_bias, added):
    x, weight, bias, residual = made(*sizes)
    bias = bias if with_bias else None
    residual = residual.to(BF16) if added and sizes[3] == 1 else None
    given = x, weight, bias, residual, sizes[3], gelu
    exact, same = by_torch(*given, torch.float64), by_torch(*given, BF16)
    got = run(*given)
    assert got.dtype == BF16
    assert_within(got, exact, same, sizes[1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("gelu", "with_bias"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("added", [False, True])
def test_halves_within_bound(run, sizes, gelu, with_bias, added):
    check(run, sizes, gelu, with_bias, added)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32_tokens_are_rounded_first(run, sizes):
    x, weight, bias, _ = made(*sizes)
    wide = x.float() * (1 + 2.0**-12)
    assert torch.equal(run(wide, weight, bias, None, sizes[3]), run(wide.to(BF16), weight, bias, None, sizes[3]))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_added_to_float32_is_the_rounded_product(run, sizes):
    x, weight, bias, residual = made(*sizes[:3], 1)
    assert torch.equal(run(x, weight, bias, residual), residual + run(x, weight, bias))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_normed_tokens_are_those_of_add_norm(run, sizes, dtype, affine):
    x, weight, bias, _ = made(*sizes)
    x = (x.float() * 3 + 1).to(dtype)
    norm = nn.LayerNorm(sizes[1], eps=1e-6, elementwise_affine=affine)
    if affine:
        norm.weight.normal_()
        norm.bias.normal_()
    normed = add_norm(x, None, norm, BF16)[1]
    given = weight, bias, None, sizes[3], True
    assert torch.equal(run(x, *given, (norm.weight, norm.bias, norm.eps)), run(normed, *given))
    assert torch.equal(run(x, *given), run(x.to(BF16), *given))


@pytest.mark.parametrize("sizes", MLPS, ids=str)
@pytest.mark.parametrize("x_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("added", [None, BF16, F32], ids=str)
@torch.no_grad()
def test_an_mlp_is_two_layers(run, sizes, x_dtype, added):
    """The same bits, what is between them rounded."""
    rows, C, hidden, M = sizes
    x, w1, b1, _ = made(rows, C, hidden, 1)
    _, w2, b2, residual = made(rows, hidden, M, 1, seed=1)
    x, residual = x.to(x_dtype), None if added is None else residual.to(added)
    norm = nn.LayerNorm(C)
    norm.weight.normal_()
    for given in ((norm.weight, norm.bias, norm.eps), (None, None, -1.0)):
        between = run(x, w1, b1, gelu=True, norm=given)
        got = run.mlp(x, (w1, b1), (w2, b2), residual, given)
        assert torch.equal(got, run(between, w2, b2, residual))


@needs_pairs
@pytest.mark.parametrize("there", [(True, True), (True, False), (False, True)], ids=str)
@torch.no_grad()
def test_a_norm_of_16_bits(there):
    x, weight, bias, _ = made(33, 70, 40, 1)
    norm = nn.LayerNorm(70).to(BF16)
    for name, is_there in zip(("weight", "bias"), there, strict=True):
        setattr(norm, name, nn.Parameter(torch.randn(70).to(BF16)) if is_there else None)
    normed = add_norm(x, None, norm, BF16)[1]
    assert torch.equal(native(x, weight, bias, norm=(norm.weight, norm.bias, norm.eps)), native(normed, weight, bias))


def test_gelu_of_any_number(run):
    """Half a step of the result, and what the table is off by (csrc/amx/gelu_halves.h); PyTorch's cancels below -4."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)
    x = torch.zeros(len(values), 16, dtype=BF16)
    x[:, 0] = values
    got = run(x, torch.eye(16).to(BF16), gelu=True)[:, 0].double()
    exact = values.double() * torch.special.ndtr(values.double())
    finite = values.isfinite() & (values.abs() >= torch.finfo(BF16).tiny)
    half_a_step = 2.0 ** (exact.abs().log2().floor() - 8)
    error, allowed = (got - exact).abs(), half_a_step + 3e-4 * exact.abs() + 5e-7
    assert (error <= allowed)[finite].all()
    assert got[values.isnan()].isnan().all()
    assert got[values == torch.inf].item() == torch.inf
    assert got[values == -torch.inf].item() == 0


def test_what_was_there_before_does_not_count(run):
    x, weight, bias, _ = made(70, 96, 40, 1)
    expected = run(x[:5, :33], weight[:, :33], bias)
    run(torch.full_like(x, float("nan")), weight, bias, gelu=True, norm=(None, None, 1e-5))
    assert torch.equal(run(x[:5, :33], weight[:, :33], bias), expected)


def test_the_same_bits_in_any_batch(run):
    x, weight, bias, residual = made(150, 80, 40, 1)
    whole = run(x, weight, bias, residual)
    for rows in (slice(0, 1), slice(37, 70), slice(149, 150)):
        assert torch.equal(run(x[rows], weight, bias, residual[rows]), whole[rows])


@needs_pairs
def test_threads_change_no_bit():
    """More threads than groups of rows share a row's panels."""
    threads = torch.get_num_threads()
    for rows in (1, 20, 1000):
        x, weight, bias, _ = made(rows, 64, 100, 3)
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(native(x, weight, bias, chunks=3, gelu=True))
        torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)


@needs_pairs
def test_the_operator_refuses_other_sizes():
    x, weight, bias, residual = made(5, 80, 40, 1)
    packed = pack(weight, 1)
    for wrong in (
        (x[:, :8], packed, bias, None, 40, 1, False),
        (x[:0], packed, bias, None, 40, 1, False),
        (x, packed.flatten()[:-1], bias, None, 40, 1, False),
        (x, packed.float(), bias, None, 40, 1, False),
        (x, packed, bias[1:], None, 40, 1, False),
        (x, packed, bias.double(), None, 40, 1, False),
        (x, packed, bias, residual[1:], 40, 1, False),
        (x, packed, bias, residual.double(), 40, 1, False),
        (x, packed, bias, None, 40, 3, False),
        (x, packed, bias, None, 40, 0, False),
        (x, packed, bias, None, 40, 1, False, x[0, 1:], None, 1e-5),
        (x, packed, bias, None, 40, 1, False, x[0], x[0].float(), 1e-5),
        (x.double(), packed, bias, None, 40, 1, False),
    ):
        with pytest.raises(ValueError, match="linear_halves: wanted"):
            linear_halves(*wrong)
    second, added = pack(torch.randn(24, 40).to(BF16), 1), torch.randn(5, 24)
    assert mlp_halves(x, packed, bias, 40, second, None, added, 24).shape == (5, 24)
    for wrong in (
        (x[:0], packed, bias, 40, second, None, added, 24),
        (x, packed, bias, 20, second, None, added, 24),
        (x, packed, bias, 40, second.float(), None, added, 24),
        (x, packed, bias, 40, second, bias, added, 24),
        (x, packed, bias, 40, second, None, residual, 24),
        (x, packed, bias, 40, second, None, added, 0),
        (x, packed[:0], None, 2**58, packed[:0], None, None, 24),
        (x, packed, bias, 40, second, None, added, 24, x[0, 1:], None, 1e-5),
    ):
        with pytest.raises(ValueError, match="linear_halves: wanted"):
            mlp_halves(*wrong)
    _C.set_capability("avx2")
    with pytest.raises(ValueError, match="linear_halves: wanted a CPU with products of pairs"):
        linear_halves(x, packed, bias, None, 40, 1, False)
    _C.set_capability("avx512")


@needs_pairs
def test_when_they_are_used():
    layer, x = Linear(64, 40).eval(), torch.randn(5, 64)
    norm, added, small = nn.LayerNorm(64), torch.randn(5, 40), Linear(8, 40).eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        y = layer(x, norm=norm, residual=added)
        assert isinstance(layer._kept["packed"][2], Halves)
        assert y.dtype == F32
        assert torch.equal(y, added + layer(norm(x)))
        assert torch.equal(layer(x), layer(x.bfloat16()))
        assert torch.equal(layer(x, activation="tanh"), layer(x).tanh())
        assert torch.equal(layer(x, residual=added.double()), added.double() + layer(x))
        _C.set_capability("avx2")
        torch.testing.assert_close(layer(x, norm=norm, residual=added), y, rtol=1e-2, atol=1e-2)
        assert isinstance(layer._kept["packed"][2], OneDnn)
        _C.set_capability("avx512")
        small(x[:, :8])
        assert isinstance(small._kept["packed"][2], OneDnn)


@needs_pairs
@pytest.mark.parametrize("autocast", [True, False])
def test_when_mlps_are_used(autocast):
    feed, norm, x = Mlp(32, 100).eval(), nn.LayerNorm(32), torch.randn(2, 7, 32)
    if not autocast:
        feed, norm, x = feed.to(BF16), norm.to(BF16), x.to(BF16)
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16, enabled=autocast):
        for residual in (None, x):
            with Recorder() as called:
                got = feed(x, norm=norm, residual=residual)
            assert "h2ot_kernels::mlp_halves" in called.names
            assert torch.equal(got, feed.fc2(feed.fc1(x, activation="gelu", norm=norm), residual=residual))


MISTAKES = {
    "outputs beyond the last are written": ("linear_halves.cpp", "if (To::is_whole(place)) {", "if (true) {"),
    "rows beyond the last are read and written": (
        "linear_blocks.h",
        "left < taken * side ? left : taken * side",
        "taken * side",
    ),
    "a chunk's bias is the first one's": ("linear_halves.cpp", "a.bias + place.chunk * a.M + ", "a.bias + "),
    "chunks meet in one place": ("linear_blocks.h", "chunk * a.rows * a.M + ", ""),
    "the next block's rows are taken": ("linear_blocks.h", "first = task / parts * side", "first = task * 0"),
    "a product is not rounded before it is added": ("linear_halves.cpp", "rounded(high) + ", "high + "),
    "the second vector has the first one's residual": (
        "linear_halves.cpp",
        "high += load_wide(residual + kFloats)",
        "high += load_wide(residual)",
    ),
    "channels behind the last are not 0": (
        "half_products.h",
        "_mm512_maskz_loadu_epi16(wanted, x)",
        "_mm512_loadu_si512(x)",
    ),
    "the next interval's cubic": ("gelu_halves.h", "_mm512_set1_ps(0x1p23f)", "_mm512_set1_ps(0x1.000002p23f)"),
    "a cubic is a parabola": ("gelu_halves.h", "kIntervals = 32, kTerms = 4", "kIntervals = 32, kTerms = 3"),
    "rows of x are adjacent": ("linear_halves.cpp", "    apart = x_row(a);\n", ""),
    "rows of x that are rounded are adjacent": ("linear_halves.cpp", "x + r * x_row(a)", "x + r * a.C"),
    "rows that are normed are adjacent": ("linear_halves.cpp", "norm_block(x, x_row(a), ", "norm_block(x, a.C, "),
    "rows of results are adjacent": ("linear_blocks.h", "row * out_row(a)", "row * a.M"),
    "GELU takes the sign": ("gelu_halves.h", "_mm512_abs_ps(x)", "x"),
    "the norm's weight is its bias": ("linear_blocks.h", "bias = weight + width;", "bias = weight;"),
    "the last rows have no norm": ("layer_norm.h", "count - row, C, eps", "0, C, eps"),
    "the second layer has one panel": ("linear_halves.cpp", "groups_of(a.second.M, kLinearPanel)", "1"),
    "an MLP's results are those of the first block": (
        "linear_halves.cpp",
        "at.hidden, first, count",
        "at.hidden, 0, count",
    ),
    "what is between two layers stands in rows": ("linear_halves.cpp", "(row / kSide * steps + step) * kSide", "row"),
}

MISTAKES_OF_THE_UNIT = {
    "the unit itself": ("emulated.h", "sum[k % 2] += widened(a)", "sum[k % 2] += k % 4 == 3 ? 0 : widened(a)"),
    "the second tile of rows is the first": (
        "half_products.h",
        "_tile_stream_loadd(5, rows + rows_apart,",
        "_tile_stream_loadd(5, rows,",
    ),
    "the second tile of columns is the first": (
        "half_products.h",
        "columns + columns_apart, kDepth",
        "columns, kDepth",
    ),
    "channels of the parts before do not count": ("linear_halves.cpp", "sums, step > 0,", "sums, false,"),
    "the last product of a block is not finished": (
        "linear_halves.cpp",
        "  finish<kGelu>(to, before, 0, kRows, gelu);\n}",
        "}",
    ),
    "what is not finished beside a product is left": (
        "linear_halves.cpp",
        "finish<kGelu>(to, before, done, kRows, gelu);",
        "",
    ),
    "the parts of a panel meet in one place": ("linear_halves.cpp", "kGroups + row / kRows", "kGroups"),
}
PLANTED = [pytest.param(DOTS, mistake, id=name) for name, mistake in MISTAKES.items()]
PLANTED += [pytest.param(UNIT_AND_PAIRS, mistake, id=name) for name, mistake in MISTAKES_OF_THE_UNIT.items()]


@needs_dots
@pytest.mark.parametrize(("target", "mistake"), PLANTED)
def test_planted_mistakes_are_seen(target, mistake, tmp_path):
    wrong = Compiled(tmp_path, mistake, target=target)
    tests = [functools.partial(check, wrong, sizes, True, True, True) for sizes in SIZES]
    for sizes in SIZES[:5]:
        tests += [
            functools.partial(test_what_is_added_to_float32_is_the_rounded_product, wrong, sizes),
            functools.partial(test_normed_tokens_are_those_of_add_norm, wrong, sizes, BF16, True),
            functools.partial(test_float32_tokens_are_rounded_first, wrong, sizes),
        ]
    tests += [functools.partial(test_an_mlp_is_two_layers, wrong, sizes, BF16, F32) for sizes in MLPS]
    others = test_gelu_of_any_number, test_the_same_bits_in_any_batch, test_what_was_there_before_does_not_count
    tests += [functools.partial(test, wrong) for test in others]
    assert any(fails(test) for test in tests)
