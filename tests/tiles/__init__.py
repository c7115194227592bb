"""Kernels built apart, for the tile unit of emulated.h or for vectors, and what their tests share."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from h2ot_kernels import _C
from h2ot_kernels.inference import tiles_run

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-std=gnu++20 -O2 -fPIC -shared -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti -w"
WIDE = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
UNIT = f"{WIDE} -mamx-tile -mamx-int8 -mamx-bf16 -DH2OT_ISA=amx"
UNIT_AND_PAIRS = f"{UNIT} -mavx512bf16"
DOTS = f"{WIDE} -mavx512bf16 -DH2OT_ISA=bf16_dots"
VECTORS = {
    "portable": "-DH2OT_ISA=portable",
    "avx2": "-mavx2 -mfma -mf16c -DH2OT_ISA=avx2",
    "avx512": f"{WIDE} -DH2OT_ISA=avx512",
}
BAND = 1024
EMULATED = ROOT / "tests" / "tiles" / "emulated.h"
SOURCES = [
    *(path for pattern in ("*.h", "cpu/*.h", "amx/*") for path in sorted((ROOT / "csrc").glob(pattern))),
    ROOT / "csrc" / "cpu" / "linear_floats.cpp",
    EMULATED,
]


def _has(*flags: str) -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and set(flags) <= set(info.read_text().split())


needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or _C.capability() not in VECTORS, reason="needs g++ and an x86 CPU"
)
needs_unit = pytest.mark.skipif(not tiles_run(), reason="this CPU has no tile unit (AMX)")
needs_emulation = pytest.mark.skipif(
    not (shutil.which("g++") and _has("avx512bw")), reason="needs g++ and a CPU with AVX-512"
)
needs_dots = pytest.mark.skipif(
    not (shutil.which("g++") and _has("avx512bw", "avx512_bf16")), reason="needs g++ and a CPU with AVX512-BF16"
)
needs_either = pytest.mark.skipif(
    not (tiles_run() or _C.dots_run()), reason="this CPU has neither a tile unit nor AVX512-BF16"
)
RUNS = [pytest.param("native", marks=needs_unit), pytest.param("emulated", marks=needs_emulation)]


def build(folder: Path, source: str, *replaced: tuple[str, str, str], target: str = UNIT) -> ctypes.CDLL:
    """tests/tiles/`source` as a library, each (file, old, new) of `replaced` done to the kernels or the unit before.

    target: UNIT, emulated, DOTS or one of VECTORS.
    """
    for file in SOURCES:
        text = file.read_text()
        for name, old, new in replaced:
            if name == file.name:
                assert text.count(old) == 1, old
                text = text.replace(old, new)
        to = folder / (file.name if file == EMULATED else file.relative_to(ROOT / "csrc"))
        to.parent.mkdir(exist_ok=True)
        to.write_text(text)
    library = folder / "kernel.so"
    given = ["-include", folder / EMULATED.name, f"-I{folder}", ROOT / "tests/tiles" / source]
    subprocess.run(["g++", *FLAGS.split(), *target.split(), *given, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory full of 7, and the `count` elements in it that stand between bands of BAND."""
    whole = torch.full((count + 2 * BAND,), 7, dtype=dtype)
    return whole, whole[BAND:-BAND]


def between_bands(whole: Tensor, inside: Tensor, size: tuple[int, ...]) -> Tensor:
    """What was written between the bands, which are as they were, of this size."""
    for band in (whole[:BAND], whole[-BAND:]):
        assert (band == 7).all()
    return inside.view(size)


class Wide:
    """Operands and results of a layer, of some sizes in rows that stand apart: NaN, or 7, between them."""

    def __init__(self, x: Tensor, M: int, chunks: int, dtype: torch.dtype):
        self.size, self.rows, self.M, self.chunks = x.shape[:-1], x.numel() // x.shape[-1], M, chunks
        self.more = 5 if chunks == 1 and self.rows % 2 else 0
        self.x = alone(self._wide(x))
        self.whole, self.out = guarded(self.rows * chunks * (M + self.more), dtype)
        self.apart = [ctypes.c_int64(columns + self.more if self.more else 0) for columns in (x.shape[-1], M)]

    def residual(self, residual: Tensor | None) -> Tensor | None:
        return residual if residual is None or not self.more else self._wide(residual)

    def result(self) -> Tensor:
        """What was written between bands and between columns, which are as they were."""
        wide = between_bands(self.whole, self.out, (self.chunks * self.rows, self.M + self.more))
        assert (wide[:, self.M :] == 7).all()
        size = (*self.size, self.M)
        return wide[:, : self.M].reshape(size if self.chunks == 1 else (self.chunks, *size))

    def _wide(self, x: Tensor) -> Tensor:
        wide = torch.full((self.rows, x.shape[-1] + self.more), torch.nan, dtype=x.dtype)
        wide[:, : x.shape[-1]] = x.reshape(self.rows, -1)
        return wide


def alone(x: Tensor) -> Tensor:
    """A copy of x between NaN, which spoils what counts it."""
    inside = torch.full((x.numel() + 64,), float("nan"), dtype=x.dtype)[32:-32].view(x.shape)
    return inside.copy_(x)


def at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def fails(test: Callable) -> bool:
    try:
        test()
    except AssertionError:
        return True
    return False
