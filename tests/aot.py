"""The compile-only gate of the Triton kernels: `python -m tests.aot [--arch 90 ...] [--kernel NAME ...] [--all]`.

Every stem is called on meta tensors of the shapes in tests/aot_samples.py; the launches that it would make are compiled
for every architecture, as Triton would for a GPU that need not be here. A row per kernel, configuration and
architecture; fails when one does not compile, spills, needs more shared memory than the device has, or when a kernel
that is launched anywhere has no row.

Architectures whose PTX differs in nothing but its target (`has_ptx_of`) have it made once and assembled for each; some
builds of every stem are compiled the whole way, too, and the gate fails where that gives other PTX or another row.
Nothing but those compilations carries line numbers. A share of the rows of sm_87 and sm_89 is assembled
(tests/aot_rows.py). --all: every row, and more builds the whole way.
"""

import argparse
import ast
import contextlib
import io
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("tests.aot compiles: run it without TRITON_INTERPRET")

from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import BaseBackend, GPUTarget, Language
from triton.backends.nvidia.compiler import CUDABackend, CUDAOptions
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, native_specialize_impl

from h2ot_kernels.triton import common

from .aot_forms import overruns
from .aot_rows import ARCHITECTURES, LIKE, SHARE, Row, compared, not_assembled

PROVEN = (120, 86, 120, 87, 120, 89)  # in every stem, those that have another's PTX; without --all two of them
PACKAGE = Path(common.__file__).parent
_OPTIONS = CUDAOptions.__dataclass_fields__
_PLACE = re.compile(r" *\bloc\((?:[^()]|\([^()]*\))*\)|^#loc.*\n", re.MULTILINE)  # of a form; attributes follow it
_LINE = re.compile(r"^\s*(?:\.(?:loc|file)\b|\$L__(?:tmp|func)\w*:|//).*\n|\s*//.*", re.MULTILINE)  # of PTX


@dataclass(frozen=True)
class Build:
    """What decides the machine code of one launch: types, alignments and ones of the arguments, and the constants."""

    kernel: str
    stem: str
    signature: tuple
    constants: tuple
    attributes: tuple
    options: tuple

    def __str__(self) -> str:
        types = [kind[1:] for name, kind in self.signature if isinstance(kind, str) and kind.startswith("*")]
        named = [f"{name}={value}" for name, value in (*self.constants, *self.options) if isinstance(name, str)]
        return f"{','.join(dict.fromkeys(types))} {' '.join(named)}"


def function(stem: str, name: str) -> JITFunction:
    module = __import__(f"h2ot_kernels.triton.{stem}", fromlist=[name])
    return getattr(module, name)


def _walk(value, path=()):
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _walk(item, (*path, i))
    else:
        yield path, value


def build_of(launch: common.Launch) -> Build:
    kernel: JITFunction = launch.kernel
    options = {name: value for name, value in launch.constants.items() if name in _OPTIONS}
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    signature, constants, attributes = [], [], []
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        kind, key = native_specialize_impl(BaseBackend, value, False, True, True)
        kind = parameter.annotation_type or kind
        signature.append((parameter.name, kind))
        parts = dict(_walk(value, (position,)))
        constants += [(path, parts[path]) for path, name in _walk(kind, (position,)) if name == "constexpr"]
        attributes += [(path, letters) for path, letters in _walk(key, (position,)) if isinstance(letters, str)]
    stem = kernel.fn.__module__.rsplit(".", 1)[1]
    return Build(
        kernel.__name__, stem, tuple(signature), tuple(constants), tuple(attributes), tuple(sorted(options.items()))
    )


def _products(ptx: str) -> str:
    kinds = [("wgmma", r"wgmma\.mma_async"), ("tcgen05", r"tcgen05\.mma"), ("mma", r"\bmma\.sync")]
    counts = [f"{name} {len(re.findall(pattern, ptx))}" for name, pattern in kinds if re.search(pattern, ptx)]
    return " ".join(counts) or "-"


