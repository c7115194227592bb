"""A residual addition and its LayerNorm in one pass: as near to float64 as PyTorch, on every instruction set."""

import itertools
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from h2ot_kernels import _C
from h2ot_kernels.add_norm import add_norm, takes
from h2ot_kernels.linear import Linear

from . import fence
from .compare import assert_within
from .runners import Recorder

pytestmark = pytest.mark.usefixtures("inference")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# x and sum, y, normed
MIXES = [*itertools.product((F32,), (F32, BF16, F16), (F32, BF16, F16)), *((dtype,) * 3 for dtype in (F64, BF16, F16))]
CHANNELS = (1, 3, 16, 17, 31, 64, 100, 256, 512, 513, 1000)
ROWS = (0, 1, 2, 33)
CAPABILITIES = _C.runnable_capabilities().split(",")
OP = torch.ops.h2ot_kernels.add_norm


def norm_of(C, dtype=F32, **options):
    norm = nn.LayerNorm(C, **options).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def arguments(rows, C, mix):
    x, y, _ = mix
    return torch.randn(rows, C).to(x), torch.randn(rows, C).to(y)


def eager(x, y, norm, dtype):
    total = x if y is None else x + y
    return total, norm(total).to(dtype)


def exactly(total, norm):
    """The norm of a sum as it is stored, in float64."""
    vectors = [t if t is None else t.double() for t in (norm.weight, norm.bias)]
    return nn.functional.layer_norm(total.double(), total.shape[-1:], *vectors, norm.eps)


def check(x, y, norm, dtype):
    """The sum exactly, the norm within the bound; in memory that nothing else may touch."""
    assert takes(x, y, norm, dtype)
    with Recorder() as called:
        total, normed = add_norm(x, y, norm, dtype)
    assert "h2ot_kernels::add_norm" in called.names
    assert not called.names & {"aten::add", "aten::native_layer_norm"}
    wanted, theirs = eager(x, y, norm, dtype)
    assert total.dtype == x.dtype
    assert torch.equal(total, wanted)
    assert_within(normed, exactly(wanted, norm), theirs, x.shape[-1])
    return total, normed


@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_within_bound(mix, C, capability):
    for rows in ROWS:
        x, y = arguments(rows, C, mix)
        check(x, y, norm_of(C, x.dtype), mix[2])
        total, _ = check(x, None, norm_of(C, x.dtype), mix[2])
        assert total is x


@pytest.mark.parametrize("axes", [9, 22])
def test_more_axes_than_gathering_takes(axes):
    """The results have as many: also those of a linear layer."""
    rows, norm, layer = torch.randn(500, 64), norm_of(64), Linear(64, 64).requires_grad_(False)
    x = rows.view(*(1,) * (axes - 2), 500, 64)
    assert torch.equal(add_norm(x, x, norm, F32)[1].flatten(0, -2), add_norm(rows, rows, norm, F32)[1])
    assert torch.equal(layer(x).flatten(0, -2), layer(rows))


@pytest.mark.parametrize("C", [1, 31, 512])
def test_weights_of_every_kind(C, capability):
    for dtype in (F32, F64, BF16, F16):
        x, y = arguments(9, C, (dtype,) * 3)
        for options in ({"elementwise_affine": False}, {"bias": False}, {"eps": 0.5}):
            check(x, y, norm_of(C, dtype, **options), dtype)
        if dtype in (BF16, F16):
            check(x, y, norm_of(C), dtype)  # float32 weights
    odd = norm_of(C)
    odd.weight = None  # a bias alone
    check(*arguments(9, C, (F32, F32, F32)), odd, F32)


@pytest.mark.parametrize("offset", [1e4, -3e4])
@pytest.mark.parametrize("C", [17, 100, 512, 1000])
def test_large_offsets(C, offset, capability):
    """The mean is mended by that of the deviations: nearer than PyTorch, whose mean is one float32."""
    x = torch.randn(33, C) + offset
    for y in (torch.randn(33, C), torch.randn(33, C).to(BF16), None):
        norm = norm_of(C)
        total, normed = check(x, y, norm, F32)
        exact = exactly(total, norm)
        assert (normed - exact).abs().max() <= 2e-5 * max(1, exact.abs().max())


@pytest.mark.parametrize("C", CHANNELS)
def test_constant_rows_are_the_bias(C, capability):
    values = torch.tensor([0.0, -0.0, 1.1, -3.3e4, 1e-30, 1e10, -65504])[:, None]
    for dtype in (F32, F64, BF16):
        x = values.to(dtype).expand(-1, C).contiguous()
        norm = norm_of(C, dtype)
        for y in (None, torch.zeros_like(x)):
            normed = add_norm(x, y, norm, dtype)[1]
            assert (normed - norm.bias).abs().max() <= 1e-5


