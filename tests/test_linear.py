"""The packed linear layer: the numbers of nn.Linear, in every mode; packed weights follow the weights."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional

from h2ot_kernels.linear import ACTIVATIONS, Linear, made_plain
from h2ot_kernels.linear_products import Widened, is_widened

from .compare import assert_within
from .host_cases import inputs, small


def pair(bias=True):
    ours = Linear(48, 40, bias=bias).eval()
    plain = nn.Linear(48, 40, bias=bias).eval()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_inference_within_bound(dtype, bias, activation):
    ours, plain = pair(bias)
    apply = functional.gelu if activation == "gelu" else nn.Identity()
    x = torch.randn(3, 5, 48).to(dtype)
    ours, plain = ours.to(dtype), plain.to(dtype)
    with torch.inference_mode():
        mine, same = ours(x, activation), apply(plain(x))
        exact = apply(plain.double()(x.double()))
    assert_within(mine, exact, same, 48)
    packed = dtype in (torch.float32, torch.bfloat16) or (dtype == torch.float16 and is_widened(dtype))
    assert (ours._kept is not None) == packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["none", "gelu", "tanh", "relu"])
def test_without_instructions_for_it_a_product_is_float32s_rounded_once(monkeypatch, dtype, activation):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False, raising=False)
    ours, wide = pair()
    ours, x = ours.to(dtype), torch.randn(5, 48).to(dtype)
    wide.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        exact = ACTIVATIONS[activation](wide.double()(x.double()))
        got = ours(x, activation)
    assert isinstance(ours._kept["packed"][2], Widened)
    assert got.dtype == dtype
    # Half a step of the result, and what float32 adds to that.
    step = torch.finfo(dtype).eps
    assert ((got.double() - exact).abs() <= 0.51 * step * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "tanh", "relu"])
@pytest.mark.parametrize(("C", "M"), [(48, 40), (64, 3), (8, 40)])  # of these few are oneDNN's
def test_a_row_that_holds_nan_is_nan_behind_an_activation(C, M, activation, dtype):
    layer, x = Linear(C, M).to(dtype).eval(), torch.randn(5, C, dtype=dtype)
    x[2, 1] = float("nan")
    with torch.inference_mode():
        got = layer(x, activation)
    assert got.isnan().sum() == M
    assert got[2].isnan().all()


def test_packed_weights_follow_the_weights():
    ours, plain = pair()
    x = torch.randn(4, 48)
    with torch.no_grad():
        before = ours(x)
        for layer in (ours, plain):
            layer.weight.mul_(2)
            layer.bias.add_(1)
        torch.testing.assert_close(ours(x), plain(x))
        assert not torch.equal(ours(x), before)
        ours.load_state_dict({"weight": torch.ones(40, 48), "bias": torch.zeros(40)})
        torch.testing.assert_close(ours(x), x.sum(1, keepdim=True).expand(-1, 40))


def test_packed_weights_follow_one_element_and_an_exchange():
    """Which the samples of a weight's elements do not see: its version and its address do."""
    layer, one = Linear(300, 300, bias=False).eval(), torch.eye(300)
    with torch.no_grad():
        for row, column in ((2, 100), (151, 33)):
            layer(one)
            layer.weight[row, column] += 1
            torch.testing.assert_close(layer(one), layer.weight.mT)
        for _ in range(2):  # of one version
            layer.weight = nn.Parameter(torch.randn(300, 300))
            torch.testing.assert_close(layer(one), layer.weight.mT)


def test_weights_made_in_inference_mode_which_have_no_version():
    with torch.inference_mode():
        layer, x = Linear(48, 40, bias=False).eval(), torch.randn(4, 48)
        for _ in range(2):
            assert torch.equal(layer(x), functional.linear(x, layer.weight))
            layer.weight[7, 31] += 1
        vector = nn.Parameter(torch.randn(40))
    layer = pair()[0]
    with torch.no_grad():
        torch.testing.assert_close(layer(x, scale=vector), vector * functional.linear(x, layer.weight, layer.bias))
        layer.bias = vector
        torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, vector))


@pytest.mark.parametrize("form", [torch.float64, torch.bfloat16, "meta"])
def test_neither_packed_nor_old_weights_outlive_a_change_of_dtype_or_device(form):
    """A layer that is moved to a GPU is not asked on the CPU again."""
    ours, _ = pair()
    with torch.inference_mode():
        ours(torch.randn(4, 48))
    kept = ours._kept
    old, packed = weakref.ref(ours.weight.untyped_storage()), weakref.ref(kept["packed"][2])
    assert ours.to("cpu", torch.float32)._kept is kept  # nothing changes
    del kept
    ours.to(form)
    assert old() is None
    assert packed() is None


def test_training_and_gradients_are_those_of_linear():
    ours, plain = pair()
    x = torch.randn(4, 48)
    with torch.inference_mode():
        ours(x)
        kept = ours._kept
        ours.eval()(x)  # as some do before every request
    assert ours._kept is kept is not None
    for layer in (ours, plain):
        layer.train()
        layer(x).square().sum().backward()
    assert ours._kept is None
    assert torch.equal(ours.weight.grad, plain.weight.grad)


