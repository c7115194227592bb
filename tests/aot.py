"""The compile-only gate of the Triton kernels: `./dev aot [--kernel NAME ...] [--all] [--record]`.

Every stem is called on meta tensors of the shapes in tests/aot_samples.py; the launches that it would make are compiled
for every architecture, as Triton would for a GPU that need not be here. A row per kernel, configuration and
architecture; fails when one does not compile, spills, needs more shared memory than the device has, or when a kernel
that is launched anywhere has no row.

What the ledger has (tests/aot_ledger.py) is compiled for a share of the builds only, and fails where it comes out
otherwise. --all: every build is compiled. --record: none that is recorded, and the ledger is brought up to date.

Architectures whose PTX differs in nothing but its target (`has_ptx_of`) have it made once and assembled for each; some
builds of every stem are compiled the whole way, too, and the gate fails where that gives other PTX or another row.
Nothing but those compilations carries line numbers.
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
from collections.abc import Iterator, Sequence
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

from . import aot_key, aot_ledger, aot_read
from .aot_ledger import LEDGER
from .aot_rows import ARCHITECTURES, Build, Row

# In every stem, those that have another's PTX; without --all and --record two of them.
PROVEN = (120, 86, 120, 87, 120, 89)
PACKAGE = Path(common.__file__).parent
_OPTIONS = CUDAOptions.__dataclass_fields__
_LINE = re.compile(r"^\s*(?:\.(?:loc|file)\b|\$L__(?:tmp|func)\w*:|//).*\n|\s*//.*", re.MULTILINE)  # of PTX


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

    Its passes know 8x as one architecture; and tensor memory is all that they and LLVM use on 100 but not on 120. Where
    more of it is wanted than there is, a trap stands in place of the kernel.
    """
    without = "tcgen05" not in ptx and "trap;" not in ptx
    return first // 10 == arch // 10 == 8 or ((first, arch) == (100, 120) and without)


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
    registers, spills = aot_read.registers_and_spills(code.log)
    loads, products = aot_read.widest_load(code.ptx), aot_read.products(code.ptx)
    error = "; ".join(aot_read.overruns(code.ptx))
    return Row(build.kernel, str(build), arch, registers, spills, code.shared, loads, products, error)


def start_worker(cache: str) -> None:
    knobs.cache.dir = cache
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True


@dataclass(frozen=True)
class Task:
    build: Build
    architectures: list[int]
    proven: int | None  # where this one has another's PTX, it is compiled the whole way, too


def compile_build(task: Task) -> list[Row]:
    """A row for each of the architectures."""
    build = task.build
    source, rows, codes = source_of(build, SharedSource), [], {}
    for arch in task.architectures:
        same = next((code for first, code in codes.items() if has_ptx_of(first, arch, code.ptx)), None)
        try:
            with line_numbers(False):
                code = assembled(arch, build, same) if same else compiled(arch, build, source)
            row = row_of(arch, build, code)
            if same and arch == task.proven:
                with line_numbers(True):
                    whole = compiled(arch, build, source_of(build))
                with_lines = row_of(arch, build, whole)
                # The same PTX; ptxas, given lines: scan_kernel 230 registers for 229, nearest_kernel 244 for 246.
                if abs(with_lines.registers - row.registers) <= 2:
                    with_lines = replace(with_lines, registers=row.registers)
                if not same_code(whole, code) or with_lines != row:
                    row = replace(row, error="has PTX of its own: see has_ptx_of and line_numbers")
            codes[arch] = code
        except Exception as error:  # any failure of the compiler is this row's result
            message = " ".join(str(error).split())[-600:]
            row = Row(build.kernel, str(build), arch, error=f"{type(error).__name__}: {message}")
        rows.append(row)
    return rows


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


def tasks(builds: list[Build], architectures: list[int], whole: Sequence[int]) -> list[Task]:
    """Of every build; for some of each stem, evenly apart, with one of `whole` to be compiled the whole way."""
    proven = {}
    for stem in {build.stem for build in builds}:
        own = [build for build in builds if build.stem == stem]
        proven |= {own[i * len(own) // len(whole)]: arch for i, arch in enumerate(whole)}
    return [Task(build, architectures, proven.get(build)) for build in builds]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--kernel", nargs="*", help="only these kernels")
    parser.add_argument("--all", action="store_true", help="compile what is recorded, too, and compare")
    parser.add_argument("--record", action="store_true", help="compile what is not recorded, and record it")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the recorded that are compiled")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args(argv)
    if given.record and given.arch != list(ARCHITECTURES):
        parser.error("--record is of all architectures")
    return given


def results(compiling: list[Build], given: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one build after the other, as they are compiled."""
    whole = PROVEN if given.all or given.record else random.Random(given.seed).sample(sorted(set(PROVEN)), 2)
    with tempfile.TemporaryDirectory() as cache, multiprocessing.Pool(given.jobs, start_worker, (cache,)) as pool:
        yield from pool.imap(compile_build, tasks(compiling, given.arch, whole))


def main(argv: list[str] | None = None) -> int:
    given, started = arguments(argv), time.monotonic()
    name = LEDGER.relative_to(aot_ledger.ROOT)
    ledger, damage = aot_ledger.read(LEDGER.read_text() if LEDGER.exists() else "")
    for fault in damage:
        print(f"{'dropped' if given.record else 'FAILED'} {name}, {fault}")
    if damage and not given.record:
        print("aot: nothing was compiled; ./dev aot --record makes such entries anew")
        return 1

    asked = {build: aot_key.key(build, function(build.stem, build.kernel)) for build in builds()}
    wanted = {build: key for build, key in asked.items() if not given.kernel or build.kernel in given.kernel}
    known = [key for key in wanted.values() if key in ledger]
    again = set(known) if given.all else set() if given.record else aot_ledger.drawn(known, given.seed)
    print(
        f"{len(known)} of {len(wanted)} builds are in {name}; of them {len(again)} are compiled (--seed {given.seed})"
    )
    compiling = [build for build, key in wanted.items() if key in again or key not in ledger]
    made, rows, compiled_rows = {}, [], results(compiling, given)
    for key in wanted.values():
        if key in ledger and key not in again:
            of_build = [row for row in ledger[key] if row.arch in given.arch]
        else:
            of_build = made[key] = aot_ledger.compared(next(compiled_rows), ledger.get(key, []))
            if given.record:  # after each: what an interrupted run compiled is not lost
                aot_ledger.write(aot_ledger.renewed(ledger, made, asked.values()))
        print(*of_build, sep="\n", flush=True)
        rows += of_build

    problems = [str(row) for row in rows if row.problem]
    launched = set() if given.kernel else launched_kernels() - {row.kernel for row in rows}
    problems += [f"{kernel} is launched but has no row: add a call to tests/aot_samples.py" for kernel in launched]
    for problem in sorted(problems):
        print(f"FAILED {problem}")
    if given.record:
        ledger = aot_ledger.renewed(ledger, made, asked.values())
        aot_ledger.write(ledger)
    if lacking := aot_ledger.stale(ledger, wanted.values(), asked.values()):
        print(f"STALE {name}: {lacking}. ./dev aot --record brings it up to date, then commit it")
    recorded = sum(row.recorded for row in rows)
    print(
        f"aot: {len(rows)} rows, {recorded} recorded, {len(rows) - recorded} compiled, {len(wanted)} builds of "
        f"{len({row.kernel for row in rows})} kernels, {len(problems)} failed, {time.monotonic() - started:.0f} s"
    )
    return int(bool(problems) or not rows)


if __name__ == "__main__":
    sys.exit(main())
