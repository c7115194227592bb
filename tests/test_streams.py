"""Two streams, weighted token by token, in one pass: as near to float64 as PyTorch, on every instruction set."""

import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import h2ot_kernels as h2ot
from h2ot_kernels import _C, hosts
from h2ot_kernels.hosts.blocks import Fusion
from h2ot_kernels.streams import mix_streams, takes

from .compare import assert_within
from .runners import Recorder

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = (F32, torch.float64, BF16, torch.float16)
CHANNELS = (1, 3, 16, 17, 31, 64, 100, 256)
OP = torch.ops.h2ot_kernels.mix_streams


@pytest.fixture(params=_C.runnable_capabilities().split(","))
def capability(request):
    _C.set_capability(request.param)  # the next test starts with the first again (conftest.py)
    return request.param


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def made(size, dtype=F32, **options):
    layer = nn.Linear(2 * size[-1], 2, **options).to(dtype).requires_grad_(False)
    return torch.randn(size).to(dtype), torch.randn(size).to(dtype), layer


def by_definition(first, second, layer, dtype):
    weight, bias = (t if t is None else t.to(dtype) for t in (layer.weight, layer.bias))
    first, second = first.to(dtype), second.to(dtype)
    weights = nn.functional.linear(torch.cat([first, second], -1), weight, bias).softmax(-1)
    return first * weights[..., :1] + second * weights[..., 1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", CHANNELS)
def test_within_bound(C, dtype, capability):
    for rows, bias in itertools.product((1, 4, 33), (True, False)):
        given = made((rows, 3, C), dtype, bias=bias)
        assert takes(*given)
        with Recorder() as called:
            ours = mix_streams(*given)
        assert called.names == {"h2ot_kernels::mix_streams"}
        assert_within(ours, *(by_definition(*given, kind) for kind in (torch.float64, dtype)), 2 * C)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_stream_takes_all(sign, capability):
    for dtype in DTYPES:
        first, second, layer = made((9, 33), dtype)
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([300.0, -300.0]) * sign)
        assert torch.equal(mix_streams(first, second, layer), first if sign > 0 else second)


def test_nan_stays_in_its_row(capability):
    first, second, layer = made((6, 20))
    first[1, 3], second[4, 19] = float("nan"), float("nan")
    bad = mix_streams(first, second, layer).isnan()
    assert torch.equal(bad.any(1), torch.tensor([False, True, False, False, True, False]))
    assert torch.equal(bad.all(1), bad.any(1))


def test_the_same_bits_alone_and_by_any_threads(capability):
    before = torch.get_num_threads()
    for dtype in DTYPES:
        first, second, layer = made((700, 100), dtype)
        whole = mix_streams(first, second, layer)
        for rows in (slice(0, 1), slice(1, 6), slice(695, 700)):
            assert torch.equal(mix_streams(first[rows], second[rows], layer), whole[rows])
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(mix_streams(first, second, layer), whole)
        finally:
            torch.set_num_threads(before)


def test_nothing_is_read_beside_the_arrays(capability):
    for dtype, C in itertools.product(DTYPES, (3, 33)):
        first, second, layer = made((5, C), dtype)
        banded = []
        for t in (first, second, layer.weight, layer.bias):
            memory = torch.full((t.numel() + 128,), float("nan"), dtype=dtype)
            memory[64:-64] = t.flatten()
            banded.append(memory[64:-64].view(t.shape))
        result = OP(*banded)
        assert torch.equal(result, OP(*(t.clone() for t in banded)))
        assert not result.isnan().any()


def test_strided_streams_and_sizes_of_zero():
    first, second, layer = made((4, 5, 6, 8))
    wanted = mix_streams(first, second, layer)
    strided = first.movedim(1, 2).contiguous().movedim(2, 1)
    assert torch.equal(mix_streams(strided, second, layer), wanted)
    assert mix_streams(first[:0], second[:0], layer).shape == (0, 5, 6, 8)


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
