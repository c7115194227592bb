"""The recovery tail in rotated channels: as near to float64 as PyTorch's, on every instruction set."""

import copy
import pickle

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels.linear import Linear
from h2ot_kernels.recover_rotated import recover_rotated, takes

from .compare import assert_within
from .runners import Recorder

pytestmark = pytest.mark.usefixtures("inference", "no_tiles")
ALL = (True, True, True, True)
# R, F, C, outputs, which vectors are there: of the projection, norm weight and bias, of the head
TAILS = [
    (2, 1, 3, 3, ALL),
    (3, 5, 64, 1, (True, True, False, False)),
    (2, 27, 100, 3, (False, False, False, True)),
    (1, 50, 160, 3, ALL),
    (5, 31, 33, 5, (False, True, True, True)),
    (2, 3, 8, 17, (True, False, False, True)),
    (3, 13, 1, 2, ALL),
]


class Tail(nn.Module):
    """proj, norm and head with weights that show a wrong channel, with or without their vectors."""

    def __init__(self, C, outputs=3, there=ALL):
        super().__init__()
        self.proj, self.norm = Linear(C, C, bias=there[0]), nn.LayerNorm(C, 1e-3, there[1], there[2])
        self.head = nn.Linear(C, outputs, bias=there[3])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
        self.eval()

    def forward(self, token, attended):
        return self.head(self.norm(token + nn.functional.linear(attended, self.proj.weight, self.proj.bias)))

    def vectors(self):
        return self.norm.weight, self.norm.bias, self.head.weight, self.head.bias

    def rotated(self, token, attended):
        """In rotated channels, which must be possible: each row is what all frames find at the only kept one."""
        kept = attended.reshape(-1, 1, attended.shape[-1])
        found = self.recovered(token, token, kept, kept, 1).unflatten(0, attended.shape[:2])
        return found.diagonal(0, 1, 2).movedim(-1, 1)

    def recovered(self, token, query, key, value, num_heads, scale=1.0):
        assert takes((token, query, key, value), self.proj, *self.vectors())
        rest = num_heads, scale, self.proj, *self.vectors(), self.norm.eps
        return recover_rotated(token, query, key, value, *rest)

    def exactly(self, token, attended):
        return copy.deepcopy(self).double()(token.double(), attended.double())


def assert_right(tail, token, attended):
    ours, exact = tail.rotated(token, attended), tail.exactly(token, attended)
    assert_within(ours, exact, tail(token, attended), token.shape[-1])


def assert_rows_apart(tail, token, attended):
    """NaN and infinity spoil their own rows; attended, of three samples, is written to."""
    expected = tail.rotated(token, attended)
    attended[1, 4, -1], attended[2, -1, 0] = float("nan"), float("inf")
    ours = tail.rotated(token, attended)
    assert ours[1, 4].isnan().all()
    assert ours[2, -1].isnan().all()
    ours[1, 4], ours[2, -1] = expected[1, 4], expected[2, -1]
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(("R", "F", "C", "outputs", "there"), TAILS)
def test_rotated_within_bound(R, F, C, outputs, there, capability):
    assert_right(Tail(C, outputs, there), torch.randn(F, C), torch.randn(R, F, C))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_instructions_for_it_the_triangle_is_float32s(monkeypatch, dtype, capability):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False, raising=False)
    monkeypatch.setattr("h2ot_kernels.recover_rotated.dots_run", lambda: False)
    tail, token, attended = Tail(40).to(dtype), torch.randn(9, 40).to(dtype), torch.randn(3, 9, 40).to(dtype)
    assert_right(tail, token, attended)
    step = torch.finfo(dtype).eps  # half a step of the result, and what float32 adds to that
    exact = tail.exactly(token, attended)
    assert ((tail.rotated(token, attended) - exact).abs() <= 0.51 * step * exact.abs() + 1e-5).all()
    monkeypatch.setattr("h2ot_kernels.recover_rotated.is_widened", lambda dtype: False)
    assert not takes((token, attended), tail.proj, *tail.vectors())


@pytest.mark.parametrize("C", [24, 200])
def test_rotated_of_channels_far_from_zero(C, capability):
    """The mean is taken from token and weights in float64: nothing cancels later."""
    tail = Tail(C)
    tail.proj.weight += 5
    assert_right(tail, torch.randn(9, C) + 1e3, torch.randn(2, 9, C))


def test_rotated_of_weights_that_lose_channels(capability):
    """The triangle of a weight of rank 1, and of zeros: the token alone."""
    tail, token, attended = Tail(40), torch.randn(9, 40), torch.randn(2, 9, 40)
    tail.proj.weight.copy_(torch.randn(40, 1) * torch.randn(40))
    assert_right(tail, token, attended)
    tail.proj.weight.zero_()
    assert_right(tail, token, attended)


