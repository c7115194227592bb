"""The CUDA gather and scatter, run on the CPU (tests/simt), held to python_ref bit for bit."""

import itertools
import subprocess
from dataclasses import replace

import pytest
import torch

import python_ref

from . import simt
from .cases import DTYPES
from .simt.gather import Move, run
from .simt.planted import build_planted, survivors

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

# shape, dim, out_dim, rows of the index, K
LAYOUTS = [
    ((2, 9, 5, 8), 1, 1, 2, 4),
    ((2, 9, 5, 8), 1, 2, 1, 4),
    ((2, 5, 9, 8), 2, 1, 2, 9),
    ((6, 9, 8), 1, 1, 2, 3),  # three rows of the batch for each of the index
    ((6, 9, 5), 1, 1, 6, 1),
    ((2, 9), 1, 1, 2, 4),
    ((5, 70), 1, 1, 1, 33),
    ((2, 3, 4, 9, 5), 3, 1, 1, 4),
    ((2, 9, 8), 1, 2, 2, 4),  # frames innermost
    ((2, 9, 16), 2, 1, 2, 5),
    ((1, 41, 3, 24), 1, 2, 1, 17),
    ((2, 1, 3, 2, 1, 5, 2, 6), 5, 3, 2, 3),
    ((3, 7, 1), 1, 1, 3, 2),
    ((2, 300, 20), 1, 1, 2, 131),  # several blocks
    ((0, 9, 8), 1, 1, 1, 4),
]


def bits(x):
    return x.contiguous().view(torch.uint8)


def some_index(rows, F, K):
    return torch.stack([torch.randperm(F)[:K].sort().values for _ in range(rows)])


def views(x):
    """x itself, and the same values at other strides and places."""
    yield x
    yield x.mT.contiguous().mT
    yield torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]]  # rows that whole vectors do not fit
    yield torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield x.repeat_interleave(2, -1)[..., ::2]
    yield x.movedim(1, -1).contiguous().movedim(-1, 1)


def check(moves, tmp_path, driver=None):
    done = run(moves, tmp_path, driver)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(move.error == 0 for move in moves)
    return moves


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_is_the_reference_bit_for_bit(dtype, tmp_path):
    moves, wanted = [], []
    for (shape, dim, out_dim, rows, K), wide in itertools.product(LAYOUTS, (False, True)):
        x, index = torch.randn(shape).to(dtype), some_index(rows, shape[dim], K)
        embeds = (
            [None]
            if out_dim == len(shape) - 1
            else [None, torch.randn(K, shape[-1 - (dim == len(shape) - 1)]).to(dtype)]
        )
        for view, embed, unaligned in itertools.product(views(x), embeds, (0, 1)):
            moves.append(Move(view, index, embed, dim, out_dim, unaligned=unaligned, wide=wide, seed=len(moves)))
            wanted.append(python_ref.gather_tokens(x, index, embed, dim=dim, out_dim=out_dim))
    for move, exact in zip(check(moves, tmp_path), wanted, strict=True):
        assert torch.equal(bits(move.out), bits(exact)), move


