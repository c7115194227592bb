"""Runs csrc/cuda/*.cu on the CPU: g++ compiles it against simt.h, under AddressSanitizer and UBSan."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import struct
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from python_ref import TokenScores

ROOT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).resolve().parent
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# What is compiled beside each driver.
PARTS = {
    "driver": ("score.cu", "cluster.cu", "plan.cpp"),
    "cluster_driver": ("score.cu", "cluster.cu", "plan.cpp"),
    "select_driver": ("select.cu", "plan.cpp"),
    "gather_driver": ("gather_plan.cpp",),
}
SEARCHES = {"stored": 0, "streamed": 1}
DISTANCES = {"direct": 0, "products": 1, "exact_products": 2}
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZED_QUICK = ("-O0", *SANITIZED[2:])  # to build: a third of the time
FAST = ("-O1",)
WATCHED = ("-O1", "-g1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")  # tests/simt/watch.h
QUICK = ("-O0",)  # to build
# The last flag: CMakeLists.txt.
_COMPILER = ("g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{_HERE}",
             "-fno-delete-null-pointer-checks")  # fmt: skip
# What all drivers include, whatever the kernels are.
_COMMON = '#include <fstream>\n#include <iostream>\n#include <string>\n#include <utility>\n#include "buffer.h"\n'


def why_not() -> str | None:
    """None where the simulator can be built, else the reason."""
    if os.uname().machine != "x86_64" or os.uname().sysname != "Linux":
        return f"the simulator is written for Linux on x86-64, not {os.uname().sysname} on {os.uname().machine}"
    return None if shutil.which("g++") else "g++ is not installed"


def _digest(*parts: str | Path) -> str:
    texts = (part.read_text() if isinstance(part, Path) else part for part in parts)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def alone(folder: Path):
    """One process and thread at a time builds here; the next one finds what it built."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(source: Path, result: Path, *flags: str | Path) -> Path:
    """Once, unless the result is there."""
    with alone(result.parent):
        if not result.exists():
            made = result.with_name(f"unfinished-{result.name}")
            command = [*_COMPILER, *flags, "-c", source, "-o", made]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{source} does not compile:\n{done.stderr[-4000:]}")
            made.rename(result)
    return result


def _common_header(flags) -> Path:
    """Compiled once per flags: a third to a half of the time that a small driver takes."""
    made_from = _digest(*_COMPILER, *flags, _COMMON, *sorted(_HERE.glob("*.h")))
    header = ROOT / "build" / "simt" / f"common-{made_from}" / "common.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists():
        header.write_text(_COMMON)
    _compile(header, header.with_suffix(".h.gch"), *flags, "-x", "c++-header")
    return header


def _optimized(name: str) -> Path:
    """What is the simulator's own, once for all drivers."""
    source = _HERE / name
    folder = ROOT / "build" / "simt" / f"simulator-{_digest(*_COMPILER, source, *sorted(_HERE.glob('*.h')))}"
    return _compile(source, folder / f"{name}.o", "-O2")


def build(
    flags=SANITIZED,
    sources: Path = ROOT / "csrc",
    folder: Path = ROOT / "build" / "simt",
    name: str = "driver",
    watcher: str = "watch",
) -> Path:
    """A driver under `folder`, built from `sources` once per content and flags. RuntimeError: what g++ says.

    watcher: "watch" or "traffic", what is told of every access where flags are WATCHED.
    """
    files = sorted([*(sources / "cuda").iterdir(), *sources.glob("*.h"), *_HERE.glob("*.h"), *_HERE.glob("*.cpp")])
    folder = folder / _digest(*_COMPILER, *flags, *files)
    is_watched = "-fsanitize=thread" in flags
    driver = folder / (f"{name}-{watcher}" if is_watched else name)
    if driver.exists():
        return driver
    objects = [_optimized(part) for part in ("threads.cpp", "products.cpp", *[f"{watcher}.cpp"] * is_watched)]
    options = (*flags, f"-I{sources}", "-include", _common_header(flags), "-x", "c++")
    for source in (_HERE / f"{name}.cpp", *(sources / "cuda" / part for part in PARTS[name])):
        objects.append(_compile(source, folder / f"{source.name}.o", *options))
    made = folder / f"{name}-{os.getpid()}-{threading.get_ident()}"
    libraries = [flag for flag in flags if flag != "-fsanitize=thread"]  # the watcher is in its place
    subprocess.run(["g++", *libraries, *objects, "-o", made], check=True)
    made.rename(driver)
    return driver


