"""A graph's layer in one pass: neighbours exactly, sums within the bound of float64, on every instruction set."""

import itertools

import pytest
import torch
from torch import nn

from h2ot_kernels.graph import graph_update, takes
from python_ref import graph as reference

from .compare import assert_within
from .runners import Recorder

pytestmark = pytest.mark.usefixtures("inference")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
# [B, F, J, C]
SIZES = [(2, 5, 17, 4), (1, 27, 3, 32), (3, 17, 2, 100), (1, 40, 5, 129), (2, 1, 3, 7), (1, 66, 1, 64)]
OP = torch.ops.h2ot_kernels.graph_update


def norm_of(nodes, dtype=F32, **options):
    norm = nn.BatchNorm1d(nodes, **options).to(dtype).eval().requires_grad_(False)
    for vector in (norm.weight, norm.bias, norm.running_mean):
        if vector is not None:
            nn.init.normal_(vector)
    norm.running_var.uniform_(0.5, 2)
    return norm


def arguments(size, dim, dtype=F32, **options):
    """x, (u, v, residual, scale), the norm."""
    x, *others = (torch.randn(size).to(dtype) for _ in range(4))
    return x, (*others, torch.randn(size[-1]).to(dtype)), norm_of(size[dim], dtype, **options)


def by_definition(x, others, norm, dim, adjacency, dtype):
    """python_ref in `dtype`; adjacency [T, T] or one for each line, in the order of [B, other axis]."""
    x, u, v, residual = (t.to(dtype).movedim(dim, 2) for t in (x, *others[:3]))
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    made = (*(None if t is None else t.to(dtype) for t in vectors), norm.eps)
    return reference.graph_update(x, u, v, residual, others[3].to(dtype), adjacency, made).movedim(2, dim)


def chosen(x, dim, neighbours, update=graph_update):
    """Who the kernel takes for a neighbour, bool [B, lines, T, T]: it sums v, which shows C nodes of a line at a time.

    x + u is 1 in every channel, so what is added to it is above 0 where a node counts.
    """
    T, C = x.shape[dim], x.shape[-1]
    norm = nn.BatchNorm1d(T, eps=0.0, affine=False).to(x.dtype).eval()
    found = []
    for first in range(0, T, C):
        one_hot = torch.eye(T, dtype=x.dtype)[:, first : first + C]
        v = nn.functional.pad(one_hot, (0, C - one_hot.shape[1])).view(*(1,) * dim, T, *(1,) * (x.dim() - dim - 2), C)
        y = update(
            x, 1 - x, v.expand_as(x), torch.zeros_like(x), torch.ones_like(x[0, 0, 0]), norm, dim, None, neighbours
        )
        found.append((y.movedim(dim, 2) > 1.001)[..., : one_hot.shape[1]])
    return torch.cat(found, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_within_bound(size, dtype, capability):
    for dim, options in itertools.product((1, 2), ({}, {"affine": False})):
        x, others, norm = arguments(size, dim, dtype, **options)
        T, neighbours = size[dim], min(4, size[dim])
        lines = x.movedim(dim, 2).shape[:2]
        by_product = reference.similar_nodes(x.double().movedim(dim, 2), neighbours)
        of_all = (torch.rand(T, T) < 0.3) | torch.eye(T, dtype=torch.bool)
        of_each = (torch.rand(*lines, T, T) < 0.3) | torch.eye(T, dtype=torch.bool)
        for given, adjacency in ((None, by_product), (of_all, of_all), (of_each, of_each)):
            assert takes(x, others, norm, neighbours)
            with Recorder() as called:
                ours = graph_update(x, *others, norm, dim, given, neighbours)
            assert called.names == {"h2ot_kernels::graph_update"}
            exact, theirs = (by_definition(x, others, norm, dim, adjacency, kind) for kind in (F64, dtype))
            assert_within(ours, exact, theirs, size[-1])


@pytest.mark.parametrize("neighbours", [1, 2, 3, 4, 5, 16])
def test_neighbours_of_whole_numbers_exactly(neighbours, capability):
    """Products of small whole numbers are exact in float32: many of them are equal, and all of those count."""
    tied = False
    for size, dim, dtype in itertools.product([(2, 40, 3, 5), (1, 16, 33, 20)], (1, 2), (F32, F64, F16, BF16)):
        x = torch.randint(-2, 3, size).to(dtype)
        count = min(neighbours, size[dim])
        wanted = reference.similar_nodes(x.double().movedim(dim, 2), count)
        assert torch.equal(chosen(x, dim, count), wanted)
        tied = tied or bool((wanted.sum(-1) > count).any())
    assert tied


def test_equal_tokens_are_equally_near(capability):
    x = torch.randint(-8, 9, (1, 5, 1, 37)).float().repeat(1, 9, 1, 1)  # products that no order of sums rounds
    x = x[:, torch.randperm(45)]
    found = chosen(x, 1, 4)
    assert torch.equal(found, reference.similar_nodes(x.double().movedim(1, 2), 4))
    assert torch.equal(chosen(torch.zeros_like(x), 1, 4), torch.ones_like(found))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_not_finite(bad, count, capability):
    """NaN is the largest product and nobody's neighbour; a node without neighbours makes its line NaN."""
    for dtype in (F32, F64):
        x, others, norm = arguments((3, 40, 2, 8), 1, dtype)
        x[1, torch.randperm(40)[:count], 1, 3] = bad
        adjacency = reference.similar_nodes(x.movedim(1, 2), 4)
        ours, given = (graph_update(x, *others, norm, 1, links, 4) for links in (None, adjacency))
        torch.testing.assert_close(ours, given, rtol=0, atol=0, equal_nan=True)
        theirs = by_definition(x, others, norm, 1, adjacency, dtype)
        bad_line = torch.zeros(3, 2, dtype=torch.bool).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(True))
        for result in (ours, theirs):
            assert torch.equal(result.movedim(1, 2).isnan().flatten(2).any(-1) | bad_line, bad_line)
        assert (theirs.isnan() | ~ours.isnan()).all()
        if bad != bad:
            assert ours[1, :, 1].isnan().all()
            assert theirs[1, :, 1].isnan().all()
    alone = torch.eye(40, dtype=torch.bool)
    alone[7] = False
    assert graph_update(*arguments((1, 40, 2, 8), 1)[:1], *others_of(8), norm_of(40), 1, alone, 0).isnan().all()


