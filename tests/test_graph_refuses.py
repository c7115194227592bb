"""Where a graph's layer in one pass is taken, and where not; what is refused with an error."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import h2ot_kernels as h2ot
from h2ot_kernels import hosts
from h2ot_kernels.graph import MOST_NEIGHBOURS, graph_update, takes
from python_ref import graph as reference

from .runners import Recorder
from .test_graph import BF16, F32, F64, OP, arguments, by_definition, norm_of

pytestmark = pytest.mark.usefixtures("inference")


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
    monkeypatch.setattr("h2ot_kernels.inference.why_no_cpp", lambda: "not built")
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
