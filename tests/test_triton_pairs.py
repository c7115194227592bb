"""float32 products of pairs of float16 (triton/pairs.py): float32's accuracy at any size, and who takes them."""

import copy

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot
from h2ot_kernels.nn import TokenRecoveringAttention
from h2ot_kernels.recover_pose import project
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


def pose_by(token, query, key, value, modules, H, dtype, backend):
    device = DEVICE if backend == "triton" else "cpu"
    own = [copy.deepcopy(module).to(device, dtype) for module in modules]
    tensors = [x.to(device, dtype) for x in (token, query, key, value)]
    with torch.no_grad(), common.record() as launches:
        pose = h2ot.recover_pose(*tensors, *own, H, num_joints=1, backend=backend)
    return pose[:, 0].cpu(), [launch.kernel.__name__ for launch in launches]


def poses_and_exact(sizes, C, H, joints=3, F=7, K=5, outputs=3):
    """(ours, exact, float32's own) of a recovery whose samples are multiplied by sizes [joints, 1, C]."""
    token, query = torch.randn(2, F, C)
    key, value = torch.randn(joints, K, C), torch.randn(joints, K, C) * sizes
    modules = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, outputs)
    given = token, query, key, value, [module.requires_grad_(False) for module in modules], H
    ours, kernels = pose_by(*given, torch.float32, "triton")
    assert kernels == ["attention_pairs_kernel", "projected_tail_kernel"]
    return ours, *(pose_by(*given, dtype, "reference")[0] for dtype in (torch.float64, torch.float32))


@pytest.mark.parametrize(("C", "H"), [(3, 3), (15, 3), (64, 1), (96, 2), (100, 1), (136, 1), (192, 3)])
def test_poses_of_heads_of_any_width(C, H):
    """Blocks of 32 and 64 channels, full and padded, one and more of a head."""
    ours, exact, same = poses_and_exact(torch.ones(3, 1, C), C, H)
    assert_within(ours, exact, same, C)


@pytest.mark.parametrize("where", ["samples", "heads"])
def test_poses_of_values_of_any_size(where):
    """Samples, and heads of each, 10^30 times as large as others."""
    C, H = 72, 6
    if where == "samples":
        sizes = torch.logspace(-30, 15, 3)[:, None, None].expand(3, 1, C)
    else:
        sizes = torch.logspace(-15, 15, H).repeat_interleave(C // H).expand(3, 1, C)
    ours, exact, same = poses_and_exact(sizes, C, H)
    assert_within(ours, exact, same, C)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_nan_and_infinity_stay_in_their_samples():
    C, torch_seed = 40, 7
    sizes, poses = torch.ones(4, 1, C), []
    for wrong in (1.0, float("nan"), float("inf")):
        torch.manual_seed(torch_seed)
        sizes[2, 0, 33] = wrong
        poses.append(poses_and_exact(sizes, C, 2, joints=4)[0])
    for pose in poses[1:]:
        assert pose[2].isnan().all()
        pose[2] = poses[0][2]
        assert torch.equal(pose, poses[0])


def test_without_samples():
    C = 8
    modules = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 3)
    kept = torch.zeros(0, 5, C)
    given = torch.zeros(7, C), torch.zeros(7, C), kept, kept, modules, 2
    assert pose_by(*given, torch.float32, "triton")[0].shape == (0, 7, 3)


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
