"""The Triton gather beyond the cases that all backends share: axes and strides, launches, wrong indices, graphs."""

import itertools

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels.triton import gather

from .runners import DEVICE
from .sample import drawn
from .test_triton import counted


def some_index(rows, F, K):
    return torch.stack([torch.randperm(F)[:K].sort().values for _ in range(rows)]).to(DEVICE)


def test_axes_merge_only_where_they_lie_behind_one_another():
    assert gather.merge_axes([2, 4, 5, 8], [360, 40, 8, 1], 1) == [(2, 360, False), (4, 40, True), (40, 1, False)]
    assert gather.merge_axes([2, 5, 4, 8], [360, 8, 40, 1], 2) == [
        (2, 360, False), (5, 8, False), (4, 40, True), (8, 1, False)]  # fmt: skip
    assert gather.merge_axes([2, 9, 3, 1, 7], [1, 2, 18, 5, 54], 1)[2:] == [(3, 18, False), (7, 54, False)]
    assert gather.merge_axes([2, 9, 3, 7], [63, 7, 0, 0], 1) == [(2, 63, False), (9, 7, True), (21, 0, False)]


def test_a_tile_holds_2048_elements_of_whole_warps():
    for inner in (1, 3, 4, 17, 51, 64, 100, 512, 5120, 2**40):
        choice = gather.tile(inner)
        assert choice["ROWS"] * choice["INNER"] == 2048
        assert choice["INNER"] == 256 or choice["INNER"] >= inner


def test_every_order_of_axes_and_both_ways_back():
    base = torch.randn(3, 4, 5, 2, device=DEVICE)
    for order in drawn(itertools.permutations(range(4)), 6):
        x = base.permute(order)
        for dim, out_dim in ((1, 3), (2, 1), (3, 2)):
            K = max(x.shape[dim] - 1, 1)
            index = some_index(x.shape[0], x.shape[dim], K)
            ours = gather.gather_tokens(x, index, None, dim, out_dim)
            assert torch.equal(ours, python_ref.gather_tokens(x, index, dim=dim, out_dim=out_dim))
            back = gather.scatter_tokens(ours, index, x.shape[dim], dim, out_dim)
            kept = torch.zeros(x.shape[0], x.shape[dim], device=DEVICE).scatter(1, index, 1.0)
            kept = kept.reshape(x.shape[0], *(x.shape[dim] if axis == dim else 1 for axis in range(1, 4)))
            assert torch.equal(back, x * kept)


def test_eight_axes():
    x = torch.randn(2, 2, 3, 2, 4, 2, 2, 3, device=DEVICE).permute(0, 7, 6, 5, 4, 3, 2, 1)
    index = some_index(1, 4, 2)
    ours = h2ot.gather_tokens(x, index, dim=4, out_dim=2, backend="triton")
    assert torch.equal(ours, python_ref.gather_tokens(x, index, dim=4, out_dim=2))


@pytest.mark.parametrize(("N", "C"), [(1, 3), (2, 64), (5, 100), (27, 512), (123, 3), (243, 64), (351, 100)])
def test_odd_shapes_with_embedding(N, C):
    K = (N + 2) // 3
    x, embed = torch.randn(2, N, 3, C, device=DEVICE), torch.randn(1, K, C, device=DEVICE)
    index = some_index(2, N, K)
    ours = h2ot.gather_tokens(x, index, embed, out_dim=2, backend="triton")
    assert torch.equal(ours, python_ref.gather_tokens(x, index, embed, out_dim=2))


def test_bfloat16_embedding_rounds_to_even_and_keeps_nan():
    x = torch.randn(1, 4, 64, device=DEVICE).bfloat16()
    x[0, 1, 0] = float("nan")
    embed = torch.randn(1, 2, 64, device=DEVICE).bfloat16()
    index = torch.tensor([[0, 1]], device=DEVICE)
    ours = h2ot.gather_tokens(x, index, embed, backend="triton")
    expected = python_ref.gather_tokens(x, index, embed)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


def test_one_launch_each():
    x, index = torch.randn(4, 9, 5, 8, device=DEVICE), some_index(2, 9, 4)
    embed = torch.randn(4, 8, device=DEVICE)
    assert counted(lambda: gather.gather_tokens(x, index, embed, 1, 2)) == ["gather_kernel"]
    kept = torch.randn(4, 5, 4, 8, device=DEVICE)
    assert counted(lambda: gather.scatter_tokens(kept, index, 9, 1, 2)) == ["gather_kernel"]


def guarded(shape, fill=float("nan")):
    """A tensor whose memory has a band of `fill` on either side, and that whole memory."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 128,), fill, device=DEVICE)
    view = memory[64 : 64 + size].view(shape)
    view.normal_()
    return view, memory


@pytest.mark.parametrize("bad", [-2, -(2**40), 9, 2**40])
def test_a_wrong_index_gives_nan_rows_and_reads_nothing(bad):
    x, _ = guarded((2, 9, 8))
    index = torch.tensor([[0, 3, 5], [0, 3, 5]], device=DEVICE)
    index[1, 1] = bad
    ours = h2ot.gather_tokens(x, index, out_dim=1, backend="triton")
    assert torch.equal(ours[0], x[0, [0, 3, 5]])
    assert ours[1, 1].isnan().all()
    assert torch.equal(ours[1, [0, 2]], x[1, [0, 5]])
    last = h2ot.gather_tokens(x, index, out_dim=2, backend="triton")
    assert torch.equal(last.mT.nan_to_num(), ours.nan_to_num())


def test_scatter_writes_every_element_and_ignores_frames_outside():
    grad = torch.ones(2, 3, 8, device=DEVICE)
    index = torch.tensor([[-4, 3, 8], [0, 3, 99]], device=DEVICE)
    back = gather.scatter_tokens(grad, index, 9, 1, 1)
    assert back.sum(2).tolist() == [[0, 0, 0, 8, 0, 0, 0, 0, 8], [8, 0, 0, 8, 0, 0, 0, 0, 0]]


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    x = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device="cuda").as_strided((2, 9, 64), (2**31, 64, 1))
    x.normal_()
    index = some_index(2, 9, 4)
    assert torch.equal(h2ot.gather_tokens(x, index, backend="triton"), python_ref.gather_tokens(x, index))


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    x, index, embed = torch.randn(4, 243, 17, 64, device="cuda"), some_index(4, 243, 81), torch.randn(81, 64).cuda()

    def run():
        return h2ot.gather_tokens(x, index, embed, out_dim=2, backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    x.normal_()
    graph.replay()
    assert torch.equal(out, run())