def scattered(grad, index, num_frames, dim, out_dim):
    """What gathering's backward pass is: zeros, and grad where the index says."""
    size = list(grad.shape)
    del size[dim]
    size.insert(out_dim, num_frames)
    out, moved = torch.zeros(size, dtype=grad.dtype).movedim(out_dim, 1), grad.movedim(dim, 1)
    for b, row in enumerate(index.repeat_interleave(grad.shape[0] // index.shape[0], 0)):
        for k, frame in enumerate(row.tolist()):
            if frame >= 0:
                out[b, frame] = moved[b, k]
    return out.movedim(1, out_dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_is_its_reverse(dtype, tmp_path):
    moves, wanted = [], []
    for (shape, dim, out_dim, rows, K), wide in itertools.product(LAYOUTS, (False, True)):
        F, index = shape[dim], some_index(rows, shape[dim], K)
        if K > 2:
            index[-1, -2:] = -1  # padding
        size = [n for axis, n in enumerate(shape) if axis != dim]
        size.insert(out_dim, K)
        grad = torch.randn(size).to(dtype)
        for view, unaligned in itertools.product(views(grad), (0, 1)):
            moves.append(Move(view, index, None, out_dim, dim, F, unaligned=unaligned, wide=wide, seed=len(moves)))
            wanted.append(scattered(grad, index, F, out_dim, dim))
    for move, exact in zip(check(moves, tmp_path), wanted, strict=True):
        assert torch.equal(bits(move.out), bits(exact)), move


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_values_and_padding(dtype, tmp_path):
    x = torch.randn(3, 9, 16).to(dtype)
    x[:, 0] = float("inf")
    index = torch.tensor([[0, 3, 9], [-2, 3, 2**40], [7, -1, -1]])
    expected = x.new_zeros(3, 3, 16)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[2, 0] = x[0, 0], x[0, 3], x[1, 3], x[2, 7]
    expected[0, 2] = expected[1, 0] = expected[1, 2] = float("nan")
    for out_dim in (1, 2):
        (move,) = check([Move(x, index, out_dim=out_dim)], tmp_path)
        assert torch.equal(bits(move.out), bits(expected.movedim(1, out_dim)))
    embed = torch.randn(3, 16).to(dtype)
    (move,) = check([Move(x, index, embed)], tmp_path)
    wrong = (index < 0) | (index > 8)  # padding has no embedding
    assert torch.equal(move.out.isnan(), wrong[..., None].expand(3, 3, 16))
    assert torch.equal(move.out[~wrong], (expected + embed)[~wrong])
    (move,) = check([Move(expected, index, num_frames=9)], tmp_path)
    kept = x.new_zeros(3, 9, 16)
    kept[0, 0], kept[0, 3], kept[2, 7] = x[0, 0], x[0, 3], x[2, 7]
    rows = [0, 2]  # an index that does not ascend places frames anywhere or nowhere, within its sample
    assert torch.equal(move.out[rows], kept[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_widened_and_rounded_right(dtype, tmp_path):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 256, 256)
    index = torch.arange(256)[None]
    embeds = (torch.zeros_like(x), x.flatten()[torch.randperm(2**16)].reshape(x.shape), x * 2**-11)
    moves = check([Move(x[..., :C], index, embed[0, :, :C]) for embed in embeds for C in (256, 77)], tmp_path)
    for move in moves:
        wanted = python_ref.gather_tokens(move.x, index, move.embed)
        torch.testing.assert_close(move.out, wanted, rtol=0, atol=0, equal_nan=True)


def test_division_by_a_product():
    driver = simt.build(simt.SANITIZED, name="gather_driver")
    done = subprocess.run([driver, "divide"], env=simt.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What must not survive: (file, text, replacement).
MUTANTS = {
    "alignment of the strides is not asked for": ("gather_plan.cpp", "all |= uint64_t(axes.stride[axis] * item);", ";"),
    "the last unit is stored twice, once too far": ("gather.cu", "if (n <= last) store", "if (n <= last + 1) store"),
    "an index at the end of its range": ("gather.cu", "frame[u] < move.frames", "frame[u] <= move.frames"),
    "an index below its range": ("gather.cu", "frame[u] >= 0 && ", ""),
    "padding is an error": ("gather.cu", "(frame[u] == -1 && move.embed == nullptr)", "false"),
    "padding under an embedding": ("gather.cu", "frame[u] == -1 && move.embed == nullptr", "frame[u] == -1"),
    "padding while searching": ("gather.cu", "value < frame && value != -1", "value < frame"),
    "the frame axis merges": ("../walk.h", "apart = frame || ", "apart = "),
    "the batch merges under an index of its own": ("../walk.h", "(axis > 0 || a.index_rows == 1)", "true"),
    "the divisor's factor": ("gather_plan.cpp", "/ uint64_t(value) + 1", "/ uint64_t(value)"),
}
HUNTED = [
    Move(torch.randn(2, 9, 5, 9)[..., :8], torch.tensor([[0, 4, 8], [1, 9, -3]])),
    Move(torch.randn(2, 9, 8), torch.tensor([[0, 4, 8], [3, -1, -1]])),
    Move(torch.randn(2, 9, 8), torch.tensor([[0, 4, 8], [3, -1, -1]]), torch.randn(3, 8)),
    Move(torch.randn(2, 3, 8), torch.tensor([[2, 4, -1], [3, -1, -1]]), num_frames=9),
    Move(torch.randn(4, 3, 8), torch.tensor([[2, 4, 7], [3, 5, 6]]), num_frames=9, out_dim=2),
    Move(torch.randn(2, 5, 3, 70)[:, :4], torch.tensor([[0, 2, 3]]), out_dim=2),
    Move(torch.randn(2, 3, 8), torch.tensor([[2, 0, 1]])),
    Move(torch.randn(2, 3, 9, 8), torch.tensor([[0, 4], [1, 5]]), dim=2, out_dim=2),
]


def test_mutants_are_caught(tmp_path, drawn_mistakes):
    mistakes = drawn_mistakes(MUTANTS)
    driver = build_planted(mistakes, tmp_path, simt.SANITIZED_QUICK, "gather_driver")
    expected = [replace(move) for move in HUNTED]
    assert run(expected, tmp_path).returncode == 0

    def is_right(expected: list[Move], mistake: int) -> bool:
        found = [replace(move) for move in expected]
        done = run(found, tmp_path, driver, mistake)
        return done.returncode == 0 and all(
            torch.equal(bits(ours.out), bits(right.out)) for ours, right in zip(found, expected, strict=True)
        )

    assert not survivors(mistakes, [expected[n : n + 10] for n in range(0, len(expected), 10)], is_right)
