"""dropin.patch on a pre-norm block: norms and residuals in the same passes as the products, if nobody looks inside."""

import copy

import pytest
import torch
from torch import nn

from h2ot_kernels import dropin
from h2ot_kernels.dropin import fast_attention
from h2ot_kernels.inference import tiles_run
from h2ot_kernels.linear_halves import adds_to_float
from python_ref.official_mixste import Block

from .runners import Recorder

C, H = 64, 4
X = torch.randn(6, 9, C, generator=torch.Generator().manual_seed(0))
APART = {"aten::add", "aten::native_layer_norm"}


def block_of(drop_path=0.0):
    """In eval mode, with norms that change something."""
    torch.manual_seed(1)
    block = Block(C, H, 2.0, drop_path).eval().requires_grad_(False)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block


def reasons(handle):
    return [entry.reason for entry in handle.entries if entry.kernel == "block"]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_same_numbers_in_fewer_passes(dtype, bound):
    block, x = block_of().to(dtype), X.to(dtype)
    before = block(x)
    with torch.no_grad(), dropin.patch(block) as handle, Recorder() as called:
        after = block(x)
    assert reasons(handle) == [""]
    if dtype == torch.float32:
        assert not called.names & (APART if tiles_run() else {"aten::add"})
    assert (after - before).abs().max() <= bound * before.abs().max()
    assert torch.equal(block(x), before)


@pytest.mark.parametrize("adds", [True, False])
def test_under_autocast(monkeypatch, adds):
    """Products that add to a float32 residual, and those that do not."""
    if adds and not adds_to_float(torch.bfloat16):
        pytest.skip("products of bfloat16 are oneDNN's on this CPU")
    monkeypatch.setattr(fast_attention, "adds_to_float", lambda dtype: adds)
    if not adds:
        monkeypatch.setattr(fast_attention, "attend_in_one_call", lambda *given, **around: None)
    block = block_of()
    exact = block(X)
    with torch.autocast("cpu", torch.bfloat16):
        before = block(X)
        with torch.no_grad(), dropin.patch(block), Recorder() as called:
            after = block(X)
    assert ("h2ot_kernels::add_norm" not in called.names) == adds
    assert not called.names & (APART if adds else {"aten::native_layer_norm"})
    assert after.dtype == before.dtype == torch.float32
    assert (after - exact).abs().max() <= 2 * (before - exact).abs().max()


@pytest.mark.parametrize("name", ["norm1", "attn", "attn.proj", "drop_path", "mlp", "mlp.act", "mlp.fc2"])
def test_who_looks_inside_sees_what_was_there(name):
    block, seen = block_of().double(), []
    handle = block.get_submodule(name).register_forward_hook(
        lambda module, given, result: seen.append((*given, result))
    )
    expected = block(X.double())
    with torch.no_grad(), dropin.patch(block):
        after = block(X.double())
    handle.remove()
    before, since = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for mine, other in zip(sum(since, ()), sum(before, ()), strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(after, expected)


def test_training_and_gradients_take_the_own_forward():
    block = block_of(drop_path=0.5).double().train().requires_grad_()
    twin = copy.deepcopy(block)
    gradients = []
    for module in (block, twin):
        handle = dropin.patch(module) if module is twin else None
        torch.manual_seed(3)
        x = X.double().requires_grad_()
        module(x).sum().backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
        if handle:
            assert reasons(handle) == [""]
            handle.unpatch()
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.drop_path(self.attn(x)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class Scaled(Block):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Linear(1, 1)


class OtherNorm(nn.LayerNorm):
    pass


def with_other_norm():
    block = block_of()
    block.norm2 = OtherNorm(C)
    return block


@pytest.mark.parametrize(
    ("make", "switches", "reason"),
    [
        (lambda: PostNorm(C, H, 2.0, 0.0).eval(), {}, "computes something else"),
        (lambda: Scaled(C, H, 2.0, 0.0).eval(), {}, "it holds gain"),
        (with_other_norm, {}, "its norm2 is OtherNorm"),
        (block_of, {"linear": False}, "without packed weights"),
        (block_of, {"attention": False}, "is not fast"),
        (block_of, {"mlp": False}, "is not fast"),
    ],
)
def test_what_is_left_says_why(make, switches, reason):
    block = make().requires_grad_(False)
    before = block(X)
    with torch.no_grad(), dropin.patch(block, **switches) as handle:
        assert reason in reasons(handle)[0]
        torch.testing.assert_close(block(X), before)


def test_parts_that_are_exchanged_later():
    block = block_of()
    with torch.no_grad(), dropin.patch(block):
        block.mlp = block_of().mlp
        after = block(X)
    torch.testing.assert_close(after, block(X))


def test_its_switch():
    with dropin.patch(block_of(), block=False) as handle:
        assert not reasons(handle)
