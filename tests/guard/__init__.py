"""Guard bands around every buffer that torch allocates on a GPU: `install()` before the first CUDA tensor."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent


def build(folder: Path, compiler: str, *flags: str) -> Path:
    """guard.cpp as a shared library in folder."""
    library = folder / "libguard.so"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", *flags, HERE / "guard.cpp", "-o", library], check=True)
    return library


def counters(library: Path) -> tuple[int, int]:
    """(buffers allocated, buffers freed with a damaged band) so far in this process."""
    loaded = ctypes.CDLL(str(library))
    loaded.guard_allocated.restype = loaded.guard_damaged.restype = ctypes.c_int64
    return loaded.guard_allocated(), loaded.guard_damaged()


def install(folder: Path) -> Path:
    """Every CUDA buffer of this process gets guard bands from now on. Needs the CUDA toolkit (nvcc on the PATH)."""
    if shutil.which("nvcc") is None:
        raise RuntimeError("guard bands need the CUDA toolkit: nvcc is not on the PATH")
    library = build(folder, "nvcc", "-Xcompiler", "-fPIC")
    allocator = torch.cuda.memory.CUDAPluggableAllocator(str(library), "guard_malloc", "guard_free")
    torch.cuda.memory.change_current_allocator(allocator)
    return library
