"""Where the residual addition with its LayerNorm in one pass is not taken, and what is refused with an error."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import h2ot_kernels as h2ot
from h2ot_kernels.add_norm import add_norm, takes

from .test_add_norm import BF16, F16, F32, F64, OP, norm_of

pytestmark = pytest.mark.usefixtures("inference")


class Subclass(torch.Tensor):
    pass


class OwnNorm(nn.LayerNorm):
    pass


def of_two_dtypes(C):
    norm = norm_of(C).requires_grad_(False)
    norm.bias.data = norm.bias.data.to(BF16)
    return norm


X, Y, NORM = torch.randn(4, 8), torch.randn(4, 8), norm_of(8).requires_grad_(False)
REFUSED = {
    "another shape": (X, Y[:1], NORM, F32),
    "broadcast": (X, Y[0], NORM, F32),
    "another width": (X[:, :7], Y[:, :7], NORM, F32),
    "two axes": (X, Y, nn.LayerNorm((4, 8)).requires_grad_(False), F32),
    "no channels": (X[:, :0], Y[:, :0], nn.LayerNorm(0).requires_grad_(False), F32),
    "a number": (X[0, 0], Y[0, 0], NORM, F32),
    "a norm of its own": (X, Y, OwnNorm(8).requires_grad_(False), F32),
    "another norm": (X, Y, nn.RMSNorm(8).requires_grad_(False), F32),
    "channels apart": (torch.randn(8, 4).mT, Y, NORM, F32),
    "y's channels apart": (X, torch.randn(8, 4).mT, NORM, F32),
    "y wider than x": (X.to(BF16), Y, NORM, BF16),
    "y of float64": (X, Y.double(), NORM, F32),
    "halves of two kinds": (X.half(), Y.to(BF16), NORM, F16),
    "a half of another kind": (X.half(), Y.half(), NORM, BF16),
    "wider than x": (X.half(), Y.half(), NORM, F32),
    "float64": (X, Y, NORM, F64),
    "integers": (X.int(), Y.int(), NORM, torch.int32),
    "float32 weights of float64": (X.double(), Y.double(), NORM, F64),
    "half weights of float32": (X, Y, norm_of(8, BF16).requires_grad_(False), F32),
    "vectors of two dtypes": (X.to(BF16), Y.to(BF16), of_two_dtypes(8), BF16),
    "a subclass": (X.as_subclass(Subclass), Y, NORM, F32),
    "meta": (X.to("meta"), Y.to("meta"), NORM, F32),
    "sparse": (X, Y.to_sparse(), NORM, F32),
    "nested": (torch.nested.nested_tensor([X, Y], layout=torch.jagged), None, NORM, F32),
}


@pytest.mark.parametrize("name", REFUSED)
def test_takes_refuses(name):
    assert takes(X, Y, NORM, F32)
    assert not takes(*REFUSED[name])


def test_more_axes_than_a_result_has():
    with pytest.raises(ValueError, match="at most 64 axes"):
        add_norm(X.view(*(1,) * 63, 4, 8), None, NORM, F32)


def test_takes_refuses_where_somebody_looks(monkeypatch):
    with FakeTensorMode():
        assert not takes(torch.empty(4, 8), torch.empty(4, 8), NORM, F32)
    with forward_ad.dual_level():
        assert not takes(X, Y, NORM, F32)
    with h2ot.use_backend("reference"):
        assert not takes(X, Y, NORM, F32)
    seen = []
    torch.func.vmap(lambda x: (seen.append(takes(x, x, NORM, F32)), x)[1])(X)
    assert seen == [False]
    compiled = torch.compile(lambda x: x + 1 if takes(x, None, NORM, F32) else x, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), X)
    monkeypatch.setattr("h2ot_kernels.inference.why_no_cpp", lambda: "not built")
    assert not takes(X, Y, NORM, F32)


def test_gradients_and_tangents_are_refused():
    mine = norm_of(8)
    leaf = X.clone().requires_grad_()
    for x, y, norm in ((leaf, Y, NORM), (X, leaf, NORM), (X, None, mine)):
        assert takes(x, y, norm, F32)
        with torch.enable_grad():
            assert not takes(x, y, norm, F32)
            with pytest.raises(RuntimeError, match="add_norm is for inference"):
                add_norm(x, y, norm, F32)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        add_norm(forward_ad.make_dual(X, Y), None, NORM, F32)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="add_norm has no gradient"):
        OP(leaf, Y, None, None, 1e-5, F32)[1].sum().backward()


WRONG = {
    "y of x's shape": (X, Y[:1], None, None, 1e-5, F32),
    "channels": (X[:, :0], None, None, None, 1e-5, F32),
    "of 16 bits": (X.half(), Y, None, None, 1e-5, F16),
    r"weight and bias \[C\]": (X, Y, torch.ones(7), None, 1e-5, F32),
    "of one dtype": (X.half(), None, torch.ones(8), torch.ones(8).half(), 1e-5, F16),
    "float16": (X.int(), None, None, None, 1e-5, torch.int32),
}


@pytest.mark.parametrize("wanted", WRONG)
def test_the_operator_refuses_what_its_kernel_would_misread(wanted):
    with pytest.raises(ValueError, match=wanted):
        OP(*WRONG[wanted])


def test_counts_no_flops():
    with FlopCounterMode(display=False) as counter:
        add_norm(X, Y, NORM, F32)
    assert counter.get_total_flops() == 0