def test_rotated_keeps_rows_apart_and_reads_any_strides(capability):
    token, attended, tail = torch.randn(20, 99).mT[:, ::2], torch.randn(3, 40, 99).mT[..., ::4], Tail(10)
    assert_right(tail, token, attended)
    assert_rows_apart(tail, token, attended)


# R, F, K, C, H: one query, whole and half panels of them, samples in parts
ATTENTIONS = [(2, 1, 1, 8, 2), (1, 27, 9, 64, 8), (5, 67, 13, 100, 4), (3, 243, 81, 64, 2), (1, 130, 70, 33, 3)]


def assert_recovers(tail, token, query, key, value, num_heads):
    """As near to float64 as PyTorch's modules behind the definition's attention."""

    def exactly(tail, *tensors):
        attended = python_ref.recover_attention(*tensors[1:], num_heads, scale=0.3)
        return tail(tensors[0], attended)

    tensors = token, query, key, value
    exact = exactly(copy.deepcopy(tail).double(), *(x.double() for x in tensors))
    assert_within(tail.recovered(*tensors, num_heads, 0.3), exact, exactly(tail, *tensors), token.shape[-1])


@pytest.mark.parametrize("own_queries", [False, True])
@pytest.mark.parametrize(("R", "F", "K", "C", "H"), ATTENTIONS)
def test_recovers_within_bound(R, F, K, C, H, own_queries, capability):
    query = torch.randn(R, F, C) if own_queries else torch.randn(F, C)
    assert_recovers(Tail(C), torch.randn(F, C), query, *torch.randn(2, R, K, C), H)


def test_recovers_from_any_strides(capability):
    tail, token, query = Tail(40), torch.randn(40, 19).mT, torch.randn(19, 80)[:, ::2]
    key, value = torch.randn(2, 7, 80).chunk(2, -1)
    assert_recovers(tail, token, query, key, value, 4)
    apart = torch.randn(40, 2, 7).movedim(0, -1)
    assert_recovers(tail, token, query, apart, value, 4)


def test_recovers_the_same_bits_by_any_number_of_threads(capability):
    """Samples are cut into other parts for other numbers of threads."""
    tail, token = Tail(24), torch.randn(131, 24)
    attending = token, *torch.randn(2, 5, 9, 24), 2
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append(tail.recovered(token, *attending))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, found[0]) for x in found)


def test_what_is_kept_knows_which_vector_and_how_many_frames_it_was_made_of():
    """From the same numbers in the same memory."""
    tail, token, attended = Tail(40, there=(True, True, False, True)), torch.randn(40, 40), torch.randn(2, 40, 40)
    for rows in (token.mT, token, token[:9]):
        assert_right(tail, rows, attended[:, : len(rows)])
    tail.norm.weight, tail.norm.bias = None, tail.norm.weight
    assert_right(tail, token[:9], attended[:, :9])


def called(tail, token, kept, **options):
    """The operators of a whole recover_pose."""
    with Recorder() as recorder:
        h2ot.recover_pose(token, token, kept, kept, tail.proj, tail.norm, tail.head, 2, num_joints=1, **options)
    return {name.removeprefix("h2ot_kernels::") for name in recorder.names if name.startswith("h2ot_kernels::")}


def test_recover_pose_takes_it():
    tail, token, kept = Tail(64), torch.randn(1, 9, 64), torch.randn(2, 3, 64)
    assert called(tail, token, kept) == {"recover_rotated"}
    products = {"pack_tiles", "linear_tiles", "linear_floats"}  # the projection is that of the module
    assert called(tail, token, kept, backend="reference") <= products
    with h2ot.use_backend("reference"):
        assert called(tail, token, kept) == set()
    tail.double()
    assert called(tail, token.double(), kept.double()) == {"recover_attention", "recover_tail"}


@pytest.mark.parametrize(
    "name", ["token", "proj.weight", "proj.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]
)
def test_what_is_kept_follows_every_parameter(name):
    tail, token, attended = Tail(64), torch.randn(9, 64), torch.randn(2, 9, 64)
    tail.rotated(token, attended)
    changed = token if name == "token" else tail.get_parameter(name)
    changed.data[0] += 1  # behind autograd's back: seen in samples
    assert_right(tail, token, attended)
    changed.mul_(1.5)
    assert_right(tail, token, attended)


def test_what_is_kept_follows_the_view_of_a_token():
    tail, token, attended = Tail(64), torch.randn(18, 64), torch.randn(2, 9, 64)
    for view in (token[:9], token[::2], token[9:]):
        assert_right(tail, view, attended)
    assert_right(tail, token[:6], attended[:, :6])


def test_copies_and_pickles_without_what_is_kept():
    tail, token, attended = Tail(64), torch.randn(9, 64), torch.randn(2, 9, 64)
    expected = tail.rotated(token, attended)
    for twin in (copy.deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        assert twin.proj._kept is None
        assert torch.equal(twin.rotated(token, attended), expected)
    tail.train()
    assert tail.proj._kept is None
