"""Layers that read rows, and write rows, which stand apart: slices of wider tensors, as the streams of MHFormer are."""

from functools import partial

import pytest
import torch
from torch import nn

from h2ot_kernels import _C, hosts, linear_floats, linear_halves
from h2ot_kernels.hosts.blocks import Attention
from h2ot_kernels.inference import dots_run, tiles_run
from h2ot_kernels.linear import Linear
from h2ot_kernels.linear_floats import floats_run
from h2ot_kernels.linear_tiles import OPERATORS as TILES
from h2ot_kernels.linear_tiles import pack_tiles
from h2ot_kernels.packed import NO_NORM

from .runners import Recorder

F32, BF16 = torch.float32, torch.bfloat16
needs_tiles = pytest.mark.skipif(not tiles_run(), reason="this CPU has no tile unit (AMX)")
needs_dots = pytest.mark.skipif(not dots_run(), reason="this CPU has neither AVX512-BF16 nor a tile unit")
needs_ours = pytest.mark.skipif(not (tiles_run() or floats_run()), reason="float32 products are oneDNN's here")
KINDS = {
    "tiles": (TILES, pack_tiles, F32),
    "floats": (linear_floats.OPERATORS, linear_floats.pack, F32),
    "halves": (linear_halves.OPERATORS, lambda weight, chunks: linear_halves.pack(weight.to(BF16), chunks), BF16),
}
EACH = [
    pytest.param("tiles", marks=needs_tiles),
    "floats",
    pytest.param("halves", marks=needs_dots),
]
C = 48


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    before = _C.capability()
    with torch.no_grad():
        yield
    _C.set_capability(before)


def slice_of(x, columns=7):
    """x as a slice of a wider tensor full of NaN."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 2 * columns), torch.nan, dtype=x.dtype)
    wide[..., columns:-columns] = x
    return wide, wide[..., columns:-columns]


def assert_only_inside(wide, inside, expected):
    assert torch.equal(inside, expected)
    assert wide.isnan().sum() == wide.numel() - inside.numel()


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("size", [(1, C), (33, C), (2, 70, C), (3, 1, 5, C)], ids=str)
@pytest.mark.parametrize("norm", [NO_NORM, (torch.rand(C), torch.rand(C), 1e-5)], ids=["plain", "norm"])
def test_slices_give_the_bits_of_tensors(kind, size, norm):
    operators, pack, dtype = KINDS[kind]
    x, residual = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    packed, bias = pack(torch.randn(C, C), 1), torch.randn(C)
    given = packed, bias, residual, C, 1, False, *norm
    expected = operators.linear(x, *given)
    (_, x_inside), (_, residual_inside) = slice_of(x), slice_of(residual)
    assert torch.equal(operators.linear(x_inside, *given), expected)
    wide, out = slice_of(torch.zeros_like(expected))
    operators.linear_out(x_inside, packed, bias, residual_inside, C, 1, False, *norm, out)
    assert_only_inside(wide, out, expected)
    wide, out = slice_of(torch.zeros_like(expected))
    operators.linear_out(x, packed, bias, None, C, 1, True, *norm, out)
    assert_only_inside(wide, out, operators.linear(x, packed, bias, None, C, 1, True, *norm))
    second = pack(torch.randn(C, C), 1), None, residual_inside, C
    assert torch.equal(
        operators.mlp(x_inside, packed, bias, C, *second, *norm), operators.mlp(x, packed, bias, C, *second, *norm)
    )


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize(("size", "dim"), [((2, 9, C), 1), ((1, 70, C), 1), ((2, 5, 3, C), 1), ((2, 5, 3, C), 2)])
def test_attention_of_slices(kind, size, dim):
    operators, pack, dtype = KINDS[kind]
    x = torch.randn(size).to(dtype)
    layers = pack(torch.randn(3 * C, C), 3), torch.randn(3 * C), dim, 3, pack(torch.randn(C, C), 1), None
    norm = torch.rand(C), None, 1e-5
    expected = operators.attend(x, *layers, x, *norm)
    _, inside = slice_of(x)
    assert torch.equal(operators.attend(inside, *layers, inside, *norm), expected)
    wide, out = slice_of(torch.zeros_like(x))
    operators.attend_out(inside, *layers, inside, *norm, out)
    assert_only_inside(wide, out, expected)
    operators.attend_out(inside, *layers, inside, *norm, inside)  # in place
    assert torch.equal(inside, expected)


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x[:, :1].expand(4, 9, C),
        lambda x: x[:1].expand(4, 9, C),
        lambda x: x[:1, :1].expand(4, 9, C),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x.flatten()[: 30 * 20 + C - 20].unfold(0, C, 20),
        lambda x: x.mT.contiguous().mT,
    ],
)
def test_rows_of_any_strides(kind, lay):
    operators, pack, dtype = KINDS[kind]
    x = lay(torch.randn(4, 9, C).to(dtype))
    given = pack(torch.randn(C, C), 1), None, None, C, 1, False
    assert torch.equal(operators.linear(x, *given), operators.linear(x.contiguous(), *given))


@pytest.mark.parametrize("kind", EACH)
def test_other_places_are_refused(kind):
    operators, pack, dtype = KINDS[kind]
    x = torch.randn(4, 9, C).to(dtype)
    packed = pack(torch.randn(C, C), 1)
    _, apart = slice_of(x)
    for residual, out, chunks in (
        (None, x[:2], 1),
        (None, x.double(), 1),
        (None, x[0, 0, 0], 1),
        (None, x[..., :24], 1),
        (None, x.transpose(0, 1).contiguous().transpose(0, 1), 1),
        (None, x[:1, :1].expand(4, 9, C), 1),
        (None, x[:, :1].expand(4, 9, C), 1),
        (None, x.flatten()[: 35 * 20 + C].unfold(0, C, 20), 1),
        (x, apart, 1),
        (apart, x.clone(), 1),
        (x.flatten()[: 19 * C].as_strided((18, 2 * C), (C, 1)), x.clone(), 1),
        (None, x.clone(), 2),
    ):
        weights = packed if chunks == 1 else pack(torch.randn(C, C), 2)
        with pytest.raises(ValueError, match="wanted an out of the result's shape and dtype, of one chunk"):
            operators.linear_out(x, weights, None, residual, C, chunks, False, *NO_NORM, out)


def test_norms_of_strided_rows_have_the_bits_of_contiguous_ones():
    """Of any product: 7 and 16 channels are oneDNN's here."""
    for channels in (7, 16, C):
        norm, layer = nn.LayerNorm(channels), Linear(channels, 4).eval()
        x = torch.randn(2, channels, 9).mT
        assert torch.equal(layer(x, norm=norm), layer(x.contiguous(), norm=norm))