def tokens_record(x: Tensor) -> tuple[list[int], bytes]:
    """A driver's description of tokens of any strides, and their buffer."""
    x = x.detach()
    B, N, C = x.shape[0], x.shape[1], x.shape[-1]
    J = x.shape[2] if x.dim() == 4 else 1
    strides = [x.stride(0), x.stride(1), x.stride(2) if x.dim() == 4 else 0, x.stride(-1)]
    last = sum((n - 1) * s for n, s in zip((B, N, J, C), strides, strict=True)) if B else -1
    raw = x.as_strided((last + 1,), (1,)).contiguous().view(torch.uint8).numpy().tobytes() if B else b""
    return [_DTYPES[x.dtype], B, N, J, C, *strides, len(raw), 0], raw


@dataclass
class Call:
    """One call of launch_score: tokens x with any strides; plan: (search, distance), None for the counted one."""

    x: Tensor
    k: int = 2
    num_tokens: int = 0
    mask: Tensor | None = None
    noise: Tensor | None = None
    keep: Tensor | None = None
    plan: tuple[str, str] | None = None
    samples: int = 65535
    multiprocessors: int = 132
    seed: int = 1
    only_index: bool = False
    side: int = 0  # of the tiles of products, 0 for the counted one
    scores: TokenScores | None = field(default=None, init=False)
    index: Tensor | None = field(default=None, init=False)
    error: int | None = field(default=None, init=False)

    def record(self) -> bytes:
        tokens, raw = tokens_record(self.x)
        keep = self.keep if self.keep is not None else torch.zeros(0, 0, dtype=torch.int64)
        search, distance = (-1, 0) if self.plan is None else (SEARCHES[self.plan[0]], DISTANCES[self.plan[1]])
        header = [
            *(self.seed, *tokens),
            *(self.k, self.mask is not None, self.noise is not None, self.num_tokens, *keep.shape),
            *(search, distance, self.multiprocessors, self.samples, self.only_index, self.side),
        ]
        parts = [struct.pack(f"<{len(header)}q", *header), raw]
        if self.mask is not None:
            parts.append(self.mask.numpy().tobytes())
        if self.noise is not None:
            parts.append(self.noise.double().contiguous().numpy().tobytes())
        return b"".join([*parts, keep.contiguous().numpy().tobytes()])

    def take(self, data: memoryview) -> memoryview:
        B, N = self.x.shape[:2]

        def read(shape, dtype):
            nonlocal data
            count = int(np.prod(shape))
            value = torch.from_numpy(np.frombuffer(data[: count * 8], dtype).copy()).reshape(shape)
            data = data[count * 8 :]
            return value

        self.error = int(read((1,), np.int64))
        if not self.only_index:
            values = [read((B, N), np.float64) for _ in range(3)]
            self.scores = TokenScores(*values, read((B, N), np.int64))
        self.index = read((B, self.num_tokens), np.int64)
        return data


def environment(mistake: int = 0) -> dict[str, str]:
    """mistake: the number of the one that runs where some are planted (tests/simt/planted.py)."""
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **options, "SIMT_MISTAKE": str(mistake)}


def _place(driver: Path, said: str) -> str:
    """Where in the source an access is that tests/simt/watch.cpp complained of."""
    found = re.search(r"\(at (0x[0-9a-f]+)\)", said)
    if not found or not shutil.which("addr2line"):
        return ""
    return subprocess.run(
        ["addr2line", "-i", "-e", driver, found[1]], capture_output=True, text=True, check=True
    ).stdout


def run(calls: list, driver: Path, folder: Path, timeout: float = 300, mistake: int = 0) -> subprocess.CompletedProcess:
    """Runs the calls, each with `record` and `take`, in one process and fills in their results; none on failure."""
    given, results = (folder / f"{name}-{mistake}.bin" for name in ("in", "out"))
    given.write_bytes(b"".join(call.record() for call in calls))
    done = subprocess.run(
        [driver, given, results],
        env=environment(mistake),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if done.returncode:
        done.stderr += _place(Path(driver), done.stderr)
    else:
        data = memoryview(results.read_bytes())
        for call in calls:
            data = call.take(data)
        assert len(data) == 0
    return done