@pytest.mark.parametrize("C", [3, 17, 64, 513])
def test_nan_and_infinity_stay_in_their_row(C, capability):
    for mix in MIXES:
        x, y = arguments(9, C, mix)
        norm = norm_of(C, x.dtype)
        for row, (tensor, value) in enumerate(itertools.product((x, y), (float("nan"), float("inf"), -float("inf")))):
            tensor[row, (row * 7) % C] = value
        total, normed = add_norm(x, y, norm, mix[2])
        wanted, theirs = eager(x, y, norm, mix[2])
        assert torch.equal(total.isnan(), wanted.isnan())
        assert torch.equal(total.nan_to_num(), wanted.nan_to_num())
        assert normed[:6].isnan().all()
        assert torch.equal(normed.isnan(), theirs.isnan())
        check(x[6:], y[6:], norm, mix[2])
    x[0, 0], y[0, 0] = float("inf"), -float("inf")
    assert add_norm(x, y, norm, x.dtype)[1][0].isnan().all()


def test_results_beyond_float16_are_infinite(capability):
    x = torch.randn(5, 64)
    norm = norm_of(64)
    norm.weight.mul_(1e6)
    for y in (None, x.half()):
        normed, theirs = add_norm(x, y, norm, F16)[1], eager(x, y, norm, F16)[1]
        assert normed.isinf().any()
        assert torch.equal(normed.isinf(), theirs.isinf())


@pytest.mark.parametrize("C", [3, 17, 100, 512])
def test_the_same_bits_alone_in_any_batch_and_by_any_threads(C, capability):
    before = torch.get_num_threads()
    for mix in MIXES:
        x, y = arguments(700, C, mix)
        norm = norm_of(C, x.dtype)
        whole = add_norm(x, y, norm, mix[2])
        for rows in (slice(0, 1), slice(1, 4), slice(5, 12), slice(695, 700)):
            alone = add_norm(x[rows], y[rows], norm, mix[2])
            assert all(torch.equal(a, b[rows]) for a, b in zip(alone, whole, strict=True))
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, add_norm(x, y, norm, mix[2]), whole))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(add_norm(whole[0], None, norm, mix[2])[1], whole[1])  # the sum as stored is what is normed


STRIDED = {
    "permuted": lambda t: t.view(3, 5, 2, -1).permute(1, 2, 0, 3),
    "rows apart": lambda t: t[::2],
    "within wider rows": lambda t: t[:, 3:-4],
    "channels of five axes": lambda t: t.view(3, 5, 2, 1, -1)[:, 1:3, :, :, 3:-4].permute(3, 0, 2, 1, 4),
    "one row": lambda t: t[7],
    "repeated": lambda t: t[:1].expand(9, -1),
    "no rows": lambda t: t.view(3, 5, 2, -1)[:, :0].permute(1, 2, 0, 3),
    "offset": lambda t: t.flatten()[1:-(t.shape[1] - 1)].view(29, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", STRIDED)
def test_strided_inputs_stay_as_they_are(name, capability):
    for C, mix in itertools.product((20, 512), ((F32, BF16, BF16), (F64,) * 3, (F16,) * 3)):
        memory = arguments(30, C, mix)
        copies = [t.clone() for t in memory]
        x, y = map(STRIDED[name], memory)
        norm = norm_of(x.shape[-1], x.dtype, eps=0.5)
        for added in (y, y.contiguous(), None):
            results = check(x, added, norm, mix[2])
            if name == "permuted":
                assert all(t.stride() == x.stride() for t in results)
        assert all(map(torch.equal, memory, copies))


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_nothing_is_read_or_written_beside_the_arrays(mix, capability):
    """Inputs between NaN; the page behind each buffer stops what touches it (below); the driver has guard bands."""
    for rows, C in itertools.product((1, 5), (3, 17, 33, 100)):
        x, y = arguments(rows, C, mix)
        banded = []
        for t in (x, y, *norm_of(C, x.dtype).parameters()):
            memory = torch.full((t.numel() + 128,), float("nan"), dtype=t.dtype)
            memory[64:-64] = t.flatten()
            banded.append(memory[64:-64].view(t.shape))
        plain = OP(*(t.clone() for t in banded), 1e-5, mix[2])
        assert all(map(torch.equal, OP(*banded, 1e-5, mix[2]), plain))
        assert not any(t.isnan().any() for t in plain)


BESIDE_FENCES = """
from h2ot_kernels import _C
from tests.test_add_norm import CAPABILITIES, CHANNELS, MIXES, add_norm, arguments, norm_of
for name in CAPABILITIES:
    _C.set_capability(name)
    for mix in MIXES:
        for C in CHANNELS:
            x, y = arguments(3, C, mix)
            norm = norm_of(C, x.dtype).requires_grad_(False)
            for added in (y, None):
                add_norm(x, added, norm, mix[2])
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_no_access_behind_a_tensor(tmp_path):
    environment = fence.environment(fence.build(tmp_path))
    command = [sys.executable, "-c", BESIDE_FENCES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr[-2000:]
