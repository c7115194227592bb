"""The tiles that the choosers keep for large inputs (on Hopper their products are wgmma's), on inputs small enough."""

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels import backend
from h2ot_kernels.triton import attention_scores, common, recover_tail, score, score_large

from .compare import assert_scores, assert_within
from .runners import DEVICE

pytestmark = pytest.mark.skipif(backend.interpreting(), reason="the interpreter has no tiles: ./dev ptx, or a GPU")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_streaming_triton_tiles_of_many_tokens(dtype, k, monkeypatch):
    chosen = score_large.stream_tile
    monkeypatch.setattr(score, "SMALL", 4)
    monkeypatch.setattr(score_large, "stream_tile", lambda B, N, *rest: chosen(8192, N, *rest))
    assert score_large.stream_tile(1, 150, 4, dtype)["ROWS"] == 64
    x = torch.randn(2, 150, 96).cumsum(1).to(dtype)
    with h2ot.use_backend("triton"), common.record() as launches:
        ours = h2ot.score_tokens(x.to(DEVICE), k)
        index = h2ot.prune_cluster(x.to(DEVICE), 50, k)
    assert {"nearest_kernel", "scan_kernel"} <= {launch.kernel.__name__ for launch in launches}
    assert_scores(type(ours)(*(value.cpu() for value in ours)), python_ref.score_tokens(x, k))
    assert torch.equal(index.cpu(), python_ref.prune_cluster(x, 50, k))


@pytest.mark.parametrize(("C", "M"), [(64, 3), (128, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_tail_of_many_rows(dtype, C, M, monkeypatch):
    chosen = recover_tail.tail_tile
    monkeypatch.setattr(recover_tail, "tail_tile", lambda rows, *rest: chosen(10**6, *rest))
    token, query, kept = torch.randn(1, 81, C), torch.randn(1, 81, C), torch.randn(2, 17, 27, C)
    modules = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, M)

    def pose(to, device, backend):
        tensors = [x.to(device, to) for x in (token, query, *kept)]
        with torch.no_grad():
            own = [module.to(device, to) for module in modules]
            return h2ot.recover_pose(*tensors, *own, 4, backend=backend).cpu()

    exact, same = pose(torch.float64, "cpu", "reference"), pose(dtype, "cpu", "reference")
    assert_within(pose(dtype, DEVICE, "triton"), exact, same, C)


@pytest.mark.parametrize("F", [129, 243])
def test_attention_scores_of_a_device_with_tensor_memory(F, monkeypatch):
    monkeypatch.setattr(attention_scores, "has_tensor_memory", lambda device: True)
    query, key = torch.randn(2, 1, 2, F, 20)
    with common.record() as launches:
        ours = attention_scores.attention_scores(query.to(DEVICE), key.to(DEVICE), 0.3)
    assert [launch.constants.get("QUERIES") for launch in launches] == [32, None]
    exact = python_ref.attention_scores(query.double(), key.double(), 0.3)
    assert_within(ours.cpu(), exact, python_ref.attention_scores(query, key, 0.3), 20)
