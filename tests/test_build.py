"""What the built libraries must not contain, and that documentation runs."""

import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
import setuptools

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


@pytest.fixture
def build_ext(monkeypatch, tmp_path):
    """The command of setup.py that builds into tmp_path, and what it would run; building fails where `fails` is set."""
    monkeypatch.chdir(tmp_path)
    command = setuptools.distutils.core.run_setup(ROOT / "setup.py", stop_after="init").get_command_obj("build_ext")
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    ran = []

    def run(given, **how):
        ran.extend(given)
        return subprocess.CompletedProcess(given, int("--build" in given and "fails" in os.environ))

    monkeypatch.setattr(subprocess, "run", run)
    return command, ran


@pytest.mark.parametrize(("given", "wanted"), [(None, "OFF"), ("", "OFF"), ("0", "OFF"), ("1", "ON")])
def test_a_cuda_library_of_an_earlier_build_does_not_stay(build_ext, monkeypatch, tmp_path, given, wanted):
    monkeypatch.delenv("H2OT_KERNELS_CUDA", raising=False)
    if given is not None:
        monkeypatch.setenv("H2OT_KERNELS_CUDA", given)
    old = tmp_path / "h2ot_kernels" / "libh2ot_kernels_cuda.so"
    old.parent.mkdir()
    old.touch()
    command, ran = build_ext
    command.run()
    assert f"-DH2OT_CUDA={wanted}" in ran
    assert old.exists() == (wanted == "ON")


def test_a_build_refuses_what_is_no_answer_to_whether_cuda_is_wanted(build_ext, monkeypatch):
    monkeypatch.setenv("H2OT_KERNELS_CUDA", "ON")
    command, ran = build_ext
    with pytest.raises(SystemExit, match="H2OT_KERNELS_CUDA: got 'ON', wanted 0 or 1"):
        command.run()
    assert not ran


def test_each_compiler_has_a_folder_of_its_own(build_ext, monkeypatch):
    command, ran = build_ext
    folders = []
    for compiler in ("", "/usr/bin/clang++-19", "ccache g++"):
        monkeypatch.setenv("CXX", compiler)
        command.run()
        folders.append(
            ran[ran.index("-B") + 1].name.removeprefix(f"{sys.implementation.cache_tag}-torch{version('torch')}")
        )
        ran.clear()
    assert folders == ["", "-clang++-19", "-ccache-g++"]


def test_a_strict_editable_install_links_every_library(build_ext, tmp_path):
    command, _ = build_ext
    libraries = [tmp_path / "h2ot_kernels" / name for name in ("_C.so", "libh2ot_kernels_cpu.so")]
    libraries[0].parent.mkdir()
    for library in libraries:
        library.touch()
    assert sorted(command.get_outputs()) == sorted(map(str, libraries))
    assert command.get_output_mapping() == {}
    command.inplace, command.build_lib = True, "wheel"
    there = Path(command.get_ext_fullpath("h2ot_kernels._C")).parent
    wanted = {f"wheel/h2ot_kernels/{path.name}": str(path) for path in there.glob("*.so")}
    assert "wheel/h2ot_kernels/libh2ot_kernels_cpu.so" in wanted
    assert command.get_output_mapping() == wanted
    assert sorted(command.get_outputs()) == sorted(wanted)


def test_dev_builds_again_where_a_source_or_the_version_differs(tmp_path):
    """Or the compiler. With a Python that does nothing, in a tree of one file of each kind."""
    python = tmp_path / ".venv" / "bin" / "python"
    package = tmp_path / "h2ot_kernels"
    for folder in (python.parent, package, tmp_path / "csrc" / "cpu"):
        folder.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "csrc/a.h", "csrc/cpu/a.cpp", "h2ot_kernels/_C.so"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "dev", tmp_path)

    def builds(**environment):
        own = os.environ | environment
        done = subprocess.run([tmp_path / "dev", "setup"], capture_output=True, text=True, check=True, env=own)
        return "dev: building" in done.stdout

    (package / "__init__.py").write_text('__version__ = "0.1.0"\n')
    assert [builds(), builds()] == [True, False]
    (package / "__init__.py").write_text('"""More words."""\n\n__version__ = "0.1.0"\n')
    assert not builds()
    (package / "__init__.py").write_text('__version__ = "0.2.0"\n')
    assert [builds(), builds()] == [True, False]
    (tmp_path / "csrc" / "a.h").write_text("int x;")
    assert [builds(), builds()] == [True, False]
    assert [builds(CXX="g++"), builds(CXX="g++"), builds(CXX="")] == [True, False, True]


def test_another_compiler_than_gxx_and_clang_is_refused(tmp_path):
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    made_up = ["-DCMAKE_CXX_COMPILER_ID_RUN=ON", "-DCMAKE_CXX_COMPILER_ID=Intel", "-DH2OT_DRIVER=ON"]
    done = subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, *made_up], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "written for g++ and clang: got Intel" in done.stderr


def test_a_build_that_fails_says_so_in_one_line(build_ext, monkeypatch):
    """cmake's own words stand above it, and no traceback between."""
    monkeypatch.setenv("fails", "1")
    command, ran = build_ext
    with pytest.raises(SystemExit, match="cmake failed"):
        command.run()
    assert "--install" not in ran


@needs_nm
def test_operator_library_uses_the_stable_abi_only():
    library = Path(h2ot_kernels.__file__).parent / "libh2ot_kernels_cpu.so"
    undefined = [line.split(maxsplit=1)[1] for line in symbols(library, "-D", "--undefined-only")]
    assert any("torch" in name for name in undefined)
    assert not [name for name in undefined if re.search(r"\b(at|c10|torch)::", name)]
    assert not [name for name in undefined if name.startswith("Py")]


def test_libraries_name_no_folder_of_the_machine_that_built_them():
    folders = [os.fsencode(folder) for folder in (ROOT, sysconfig.get_path("include"), sysconfig.get_path("purelib"))]
    libraries = Path(h2ot_kernels.__file__).parent
    for library in [*libraries.glob("_C.*.so"), libraries / "libh2ot_kernels_cpu.so"]:
        assert not [folder for folder in folders if folder in library.read_bytes()], library


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
