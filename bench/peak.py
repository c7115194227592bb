"""The measured peak of this CPU: multiply-adds of float32 numbers that stay in registers (bench/peak.cpp)."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.cpp")


@functools.cache
def multiply_adds(threads: int) -> float:
    """FLOP/s of so many threads, a multiply-add counts 2: of each the best of short tries.

    Raises RuntimeError without a C++ compiler.
    """
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found (Debian: apt-get install g++; or set CXX)")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        subprocess.run([compiler, "-O2", "-march=native", "-pthread", SOURCE, "-o", program], check=True)
        done = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True)
    return float(done.stdout)