@needs_ours
def test_rows_that_no_one_step_reaches_are_written_all_the_same():
    layer, attention, x = Linear(C, C).eval(), Attention(C, 3).eval(), torch.randn(2, 9, C)
    turned = torch.randn(9, 2, C).transpose(0, 1)
    with torch.inference_mode():
        attend = partial(attention, x, 1, with_query_key=False)
        for update in (partial(layer, x), lambda **given: attend(**given)[0]):
            out = turned.clone()
            assert update(residual=turned, out=out) is out
            torch.testing.assert_close(out, update(residual=turned.contiguous()))


@needs_ours
def test_layers_write_where_they_are_told():
    layer, attention, x = Linear(C, C).eval(), Attention(C, 3).eval(), torch.randn(2, 9, C)
    _, inside = slice_of(x)
    for update, name in (
        (lambda **given: layer(x, residual=inside, **given), "linear"),
        (lambda **given: attention(inside, 1, with_query_key=False, residual=inside, **given)[0], "attend"),
    ):
        expected = update()
        wide, out = slice_of(torch.zeros_like(x))
        with Recorder() as called:
            assert update(out=out) is out
        assert any(of.startswith(f"h2ot_kernels::{name}") and of.endswith("_out") for of in called.names)
        assert_only_inside(wide, out, expected)
        elsewhere = torch.zeros(2, 9, C)  # not laid out as the residual: the same, with a copy
        assert update(out=elsewhere) is elsewhere
        assert torch.equal(elsewhere, expected)
    out = torch.zeros(2, 9, C)
    with pytest.raises(ValueError, match="chunks: got 2, wanted 1"):
        layer(x, out=out, chunks=2)
    norm = nn.LayerNorm(C)
    assert torch.equal(layer(x, "gelu", norm=norm, out=out), layer(x, "gelu", norm=norm))
    assert torch.equal(out, layer(x, "gelu", norm=norm))


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64], ids=str)
def test_blocks_of_streams_leave_what_others_hold(dtype):
    """A hook may keep the input and the output of a block of MHFormer, whose streams are updated in one new tensor."""
    model = hosts.build("mhformer", num_frames=27, channels=64, hidden=96).to(dtype).eval()
    x, kept = torch.randn(2, 27, 17, 2).to(dtype), []
    for block in (*model.Transformer_hypothesis.SHR_blocks, *model.Transformer_hypothesis.CHI_blocks):
        block.register_forward_hook(lambda _, given, result: kept.extend((y, y.clone()) for y in (given[0], result[0])))
    fused = model(x)
    assert len(kept) == 6
    assert all(torch.equal(*pair) for pair in kept)
    with torch.enable_grad():
        plain = model(x)
    bound = {F32: 1e-5, BF16: 5e-2, torch.float64: 1e-12}[dtype] * plain.abs().max().item()
    torch.testing.assert_close(fused, plain.detach(), rtol=0, atol=bound)


def test_streams_have_the_same_dtypes_under_autocast():
    model, dtypes = hosts.build("mhformer", num_frames=27, channels=64, hidden=96).eval(), []
    for block in model.Transformer_hypothesis.SHR_blocks:
        block.register_forward_hook(lambda _, given, result: dtypes.append((given[0].dtype, result[0].dtype)))
    x = torch.randn(2, 27, 17, 2)
    with torch.autocast("cpu", dtype=BF16):
        fused = model(x)
        with torch.enable_grad():
            plain = model(x)
    assert dtypes[:2] == dtypes[2:]
    torch.testing.assert_close(fused, plain.detach(), rtol=0, atol=5e-2 * plain.abs().max().item())
