"""What was proven whole, and has not changed since: of that CI proves a drawn share again (sample.py).

`./dev reliability` writes a key beside what each of these proofs counted, in bench/results/reliability/last.json: of
the files that decide how it ends, and of the versions that it ran with. With another key, or none, it counts as new.
"""

import ast
import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import triton

from h2ot_kernels import _C

from . import cuda_ledger

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "reliability" / "last.json"
CUDA, TRITON, ARM, SANITIZE, ONNX = "cuda source, simulated", "triton, its PTX", "arm", "sanitize", "onnx"
_KERNELS = ("score", "select", "cluster", "gather", "recover_attention", "recover_interpolation")
_POSE = ("recover_pose", "recover_tail")
_TRITON = ("triton", "triton_score", "triton_gather", "triton_pairs", "triton_forms", "triton_tiles", "ptx_barriers")
_CPU = ("recover_rotated", "add_norm", "graph", "linear_floats")
_MORE = (
    "recover_rotated_halves",
    "recover_rotated_tiles",
    "linear_halves",
    "linear_tiles",
    "linear_out",
    "samples",
    "attention_tiles",
    "attention_score_tiles",
)
# The tests of each, and what else decides how it ends (dev: versions). Python above kernels has tests of its own.
TESTS = {
    CUDA: sorted(path.stem.removeprefix("test_") for path in ROOT.glob("tests/test_cuda_simt*.py")),
    TRITON: [*_KERNELS, *_TRITON, "fuzz"],
    ARM: [*_KERNELS, *_CPU, "fuzz"],
    SANITIZE: [*_KERNELS, *_CPU, *_MORE, "attend", "operators", "size", "fuzz"],
    ONNX: [],
}
_SOURCES = {
    CUDA: ("csrc/cuda/*",),
    TRITON: (
        "h2ot_kernels/triton/*.py",
        *(f"h2ot_kernels/{stem}.py" for stem in (*_KERNELS, *_POSE, "checks", "library")),
    ),
    ARM: ("csrc/*.*", "csrc/cpu/*", "tests/arm.py", "tests/driver/*", "CMakeLists.txt"),
    SANITIZE: ("csrc/*.*", "csrc/cpu/*", "csrc/amx/*", "tests/sanitize.py", "tests/every_op.py", "CMakeLists.txt"),
    ONNX: ("h2ot_kernels/*.py", "h2ot_kernels/hosts/*.py", "bench/bench_onnx.py", "bench/hosts.py", "dev"),
}
_DEFINITIONS = [f"python_ref/{stem}.py" for stem in ("__init__", "graph", *_KERNELS, "recover_pose")]
_CHOICE = {"sample.py", "unchanged.py"}  # which tests run, not how they end; of conftest.py a share shows a fault, too
_COMPILERS = {CUDA: "g++", TRITON: "g++", ARM: "aarch64-linux-gnu-g++", SANITIZE: "g++"}


def tests_of(proof: str) -> list[str]:
    return [f"tests/test_{stem}.py" for stem in TESTS[proof]]


def _imported(path: Path) -> Iterable[Path]:
    """Files of this project's tests that a file of theirs imports; of a package all."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            names = [node.module.split(".")[0]] if node.module else [name.name for name in node.names]
            for name in names:
                package = folder / name
                yield from package.iterdir() if package.is_dir() else (package.with_suffix(".py"),)


def files(proof: str) -> list[Path]:
    """What decides how a proof ends."""
    found = {path for pattern in (*_SOURCES[proof], *_DEFINITIONS) for path in ROOT.glob(pattern)}
    found |= set(cuda_ledger.sources()) if proof == CUDA else set()
    ahead = [ROOT / name for name in tests_of(proof)]
    while ahead:
        path = ahead.pop()
        if path.is_file() and path not in found and path.name not in _CHOICE:
            found.add(path)
            ahead += _imported(path) if path.suffix == ".py" else ()
    return sorted(found)


def key(proof: str) -> str:
    """Of those files, and of the versions."""
    compiler = shutil.which(_COMPILERS.get(proof, ""))
    releases = [".".join(version.split(".")[:2]) for version in (platform.python_version(), np.__version__)]
    parts = [*releases, torch.__version__, triton.__version__]
    if proof == SANITIZE:  # watched is what this CPU has instructions for
        parts.append(f"{_C.runnable_capabilities()} {_C.tiles_run()} {_C.dots_run()}")
    if compiler:
        parts.append(subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout)
    parts += [f"{path.relative_to(ROOT)}\n{path.read_text()}" for path in files(proof)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def is_unchanged(proof: str) -> bool:
    """Whether it has passed under the key that it has now."""
    row = json.loads(RESULT.read_text())["proofs"].get(proof, {}) if RESULT.exists() else {}
    return row.get("passed", False) and "key" in row and row["key"] == key(proof)
