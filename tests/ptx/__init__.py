"""Runs the PTX that Triton compiles for a GPU on a CPU, in place of the interpreter.

`install(arch)`, before any kernel is imported: from then on every launch on CPU tensors is compiled as for a GPU of
that architecture and its PTX is run by machine.cpp, which sees what the interpreter cannot: layouts, barriers,
shared memory, TF32 products, approximate divisions, contracted sums, accesses out of bounds, misaligned or in a race.
Not seen: what ptxas and the hardware make of the PTX. Triton is imported where it is needed: the machine needs none.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import subprocess
from pathlib import Path

import numpy as np
import torch

from ..simt import alone
from . import program

ROOT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).resolve().parent
_FLAGS = ("-std=c++20", "-O2", "-fvect-cost-model=dynamic", "-march=native", "-ffp-contract=off")
_FLAGS += ("-Wall", "-Wextra", "-Werror", "-Wno-psabi")
_WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "f32": 4, "f64": 8}
_seeds = itertools.count(1)


class Fault(Exception):
    """What a kernel did that it must not do; the message names the kernel, the thread and the place."""


class _Launch(ctypes.Structure):
    _fields_ = [
        ("registers", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
        ("shared_cell", ctypes.c_int64),
        ("grid", ctypes.c_int64 * 3),
        ("special", ctypes.c_int64 * len(program.SPECIAL)),
        ("constants", ctypes.c_int64),
        ("constant_registers", ctypes.c_void_p),
        ("constant_values", ctypes.c_void_p),
    ]


@functools.cache
def machine() -> ctypes.CDLL:
    """The library, built under build/ptx once per content. RuntimeError: what g++ says."""
    files = sorted([*_HERE.glob("*.h"), *_HERE.glob("*.cpp"), _HERE.parent / "simt" / "bits.h"])
    state = hashlib.sha256("\0".join([*_FLAGS, *(file.read_text() for file in files)]).encode()).hexdigest()
    library = ROOT / "build" / "ptx" / f"machine-{state[:16]}.so"
    with alone(library.parent):
        if not library.exists():
            made = library.with_suffix(".unfinished")
            sources = [file for file in files if file.suffix == ".cpp"]
            done = subprocess.run(
                ["g++", *_FLAGS, "-shared", "-fPIC", *sources, "-o", made], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{_HERE} does not compile:\n{done.stderr[-4000:]}")
            made.rename(library)
    loaded = ctypes.CDLL(str(library))
    loaded.ptx_operation.restype = ctypes.c_int64
    loaded.ptx_run.restype = ctypes.c_int32
    return loaded


@functools.cache
def operation(name: str) -> int:
    """The machine's number for an instruction. Unknown: it has none."""
    number = machine().ptx_operation(name.encode())
    if number < 0:
        raise program.Unknown(f"instruction {name}")
    return number


def _integers(values) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _word(value, kind: str) -> int:
    """The bits of a kernel's argument of a PTX type."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind[0] == "f":
        return int(np.array(value, f"f{_WIDTHS[kind]}").view(f"u{_WIDTHS[kind]}"))
    return int(value) % 2 ** (8 * _WIDTHS[kind])


def _ranges(tensors: list[torch.Tensor]) -> np.ndarray:
    """(begin, bytes, bytes of a cell) of the memory that a launch may touch; cells: the smallest element seen there."""
    found: dict[int, tuple[int, int]] = {}
    for x in tensors:
        storage = x.untyped_storage()
        _, cell = found.get(storage.data_ptr(), (0, 16))
        found[storage.data_ptr()] = storage.nbytes(), min(cell, x.element_size())
    return np.array([(begin, *rest) for begin, rest in found.items()], dtype=np.int64).reshape(-1, 3)


def run(parsed: program.Program, shared: int, grid: tuple[int, ...], arguments: list, seed: int) -> None:
    """One launch. Fault: what the kernel did wrong."""
    kinds = parsed.parameters[: len(arguments)]
    assert len(parsed.parameters) == len(arguments) + 2, "the last two parameters are Triton's own scratch"
    constants = dict(parsed.constants)
    for n, (value, kind) in enumerate(zip(arguments, kinds, strict=True)):
        constants[parsed.register(f"param {n}")] = _word(value, kind)
    for n in range(2):
        constants[parsed.register(f"param {len(arguments) + n}")] = 0
    registers = np.array(list(constants), dtype=np.int64)
    values = np.array(list(constants.values()), dtype=np.uint64)
    special = [parsed.registers.get(name, -1) for name in program.SPECIAL]
    grid = (*grid, 1, 1)[:3]
    launch = _Launch(
        *(len(parsed.registers), parsed.threads, shared, parsed.shared_cell, _integers(grid), _integers(special)),
        *(len(constants), registers.ctypes.data, values.ctypes.data),
    )
    ranges = _ranges([x for x in arguments if isinstance(x, torch.Tensor)])
    at, message = ctypes.c_int64(), ctypes.create_string_buffer(1000)
    failed = machine().ptx_run(
        *(_address(parsed.instructions), ctypes.c_int64(len(parsed.instructions)), _address(parsed.operands)),
        ctypes.byref(launch),
        *(_address(ranges), ctypes.c_int64(len(ranges)), ctypes.c_uint64(seed)),
        *(ctypes.byref(at), message, ctypes.c_int64(len(message))),
    )
    if failed:
        raise Fault(f"{parsed.name}: {message.value.decode()}, at {parsed.lines[at.value]}")


def compiled(arch: int, build) -> tuple[str, int]:
    """(PTX, bytes of shared memory) of a build of tests/aot.py, kept under build/ptx."""
    import triton

    from .. import aot

    key = aot.function(build.stem, build.kernel).cache_key
    state = hashlib.sha256(f"{triton.__version__} {arch} {key} {build!r}".encode()).hexdigest()
    kept = ROOT / "build" / "ptx" / f"{build.kernel}-{state[:24]}.ptx"
    if not kept.exists():
        form, metadata = aot.form_of(arch, build, "ptx")
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = kept.with_suffix(f".{os.getpid()}")
        kernel_only = form[: form.index("\n}\n") + 3]  # the rest is for debuggers
        made.write_text(f"{kernel_only}// shared: {metadata['shared']}\n")
        made.rename(kept)
    ptx, shared = kept.read_text().rsplit("// shared: ", 1)
    return ptx, int(shared)


def _runtime(kind, value) -> list:
    """The arguments that a kernel still has, of one and its type in the signature; tuples in parts."""
    if isinstance(kind, tuple):
        return [part for pair in zip(kind, value, strict=True) for part in _runtime(*pair)]
    return [] if kind == "constexpr" else [value]


def install(arch: int) -> None:
    """From now on Triton kernels take CPU tensors, and run as PTX for `arch`."""
    from triton.runtime.jit import JITFunction

    from h2ot_kernels import backend
    from h2ot_kernels.triton import common

    from .. import aot

    made: dict = {}

    def run_kernel(kernel, *arguments, grid, warmup, **constants) -> None:
        launch = common.Launch(kernel, grid, arguments, constants)
        build = aot.build_of(launch)
        if build not in made:
            ptx, shared = compiled(arch, build)
            made[build] = program.parse(ptx, operation), shared
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        values = [part for name, kind in build.signature for part in _runtime(kind, given.get(name))]
        run(*made[build], grid, values, next(_seeds))

    JITFunction.run = run_kernel
    backend.triton_device = lambda: "cpu"