def _widest_load(ptx: str) -> int:
    """Bytes of the widest global load or asynchronous copy of one thread."""
    widths = [0]
    for vector, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        widths.append(int(vector or 1) * int(bits) // 8)
    widths += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)[,;]", ptx)]
    return max(widths)


def source_of(build: Build, kind: type[ASTSource] = ASTSource) -> ASTSource:
    attributes = {path: CUDABackend.parse_attr(letters) for path, letters in build.attributes}
    return kind(function(build.stem, build.kernel), dict(build.signature), dict(build.constants), attributes)


def form_of(arch: int, build: Build, last: str) -> tuple[str, dict]:
    """(text, metadata) of a kernel after Triton's stage `last`, "ttir" to "ptx": nothing is assembled."""
    target = GPUTarget("cuda", arch, 32)
    backend, context, stages, metadata = make_backend(target), ir.context(), {}, {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(build.options))
    backend.add_stages(stages, options, Language.TRITON)
    generate, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    form = source_of(build).make_ir(target, options, generate, modules, context)
    for name, stage in stages.items():
        form = stage(form, metadata)
        if name == last:
            break
    return str(form), metadata


class SharedSource(ASTSource):
    """A kernel whose first intermediate form, the same for every architecture, is made once: a fifth of the work."""

    form = ""

    def make_ir(self, target, options, codegen_fns, module_map, context):
        if not self.form:
            module = super().make_ir(target, options, codegen_fns, module_map, context)
            self.form = str(module)
            return module
        with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
            file.write(self.form)
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context
        return module


@dataclass(frozen=True)
class Code:
    ptx: str
    shared: int
    log: str  # of ptxas


def has_ptx_of(first: int, arch: int, ptx: str) -> bool:
    """Whether Triton makes for `arch` the PTX that it made for `first`, but for the target.

    Its passes know 8x as one architecture; and tensor memory is all that they and LLVM use on 100 but not on 120.
    """
    return first // 10 == arch // 10 == 8 or ((first, arch) == (100, 120) and "tcgen05" not in ptx)


def same_code(ours: Code, other: Code) -> bool:
    """Whether the kernels are the same instruction for instruction, wherever in the source they come from."""
    one, two = (_LINE.sub("", code.ptx[: code.ptx.index("\n}\n")]).split() for code in (ours, other))
    return one == two and ours.shared == other.shared


@contextlib.contextmanager
def line_numbers(wanted: bool):
    """They cost a tenth of the compilation."""
    before, knobs.compilation.disable_line_info = knobs.compilation.disable_line_info, not wanted
    try:
        yield
    finally:
        knobs.compilation.disable_line_info = before


def compiled(arch: int, build: Build, source: ASTSource) -> Code:
    with contextlib.redirect_stdout(io.StringIO()) as log:
        built = compile(source, target=GPUTarget("cuda", arch, 32), options=dict(build.options))
    return Code(built.asm["ptx"], built.metadata.shared, log.getvalue())


def assembled(arch: int, build: Build, code: Code) -> Code:
    """The same PTX through Triton's last stage for another architecture."""
    backend, stages = make_backend(GPUTarget("cuda", arch, 32)), {}
    backend.add_stages(stages, backend.parse_options(dict(build.options)), Language.TRITON)
    ptx = re.sub(r"\.target sm_\d+", f".target sm_{arch}", code.ptx)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        stages["cubin"](ptx, {})
    return Code(ptx, code.shared, log.getvalue())


def row_of(arch: int, build: Build, code: Code) -> Row:
    numbers = [sum(map(int, re.findall(rf"(\d+) {name}", code.log))) for name in ("registers", "bytes spill stores")]
    assert numbers[0], f"ptxas said nothing of {build.kernel}: {code.log}"
    error = "; ".join(overruns(code.ptx))
    return Row(
        build.kernel, str(build), arch, *numbers, code.shared, _products(code.ptx), _widest_load(code.ptx), error
    )


def start_worker(cache: str) -> None:
    knobs.cache.dir = cache
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True


@dataclass(frozen=True)
class Task:
    build: Build
    architectures: list[int]
    taken: set[int]  # architectures of which nothing is assembled: they have the row of another
    proven: int | None  # where this one has another's PTX, it is compiled the whole way, too


