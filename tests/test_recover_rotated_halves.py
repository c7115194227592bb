"""The recovery tail in rotated channels in bfloat16, by products of pairs (AVX512-BF16)."""

import pytest
import torch

from h2ot_kernels import _C
from h2ot_kernels.recover_rotated import takes

from .test_recover_rotated import TAILS, Tail, assert_right, assert_rows_apart

pytestmark = [
    pytest.mark.usefixtures("inference", "no_tiles"),
    pytest.mark.skipif(not _C.dots_run(), reason="this CPU has no products of pairs of bfloat16 numbers (AVX512-BF16)"),
]
BF16 = torch.bfloat16


def made(R, F, C, outputs=3, there=(True,) * 4):
    return Tail(C, outputs, there).to(BF16), torch.randn(F, C).to(BF16), torch.randn(R, F, C).to(BF16)


@pytest.mark.parametrize(("R", "F", "C", "outputs", "there"), [*TAILS, (2, 243, 512, 3, (True,) * 4)])
def test_halves_within_bound(R, F, C, outputs, there):
    assert_right(*made(R, F, C, outputs, there))


def test_halves_are_as_near_as_a_projection_that_is_rounded():
    """The triangle is rounded, too, but the projected rows are not."""
    tail, token, attended = made(4, 243, 256)
    exact = tail.exactly(token, attended)
    ours, theirs = (
        (result.double() - exact).square().mean().sqrt()
        for result in (tail.rotated(token, attended), tail(token, attended))
    )
    assert ours <= 1.1 * theirs


def test_halves_keep_rows_apart_and_read_any_strides():
    tail, token, attended = made(3, 40, 65)
    attended = attended.mT.contiguous().mT
    assert_right(tail, token, attended)
    assert_rows_apart(tail, token, attended)


def test_halves_give_the_same_bits_alone_and_by_two_threads():
    tail, token, attended = made(5, 31, 96)
    expected = tail.rotated(token, attended)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(tail.rotated(token, attended), expected)
        assert torch.equal(tail.rotated(token, attended[3:4]), expected[3:4])
    torch.set_num_threads(threads)


def test_halves_follow_the_parameters():
    tail, token, attended = made(2, 9, 64)
    for changed in (tail.proj.weight, tail.norm.weight, tail.head.bias, token):
        tail.rotated(token, attended)
        changed.mul_(1.5)
        assert_right(tail, token, attended)
    tail.float()
    assert_right(tail, token.float(), attended.float())


def test_halves_are_refused_where_nothing_multiplies_them():
    tail, token, attended = made(2, 9, 64)
    vectors = tail.proj, *tail.vectors()
    assert takes((token, attended), *vectors)
    assert not takes((token, attended.float()), *vectors)
    rows = torch.randn(2, 9, 64).to(BF16)
    triangle = torch.randn(3, 1024).to(BF16)
    operands = rows, rows, rows, 2, 0.5, torch.randn(9, 64), triangle, torch.randn(3, 64), torch.randn(3), 1e-5
    operator = torch.ops.h2ot_kernels.recover_rotated
    assert operator(*operands).shape == (2, 9, 3)
    for other in (triangle.float(), triangle[:2], triangle[:, :512]):
        with pytest.raises(ValueError, match="recover_rotated: wanted .*triangle"):
            operator(*operands[:6], other, *operands[7:])
    _C.set_capability("portable")
    assert not takes((token, attended), *vectors)
    with pytest.raises(ValueError, match="recover_rotated: wanted a CPU with products of pairs"):
        operator(*operands)