@pytest.mark.parametrize("neighbours", [1, 3, 4, 16])
def test_products_of_minus_infinity_are_neighbours_where_all_are(neighbours, capability):
    """Finite nodes that are opposite, and so large that float32 does not hold their product."""
    for T in (neighbours, neighbours + 1):
        x, large = torch.randn(1, T, 1, 16), 1e25
        x[0, 0], x[0, -1] = large, -large
        v = large * torch.eye(T, 16).view(1, T, 1, 16)  # x + u is 0: sums as large as x show who is counted
        norm = nn.BatchNorm1d(T, eps=0.0, affine=False).eval()
        found = graph_update(x, -x, v, torch.zeros_like(x), torch.ones(16), norm, 1, None, neighbours)
        wanted = reference.similar_nodes(x.movedim(1, 2), neighbours)
        assert torch.equal(found[0, :, 0, :T] > 0, wanted[0, 0, :, :16])


def others_of(C):
    return arguments((1, 40, 2, C), 1)[1]


def test_the_same_bits_alone_in_any_batch_and_by_any_threads(capability):
    before = torch.get_num_threads()
    for dtype, dim in itertools.product(DTYPES, (1, 2)):
        x, others, norm = arguments((7, 40, 9, 33), dim, dtype)
        for adjacency in (None, torch.rand(x.shape[dim], x.shape[dim]) < 0.5):
            whole = graph_update(x, *others, norm, dim, adjacency, 4)
            alone = graph_update(x[3:4], *(t[3:4] for t in others[:3]), others[3], norm, dim, adjacency, 4)
            assert torch.equal(alone, whole[3:4])
            try:
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    assert torch.equal(graph_update(x, *others, norm, dim, adjacency, 4), whole)
            finally:
                torch.set_num_threads(before)


def test_strided_inputs_stay_as_they_are():
    x, others, norm = arguments((2, 9, 5, 20), 1)
    wanted = graph_update(x, *others, norm, 1, None, 4)
    strided = [t.movedim(1, 2).contiguous().movedim(2, 1) for t in (x, *others[:3])]
    copies = [t.clone() for t in strided]
    assert torch.equal(graph_update(*strided, others[3].repeat(2)[:20], norm, 1, None, 4), wanted)
    assert all(map(torch.equal, strided, copies))


def test_nothing_is_read_beside_the_arrays(capability):
    for dtype, (size, dim) in itertools.product((F32, BF16), (((1, 5, 3, 33), 1), ((2, 3, 9, 5), 2))):
        x, others, norm = arguments(size, dim, dtype)
        banded = []
        for t in (x, *others, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            memory = torch.full((t.numel() + 128,), float("nan"), dtype=t.dtype)
            memory[64:-64] = t.flatten()
            banded.append(memory[64:-64].view(t.shape))
        plain, apart = (
            OP(*given[:5], None, 3, *given[5:], 1e-5, dim) for given in (banded, [t.clone() for t in banded])
        )
        assert torch.equal(plain, apart)
        assert not plain.isnan().any()


def test_sizes_of_zero():
    for size in ((0, 5, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)):
        x, others, norm = arguments(size, 1)
        assert graph_update(x, *others, norm, 1, None, 2).shape == size
