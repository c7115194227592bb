"""float32 products of pairs of float16 (triton/pairs.py): float32's accuracy at any size, and who takes them."""

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot
from h2ot_kernels.nn import TokenRecoveringAttention
from h2ot_kernels.recover_attention import project
from h2ot_kernels.triton import common, pairs

from .compare import assert_within
from .runners import DEVICE


def layers_of(C, bias=True):
    return [nn.Linear(C, C, bias=bias).requires_grad_(False).to(DEVICE) for _ in range(3)]


def by_triton(*given):
    """(what project gives, on the CPU, the kernels that were launched)."""
    with h2ot.use_backend("triton"), torch.no_grad(), common.record() as launches:
        made = project(*given)
    return [x.cpu() for x in made], [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize(("C", "F", "rows", "bias"), [(3, 5, 4, True), (100, 27, 70, False), (576, 9, 33, True)])
def test_projections_within_bound(C, F, rows, bias):
    layers = layers_of(C, bias)
    token, x = torch.randn(1, F, C, device=DEVICE), torch.randn(2, rows, C, device=DEVICE)
    ours, kernels = by_triton(token, x, *layers)
    assert kernels == ["pair_kernel", "project_kernel"]
    for layer, given, one in zip(layers, (token, x, x), ours, strict=True):
        same, exact = (layer.cpu().to(dtype)(given.cpu().to(dtype)) for dtype in (torch.float32, torch.float64))
        assert one.shape == given.shape
        assert_within(one, exact, same, C)


def test_rows_of_any_size():
    """Each row keeps its digits beside rows 10^60 times as large, in both factors; NaN and infinity keep to theirs."""
    C = 64
    size = torch.logspace(-30, 30, 9)[:, None]
    layers = layers_of(C, bias=False)
    token, x = torch.randn(1, 9, C) * size, torch.randn(2, 9, C) * size
    x[1, 2, 5], x[1, 3, 0] = float("nan"), float("inf")
    layers[1].weight.mul_(torch.logspace(-7, 7, C)[:, None].to(DEVICE))
    ours, _ = by_triton(token.to(DEVICE), x.to(DEVICE), *layers)
    for layer, given, one in zip(layers, (token, x, x), ours, strict=True):
        weight = layer.weight.cpu().double()
        exact, most = given.double() @ weight.mT, given.abs().double() @ weight.abs().mT
        whole = exact.isfinite()
        assert not one[~whole].isfinite().any()
        assert ((one - exact).abs() <= C * 2.0**-24 * most)[whole].all()


def test_what_small_numbers_lose():
    """At most 2^-23 of a number or 2^-36 of its row's largest, in rows down to 2^-114."""
    x = torch.randn(7, 70) * torch.logspace(-9, 0, 70) * torch.tensor([1e-33, 1e-20, 1e-3, 1, 1e9, 1e30, 3e37])[:, None]
    x[3] = 0
    (high, low), unit = (made.cpu().double() for made in pairs.pairs_of(x.to(DEVICE), x[:2].to(DEVICE)))
    whole = (high + low) * 2.0**-12 * unit[:, None]
    assert (whole[:, 70:] == 0).all()
    assert torch.equal(whole[7:], whole[:2])
    lost, x = (whole[:7, :70] - x).abs(), x.double()
    assert (lost <= 2.0**-23 * x.abs() + 2.0**-36 * x.abs().amax(1, keepdim=True)).all()


def other_linear(layers):
    layers[1] = type("Other", (nn.Linear,), {})(8, 8).to(DEVICE)


def hooked(layers):
    layers[2].register_forward_hook(lambda *given: None)


@pytest.mark.parametrize("change", [other_linear, hooked, lambda layers: [layer.double() for layer in layers]])
def test_other_layers_are_called(change):
    layers = layers_of(8)
    change(layers)
    dtype = layers[0].weight.dtype
    token, x = (torch.randn(size, dtype=dtype, device=DEVICE) for size in ((1, 5, 8), (2, 3, 8)))
    _, kernels = by_triton(token, x, *layers)
    assert not kernels


def test_gradients_go_through_the_layers():
    recovery = TokenRecoveringAttention(8, 2).to(DEVICE)
    token, x = torch.randn(1, 5, 8, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE)
    with h2ot.use_backend("triton"), common.record() as launches:
        recovery(token, x).sum().backward()
    assert recovery.linear_k.weight.grad is not None
    assert "project_kernel" not in {launch.kernel.__name__ for launch in launches}
