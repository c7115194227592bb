"""The CUDA library on a device: what the simulator cannot show. Values are held to the oracle by the other tests, whose
runners include this backend where it runs."""

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels import backend

from . import every_op, every_plan
from .cases import TokenCase, oracle_tokens

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _library():
    ok, reason = backend.can_run("score_tokens", "cuda", "cuda")
    if not ok:
        pytest.skip(reason)


def score(x, **given):
    return h2ot.score_tokens(x, backend="cuda", **given)


def prune(x, K, **given):
    return h2ot.prune_cluster(x, K, backend="cuda", **given)


def cluster(x, K, **given):
    return h2ot.cluster_tokens(x, K, backend="cuda", **given)


def assign(x, index, **given):
    return h2ot.assign_clusters(x, index, backend="cuda", **given)


@pytest.mark.parametrize("case", every_plan.CASES, ids=str)
def test_every_plan_equals_the_oracle(case):
    every_plan.check(case, "cuda")


@pytest.mark.parametrize("kind", ["static", "clump", "duplicates", "offset", "huge", "tiny"])
def test_labels_where_bounds_decide_little(kind):
    for dtype in (torch.float32, torch.bfloat16):
        case = TokenCase(kind, B=2, N=700, C=256, K=233, dtype=dtype)
        x = case.tokens()
        index = python_ref.prune_cluster(oracle_tokens(x), case.K)
        labels = python_ref.assign_clusters(oracle_tokens(x), index)
        assert torch.equal(cluster(x.cuda(), case.K).labels.cpu(), labels)
        assert torch.equal(assign(x.cuda(), index.cuda()).cpu(), labels)


def test_an_index_with_values_outside_its_range_selects_nothing_by_them():
    x, index = torch.randn(1, 40, 16, device="cuda"), torch.tensor([[3, 40, -2, 9, 2**40]], device="cuda")
    wanted = torch.tensor([0, 3], device="cuda")[assign(x, torch.tensor([[3, 9]], device="cuda"))]
    assert torch.equal(assign(x, index), wanted)


@pytest.mark.parametrize("N", [243, 3000])
def test_graph_capture_and_replay(N):
    x = torch.randn(2, N, 64, device="cuda")
    prune(x, N // 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index = prune(x, N // 3, keep=5)
        scores = score(x)
        clusters = cluster(x, N // 3)
        labels = assign(x, index)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(index, prune(x, N // 3, keep=5))
        assert all(map(torch.equal, scores, score(x)))
        assert all(map(torch.equal, clusters, cluster(x, N // 3)))
        assert torch.equal(labels, assign(x, index))


@pytest.mark.parametrize("name", ["cuda", "triton"])
@torch.no_grad()
def test_every_operation_is_captured_and_replayed_on_other_values(name):
    given = {key: x.to("cuda") for key, x in every_op.inputs(600).items()}
    for op, call in every_op.calls():
        if not backend.can_run(op, name, "cuda")[0]:
            continue
        call(h2ot, given, backend=name)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(h2ot, given, backend=name)
        for x in given.values():
            if x.is_floating_point():
                x.normal_()
        graph.replay()
        assert all(map(torch.equal, found, call(h2ot, given, backend=name))), op


def test_streams_do_not_disturb_each_other():
    inputs = [torch.randn(4, 243, 128, device="cuda") for _ in range(4)]
    expected = [prune(x, 81) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(prune(x, 81))
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))


def test_the_host_does_not_wait():
    x = torch.randn(4, 243, 128, device="cuda")
    prune(x, 81, keep=3)  # the number becomes a tensor, which later calls read (constants.py)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prune(x, 81, keep=3)
        score(x)
        assign(x, cluster(x, 81).index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_over_runs_and_batches():
    x = TokenCase("still", B=64, N=243, C=64).tokens().cuda()
    first = score(x)
    for _ in range(20):
        assert all(map(torch.equal, score(x), first))
    assert all(map(torch.equal, score(x[7:8]), (value[7:8] for value in first)))
    labels = cluster(x, 81).labels
    for _ in range(20):
        assert torch.equal(cluster(x, 81).labels, labels)
    assert torch.equal(cluster(x[7:8], 81).labels, labels[7:8])


def test_a_wrong_keep_spoils_its_sample_only():
    x = torch.randn(3, 27, 16, device="cuda")
    keep = torch.tensor([[1, 2], [3, 27], [-1, 0]], device="cuda")
    index = prune(x, 4, keep=keep).cpu()
    assert torch.equal(index[0], prune(x[:1], 4, keep=keep[:1])[0].cpu())
    assert (index[1:] == -1).all()
    labels = cluster(x, 4, keep=keep).labels.cpu()
    assert torch.equal(labels[0], cluster(x[:1], 4, keep=keep[:1]).labels[0].cpu())
    assert (labels[1:] == -1).all()


def test_more_than_2_to_the_31_elements():
    N, C = 243, 512
    B = 2**31 // (N * C) + 2
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * B * N * C * 2:
        pytest.skip(f"needs {3 * B * N * C * 2 >> 30} GiB of device memory, {free >> 30} are free")
    x = torch.randn(B, N, C, device="cuda", dtype=torch.bfloat16)
    kept = prune(x, 81)
    assert torch.equal(kept[-2:], prune(x[-2:].clone(), 81))
    assert torch.equal(kept[-1:].cpu(), python_ref.prune_cluster(oracle_tokens(x[-1:].cpu()), 81))
    labels = python_ref.assign_clusters(oracle_tokens(x[-1:].cpu()), kept[-1:].cpu())
    assert torch.equal(assign(x, kept)[-1:].cpu(), labels)
