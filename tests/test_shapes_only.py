"""Hosts and operations where no values are known: on meta tensors, and what torch.jit.trace makes of them."""

import warnings

import pytest
import torch

import h2ot_kernels as h2ot

from .host_cases import NAMES, poses, small

META = {"device": "meta"}
X, INDEX = torch.empty(2, 9, 4, **META), torch.zeros(2, 3, dtype=torch.int64, **META)
LABELS = torch.zeros(2, 9, dtype=torch.int64, **META)
CALLS = {
    "gather_tokens": (lambda: h2ot.gather_tokens(X, INDEX), (2, 3, 4)),
    "recover_interpolate": (lambda: h2ot.recover_interpolate(X[:, :3], INDEX, 9), (2, 9, 4)),
    "merge_tokens": (lambda: h2ot.merge_tokens(X, LABELS, 3), (2, 3, 4)),
    "assign_clusters": (lambda: h2ot.assign_clusters(X, INDEX), (2, 9)),
    "assign_by_parent": (lambda: h2ot.assign_clusters(X, INDEX, parent=LABELS), (2, 9)),
    "cluster_tokens": (lambda: h2ot.cluster_tokens(X, 3)[0], (2, 3)),
    "prune_cluster": (lambda: h2ot.prune_cluster(X, 3, keep=[0, 4]), (2, 3)),
    "select_tokens": (lambda: h2ot.select_tokens(X[..., 0], 3, keep=INDEX), (2, 3)),
    "prune_sample": (lambda: h2ot.prune_sample(9, 3, device="meta"), (1, 3)),
}


@pytest.mark.parametrize("op", CALLS)
def test_operations_on_meta_tensors(op):
    call, shape = CALLS[op]
    result = call()
    assert (result.device.type, tuple(result.shape)) == ("meta", shape)


@pytest.mark.parametrize("name", NAMES)
def test_hosts_on_meta_tensors(name):
    model = small(name).eval()
    x = torch.randn(2, *model.in_shape, dtype=torch.float64)
    with torch.no_grad():
        expected = poses(model(x))
        assert poses(model.to("meta")(x.to("meta"))).shape == expected.shape


@pytest.mark.parametrize("name", NAMES)
def test_hosts_can_be_traced(name):
    model = small(name).float().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that become constants
        traced = torch.jit.trace(model, torch.randn(2, *model.in_shape), check_trace=False)
        x = torch.randn(2, *model.in_shape)
        torch.testing.assert_close(poses(traced(x)), poses(model(x)), rtol=1e-4, atol=1e-4)
