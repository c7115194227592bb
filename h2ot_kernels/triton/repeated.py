"""Launches that repeat an earlier one in all that Triton specialises on, without Triton's way to the compiled kernel.

JITFunction.run binds, specialises and prints every argument on each call. Here the first launch of a form goes that
way, and what it returns, the compiled kernel, is kept under the form: kernel, device, constants with their types, and
of every argument what triton.runtime.jit.native_specialize_impl tells apart (or more, where a parameter is annotated).
Later ones call its launcher as JITFunction.run does, with all arguments in the order of the signature.

Only what was read and tested: Triton 3.6 (on GPUs) to 3.9 (without one), its own JITFunction.run and its CUDA launcher,
no hooks, no debugging, no instrumentation, and the globals that the kernel reads still the same objects. All else takes
the ordinary way, as does everything with H2OT_KERNELS_TRITON_LAUNCH=ordinary (read once). A kernel whose caches were
emptied by hand (JITFunction.device_caches) is not compiled again.
"""

import os
from typing import NamedTuple

import torch
import triton
from torch.nn import Parameter

try:
    from triton import knobs
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.knobs import HookChain
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    _RUN = JITFunction.run
    TESTED = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
except (ImportError, AttributeError):
    TESTED = False

MOST = 4096  # forms that are kept

_direct = TESTED and os.environ.get("H2OT_KERNELS_TRITON_LAUNCH") != "ordinary"


class _Kept(NamedTuple):
    """The compiled kernel of a form, and what its launcher wants after the arguments: constants, by the signature."""

    kernel: object  # alive as long as its id is in a form
    source: str  # the hash of it
    compiled: object
    rest: tuple
    seen: tuple  # (globals, name, value) of what the kernel reads


_kept: dict[tuple, _Kept] = {}


def launch(kernel, grid: tuple[int, ...], device: int, arguments: tuple, constants: dict) -> None:
    """kernel[grid](*arguments, **constants) on the current device, which is `device`, and its current stream."""
    kept, form = None, None
    if _direct and _plain(kernel) and (form := form_of(kernel, device, arguments, constants)) is not None:
        try:
            kept = _kept.get(form)
        except TypeError:  # a constant without a hash
            form = None
    if kept is None or not _current(kept, kernel):
        compiled = kernel[grid](*arguments, **constants)
        if form is not None:
            _keep(form, kernel, compiled, arguments, constants)
        return
    compiled, (x, y, z) = kept.compiled, grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    # After the stream: function, packed metadata, launch metadata and the two hooks.
    compiled.run(
        x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *kept.rest
    )  # fmt: skip


def _current(kept: _Kept, kernel) -> bool:
    """Whether the source and the globals are those of the compiled kernel; Triton raises where a global is another."""
    return kernel.hash is kept.source and all(names.get(name) is value for names, name, value in kept.seen)


def _plain(kernel) -> bool:
    """Whether nothing would see or change a launch but the launcher."""
    runtime = knobs.runtime
    if type(kernel) is not JITFunction or JITFunction.run is not _RUN or kernel.pre_run_hooks or kernel.debug:
        return False
    if runtime.debug or knobs.compilation.instrumentation_mode or runtime.add_stages_inspection_hook is not None:
        return False
    if driver.active.launcher_cls is not CudaLauncher:
        return False
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and (type(hook) is not HookChain or hook.calls):
            return False
    return True


def form_of(kernel, device: int, arguments: tuple, constants: dict) -> tuple | None:
    """All that decides which compiled kernel is launched. None: an argument that is not known here."""
    parts = [id(kernel), device]  # and the kernel's source: _Kept
    if not _classify(arguments, parts.append):
        return None
    # Read from the end it is one thing only: no class is a string, the names are.
    values = constants.values()
    parts += constants
    parts += values
    parts += map(type, values)
    return tuple(parts)


def _classify(values: tuple, append) -> bool:
    """Appends what is specialised of each value; no two sequences of classes give the same. False: an unknown type."""
    for value in values:
        kind = type(value)
        if kind is int:
            if -0x80000000 <= value <= 0x7FFFFFFF:
                append(1 if value == 1 else 0 if value & 15 else 16)
            elif -(2**63) <= value < 2**64:
                append((64 if value < 2**63 else 128) + (0 if value & 15 else 16))
            else:
                return False
        elif kind is torch.Tensor or kind is Parameter:
            append(value.dtype)
            append(0 if value.data_ptr() & 15 else 16)
        elif value is None:
            append(None)
        elif kind is float or kind is bool:
            append(kind)
        elif kind is tuple:
            append(kind)
            append(len(value))
            if not _classify(value, append):
                return False
        else:
            return False
    return True


def _keep(form: tuple, kernel, compiled, arguments: tuple, constants: dict) -> None:
    """Keeps a compiled kernel under its form, where the arguments are all the runtime parameters and in their order."""
    rest = kernel.params[len(arguments) :]
    if compiled is None or not all(parameter.is_constexpr for parameter in rest):
        return
    if any(parameter.is_constexpr for parameter in kernel.params[: len(arguments)]):
        return
    seen = ((names, name, names.get(name)) for (name, _), (_, names) in kernel.used_global_vals.items())
    if len(_kept) >= MOST:
        _kept.clear()
    _kept[form] = _Kept(
        kernel,
        kernel.hash,
        compiled,
        tuple(constants.get(parameter.name, parameter.default) for parameter in rest),
        tuple(seen),
    )
