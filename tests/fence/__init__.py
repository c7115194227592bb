"""Buffers of torch on a CPU that end at a page which cannot be touched: for a process started with `environment()`."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """fence.c as a shared library in folder."""
    library = folder / "libfence.so"
    flags = ("-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["cc", *flags, HERE / "fence.c", "-o", library, "-ldl"], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    return os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