def test_tangents_are_those_of_linear():
    """Forward mode is not switched off by no_grad."""
    ours, plain = pair()
    x, tangent = torch.randn(4, 48), torch.randn(4, 48)
    with torch.no_grad(), forward_ad.dual_level():
        got, expected = (
            forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent for layer in (ours, plain)
        )
    assert torch.equal(got, expected)


def test_autocast_gives_its_dtype():
    ours, plain = pair()
    x = torch.randn(4, 48)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == plain(x).dtype == torch.bfloat16
        torch.testing.assert_close(ours(x), plain(x), rtol=2e-2, atol=2e-2)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), plain(x))


def test_copies_and_pickles_without_the_packed_weight():
    ours, _ = pair()
    x = torch.randn(4, 48)
    with torch.no_grad():
        expected = ours(x)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert twin._kept is None
            assert torch.equal(twin(x), expected)
    assert set(ours.state_dict()) == {"weight", "bias"}


def test_compiles_without_a_break():
    ours, plain = pair()
    x = torch.randn(4, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ours, fullgraph=True)(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_residual_scale_and_chunks(dtype):
    ours, plain = pair()
    ours, plain = ours.to(dtype), plain.to(dtype)
    x, residual, scale = (torch.randn(*shape).to(dtype) for shape in ((3, 5, 48), (3, 5, 40), (40,)))
    with torch.inference_mode():
        exact = residual.double() + scale.double() * plain.double()(x.double())
        same = torch.addcmul(residual, plain.to(dtype)(x), scale)
        assert_within(ours(x, residual=residual, scale=scale), exact, same, 48)
        scale.mul_(2)
        assert_within(ours(x, scale=scale), exact * 2 - residual.double() * 2, scale * plain(x), 48)
        assert_within(
            ours(x, residual=residual),
            residual.double() + plain.double()(x.double()),
            residual + plain.to(dtype)(x),
            48,
        )
        for part, expected in zip(ours(x, chunks=4), plain.to(dtype)(x).chunk(4, -1), strict=True):
            assert part.is_contiguous()
            torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(("C", "M"), [(15, 40), (49, 3), (1, 1), (48, 40), (100, 1), (34, 3), (96, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_reach_no_other_row(C, M, dtype):
    """As they do in oneDNN's bfloat16 products on a tile unit, of channels that are no whole pairs or blocks."""
    layer, x = Linear(C, M).to(dtype).eval(), torch.randn(17, C).to(dtype)
    with torch.inference_mode():
        expected = layer(x)
        x[4, 0], x[9, -1] = float("inf"), float("nan")
        got = layer(x)
    others = [row for row in range(17) if row not in (4, 9)]
    assert torch.equal(got[others], expected[others])
    assert not got[[4, 9]].isfinite().any()


@pytest.mark.parametrize(
    ("around", "refused"),
    [
        ({"activation": "gelu", "scale": torch.ones(40)}, "activation: got 'gelu', wanted 'none' where scale is given"),
        ({"chunks": 2, "scale": torch.ones(40)}, "chunks: got 2, wanted 1 where scale is given"),
        ({"chunks": 2, "residual": torch.zeros(3, 40)}, "chunks: got 2, wanted 1 where residual is given"),
    ],
    ids=["activation and scale", "chunks and scale", "chunks and residual"],
)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_what_does_not_go_together_is_refused(around, refused, mode):
    """Wherever the layer runs: packed, and as nn.Linear, which would do something else or leave it out."""
    layer = Linear(48, 40).eval()
    with mode(), pytest.raises(ValueError, match=refused):
        layer(torch.randn(3, 48), **around)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_norm_inside_a_product_has_an_eps_of_its_own(dtype):
    ours, plain = pair()
    ours, plain, norm = ours.to(dtype), plain.to(dtype), nn.LayerNorm(48, eps=0.5).to(dtype)
    x = torch.randn(3, 5, 48).to(dtype)
    with torch.inference_mode():
        mine, same = ours(x, norm=norm), plain(norm(x))
        exact = plain.double()(norm.double()(x.double()))
    assert_within(mine, exact, same, 48)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # that such quantization will be removed
def test_made_plain_a_host_is_quantized_whole():
    """As it is, layers of a subclass stay as they were."""
    pytest.importorskip("torch.ao.nn.quantized.dynamic", reason="this torch has no quantize_dynamic any more")
    model, x = small("h2ot_mixste").float().eval(), inputs()[0].float()
    expected = model(x)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert made_plain(model) is model
    torch.testing.assert_close(model(x), expected)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert {type(quantized.get_submodule(name)) for name in layers} == {torch.ao.nn.quantized.dynamic.Linear}
    assert (quantized(x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_autocast_refuses_what_it_refuses_of_pytorch(weights, cast_to):
    layers = [cls(32, 32).to(weights).eval() for cls in (nn.Linear, Linear)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        given, said = torch.ones(4, 32).to(dtype), []
        for layer in layers:
            with torch.no_grad(), torch.autocast("cpu", cast_to):
                try:
                    said.append(layer(given).dtype)
                except RuntimeError as error:
                    said.append(str(error))
        assert said[0] == said[1], dtype
