"""When linear layers and MLPs run by vectors of float32, what is refused, and that both give what their parts do."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from h2ot_kernels import _C
from h2ot_kernels.hosts.blocks import Mlp
from h2ot_kernels.linear import Linear
from h2ot_kernels.linear_floats import OPERATORS, Floats, floats_run, has_floats, pack
from h2ot_kernels.linear_fused import mlp
from h2ot_kernels.linear_products import OneDnn

from .linear_layers import made
from .runners import Recorder
from .test_linear_floats import made_mlp

linear_floats, mlp_floats = OPERATORS.linear, OPERATORS.mlp

pytestmark = pytest.mark.usefixtures("inference")
MLP = "h2ot_kernels::mlp_floats"
needs_floats = pytest.mark.skipif(
    not floats_run(), reason="this CPU has no AVX2, or a tile unit that is faster than its vectors"
)


def test_what_is_refused():
    x, weight, bias, residual = made(5, 80, 40)
    packed, vector = pack(weight, 1), torch.randn(80)
    for wrong in (
        (x[:0], packed, bias, None, 40, 1, False),
        (x.double(), packed, bias, None, 40, 1, False),
        (x[:, :8], packed[:, :, :8].contiguous(), bias, None, 40, 1, False, None, None, 1e-5),
        (x, packed.flatten()[:-1], bias, None, 40, 1, False),
        (x, packed.mT, bias, None, 40, 1, False),
        (x, pack(weight, 1, 2 * packed.shape[-1]), bias, None, 40, 1, False),
        (x, packed.double(), bias, None, 40, 1, False),
        (x, packed, bias[1:], None, 40, 1, False),
        (x, packed, bias.double(), None, 40, 1, False),
        (x, packed, bias, residual[1:], 40, 1, False),
        (x, packed, bias, residual.double(), 40, 1, False),
        (x, packed, bias, None, 40, 3, False),
        (x, packed, bias, None, 40, 0, False),
        (x, packed, bias, None, 40, 1, False, vector[1:], None, 1e-5),
        (x, packed, bias, None, 40, 1, False, None, vector.double(), 1e-5),
    ):
        with pytest.raises(ValueError, match="^linear_floats: wanted"):
            linear_floats(*wrong)
    second, added = pack(torch.randn(24, 40), 1), torch.randn(5, 24)
    assert mlp_floats(x, packed, bias, 40, second, None, added, 24).shape == (5, 24)
    for wrong in (
        (x[:0], packed, bias, 40, second, None, added, 24),
        (x, packed, bias, 39, second, None, added, 24),
        (x, packed, bias, 40, second[:, :, 1:].contiguous(), None, added, 24),
        (x, packed, bias, 40, second, bias, added, 24),
        (x, packed, bias, 40, second, None, residual, 24),
        (x, packed, bias, 40, second, None, added, 0),
        (x, packed, bias, 40, second, None, added, 24, vector[1:], None, 1e-5),
    ):
        with pytest.raises(ValueError, match="^linear_floats: wanted"):
            mlp_floats(*wrong)


@pytest.mark.skipif(not has_floats(), reason="this CPU has no AVX2")
def test_few_channels_are_multiplied_by_vectors_beside_a_tile_unit():
    layer, x = Linear(24, 96).eval(), torch.randn(5, 24)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert isinstance(layer._kept["packed"][2], Floats)


@needs_floats
def test_when_layers_are_used():
    before = _C.capability()
    layer, x, added, small = Linear(48, 40).eval(), torch.randn(5, 48), torch.randn(5, 40), Linear(8, 40).eval()
    norm = nn.LayerNorm(48)
    y = layer(x, norm=norm, residual=added)
    assert isinstance(layer._kept["packed"][2], Floats)
    torch.testing.assert_close(y, added + layer(norm(x)))
    assert torch.equal(layer(x, activation="tanh"), layer(x).tanh())
    assert torch.equal(layer(x, residual=added.double()), added.double() + layer(x))
    assert torch.equal(torch.cat(Linear.forward(layer, x, chunks=2), -1), layer(x))
    _C.set_capability("portable")
    torch.testing.assert_close(layer(x, norm=norm, residual=added), y)
    assert isinstance(layer._kept["packed"][2], OneDnn)
    _C.set_capability(before)
    small(x[:, :8])
    assert isinstance(small._kept["packed"][2], OneDnn)


def test_weights_are_packed_for_the_instruction_set_in_use():
    """Panels are as wide as its tiles; a layer that was called before is packed again."""
    layer, x, widths = Linear(48, 72).eval(), torch.randn(9, 48), set()
    exact = (x.double() @ layer.weight.double().mT + layer.bias.double()).float()
    names = _C.runnable_capabilities().split(",")
    for name in names:
        _C.set_capability(name)
        torch.testing.assert_close(layer(x), exact)
        torch.testing.assert_close(linear_floats(x, pack(layer.weight, 1), layer.bias, None, 72, 1, False), exact)
        widths.add(_C.floats_panel())
    _C.set_capability(names[0])
    assert len(widths) == len(names)


class Doubled(Linear):
    """A user's layer with a forward of its own."""

    def forward(self, x, *given, **options):
        return 2 * super().forward(x, *given, **options)


