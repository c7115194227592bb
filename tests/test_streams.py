"""Two streams, weighted token by token, in one pass: as near to float64 as PyTorch, on every instruction set."""

import itertools

import pytest
import torch
from torch import nn

from h2ot_kernels import _C
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
