"""Recovery with its tail in rotated channels on the tile unit (AMX): in float32 by bytes, in bfloat16 as it is."""

import pytest
import torch

from h2ot_kernels import _C
from h2ot_kernels.recover_rotated import takes

from .test_recover_rotated import ATTENTIONS, TAILS, Tail, assert_recovers, assert_right, assert_rows_apart

pytestmark = [
    pytest.mark.usefixtures("inference"),
    pytest.mark.skipif(not _C.tiles_run(), reason="this CPU has no tile unit (AMX)"),
]
F32, BF16 = torch.float32, torch.bfloat16
OP = torch.ops.h2ot_kernels.recover_rotated
LARGE = (2, 243, 512, 3, (True,) * 4)


def form_of(tail):
    """The dtype of the triangle that a tail keeps."""
    return tail.proj._kept["rotation"][-1][0].dtype


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("R", "F", "C", "outputs", "there"), [*TAILS, LARGE])
def test_tiles_within_bound(R, F, C, outputs, there, dtype):
    F = min(F, 50)
    tail = Tail(C, outputs, there).to(dtype)
    assert_right(tail, torch.randn(F, C).to(dtype), torch.randn(R, F, C).to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("own_queries", [False, True])
@pytest.mark.parametrize(("R", "F", "K", "C", "H"), [*ATTENTIONS, (2, 243, 81, 512, 8)])
def test_tiles_recover_within_bound(R, F, K, C, H, own_queries, dtype):
    query = torch.randn(R, F, C) if own_queries else torch.randn(F, C)
    tensors = torch.randn(F, C), query, *torch.randn(2, R, K, C)
    assert_recovers(Tail(C).to(dtype), *(x.to(dtype) for x in tensors), H)


def test_tiles_keep_rows_apart_and_read_any_strides():
    token, attended, tail = torch.randn(40, 99).mT[:, ::2][:40], torch.randn(3, 40, 40).mT, Tail(20)
    attended = attended[..., ::2]
    assert_right(tail, token, attended)
    assert_rows_apart(tail, token, attended)


@pytest.mark.parametrize("size", [1e-20, 1e-12, 1e12, 1e17])
def test_rows_without_digits(size):
    """Magnitudes that have no scale go by float32."""
    tail, token, attended = Tail(64), torch.randn(9, 64), torch.randn(3, 9, 64)
    token, attended[1] = token * size, attended[1] * size
    assert_right(tail, token, attended)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e16])
def test_weights_without_digits_take_vectors(size):
    tail, token, attended = Tail(64), torch.randn(9, 64), torch.randn(3, 9, 64)
    tail.proj.weight.mul_(size)
    assert_right(tail, token, attended)
    assert form_of(tail) == (torch.int8 if size == 0 else F32)


def test_weights_that_lose_channels_keep_the_unit():
    tail, token, attended = Tail(40), torch.randn(9, 40), torch.randn(2, 9, 40)
    tail.proj.weight.copy_(torch.randn(40, 1) * torch.randn(40))
    assert_right(tail, token, attended)
    assert form_of(tail) == torch.int8


@pytest.mark.parametrize("apart", [1e2, 1e6])
def test_channels_of_different_scales(apart):
    """As near to float64 as float32: values are large where the projection's weights are small."""
    tail, token, attended = Tail(128), torch.randn(40, 128), torch.randn(3, 40, 128)
    scale = apart ** torch.linspace(-0.5, 0.5, 128)[torch.randperm(128)]
    tail.proj.weight.div_(scale)
    assert_right(tail, token, attended * scale)
    assert form_of(tail) == torch.int8


def test_another_instruction_set_has_a_triangle_of_its_own():
    tail, token, attended = Tail(64), torch.randn(9, 64), torch.randn(2, 9, 64)
    for capability, form in ((None, torch.int8), ("avx2", F32), ("avx512", torch.int8)):
        _C.set_capability(capability or _C.capability())
        assert_right(tail, token, attended)
        assert form_of(tail) == form


def test_operator_refuses_what_is_not_packed_for_the_unit():
    tail, token, kept = Tail(64), torch.randn(9, 64), torch.randn(2, 3, 64)
    tail.recovered(token, token, kept, kept, 2)
    triangle = tail.proj._kept["rotation"][-1][0]
    given = token, kept, kept, 2, 0.5, torch.randn(9, 64), triangle, torch.randn(3, 64), torch.randn(3), 1e-5
    assert OP(*given).shape == (2, 9, 3)
    with pytest.raises(ValueError, match="recover_rotated: wanted triangle"):
        OP(*given[:6], triangle[:-4], *given[7:])
    with pytest.raises(ValueError, match="recover_rotated: wanted query, key and value of bfloat16 beside"):
        OP(*(x.bfloat16() for x in given[:3]), *given[3:])
    _C.set_capability("portable")
    assert takes((token, token, kept, kept), tail.proj, *tail.vectors())
    with pytest.raises(ValueError, match="recover_rotated: wanted a CPU with a tile unit"):
        OP(*given)
