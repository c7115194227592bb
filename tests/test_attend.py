"""Self-attention from norm to residual in one operator has the bits of its parts, and is used where nobody sees it."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import h2ot_kernels as h2ot
from h2ot_kernels import _C
from h2ot_kernels.attention import attend_in_one_call
from h2ot_kernels.hosts import blocks
from h2ot_kernels.hosts.blocks import Attention
from h2ot_kernels.inference import dots_run, tiles_run
from h2ot_kernels.linear_floats import floats_run, pack

from .runners import Recorder

NAMES = {f"h2ot_kernels::attend_{of}" for of in ("tiles", "halves", "floats")}
needs_dots = pytest.mark.skipif(not dots_run(), reason="this CPU has neither AVX512-BF16 nor a tile unit")
needs_floats = pytest.mark.skipif(not (tiles_run() or floats_run()), reason="float32 products are oneDNN's here")
DTYPES = [
    pytest.param(torch.float32, marks=needs_floats, id="float32"),
    pytest.param(torch.bfloat16, marks=needs_dots, id="bfloat16"),
]


@pytest.fixture(autouse=True)
def no_gradients():
    before = _C.capability()
    with torch.no_grad():
        yield
    _C.set_capability(before)


def layer(C=48, heads=3, **options) -> Attention:
    torch.manual_seed(0)
    return Attention(C, heads, **options).eval()


def by_parts(monkeypatch, attention, x, dim, **given):
    with monkeypatch.context() as patched, Recorder() as called:
        patched.setattr(blocks, "attend_in_one_call", lambda *given, **update: None)
        result, _ = attention(x, dim, with_query_key=False, **given)
    assert not called.names & NAMES
    return result


def in_one(attention, x, dim, **given):
    """(the result, whether one operator made it)."""
    with Recorder() as called:
        result, query_key = attention(x, dim, with_query_key=False, **given)
    assert query_key is None
    return result, bool(called.names & NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "dim"), [((2, 9, 48), 1), ((2, 9, 5, 48), 1), ((2, 9, 5, 48), 2), ((1, 80, 48), 1)])
def test_the_bits_are_those_of_the_parts(dtype, size, dim, monkeypatch):
    norm, scale, x = nn.LayerNorm(48).to(dtype), torch.randn(48).to(dtype), torch.randn(size).to(dtype)
    for options in ({}, {"qkv_bias": False}):
        attention = layer(**options).to(dtype)
        for given in ({}, {"norm": norm}, {"residual": x}, {"residual": x, "scale": scale, "norm": norm}):
            got, fused = in_one(attention, x, dim, **given)
            assert fused
            assert torch.equal(got, by_parts(monkeypatch, attention, x, dim, **given))
        views = x.transpose(0, -2).contiguous().transpose(0, -2)
        assert torch.equal(in_one(attention, views, dim)[0], in_one(attention, x, dim)[0])


@needs_floats
@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_every_instruction_set_with_products_of_ours(capability, monkeypatch):
    if capability not in _C.runnable_capabilities():
        pytest.skip(f"this CPU has no {capability}")
    _C.set_capability(capability)
    x = torch.randn(2, 30, 48)
    got, fused = in_one(layer(), x, 1, residual=x)
    assert fused
    assert torch.equal(got, by_parts(monkeypatch, layer(), x, 1, residual=x))


@needs_floats
def test_against_pytorch():
    attention, x = layer(), torch.randn(2, 9, 48)
    query, key, value = nn.functional.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    heads = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in (query, key, value))
    attended = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    expected = nn.functional.linear(attended, attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(in_one(attention, x, 1)[0], expected)


@needs_dots
def test_autocast_adds_to_float32(monkeypatch):
    attention, x = layer(), torch.randn(2, 70, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, fused = in_one(attention, x, 1, residual=x, norm=nn.LayerNorm(48))
        assert fused
        assert got.dtype == torch.float32
        assert torch.equal(got, by_parts(monkeypatch, attention, x, 1, residual=x, norm=nn.LayerNorm(48)))


@needs_floats
def test_flops_are_those_of_the_parts(monkeypatch):
    attention, x = layer(), torch.randn(2, 9, 5, 48)
    counts = []
    for run in (lambda: in_one(attention, x, 1), lambda: by_parts(monkeypatch, attention, x, 1)):
        with FlopCounterMode(display=False) as counted:
            run()
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] == 2 * 90 * 48 * 48 * 4 + 4 * 90 * 9 * 48


@needs_floats
def test_where_its_parts_are_called():
    x, heard = torch.randn(2, 9, 48), []
    for hooked in ("qkv", "proj"):
        attention = layer()
        getattr(attention, hooked).register_forward_hook(lambda *call: heard.append(call))
        assert not in_one(attention, x, 1)[1]
    assert len(heard) == 2
    attention = layer()
    assert in_one(attention, x, 1)[1]
    for residual in (x.double(), x[:1]):
        got, fused = in_one(attention, x, 1, residual=residual)
        assert not fused
        torch.testing.assert_close(got, (attention(x, 1)[0] + residual).to(got.dtype))
    with h2ot.use_backend("reference"):
        assert not in_one(attention, x, 1)[1]
    with torch.enable_grad():
        assert not in_one(attention, x, 1)[1]
    dropping = layer(dropout=0.5).train()
    assert not in_one(dropping, x, 1)[1]
    assert attend_in_one_call(x, attention.qkv, nn.Linear(48, 48).eval(), 1, 3, None) is None
    assert attend_in_one_call(x, attention.qkv, attention.proj, 1, 5, None) is None
    _, query_key = attention(x, 1)
    assert [tuple(y.shape) for y in query_key] == [(2, 3, 9, 16)] * 2


@needs_floats
def test_weights_are_followed(monkeypatch):
    attention, x = layer(), torch.randn(2, 9, 48)
    before, _ = in_one(attention, x, 1)
    attention.qkv.weight.mul_(-0.5)
    attention.proj.bias.data.add_(1)
    got, fused = in_one(attention, x, 1)
    assert fused
    assert not torch.allclose(got, before + 1)
    assert torch.equal(got, by_parts(monkeypatch, attention, x, 1))


@pytest.mark.parametrize(("dim", "heads"), [(2, 3), (-1, 3), (1, 5), (1, 0), (1, -3)])
def test_other_sizes_are_refused(dim, heads):
    x, weights = torch.randn(2, 9, 48), (pack(torch.randn(144, 48), 3), pack(torch.randn(48, 48), 1))
    attend = torch.ops.h2ot_kernels.attend_floats
    assert attend(x, weights[0], None, 1, 3, weights[1], None, None).shape == x.shape
    with pytest.raises(ValueError, match="an axis of tokens before the channels, and heads that divide those"):
        attend(x, weights[0], None, dim, heads, weights[1], None, None)
    with pytest.raises(ValueError, match="what `pack` makes of a weight of these sizes"):
        attend(x, weights[0], None, 1, 3, weights[0], None, None)
