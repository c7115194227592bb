"""When float32 layers run on the tile unit (AMX)."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional

from h2ot_kernels import _C
from h2ot_kernels.hosts.blocks import Mlp
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
    layer, x = Linear(48, 40).eval(), torch.randn(5, 48)
    with torch.inference_mode():
        y = layer(x)
        assert isinstance(layer._kept["packed"][2], Tiles)
        torch.testing.assert_close(layer(x, activation="tanh"), y.tanh())
        torch.testing.assert_close(layer(x, residual=torch.ones(5, 40).double()), y.double() + 1)
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
        wide = layer(x, residual=torch.ones(1, 40))  # a residual that all rows share
        assert isinstance(layer._kept["packed"][2], Tiles)
        torch.testing.assert_close(wide, functional.linear(x, layer.weight, layer.bias) + 1)
        uneven = layer(x, chunks=3)
        assert [part.shape[-1] for part in uneven] == [14, 14, 12]
        torch.testing.assert_close(torch.cat(uneven, -1), functional.linear(x, layer.weight, layer.bias))


@needs_unit
def test_when_mlps_are_used():
    feed, norm, x = Mlp(32, 100).eval(), torch.nn.LayerNorm(32), torch.randn(2, 7, 32)
    with torch.inference_mode():
        for residual in (None, x):
            with Recorder() as called:
                got = feed(x, norm=norm, residual=residual)
            assert "h2ot_kernels::mlp_tiles" in called.names
            assert torch.equal(got, feed.fc2(feed.fc1(x, activation="gelu", norm=norm), residual=residual))


@needs_unit
def test_weights_are_packed_where_they_are():
    """Not where a context makes new tensors."""
    layer, x = Linear(48, 40).eval(), torch.randn(5, 48)
    with torch.device("meta"), torch.inference_mode():
        torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias))
