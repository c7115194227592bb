"""Where two streams are weighted in one pass, and where not; what is refused with an error."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import h2ot_kernels as h2ot
from h2ot_kernels import hosts
from h2ot_kernels.hosts.blocks import Fusion
from h2ot_kernels.streams import mix_streams, takes

from .runners import Recorder
from .test_streams import BF16, F32, OP, by_definition, made


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


class Subclass(torch.Tensor):
    pass


FIRST, SECOND, LAYER = made((4, 8))
REFUSED = {
    "a subclass": (FIRST.as_subclass(Subclass), SECOND, LAYER),
    "another shape": (FIRST, SECOND[:1], LAYER),
    "another dtype": (FIRST, SECOND.half(), LAYER),
    "another width": (FIRST, SECOND, nn.Linear(8, 2).requires_grad_(False)),
    "half weights": (FIRST, SECOND, nn.Linear(16, 2).half().requires_grad_(False)),
    "meta": (FIRST.to("meta"), SECOND.to("meta"), LAYER),
}


@pytest.mark.parametrize("name", REFUSED)
def test_takes_refuses(name):
    assert takes(FIRST, SECOND, LAYER)
    assert not takes(*REFUSED[name])


def test_takes_refuses_where_somebody_looks(monkeypatch):
    with FakeTensorMode():
        assert not takes(torch.empty(4, 8), torch.empty(4, 8), LAYER)
    with forward_ad.dual_level():
        assert not takes(FIRST, SECOND, LAYER)
    with h2ot.use_backend("reference"), torch.autocast("cpu", BF16):
        assert not takes(FIRST, SECOND, LAYER)
    with torch.autocast("cpu", BF16):
        assert not takes(FIRST, SECOND, LAYER)
    leaf = FIRST.clone().requires_grad_()
    assert takes(leaf, SECOND, LAYER)
    with torch.enable_grad():
        assert not takes(leaf, SECOND, LAYER)
        with pytest.raises(RuntimeError, match="mix_streams is for inference"):
            mix_streams(leaf, SECOND, LAYER)
        with pytest.raises(NotImplementedError, match="mix_streams has no gradient"):
            OP(leaf, SECOND, LAYER.weight, None).sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        mix_streams(forward_ad.make_dual(FIRST, SECOND), SECOND, LAYER)
    monkeypatch.setattr("h2ot_kernels.streams.why_no_cpp", lambda: "not built")
    assert not takes(FIRST, SECOND, LAYER)


WRONG = {
    "of one shape": (FIRST, SECOND[:1], LAYER.weight, None),
    "and dtype": (FIRST, SECOND.half(), LAYER.weight, None),
    r"weight \[2, 2 C\]": (FIRST, SECOND, LAYER.weight[:, 1:], None),
    r"bias \[2\]": (FIRST, SECOND, LAYER.weight, torch.ones(3)),
}


@pytest.mark.parametrize("wanted", WRONG)
def test_the_operator_refuses_what_its_kernel_would_misread(wanted):
    with pytest.raises(ValueError, match=wanted):
        OP(*WRONG[wanted])


def test_flops_are_those_of_the_layer():
    counts = []
    for run in (lambda: mix_streams(FIRST, SECOND, LAYER), lambda: by_definition(FIRST, SECOND, LAYER, F32)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["motionbert", "motionagformer"])
def test_a_host_mixes_its_streams_in_one_pass(name):
    """And gives what it gives without; a hook on the layer is called."""
    model = hosts.build(name, num_frames=27, channels=32, depth=2).eval()
    x = torch.randn(2, 27, 17, 3)
    with Recorder() as called:
        fused = model(x)
    assert "h2ot_kernels::mix_streams" in called.names
    assert not called.names & {"aten::_softmax", "aten::lerp"}
    heard = []
    for module in model.modules():
        if isinstance(module, Fusion):
            module.register_forward_hook(lambda *call: heard.append(call))
    plain = model(x)
    assert len(heard) == 2
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
