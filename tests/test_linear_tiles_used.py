"""When float32 layers run on the tile unit (AMX)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from h2ot_kernels import _C
from h2ot_kernels.hosts.blocks import Attention, Mlp
from h2ot_kernels.linear import Linear
from h2ot_kernels.linear_floats import Floats
from h2ot_kernels.linear_products import OneDnn
from h2ot_kernels.linear_tiles import Tiles

from .runners import Recorder
from .tiles import needs_unit

ROOT = Path(__file__).resolve().parents[1]


def test_the_unit_can_be_left_alone():
    program = "from h2ot_kernels import _C; print(_C.tiles_run())"
    environment = {**os.environ, "H2OT_KERNELS_TILES": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@needs_unit
def test_when_the_unit_is_used():
    layer, x = Linear(80, 64).eval(), torch.randn(5, 80)
    with torch.inference_mode():
        y = layer(x)
        assert isinstance(layer._kept["packed"][2], Tiles)
        torch.testing.assert_close(layer(x, activation="tanh"), y.tanh())
        torch.testing.assert_close(layer(x, residual=torch.ones(5, 64).double()), y.double() + 1)
        _C.set_capability("avx2")
        torch.testing.assert_close(layer(x), y)
        assert isinstance(layer._kept["packed"][2], Floats)
        _C.set_capability("avx512")
    with torch.no_grad():
        for value in (torch.inf, torch.nan, 3e38):
            layer.weight[3, 5] = value
            layer(x)
            assert isinstance(layer._kept["packed"][2], OneDnn)
        layer.weight[3] = 1e-20
        layer(x)
        assert isinstance(layer._kept["packed"][2], OneDnn)
        layer.weight[3] = 0
        wide = layer(x, residual=torch.ones(1, 64))  # a residual that all rows share
        assert isinstance(layer._kept["packed"][2], Tiles)
        torch.testing.assert_close(wide, functional.linear(x, layer.weight, layer.bias) + 1)
        uneven = layer(x, chunks=3)
        assert [part.shape[-1] for part in uneven] == [22, 22, 20]
        torch.testing.assert_close(torch.cat(uneven, -1), functional.linear(x, layer.weight, layer.bias))


@needs_unit
def test_when_mlps_are_used():
    feed, norm, x = Mlp(64, 100).eval(), torch.nn.LayerNorm(64), torch.randn(2, 7, 64)
    with torch.inference_mode():
        for residual in (None, x):
            with Recorder() as called:
                got = feed(x, norm=norm, residual=residual)
            assert "h2ot_kernels::mlp_tiles" in called.names
            assert torch.equal(got, feed.fc2(feed.fc1(x, activation="gelu", norm=norm), residual=residual))


@needs_unit
def test_weights_are_packed_where_they_are():
    """Not where a context makes new tensors."""
    layer, x = Linear(80, 64).eval(), torch.randn(5, 80)
    with torch.device("meta"), torch.inference_mode():
        torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias))


@needs_unit
@pytest.mark.parametrize(
    ("channels", "hidden", "mlp", "attend"),
    [
        (27, 54, "floats", "floats"),
        (63, 256, "floats", "floats"),
        (32, 300, "tiles", "floats"),
        (64, 80, "tiles", "tiles"),
    ],
)
def test_narrow_layers_are_left_to_vectors(channels, hidden, mlp, attend):
    """Both layers of an MLP or none, so that it stays one pass."""
    feed, norm, x = Mlp(channels, hidden).eval(), torch.nn.LayerNorm(channels), torch.randn(2, 7, channels)
    attention = Attention(channels, 1).eval()
    with torch.inference_mode(), Recorder() as called:
        feed(x, norm=norm, residual=x)
        attention(x, 1, with_query_key=False)
    ours = {f"h2ot_kernels::mlp_{mlp}", f"h2ot_kernels::attend_{attend}"}
    assert {name for name in called.names if name.startswith(("h2ot_kernels::mlp", "h2ot_kernels::attend"))} == ours
