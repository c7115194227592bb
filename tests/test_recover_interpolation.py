"""Interpolation: the kept frames exactly, the others to a rounding of the two terms."""

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref

from .cases import DTYPES
from .compare import assert_within
from .runners import runners
from .sample import drawn
from .test_gather import some_index

# B, K, F, trailing shape, rows of the index
SHAPES = [
    (2, 81, 243, (17, 3), 2),
    (2, 9, 27, (512,), 1),
    (1, 3, 9, (2500,), 1),  # more than a tile of channels, and a rest
    (3, 1, 5, (4,), 3),
    (1, 5, 5, (), 1),
    (2, 2, 100, (3,), 2),
    (0, 3, 9, (3,), 1),
    (2, 3, 9, (0,), 1),
]
OPTIONS = [{"mode": mode, "align": align} for mode in ("linear", "nearest") for align in ("index", "uniform")]


@pytest.mark.parametrize("runner", runners("recover_interpolate"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize(("B", "K", "F", "trailing", "rows"), SHAPES)
def test_interpolation_within_bound(B, K, F, trailing, rows, options, dtype, runner):
    x, index = torch.randn(B, K, *trailing).to(dtype), some_index(rows, F, K)
    ours = runner(h2ot.recover_interpolate, x, index, F, **options)
    exact = python_ref.recover_interpolate(x.double(), index, F, **options)
    assert_within(ours, exact, python_ref.recover_interpolate(x, index, F, **options), 2)
    if options["align"] == "index":
        for b in range(B):
            assert torch.equal(ours[b, index[b % rows]], x[b])


@pytest.mark.parametrize("runner", runners("recover_interpolate"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_out_takes_the_result(options, dtype, runner):
    shapes = [(2, 5, 23, (7, 3), 2), (1, 2, 6, (70,), 1), *SHAPES[3:5], *SHAPES[6:]]
    for B, K, F, trailing, rows in drawn(shapes, 2):
        x = torch.randn(B, K, *trailing).to(dtype)
        runner.assert_fills_out(h2ot.recover_interpolate, x, some_index(rows, F, K), F, **options)


@pytest.mark.parametrize("runner", runners("recover_interpolate"))
def test_out_of_one_frame_may_have_any_stride_there(runner):
    """A contiguous tensor's stride along an axis of size 1 says nothing."""
    out = torch.empty(2, 3, 5, device=runner.device).as_strided((2, 1, 5), (5, 4, 1))
    assert out.is_contiguous()
    x = torch.randn(2, 1, 5)
    assert torch.equal(runner(h2ot.recover_interpolate, x, torch.tensor([[0]]), 1, out=out), x)


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("runner", runners("recover_interpolate"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 7, 40])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_a_frame_that_is_one_token_has_its_bits_whatever_the_others_hold(options, channels, dtype, runner):
    inf, nan = float("inf"), float("nan")
    x = torch.randn(1, 9, channels).to(dtype)
    x[:, 1::2] = torch.tensor([nan, inf, -inf, inf]).to(dtype)[:, None]
    x[:, 4, 1] = -0.0
    # Uniform: every third of 25 frames is a token. By the index: held frames before the first and after the last, too.
    first = 0 if options["align"] == "uniform" else 2
    index, F = torch.arange(first, first + 25, 3)[None], 25 + 2 * first
    ours = runner(h2ot.recover_interpolate, x, index, F, **options)
    finite = torch.arange(0, 9, 2)
    assert torch.equal(bits(ours[:, index[0, finite]]), bits(x[:, finite]))
    assert torch.equal(ours[:, index[0, 1::2]].isnan(), x[:, 1::2].isnan())
    assert torch.equal(ours[:, index[0, 3::2]], x[:, 3::2])
    assert torch.equal(bits(ours[:, :first]), bits(x[:, :1].expand(-1, first, -1)))
    assert torch.equal(bits(ours[:, F - first :]), bits(x[:, -1:].expand(-1, first, -1)))
    wanted = python_ref.recover_interpolate(x, index, F, **options)
    torch.testing.assert_close(ours, wanted, rtol=0 if dtype.itemsize > 2 else 1e-2, atol=0, equal_nan=True)


@pytest.mark.parametrize("runner", runners("recover_interpolate"))
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_a_gradient_reaches_only_the_tokens_that_its_frame_reads(options, channels, runner):
    index, F = torch.arange(0, 25, 3)[None], 25
    for bad in (float("nan"), float("inf")):
        for position in (0, 4, 8):
            x = torch.randn(1, 9, channels, requires_grad=True)
            given = torch.randn(1, F, channels)
            given[:, index[0, position]] = bad
            (ours,) = torch.autograd.grad(runner(h2ot.recover_interpolate, x, index, F, **options), x, given)
            (wanted,) = torch.autograd.grad(python_ref.recover_interpolate(x, index, F, **options), x, given)
            others = torch.arange(9) != position
            assert ours[:, others].isfinite().all()
            assert wanted[:, others].isfinite().all()
            spoilt = torch.full((1, channels), bad)
            assert torch.equal(ours[:, position].nan_to_num(7), spoilt.nan_to_num(7))
            torch.testing.assert_close(ours[:, others], wanted[:, others])


@pytest.mark.parametrize("runner", runners("recover_interpolate"))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_gradcheck_first_and_second_order(options, runner):
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, 2, 5, 8], [0, 3, 4, 9]])

    def function(x):
        return runner(h2ot.recover_interpolate, x, index, 11, **options)

    assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


@pytest.mark.parametrize("runner", runners("recover_interpolate"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_gradients_within_bound(options, dtype, runner):
    x, index = torch.randn(2, 9, 17, 3).to(dtype), some_index(2, 100, 9)
    weight = torch.randn(2, 100, 17, 3)

    def gradient(function, to):
        leaf = x.to(to).requires_grad_()
        out = function(leaf, index, 100, **options)
        return torch.autograd.grad((out * weight.to(out)).sum(), leaf)[0]

    ours = gradient(lambda *args, **kwargs: runner(h2ot.recover_interpolate, *args, **kwargs), dtype)
    exact, same = (gradient(python_ref.recover_interpolate, to) for to in (torch.float64, dtype))
    assert_within(ours, exact, same, 100)


def test_a_straight_line_is_recovered():
    line = torch.arange(243.0)[None, :, None] * torch.tensor([1.0, -2.0, 0.5])
    index = h2ot.prune_sample(243, 81)
    torch.testing.assert_close(h2ot.recover_interpolate(line[:, index[0]], index, 243), line)
    uniform = h2ot.recover_interpolate(line[:, [0, 121, 242]], None, 243, align="uniform")
    torch.testing.assert_close(uniform, line)


def test_nearest_takes_the_earlier_on_a_tie():
    x = torch.tensor([[0.0, 1.0]])
    ours = h2ot.recover_interpolate(x, torch.tensor([[0, 4]]), 5, mode="nearest")
    assert ours.tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("runner", runners("recover_interpolate"))
def test_a_wrong_index_is_refused_or_gives_nan_where_it_counts(runner):
    x = torch.randn(1, 3, 2)
    if runner.backend in ("cpp", "reference"):
        for bad in ([0, 1, 9], [-1, 1, 2]):
            with pytest.raises(IndexError, match="index"):
                runner(h2ot.recover_interpolate, x, torch.tensor([bad]), 9)
        with pytest.raises(IndexError, match="ascending"):
            runner(h2ot.recover_interpolate, x, torch.tensor([[0, 4, 4]]), 9)
        return
    for bad, spoilt in (([0, 1, 9], slice(1, 9)), ([-1, 1, 2], slice(0, 1)), ([0, 1 << 40, 8], slice(0, 9))):
        out = runner(h2ot.recover_interpolate, x, torch.tensor([bad]), 9)
        assert out[:, spoilt].isnan().all()
        assert out.isnan().sum() == out[:, spoilt].numel()
    out_of_order = runner(h2ot.recover_interpolate, x, torch.tensor([[4, 2, 1]]), 9)
    assert (out_of_order <= x.amax(1)).all()
    assert (out_of_order >= x.amin(1)).all()
