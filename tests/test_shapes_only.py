"""Hosts and operations where no values are known: on meta tensors, and what torch.jit.trace makes of them."""

import warnings

import pytest
import torch

import h2ot_kernels as h2ot
from h2ot_kernels.dropin import hot, prunevid, tcformer

from .host_cases import NAMES, poses, small
from .test_dropin_patch import MODELS, run

META = {"device": "meta"}
X, INDEX = torch.empty(2, 9, 4, **META), torch.zeros(2, 3, dtype=torch.int64, **META)
LABELS = torch.zeros(2, 9, dtype=torch.int64, **META)
TOKENS = {"x": X, "mask": LABELS, "idx_token": LABELS, "agg_weight": X[..., :1]}
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
    "hot": (lambda: hot.cluster_dpc_knn(X, 3, 2)[0], (2, 3)),
    "hot, masked": (lambda: hot.cluster_dpc_knn(X, 3, 2, LABELS, masked_label=0)[1], (2, 9)),
    "tpc": (lambda: hot.cluster_dpc_knn_center(X, 3, 2, 4)[1], (2, 9)),
    "prunevid": (lambda: prunevid.cluster_dpc_knn(X, 3)[0], (2, 9)),
    "tcformer": (lambda: tcformer.cluster_dpc_knn(TOKENS, 3)[0], (2, 9)),
    "tcformer, merged": (lambda: tcformer.merge_tokens(TOKENS, LABELS, 3, X[..., 0])["x"], (2, 3, 4)),
    "tcformer, followed": (lambda: tcformer.merge_tokens(TOKENS, LABELS, 3)["agg_weight"], (2, 9, 1)),
    "index_points": (lambda: hot.index_points(X, INDEX), (2, 3, 4)),
    "cross_attention": (lambda: hot.CrossAttention(4, 2).to("meta")(X, X[:, :3], X[:, :3]), (2, 9, 4)),
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


@pytest.mark.parametrize("make", MODELS)
def test_patched_models_on_meta_tensors(make):
    model, x = make()
    model.eval()
    with torch.no_grad():
        expected = run(model, x)
        with h2ot.dropin.patch(model), torch.device("meta"):
            found = run(model.to("meta"), x.to("meta"))
    assert all(y.is_meta for y in found)
    assert [y.shape for y in found] == [y.shape for y in expected]


@pytest.mark.parametrize("name", NAMES)
def test_hosts_can_be_traced(name):
    model = small(name).float().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that become constants
        traced = torch.jit.trace(model, torch.randn(2, *model.in_shape), check_trace=False)
        x = torch.randn(2, *model.in_shape)
        torch.testing.assert_close(poses(traced(x)), poses(model(x)), rtol=1e-4, atol=1e-4)
