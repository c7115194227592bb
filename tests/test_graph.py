"""A graph's layer in one pass: neighbours exactly, sums within the bound of float64, on every instruction set."""

import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import h2ot_kernels as h2ot
from h2ot_kernels import _C, hosts
from h2ot_kernels.graph import MOST_NEIGHBOURS, graph_update, takes
from python_ref import graph as reference

from .compare import assert_within
from .runners import Recorder

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
CAPABILITIES = _C.runnable_capabilities().split(",")
# [B, F, J, C]
SIZES = [(2, 5, 17, 4), (1, 27, 3, 32), (3, 17, 2, 100), (1, 40, 5, 129), (2, 1, 3, 7), (1, 66, 1, 64)]
OP = torch.ops.h2ot_kernels.graph_update


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    _C.set_capability(request.param)  # the next test starts with the first again (conftest.py)
    return request.param


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


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
    x = torch.randn(1, 5, 1, 37).repeat(1, 9, 1, 1)
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


class Subclass(torch.Tensor):
    pass


X, OTHERS, NORM = arguments((2, 9, 5, 8), 1)
REFUSED = {
    "a subclass": (X.as_subclass(Subclass), OTHERS, NORM, 4),
    "another dtype": (X, (*OTHERS[:3], OTHERS[3].half()), NORM, 4),
    "another dtype of the norm": (X, OTHERS, norm_of(9, F64), 4),
    "statistics of the batch": (X, OTHERS, norm_of(9).train(), 4),
    "no statistics": (X, OTHERS, nn.BatchNorm1d(9, track_running_stats=False).requires_grad_(False).eval(), 4),
    "another norm": (X, OTHERS, nn.SyncBatchNorm(9).requires_grad_(False).eval(), 4),
    "more neighbours": (X, OTHERS, NORM, MOST_NEIGHBOURS + 1),
    "meta": (X.to("meta"), OTHERS, NORM, 4),
    "integers": (X.int(), tuple(t.int() for t in OTHERS), NORM, 4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_takes_refuses(name):
    assert takes(X, OTHERS, NORM, 4)
    assert not takes(*REFUSED[name])


def test_takes_refuses_where_somebody_looks(monkeypatch):
    with FakeTensorMode():
        assert not takes(torch.empty(2, 9, 5, 8), OTHERS, NORM, 4)
    with forward_ad.dual_level():
        assert not takes(X, OTHERS, NORM, 4)
    with h2ot.use_backend("reference"):
        assert not takes(X, OTHERS, NORM, 4)
    seen = []
    torch.func.vmap(lambda x: (seen.append(takes(x, OTHERS, NORM, 4)), x)[1])(X)
    assert seen == [False]
    leaf = X.clone().requires_grad_()
    assert takes(leaf, OTHERS, NORM, 4)
    with torch.enable_grad():
        assert not takes(leaf, OTHERS, NORM, 4)
        with pytest.raises(RuntimeError, match="graph_update is for inference"):
            graph_update(leaf, *OTHERS, NORM, 1, None, 4)
    monkeypatch.setattr("h2ot_kernels.graph.why_no_cpp", lambda: "not built")
    assert not takes(X, OTHERS, NORM, 4)


def test_gradients_and_tangents_are_refused():
    vectors = NORM.weight, NORM.bias, NORM.running_mean, NORM.running_var
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="graph_update has no gradient"):
        OP(X.clone().requires_grad_(), *OTHERS, None, 4, *vectors, 1e-5, 1).sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        graph_update(forward_ad.make_dual(X, X), *OTHERS, NORM, 1, None, 4)


VECTORS = (None, None, torch.zeros(9), torch.ones(9))
WRONG = {
    "an axis before the channels": (X, *OTHERS, None, 4, *VECTORS, 1e-5, 3),
    "of x's shape": (X, OTHERS[0][:1], *OTHERS[1:], None, 4, *VECTORS, 1e-5, 1),
    "residual of x's dtype": (X, OTHERS[0].half(), *OTHERS[1:], None, 4, *VECTORS, 1e-5, 1),
    r"scale \[C\]": (X, *OTHERS[:3], torch.ones(7), None, 4, *VECTORS, 1e-5, 1),
    r"the norm's vectors \[T\]": (X, *OTHERS, None, 4, torch.ones(8), *VECTORS[1:], 1e-5, 1),
    r"adjacency bool \[T, T\]": (X, *OTHERS, torch.ones(9, 8, dtype=torch.bool), 4, *VECTORS, 1e-5, 1),
    "one for each line": (X, *OTHERS, torch.ones(3, 9, 9, dtype=torch.bool), 4, *VECTORS, 1e-5, 1),
    "neighbours from 1": (X, *OTHERS, None, 0, *VECTORS, 1e-5, 1),
    "at most 16": (X, *OTHERS, None, 10, *VECTORS, 1e-5, 1),
}


@pytest.mark.parametrize("wanted", WRONG)
def test_the_operator_refuses_what_its_kernel_would_misread(wanted):
    with pytest.raises(ValueError, match=wanted):
        OP(*WRONG[wanted])


def test_flops_are_those_of_the_definition():
    counts = []
    for run in (
        lambda: graph_update(X, *OTHERS, NORM, 1, None, 4),
        lambda: by_definition(X, OTHERS, NORM, 1, reference.similar_nodes(X.movedim(1, 2), 4), F32),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_a_host_runs_its_graphs_in_one_pass(dtype):
    """And gives what it gives without; a hook on the norm is called."""
    model = hosts.build("motionagformer", num_frames=27, channels=32, depth=2).to(dtype).eval()
    x = torch.randn(2, 27, 17, 3).to(dtype)
    with Recorder() as called:
        fused = model(x)
    assert "h2ot_kernels::graph_update" in called.names
    assert not called.names & {"aten::native_batch_norm", "aten::bmm", "aten::argmax"}
    heard = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.register_forward_hook(lambda *call: heard.append(call))
    plain = model(x)
    assert len(heard) == 4
    torch.testing.assert_close(fused, plain, rtol=0, atol=(2e-2 if dtype == BF16 else 1e-5) * plain.abs().max().item())
