"""Parameters that change behind autograd's back are noticed: by the C++ samples and by PyTorch's."""

import pytest
import torch
from torch import nn

from h2ot_kernels import samples
from h2ot_kernels.linear import Linear

SHAPES = {"line": (5,), "small": (40, 25), "just runs": (64, 16), "odd": (33, 95), "weight": (512, 512), "none": (0, 3)}


@pytest.fixture(params=["C++", "PyTorch"], autouse=True)
def way(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(samples, "_Samples", None)
    elif samples._Samples is None:
        pytest.skip("the C++ kernels are not built")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_does_not_change_is_the_same_and_what_changes_is_not(shape, dtype):
    weight, bias = torch.randn(shape).to(dtype), torch.randn(7).to(dtype)
    kept = samples.Samples([weight, bias])
    assert kept.same()
    assert kept.same()
    weight.mul_(2)
    assert kept.same() == (weight.numel() == 0)
    kept = samples.Samples([weight, bias])
    bias[6] += 1
    assert not kept.same()


def test_all_of_a_small_tensor_is_looked_at():
    weight = torch.zeros(31, 33)
    for element in range(weight.numel()):
        kept = samples.Samples([weight])
        weight.view(-1)[element] += 1
        assert not kept.same(), element


@pytest.mark.parametrize("columns", [128, 384, 512, 1024])
def test_places_meet_many_rows_and_all_columns(columns):
    weight = torch.zeros(512, columns)
    (part,) = samples.Samples([weight]).parts
    part += 1
    assert weight.count_nonzero() == part.numel() >= samples.PLACES * samples.NEIGHBOURS * 0.95
    assert (weight.sum(1) > 0).sum() >= samples.PLACES * 0.95
    assert (weight.sum(0) > 0).all()


def test_one_element_of_fifty_is_noticed():
    """A mask of 2 %: 1024 elements miss it once in 10^9 times."""
    for seed in range(20):
        weight = torch.ones(300, 511)
        kept = samples.Samples([weight])
        weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.02)
        assert not kept.same(), seed


@pytest.mark.parametrize("lay", [lambda x: x.t(), lambda x: x[:, :40], lambda x: x[::2], lambda x: x[:1].expand(9, -1)])
def test_tensors_of_any_strides_are_looked_at_in_place(lay):
    whole = torch.randn(90, 80)
    kept = samples.Samples([lay(whole)])
    assert kept.same()
    whole.add_(1)
    assert not kept.same()


def test_memory_that_its_owner_gave_up_stays_with_the_samples():
    weight = nn.Parameter(torch.randn(600, 600))
    kept = samples.Samples([weight])
    weight.data = torch.zeros(2)
    assert kept.same()


@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x.t().contiguous().t()], ids=["dense", "transposed"])
def test_a_layer_follows_edits_through_data(lay):
    torch.manual_seed(0)
    layer = Linear(96, 64).eval().requires_grad_(False)
    layer.weight = nn.Parameter(lay(layer.weight.detach()), requires_grad=False)
    x = torch.randn(20, 96)
    with torch.inference_mode():
        before = layer(x)
        layer.weight.data.mul_(-1)
        layer.bias.data.mul_(-1)
        torch.testing.assert_close(layer(x), -before)


def test_a_layer_whose_weight_is_turned_in_place():
    """The memory is the same, its reading is not."""
    torch.manual_seed(0)
    layer, x = Linear(64, 64).eval().requires_grad_(False), torch.randn(20, 64)
    with torch.inference_mode():
        layer(x)
        layer.weight.data = layer.weight.data.t()
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_bias_that_does_not_say_when_it_changes():
    layer, x = Linear(64, 64).eval().requires_grad_(False), torch.randn(20, 64)
    with torch.inference_mode():
        layer.bias = nn.Parameter(torch.zeros(64), requires_grad=False)
        for added in (0, 1):
            layer.bias += added
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
