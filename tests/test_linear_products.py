"""16-bit layers where the CPU has no instructions for their dtype: float32 kernels from norm to residual."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from h2ot_kernels.hosts.blocks import Attention, Mlp
from h2ot_kernels.inference import tiles_run
from h2ot_kernels.linear_floats import floats_run
from h2ot_kernels.linear_products import Widened

from .runners import Recorder

HALVES = (torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.usefixtures("inference"),
    pytest.mark.skipif(not (tiles_run() or floats_run()), reason="float32 products are oneDNN's here"),
]


@pytest.fixture(autouse=True)
def no_instructions(monkeypatch):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False, raising=False)
    torch.manual_seed(0)


def names_of(run):
    with Recorder() as called:
        result = run()
    return result, {name.split("::")[-1].rsplit("_", 1)[0] for name in called.names if "h2ot_kernels" in name}


def assert_rounded_once(got, exact, dtype):
    """Half a step of the result, and what float32 adds to that: nothing between was rounded."""
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= 0.52 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_an_mlp_is_one_pass_in_float32(dtype, normed, added):
    feed, norm, x = Mlp(48, 100).eval().to(dtype), nn.LayerNorm(48).to(dtype), torch.randn(2, 7, 48).to(dtype)
    given = ({"norm": norm} if normed else {}) | ({"residual": x} if added else {})
    got, names = names_of(lambda: feed(x, **given))
    assert "mlp" in names
    assert isinstance(feed.fc1._kept["packed"][2], Widened)
    wide, tokens = feed.double(), norm.double()(x.double()) if normed else x.double()
    exact = wide.fc2(functional.gelu(wide.fc1(tokens)))
    assert_rounded_once(got, exact + x.double() if added else exact, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [(2, 9, 48), (2, 9, 5, 48)])
def test_attention_is_one_call_in_float32(dtype, size):
    attention, norm = Attention(48, 3).eval().to(dtype), nn.LayerNorm(48).to(dtype)
    x = torch.randn(size).to(dtype)
    (got, _), names = names_of(lambda: attention(x, 1, with_query_key=False, norm=norm, residual=x))
    assert "attend" in names
    tokens, wide = norm.double()(x.double()), attention.double()
    parts = wide.qkv(tokens).movedim(1, -2).unflatten(-1, (3, 3, 16)).movedim(-3, 0).transpose(-3, -2)
    attended = functional.scaled_dot_product_attention(*parts).transpose(-3, -2).flatten(-2).movedim(-2, 1)
    exact = x.double() + wide.proj(attended)
    assert_rounded_once(got, exact, dtype)
    wider = torch.zeros(*size[:-1], 96, dtype=dtype)[..., :48]
    attention.to(dtype), norm.to(dtype)
    (written, _), names = names_of(lambda: attention(x, 1, with_query_key=False, norm=norm, residual=x, out=wider))
    assert "attend" in names
    assert written is wider
    assert torch.equal(wider, got)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_autocast_rounds_goes_layer_by_layer(dtype):
    """Of float32 tokens and a float32 residual the definition rounds what is between."""
    feed, x = Mlp(48, 100).eval(), torch.randn(2, 7, 48)
    with torch.autocast("cpu", dtype):
        got, names = names_of(lambda: feed(x, residual=x))
        expected = feed.fc2(feed.fc1(x, activation="gelu"), residual=x)
    assert "mlp" not in names
    assert torch.equal(got, expected)