def compile_build(task: Task) -> list[Row]:
    """A row for each of the architectures."""
    build = task.build
    source, rows, codes = source_of(build, SharedSource), [], {}
    for arch in task.architectures:
        if arch in task.taken:
            rows.append(Row(build.kernel, str(build), arch, taken_from=LIKE[arch]))
            continue
        same = next((code for first, code in codes.items() if has_ptx_of(first, arch, code.ptx)), None)
        try:
            with line_numbers(False):
                code = assembled(arch, build, same) if same else compiled(arch, build, source)
            row = row_of(arch, build, code)
            if same and arch == task.proven:
                with line_numbers(True):
                    whole = compiled(arch, build, source_of(build))
                with_lines = row_of(arch, build, whole)
                # scan_kernel: 230 registers where ptxas is given lines, else 229.
                if abs(with_lines.registers - row.registers) == 1:
                    with_lines = replace(with_lines, registers=row.registers)
                if not same_code(whole, code) or with_lines != row:
                    row = replace(row, error="has PTX of its own: see has_ptx_of and line_numbers")
            codes[arch] = code
        except Exception as error:  # any failure of the compiler is this row's result
            message = " ".join(str(error).split())[-600:]
            row = Row(build.kernel, str(build), arch, error=f"{type(error).__name__}: {message}")
        rows.append(row)
    return compared(rows)


def launched_kernels() -> set[str]:
    """The names of all `@triton.jit` functions that host code refers to: what it passes on to `launch`."""
    compiled, used = set(), set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                compiled.add(node.name)
            elif isinstance(node, ast.FunctionDef):
                used |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return compiled & used


def builds() -> list[Build]:
    from .aot_samples import calls

    with common.record() as launches:
        for call in calls():
            call()
    return list(dict.fromkeys(build_of(launch) for launch in launches))


def tasks(builds: list[Build], architectures: list[int], seed: int | None) -> list[Task]:
    """Every build, and for some of each stem, evenly apart, an architecture to be compiled the whole way.

    Without a seed every row is assembled.
    """
    whole = PROVEN if seed is None else random.Random(seed).sample(sorted(set(PROVEN)), 2)
    proven = {}
    for stem in {build.stem for build in builds}:
        own = [build for build in builds if build.stem == stem]
        proven |= {own[i * len(own) // len(whole)]: arch for i, arch in enumerate(whole)}
    taken = [set()] * len(builds) if seed is None else not_assembled(len(builds), architectures, seed)
    return [
        Task(build, architectures, without - {proven.get(build)}, proven.get(build))
        for build, without in zip(builds, taken, strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--kernel", nargs="*", help="only these kernels")
    parser.add_argument("--all", action="store_true", help="assemble for architectures that are like another, too")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the rows that are, without --all")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args(argv)
    started = time.monotonic()
    wanted = [build for build in builds() if not given.kernel or build.kernel in given.kernel]
    if not given.all:
        print(f"sm_87 and sm_89: one build in {SHARE} is assembled, drawn by --seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as cache, multiprocessing.Pool(given.jobs, start_worker, (cache,)) as pool:
        rows = []
        for made in pool.imap(compile_build, tasks(wanted, given.arch, None if given.all else given.seed)):
            print(*made, sep="\n", flush=True)
            rows += made
    missing = set() if given.kernel else launched_kernels() - {row.kernel for row in rows}
    problems = [row for row in rows if row.problem]
    for row in problems:
        print(f"FAILED {row}")
    for name in sorted(missing):
        print(f"FAILED {name} is launched but was not compiled: add a call to tests/aot_samples.py")
    print(
        f"aot: {len(rows)} rows, {sum(bool(row.taken_from) for row in rows)} of them another architecture's, "
        f"{len(wanted)} builds of {len({row.kernel for row in rows})} kernels, "
        f"{len(problems) + len(missing)} failed, {time.monotonic() - started:.0f} s"
    )
    return 1 if problems or missing or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
