"""The kernels of csrc/amx, built for the emulated tile unit of unit.h, and what their tests share."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from h2ot_kernels.linear import tiles_run

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-std=gnu++20 -O2 -fPIC -shared -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mamx-tile -mamx-int8"
FLAGS += " -mamx-bf16 -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti -w -DH2OT_ISA=amx"
BAND = 1024


def _can_emulate() -> bool:
    info = Path("/proc/cpuinfo")
    return shutil.which("g++") is not None and info.exists() and "avx512bw" in info.read_text()


needs_unit = pytest.mark.skipif(not tiles_run(), reason="this CPU has no tile unit (AMX)")
needs_emulation = pytest.mark.skipif(not _can_emulate(), reason="needs g++ and a CPU with AVX-512")
RUNS = [pytest.param("native", marks=needs_unit), pytest.param("emulated", marks=needs_emulation)]


def build(folder: Path, source: str, *replaced: tuple[str, str, str]) -> ctypes.CDLL:
    """tests/tiles/`source` as a library, each (file, old, new) of `replaced` done to the kernels before."""
    for file in [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*.h"), *ROOT.glob("csrc/amx/*")]:
        text = file.read_text()
        for name, old, new in replaced:
            if name == file.name:
                assert text.count(old) == 1, old
                text = text.replace(old, new)
        to = folder / file.relative_to(ROOT / "csrc")
        to.parent.mkdir(exist_ok=True)
        to.write_text(text)
    library = folder / "emulated.so"
    given = ["-include", ROOT / "tests/tiles/unit.h", f"-I{folder}", ROOT / "tests/tiles" / source]
    subprocess.run(["g++", *FLAGS.split(), *given, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory full of 7, and the `count` elements in it that stand between bands of BAND."""
    whole = torch.full((count + 2 * BAND,), 7, dtype=dtype)
    return whole, whole[BAND:-BAND]


def at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def fails(test: Callable) -> bool:
    try:
        test()
    except AssertionError:
        return True
    return False