def calls_of(*arguments, **options):
    with Recorder() as called:
        result = mlp(*arguments, **options)
    return result, called.names


@needs_floats
def test_an_mlp_in_one_pass_is_its_two_layers():
    feed, norm, x = Mlp(32, 100).eval(), nn.LayerNorm(32), torch.randn(2, 7, 32)
    scale = torch.randn(32)
    for given in ({}, {"norm": norm}, {"residual": x}, {"residual": x, "scale": scale, "norm": norm}):
        got, names = calls_of(x, feed.fc1, feed.fc2, **given)
        assert MLP in names
        hidden = feed.fc1(x, activation="gelu", norm=given.pop("norm", None))
        assert torch.equal(got, feed.fc2(hidden, **given))
    with FlopCounterMode(display=False) as counted:
        feed(x, norm=norm)
    assert counted.get_total_flops() == 2 * 2 * 14 * 32 * 100


@needs_floats
def test_where_an_mlp_is_its_two_layers():
    feed, x = Mlp(32, 100).eval(), torch.randn(2, 7, 32)
    expected, before = feed(x), _C.capability()

    def taken(x=x, fc1=feed.fc1, fc2=feed.fc2, **given):
        result, names = calls_of(x, fc1, fc2, **given)
        return result, MLP in names

    assert taken()[1]
    plain = nn.Linear(100, 32)
    plain.load_state_dict(feed.fc2.state_dict())
    result, fused = taken(fc2=plain)
    torch.testing.assert_close(result, expected)
    assert not fused
    doubled = Doubled(100, 32).eval()
    doubled.load_state_dict(feed.fc2.state_dict())
    result, fused = taken(fc2=doubled)
    assert torch.equal(result, 2 * feed.fc2(feed.fc1(x, activation="gelu")))
    assert not fused
    result, fused = taken(residual=torch.zeros(32))  # broadcast
    torch.testing.assert_close(result, expected)
    assert not fused
    result, fused = taken(residual=torch.zeros(2, 7, 32, dtype=torch.float64))
    assert result.dtype == torch.float64
    assert not fused
    seen = []
    handle = feed.fc1.register_forward_hook(lambda *given: seen.append(given))
    assert not taken()[1]
    handle.remove()
    assert len(seen) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert taken()[0].dtype == torch.bfloat16
    _C.set_capability("portable")
    result, fused = taken()
    torch.testing.assert_close(result, expected)
    assert not fused
    _C.set_capability(before)
    with torch.inference_mode(False), torch.enable_grad():
        result, fused = taken(torch.randn(3, 32, requires_grad=True))
        assert result.requires_grad
        assert not fused


def test_what_does_not_fit_is_refused_as_by_linear():
    feed = Mlp(32, 100).eval()
    for wrong in (torch.randn(3, 31), torch.randn(3, 32, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            feed(wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        mlp(torch.randn(3, 32), feed.fc1, feed.fc1)


def test_an_mlp_of_the_case_list_on_every_instruction_set(capability):
    """Through the layers: whichever products run, the numbers are those of nn.Linear."""
    x, (w1, b1), (w2, b2), residual = made_mlp(50, 64, 130, 70)
    fc1, fc2 = Linear(64, 130).eval(), Linear(130, 70).eval()
    with torch.inference_mode(False), torch.no_grad():
        for layer, given in ((fc1, (w1, b1)), (fc2, (w2, b2))):
            for parameter, value in zip((layer.weight, layer.bias), given, strict=True):
                parameter.copy_(value)
    wanted = residual + nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, w1, b1)), w2, b2)
    torch.testing.assert_close(mlp(x, fc1, fc2, residual=residual), wanted)
