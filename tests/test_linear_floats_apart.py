"""The kernels of linear layers and MLPs in float32 by themselves, between bands of memory; planted mistakes in them."""

import ctypes
from pathlib import Path

import pytest
import torch

from h2ot_kernels import _C
from h2ot_kernels.linear_floats import pack

from .test_linear_floats import NONE, checks
from .tiles import VECTORS, Wide, alone, at, between_bands, build, fails, guarded, needs_compiler

pytestmark = [pytest.mark.usefixtures("inference"), needs_compiler]


class Compiled:
    """The kernels by themselves; the bytes beside their results stay as they are, and none beside operands counts."""

    def __init__(self, folder: Path, *replaced: tuple[str, str, str]):
        self.library = build(folder, "linear_floats.cpp", *replaced, target=VECTORS[_C.capability()])

    @staticmethod
    def _norm(norm):
        return at(norm[0]), at(norm[1]), ctypes.c_double(norm[2])

    def linear(self, x, weight, bias=None, residual=None, chunks=1, gelu=False, norm=NONE):
        rows, C, M = x.numel() // x.shape[-1], x.shape[-1], len(weight) // chunks
        sizes = [ctypes.c_int64(size) for size in (rows, chunks, M, C)]
        wide, packed = Wide(x, M, chunks, torch.float32), pack(weight, chunks)
        added = wide.residual(residual)
        given = at(bias), at(added), int(gelu), at(wide.out), *self._norm(norm), *wide.apart
        assert self.library.linear_floats(at(wide.x), at(packed), *sizes, *given) == 0
        return wide.result()

    def mlp(self, x, first, second, residual=None, norm=NONE):
        (w1, b1), (w2, b2) = first, second
        rows, C = x.numel() // x.shape[-1], x.shape[-1]
        whole, out = guarded(rows * len(w2), torch.float32)
        sizes = [ctypes.c_int64(size) for size in (rows, C, len(w1), len(w2))]
        inside, packed = alone(x), (pack(w1, 1), pack(w2, 1))
        given = at(b1), at(b2), at(residual), at(out), *self._norm(norm)
        assert self.library.mlp_floats(at(inside), *map(at, packed), *sizes, *given) == 0
        return between_bands(whole, out, (*x.shape[:-1], len(w2)))


def test_between_bands_of_memory(tmp_path):
    for test in checks(Compiled(tmp_path)):
        test()


KERNEL, SHARED = "linear_floats.cpp", "linear_blocks.h"
MISTAKES = {
    "outputs beyond the last are written": (KERNEL, "result(whole), rest);", "result(whole), kFloats);"),
    "outputs behind whole vectors are left out": (KERNEL, "rest = place.count - whole", "rest = 0"),
    "vectors behind whole tiles are left out": (KERNEL, "if constexpr (V > 1) mul", "if constexpr (V > 9) mul"),
    "rows beyond the last are read and written": (
        SHARED,
        "left < taken * side ? left : taken * side",
        "taken * side",
    ),
    "a tile's last rows are left out": (KERNEL, "? count - row : kRows", "? 1 : kRows"),
    "a chunk's bias is the first one's": (KERNEL, "a.bias + place.chunk * a.M + ", "a.bias + "),
    "chunks meet in one place": (SHARED, "chunk * a.rows * a.M + ", ""),
    "the next block's rows are taken": (SHARED, "first = task / parts * side", "first = task * 0"),
    "the residual of the first row": (KERNEL, "if (residual) residual += out_row(a);", ""),
    "rows of x are adjacent": (KERNEL, "a.C, x, x_row(a), Fixed", "a.C, x, a.C, Fixed"),
    "rows that are normed are adjacent": (KERNEL, "norm_block(x, x_row(a), ", "norm_block(x, a.C, "),
    "normed rows stand as far apart as they did": (KERNEL, "if (a.has_norm) inner.apart.x = 0;", ""),
    "rows of results are adjacent": (KERNEL, "out += out_row(a)", "out += a.M"),
    "a rest has no residual": (KERNEL, "residual ? added + result(whole) :", "false ? added :"),
    "weights of the panel before": (KERNEL, "a.packed + panel * a.C", "a.packed + panel / 2 * a.C"),
    "the norm's weight is its bias": (SHARED, "bias = weight + width;", "bias = weight;"),
    "the last rows have no norm": ("layer_norm.h", "count - row, C, eps", "0, C, eps"),
    "what is between two layers overlaps the norm": (KERNEL, "*const more = own + normed;", "*const more = own;"),
    "the second layer has one panel": (KERNEL, "groups_of(a.second.M, kFloatsPanel)", "1"),
    "an MLP's results are those of the first block": (KERNEL, "between, first, count", "between, 0, count"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(mistake, tmp_path):
    wrong = Compiled(tmp_path, MISTAKES[mistake])
    assert any(fails(test) for test in checks(wrong))
