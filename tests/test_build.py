"""What the built libraries must not contain, and that documentation runs."""

import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import h2ot_kernels

from . import cuda_gate, tiles

ROOT = Path(__file__).resolve().parents[1]
# onnx: in test_onnx.py, which is skipped where its packages are missing.
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "h2ot_kernels").rglob("*.py"))
    if ">>> " in path.read_text() and path.stem != "onnx"
]
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")


def symbols(path, *options):
    return subprocess.run(["nm", "-C", *options, path], capture_output=True, text=True, check=True).stdout.splitlines()


@needs_nm
def test_operator_library_uses_the_stable_abi_only():
    library = Path(h2ot_kernels.__file__).parent / "libh2ot_kernels_cpu.so"
    undefined = [line.split(maxsplit=1)[1] for line in symbols(library, "-D", "--undefined-only")]
    assert any("torch" in name for name in undefined)
    assert not [name for name in undefined if re.search(r"\b(at|c10|torch)::", name)]
    assert not [name for name in undefined if name.startswith("Py")]


@needs_nm
def test_no_kernel_symbol_can_cross_instruction_sets():
    """A weak function compiled for AVX-512 could be the copy that the linker keeps for every instruction set."""
    objects = [path for path in (ROOT / "build").glob("*/CMakeFiles/cpu_*.dir/**/*.o")]
    assert objects, "no kernel objects under build/: run ./dev setup"
    weak = {f"{path.name}: {line}" for path in objects for line in symbols(path) if re.search(r"^\S* [Wu] ", line)}
    assert not weak


@needs_nm
@tiles.needs_compiler
@pytest.mark.parametrize("source", ["cpu/linear_floats.cpp", "amx/linear_tiles.cpp"])
def test_none_does_where_little_is_inlined(source, tmp_path):
    """As ./dev sanitize builds: what functions of headers leave is named by the instruction set."""
    own = tiles.UNIT if source.startswith("amx") else tiles.VECTORS["avx512"]
    flags = [*tiles.FLAGS.replace("-O2", "-Og").replace("-shared", "-c").split(), *own.split()]
    subprocess.run(["g++", *flags, ROOT / "csrc" / source, "-o", tmp_path / "kernels.o"], check=True)
    weak = [line for line in symbols(tmp_path / "kernels.o") if re.search(r"^\S* [Wu] ", line)]
    assert weak
    assert not [line for line in weak if not re.search(r"\bh2ot::(amx|avx512)::", line)]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, cwd=tmp_path, timeout=120)


IMPORT = """
import sys, time, torch
before, began = set(sys.modules), time.process_time()
import h2ot_kernels
print(time.process_time() - began, *sorted(set(sys.modules) - before))
"""


def test_import_needs_little_and_under_a_second_beyond_torch():
    """Of the processor's time: other work on the machine does not count."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=True)
    seconds, *modules = run.stdout.split()
    assert float(seconds) < 1
    assert "h2ot_kernels" in modules
    assert not {"matplotlib", "rich", "sympy", "scipy", "torch._dynamo", "h2ot_kernels.demo"} & set(modules)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize(
    "code",
    ["__global__ void k() { int unused; }\n", "bool f(int a, unsigned b) { return a < b; }\n"],
    ids=["by nvcc", "by the host's compiler"],
)
def test_warnings_of_cuda_code_are_errors_in_the_gate_only(tmp_path, code):
    """A user's nvcc or g++ may have more of them than those that CI runs."""
    source = tmp_path / "warned.cu"
    source.write_text(code)
    there = os.path.relpath(source, ROOT / "csrc" / "cuda")
    assert "nvcc failed" in cuda_gate.compile_file(80, there, "-c", tmp_path, None).faults[0]
    assert "-Werror" not in (ROOT / "CMakeLists.txt").read_text()
