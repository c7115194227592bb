"""Gathering moves data: the bound is zero, the embedding one rounding."""

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref

from .cases import DTYPES
from .runners import runners
from .sample import drawn


def some_index(rows, F, K):
    return torch.stack([torch.randperm(F)[:K].sort().values for _ in range(rows)])


# shape, dim, out_dim, rows of the index, K
LAYOUTS = [
    ((2, 9, 5, 8), 1, 1, 2, 4),
    ((2, 9, 5, 8), 1, 2, 1, 4),
    ((2, 5, 9, 8), 2, 1, 2, 9),
    ((6, 9, 8), 1, 1, 2, 3),
    ((6, 9, 8), 1, 1, 6, 1),
    ((2, 9), 1, 1, 2, 4),
    ((2, 3, 4, 9, 5), 3, 1, 1, 4),
    ((2, 9, 8), 1, 2, 2, 4),
    ((1, 243, 17, 64), 1, 2, 1, 81),
    ((0, 9, 8), 1, 1, 1, 4),
]


@pytest.mark.parametrize("runner", runners("gather_tokens"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim", "out_dim", "rows", "K"), LAYOUTS)
def test_gather_is_exact(shape, dim, out_dim, rows, K, dtype, runner):
    x, index = torch.randn(shape).to(dtype), some_index(rows, shape[dim], K)
    given = {"dim": dim, "out_dim": out_dim}
    assert torch.equal(runner(h2ot.gather_tokens, x, index, **given), python_ref.gather_tokens(x, index, **given))
    if out_dim < len(shape) - 1:
        embed = torch.randn(1, K, shape[-1]).to(dtype)
        ours = runner(h2ot.gather_tokens, x, index, embed, **given)
        assert torch.equal(ours, python_ref.gather_tokens(x, index, embed, **given))


@pytest.mark.parametrize("runner", runners("gather_tokens"))
@pytest.mark.parametrize("C", [5, 20])
def test_an_embedding_has_the_channels_of_the_result(C, runner):
    """Frames on the last axis of x: its last axis is not that of the result."""
    x, index, embed = torch.randn(2, C, 9), some_index(2, 9, 4), torch.randn(4, C)
    ours = runner(h2ot.gather_tokens, x, index, embed, dim=2, out_dim=1)
    assert torch.equal(ours, python_ref.gather_tokens(x, index, embed, dim=2, out_dim=1))
    with pytest.raises(ValueError, match="pos_embed"):
        runner(h2ot.gather_tokens, x, index, torch.randn(4, 9), dim=2, out_dim=1)


@pytest.mark.parametrize("runner", runners("gather_tokens"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_widened_and_rounded_right(dtype, runner):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 256, 256)
    index = torch.arange(256)[None]
    for embed in (torch.zeros_like(x), x.flatten()[torch.randperm(2**16)].reshape(x.shape), x * 2**-11):
        wanted = python_ref.gather_tokens(x, index, embed)
        skipped = torch.zeros_like(x, dtype=torch.bool)
        if runner.interpreted:  # Triton's interpreter converts subnormal bfloat16 wrongly
            for value in (x, embed, wanted):
                skipped |= (value != 0) & (value.abs() < torch.finfo(dtype).tiny)
        for channels in (256, 77):  # whole vectors, and a part of one
            ours = runner(h2ot.gather_tokens, x[..., :channels], index, embed[..., :channels])
            left = ~skipped[..., :channels]
            torch.testing.assert_close(ours[left], wanted[..., :channels][left], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("runner", runners("gather_tokens"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_takes_the_result(dtype, runner):
    for shape, dim, out_dim, rows, K in drawn(LAYOUTS[1:4:2], 1) if runner.simulated else LAYOUTS:
        x, index = torch.randn(shape).to(dtype), some_index(rows, shape[dim], K)
        embed = torch.randn(1, K, shape[-1]).to(dtype) if out_dim < len(shape) - 1 else None
        runner.assert_fills_out(h2ot.gather_tokens, x, index, embed, dim=dim, out_dim=out_dim)
    padded = torch.tensor([[1, 4, 8], [7, -1, -1]])
    for out_dim in drawn((1, 2), 1):
        runner.assert_fills_out(h2ot.gather_tokens, torch.randn(2, 9, 5).to(dtype), padded, out_dim=out_dim)
    apart = torch.randn(2, 8, 9).to(dtype).mT
    runner.assert_fills_out(h2ot.gather_tokens, apart, padded)


@pytest.mark.parametrize("runner", runners("gather_tokens"))
def test_gather_reads_any_strides(runner):
    x, index = torch.randn(2, 9, 5, 8), some_index(2, 9, 4)
    expected = runner(h2ot.gather_tokens, x, index, out_dim=2)
    for view in (x.mT.contiguous().mT, x.movedim(1, 3).contiguous().movedim(3, 1), torch.cat([x, x], -1)[..., :8]):
        assert torch.equal(runner(h2ot.gather_tokens, view, index, out_dim=2), expected)
    wide = x[:1].expand(3, -1, -1, -1)
    assert torch.equal(runner(h2ot.gather_tokens, wide, index[:1])[2], runner(h2ot.gather_tokens, x[:1], index[:1])[0])


@pytest.mark.parametrize("runner", runners("gather_tokens"))
def test_gradients_equal_the_reference(runner):
    index = some_index(2, 9, 4)

    def gradients(function, **kwargs):
        x, embed = torch.ones(6, 9, 8, requires_grad=True), torch.ones(1, 4, 8, requires_grad=True)
        out = function(x * 1, index, embed * 1, **kwargs)
        weight = torch.arange(out.numel(), dtype=torch.float32).reshape(out.shape)
        return torch.autograd.grad((out * weight).sum(), (x, embed))

    for ours, exact in zip(
        gradients(lambda *args: runner(h2ot.gather_tokens, *args)), gradients(python_ref.gather_tokens), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("runner", runners("gather_tokens"))
@pytest.mark.parametrize(("dim", "out_dim"), [(1, 1), (1, 2), (2, 1)])
def test_gradcheck_first_and_second_order(dim, out_dim, runner):
    x = torch.randn(4, 5, 5, 3, dtype=torch.float64, requires_grad=True)
    embed = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    index = some_index(2, 5, 3)

    def function(x, embed):
        return runner(h2ot.gather_tokens, x, index, embed, dim=dim, out_dim=out_dim)

    assert torch.autograd.gradcheck(function, (x, embed), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, embed), fast_mode=True)


@pytest.mark.parametrize("runner", runners("gather_tokens"))
@pytest.mark.parametrize("bad", [-2, 9, 2**40])
def test_a_wrong_index_touches_nothing(bad, runner):
    x, index = torch.randn(2, 9, 8), torch.tensor([[0, 3, 5], [0, 3, bad]])
    if bad < 0:
        index = torch.tensor([[0, 3, 5], [bad, 3, 5]])
    if runner.backend in ("cpp", "reference"):
        with pytest.raises(IndexError, match="index"):
            runner(h2ot.gather_tokens, x, index)
    else:
        out = runner(h2ot.gather_tokens, x, index)
        assert torch.equal(out[0], x[0, [0, 3, 5]])
        assert out[1, (index[1] == bad).nonzero()[0, 0]].isnan().all()


@pytest.mark.parametrize("runner", runners("gather_tokens"))
@pytest.mark.parametrize("out_dim", [1, 2])
def test_padding_gives_zeros_and_takes_no_gradient(out_dim, runner):
    x, index = torch.randn(2, 9, 3), torch.tensor([[1, 4, 8], [7, -1, -1]])
    x[0, 0, 0] = x[1, 0, 0] = float("nan")
    exact = python_ref.gather_tokens(x, index, out_dim=out_dim)
    assert (exact.movedim(out_dim, 1)[1, 1:] == 0).all()
    assert torch.equal(runner(h2ot.gather_tokens, x, index, out_dim=out_dim), exact)
    weight = torch.randn(exact.shape)

    def gradient(function):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((function(leaf, index, out_dim=out_dim) * weight).sum(), leaf)[0]

    ours = gradient(lambda *args, **given: runner(h2ot.gather_tokens, *args, **given))
    assert torch.equal(ours, gradient(python_ref.gather_tokens))
    embed = torch.zeros(1, 3, 3)
    if runner.backend in ("cpp", "reference"):
        with pytest.raises(IndexError, match="index"):
            runner(h2ot.gather_tokens, x, index, embed)
    else:
        assert runner(h2ot.gather_tokens, x, index, embed)[1, 1:].isnan().all()


def test_backward_refuses_an_index_that_is_not_ascending():
    x = torch.randn(1, 9, 8, requires_grad=True)
    for index in ([5, 5], [-1, 5]):
        with pytest.raises(IndexError, match="ascending"):
            h2ot.gather_tokens(x, torch.tensor([index])).sum().backward()
