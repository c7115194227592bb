"""The compile-only gate of the CUDA library: `python -m tests.cuda_gate [--arch 90 ...] [--all] [--record]`.

nvcc compiles the kernels, with warnings as errors, for every architecture where anything has changed since the ledger
was written (tests/cuda_ledger.py; --all, --record: always), else for one that is drawn; and once the host's side of
those files and the two torch-facing files. A row per kernel and architecture; fails on a spill, on more shared memory
than every device has, or where the disassembly lacks the instructions that a kernel is written for. Needs nvcc, not a
GPU; says so and passes where there is none.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import cuda_ledger, simt

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)
SOURCES = ("score.cu", "cluster.cu", "select.cu", "gather.cu")
SHARED_LIMIT = 99 << 10  # what a launch may ask for on any device from 8.0 on; above 48 KiB it must opt in
REGISTER_LIMIT = 255
FLAGS = (
    "-std=c++20",
    "-O3",
    "--fmad=false",
    "--resource-usage",
    "-Werror",
    "all-warnings",
    "-Xcompiler",
    "-Wall,-Wextra",
    "-Icsrc",
)

# What the disassembly of a kernel must hold: (part of its name, instruction, at least so often).
WANTED = (
    ("pool_kernel<float>", r"LDG\.E\.128", 1),
    ("pool_kernel<h2ot::cuda::BFloat16>", r"LDG\.E\.64", 1),
    ("pair_kernel", r"LDG\.E\.128", 12 + 2 * (12 + 12)),
    ("pair_kernel", r"STG\.E\.64", 2 * 12),
    ("stored_kernel<h2ot::cuda::DirectTile<float, 16, 32, 8>", r"LDGSTS\.E\.BYPASS\.128", 6),
    ("stored_kernel<h2ot::cuda::DirectTile<float, 16, 32, 8>", r"LDS\.128", 2 * 16),
    ("stored_kernel<h2ot::cuda::DirectTile<float, 16, 32, 8>", r"FFMA", 2 * 2 * 64),
    ("stored_kernel<h2ot::cuda::DirectTile<float, 32, 64, 2>", r"LDGSTS\.E\.BYPASS\.128", 6),
    ("stored_kernel<h2ot::cuda::DirectTile<float, 32, 64, 2>", r"LDS\.128", 2 * 16),
    ("stored_kernel<h2ot::cuda::DirectTile<float, 32, 64, 2>", r"FFMA", 2 * 2 * 64),
    ("stored_kernel<h2ot::cuda::DirectTile<double, 16, 32, 4>", r"DFMA", 2 * 32),
    ("stored_products_kernel<h2ot::cuda::ProductTile<h2ot::cuda::Pairs, 128", r"LDGSTS\.E\.BYPASS\.128", 3 * 2),
    ("stored_products_kernel<h2ot::cuda::ProductTile<h2ot::cuda::BFloat16, 64", r"LDGSTS\.E\.BYPASS\.128", 3 * 8),
    ("nearest_stored_kernel<float>", r"LDG\.E\.128", 2 + 2 * (1 + 4)),
    ("parent_stored_kernel<float>", r"LDG\.E\.128", 1 + 4),
    ("parent_stored_kernel<float>", r"ATOMS", 1),
    ("nearest_stored_kernel<h2ot::cuda::BFloat16>", r"LDG\.E\.64", 2 + 2 * (1 + 4)),
    ("nearest_streamed_kernel<h2ot::cuda::Float16>", r"LDG\.E\.64", 2 + 1 + 4),
    ("centre_kernel<h2ot::cuda::DirectTile<float, 16, 32, 8>", r"LDGSTS\.E\.BYPASS\.128", 6),
    ("centre_kernel<h2ot::cuda::DirectTile<float, 32, 64, 2>", r"FFMA", 2 * 2 * 64),
    ("centre_kernel<h2ot::cuda::DirectTile<double, 32, 64, 2>", r"DFMA", 2 * 32),
    ("centre_kernel<h2ot::cuda::ProductTile<h2ot::cuda::Pairs, 128", r"LDGSTS\.E\.BYPASS\.128", 3 * 2),
    ("label_stored_kernel<float>", r"LDG\.E\.128", 1 + 2),
    ("label_listed_kernel<float>", r"LDG\.E\.128", 1 + 2),
    ("select_kernel", r"LDG\.E\.64", 2 * 4),
    ("select_kernel", r"ATOMS", 1),
    ("move_kernel<h2ot::cuda::Unit<16>, unsigned int, false>", r"LDG\.E\.128", 4),
    ("move_kernel<h2ot::cuda::Unit<16>, unsigned int, false>", r"STG\.E\.128", 4),
    ("embed_kernel<h2ot::cuda::Brain, 8, unsigned int>", r"LDG\.E\.128", 8),
)
# The same of products: by warps, or, on 9.0, by warpgroups.
_PRODUCTS = [
    (f"{kernel}<h2ot::cuda::ProductTile<h2ot::cuda::{operand}, {side}", operand)
    for kernel in ("stored_products_kernel", "stream_products_kernel", "centre_kernel")
    for operand in ("Pairs", "BFloat16", "Float16")
    for side in (128, 64)
    if side == 128 or kernel != "stream_products_kernel"
]
_BRAIN = {"BFloat16": r"\.BF16"}
BY_WARPS = (
    *(
        (name, r"HMMA\.16816\.F32" + _BRAIN.get(operand, " "), 48 if operand == "Pairs" else 32)
        for name, operand in _PRODUCTS
    ),
    *((name, r"LDSM\.16\.M88\.4", 16) for name, _ in _PRODUCTS),
)
BY_GROUPS = tuple(
    (name, r"HGMMA\.64x64x16\.F32" + _BRAIN.get(operand, " "), 6 if operand == "Pairs" else 4)
    for name, operand in _PRODUCTS
)
TARGETS = {90: "90a"}  # what a GPU of that architecture needs for all of its instructions
# Kernels that are launched while the one before may still run: from 9.0 on they must wait for it.
OVERLAPPING = (
    "pool_",
    "operand_",
    "pair_",
    "scale_",
    "stored_",
    "nearest_stored_",
    "largest_stored_",
    "parent_stored_",
    "centre_",
    "label_",
    "move_",
    "embed_",
)


@dataclass
class Compiled:
    architecture: int
    seconds: float
    kernels: dict[str, dict] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)  # their disassembly
    faults: list[str] = field(default_factory=list)


def disassembler() -> Path | None:
    """cuobjdump: the toolkit's, else the one that the package triton carries."""
    found = shutil.which("cuobjdump")
    if found:
        return Path(found)
    triton = find_spec("triton")
    carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return carried if carried and carried.exists() else None


def demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    return subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )[: len(names)]


def short(name: str) -> str:
    """void h2ot::cuda::pool_kernel<float>(h2ot::...) -> pool_kernel<float>"""
    return re.sub(r"^(?:void )?h2ot::cuda::(?:\(anonymous namespace\)::)?", "", name).split("(")[0]


def resources(report: str) -> dict[str, dict]:
    """Registers, spills and static shared memory per kernel, from what ptxas prints."""
    blocks = re.split(r"Compiling entry function '", report)[1:]
    names = demangled([block.split("'")[0] for block in blocks])
    kernels = {}
    for name, block in zip(names, blocks, strict=True):
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        shared = re.search(r"(\d+) bytes smem", block)
        kernels[short(name)] = {
            "registers": int(re.search(r"Used (\d+) registers", block)[1]),
            "spills": int(stores) + int(loads),
            "stack": int(stack),
            "static": int(shared[1]) if shared else 0,
        }
    return kernels


def instructions(sass: str) -> dict[str, str]:
    """The disassembly of each kernel."""
    functions = re.split(r"Function : ", sass)[1:]
    names = demangled([function.split("\n")[0].strip() for function in functions])
    return {short(name): text for name, text in zip(names, functions, strict=True)}


def compile_file(architecture: int, source: str, result_as: str, folder: Path, cuobjdump: Path | None) -> Compiled:
    """One file's kernels. result_as: "-c", or "-cubin", which leaves out the host's side."""
    start, result = time.monotonic(), Compiled(architecture, 0.0)
    out = folder / f"{Path(source).stem}_{architecture}"
    command = [
        "nvcc",
        *FLAGS,
        f"-arch=sm_{TARGETS.get(architecture, architecture)}",
        result_as,
        f"csrc/cuda/{source}",
        "-o",
        out,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        result.faults.append(f"nvcc failed:\n{done.stdout}{done.stderr}")
    else:
        result.kernels = resources(done.stdout + done.stderr)
        if cuobjdump:
            dump = subprocess.run([cuobjdump, "-sass", out], capture_output=True, text=True, check=True).stdout
            result.code = instructions(dump)
    result.seconds = time.monotonic() - start
    return result


def judged(files: list[Compiled], disassembled: bool) -> Compiled:
    """The files of one architecture that were compiled, and what is wrong with them."""
    result = Compiled(files[0].architecture, sum(file.seconds for file in files))
    for file in files:
        result.faults += file.faults
        result.kernels |= file.kernels
        result.code |= file.code
    if result.faults:
        return result
    for name, kernel in result.kernels.items():
        if kernel["spills"] or kernel["stack"]:
            result.faults.append(f"{name}: {kernel['spills']} bytes spilled, stack {kernel['stack']} bytes")
        if kernel["registers"] > REGISTER_LIMIT:
            result.faults.append(f"{name}: {kernel['registers']} registers")
    if disassembled:
        for part, pattern, least in (*WANTED, *(BY_GROUPS if result.architecture == 90 else BY_WARPS)):
            texts = [text for name, text in result.code.items() if name.startswith(part)]
            count = max((len(re.findall(rf"\b{pattern}", text)) for text in texts), default=0)
            if count < least:
                result.faults.append(f"{part}: {count} x {pattern}, wanted at least {least}")
        if result.architecture >= 90:
            early = [n for n, text in result.code.items() if n.startswith(OVERLAPPING) and "ACQBULK" not in text]
            result.faults += [f"{name}: does not wait for the kernel before" for name in early]
    return result


def compile_torch_facing(folder: Path) -> list[str]:
    """The files that need torch's and CUDA's headers, once."""
    include = Path(torch.__file__).parent / "include"
    flags = (
        "-std=c++20",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-Xcompiler",
        "-Wall,-Wextra,-Werror",
    )
    faults = []
    for source in ("cuda_registration.cpp", "cuda/machine.cpp"):
        out = folder / (Path(source).stem + ".o")
        command = ["nvcc", *flags, "-isystem", include, "-Icsrc", "-c", f"csrc/{source}", "-o", out]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            faults.append(f"{source}:\n{done.stdout}{done.stderr}")
        elif shutil.which("nm"):
            names = subprocess.run(["nm", "-C", "--undefined-only", out], capture_output=True, text=True, check=True)
            unstable = [line.strip() for line in names.stdout.splitlines() if re.search(r"\b(at|c10)::", line)]
            faults += [f"{source}: not of the stable ABI: {name}" for name in unstable]
            faults += [
                f"{source}: {name} needs a stand-in in CMakeLists.txt" for name in _without_stand_in(names.stdout)
            ]
    return faults


def _without_stand_in(undefined: str) -> list[str]:
    """Names of torch that libtorch_cpu.so does not have, and that CMake's stand-in for libtorch_cuda.so lacks, too."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    known = listed.split() + re.findall(r"\w+", (ROOT / "CMakeLists.txt").read_text())
    return sorted(set(re.findall(r"\baoti_torch_\w+", undefined)) - set(known))


def dynamic_shared() -> dict[str, int]:
    """Shared memory that the launches ask for, as the host side computes it: kernel -> bytes."""
    listed = subprocess.run([simt.build(simt.QUICK), "shared"], capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in (line.rsplit(" ", 1) for line in listed.splitlines())}


def compiled_by(architectures: Sequence[int], cuobjdump: Path | None) -> tuple[list[Compiled], list[str]]:
    """The kernels of each architecture, and what is wrong."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        folder = Path(name)
        torch_facing = pool.submit(compile_torch_facing, folder)
        kinds = ["-c"] + ["-cubin"] * (len(architectures) - 1)
        wanted = [
            (architecture, source, kind, folder, cuobjdump)
            for source in SOURCES
            for architecture, kind in zip(architectures, kinds, strict=True)
        ]
        files = list(pool.map(lambda one: compile_file(*one), wanted))
        results = [judged([file for file in files if file.architecture == of], bool(cuobjdump)) for of in architectures]
        faults = [f"sm_{result.architecture}: {fault}" for result in results for fault in result.faults]
        return results, faults + torch_facing.result()


def registers(results: list[Compiled]) -> cuda_ledger.Registers:
    kernels = sorted({kernel for result in results for kernel in result.kernels})
    return {
        kernel: {str(of.architecture): of.kernels[kernel]["registers"] for of in results if kernel in of.kernels}
        for kernel in kernels
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHITECTURES, help="compile for these")
    parser.add_argument("--all", action="store_true", help="compile for all, whatever is recorded")
    parser.add_argument("--record", action="store_true", help="the same, and record it")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of those that are compiled again")
    return parser.parse_known_args()[0]  # what else `./dev aot` was given is for tests/aot.py, which runs first


def main() -> int:
    given = arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if shutil.which("nvcc") is None:
        console.print("cuda gate: not run, nvcc is not on the PATH")
        return 0
    cuobjdump = disassembler()
    key = cuda_ledger.key(FLAGS, WANTED, BY_WARPS, BY_GROUPS, OVERLAPPING, ARCHITECTURES, bool(cuobjdump))
    recorded = {} if given.all or given.record or given.arch else cuda_ledger.read(key)
    chosen = given.arch or (cuda_ledger.drawn(ARCHITECTURES, given.seed) if recorded else ARCHITECTURES)
    results, faults = compiled_by(chosen, cuobjdump)
    rows = registers(results)
    if recorded:
        faults += cuda_ledger.differences(recorded, rows, chosen)
        rows = recorded
    shared = dynamic_shared() if simt.why_not() is None else {}
    faults += [f"{kernel}: {size} bytes of shared memory" for kernel, size in shared.items() if size > SHARED_LIMIT]

    columns = ARCHITECTURES if recorded else chosen
    table = Table("kernel", "shared", *(f"sm_{architecture}" for architecture in columns))
    for kernel, row in rows.items():
        size = next((str(size) for part, size in shared.items() if kernel.startswith(part)), "0")
        table.add_row(kernel.replace("h2ot::cuda::", ""), size, *(str(row.get(str(of), "-")) for of in columns))
    console.print(table)
    seconds = ", ".join(f"sm_{result.architecture} {result.seconds:.0f}" for result in results)
    console.print(f"Registers per thread and bytes of shared memory per block; spills: 0 wanted. Seconds: {seconds}")
    if recorded:
        console.print(
            f"Of the other architectures as recorded: nothing has changed (--seed {given.seed}; --all: compiled)"
        )
    console.print(f"Disassembly: {'checked' if cuobjdump else 'not checked, no cuobjdump (CUDA toolkit, or triton)'}")
    if given.record and not faults:
        cuda_ledger.write(key, rows)
    elif list(chosen) == list(ARCHITECTURES) and cuda_ledger.read(key) != rows:
        console.print("STALE bench/results/aot/cuda.json: ./dev aot --record brings it up to date, then commit it")
    for fault in faults:
        console.print(f"FAILED {fault}", markup=False)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
