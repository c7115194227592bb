"""Which implementation of an operation runs: a pure predicate with reasons, a default order per device, an override.

Every stem registers its implementations here with `implement(op, backend, function)`; all functions of one operation
take the same arguments. A public function calls `dispatch(op, tensor, backend)(...)`.
"""

import contextlib
import functools
import importlib.util
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import environment
from .library import ranged

BACKENDS = ("cpp", "cuda", "triton", "reference")
# In order of preference. "reference" stands last where a device has kernels for some operations only. Of CUDA C++ and
# Triton, where both have a kernel, CUDA C++ was the faster at every size that was timed (bench/results).
_DEFAULT_ORDER = {"cpu": ("cpp",), "cuda": ("cuda", "triton", "reference")}
# A public function that has no operator of its own -> the one that decides what it runs on.
_RUNS_AS = {"recover_pose": "recover_tail"}
# A public function -> the operator that it runs with certain options, and those.
_VARIANT = ("score_variant", "scale, exclude_self or the Gaussian density")
_RUNS_WITH = {
    "score_tokens": _VARIANT,
    "prune_cluster": _VARIANT,
    "assign_clusters": ("assign_by_parent", "parent"),
}
_implementations: dict[str, dict[str, Callable]] = {}
# (op, device, named backend) -> what runs
_resolved: dict[tuple[str, str, str | None], Callable] = {}
_override: str | None = None  # a plain global: torch.compile guards it, and does not see thread-local values
_entered: list["_Entry"] = []  # the blocks of use_backend that are open, in any thread, the last one entered last
_entering = threading.Lock()


def implement(op: str, backend: str, function: Callable) -> None:
    """Register `function` as what `backend` runs for `op`."""
    if backend == "reference":
        function = ranged(f"h2ot_kernels::{op} (reference)")(function)
    _implementations.setdefault(op, {})[backend] = function


def load_library(stem: str) -> str | None:
    """Load the operator library lib<stem>.so of this package. Returns None, or why it cannot be loaded."""
    path = Path(__file__).parent / f"lib{stem}.so"
    if not path.exists():
        return f"{path.name} is not built (pip install --no-build-isolation .)"
    try:
        torch.ops.load_library(path)
    except OSError as error:  # another torch or CUDA than it was built with: said loudly, what else can run runs
        reason = f"{path.name} cannot be loaded: {error}"
        warnings.warn(f"h2ot_kernels: {reason}", stacklevel=2)
        return reason
    return None


@functools.cache
def why_no_cpp() -> str | None:
    """None when the C++ library is loaded, else the reason."""
    reason = load_library("h2ot_kernels_cpu")
    if reason is None and importlib.util.find_spec("h2ot_kernels._C") is None:  # a build for another Python
        reason = f"h2ot_kernels._C is not built for {sys.implementation.cache_tag} (pip install --no-build-isolation .)"
    if reason is None:
        environment.choose_capability()
    return reason


@functools.cache
def why_no_cuda() -> str | None:
    """None when the CUDA library is loaded, else the reason."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return load_library("h2ot_kernels_cuda")


def why_no_code(architectures: str, capability: tuple[int, int]) -> str | None:
    """None when a library for these architectures ("80 90a 120") runs on a device of this capability, else why not.

    Code for 80 runs on 8.0 and later minors, 90a on 9.0 only; the highest is there as PTX, too, for all that is newer.
    What CMake makes out itself ("native", "all") is not looked into.
    """
    built = [re.fullmatch(r"(\d+)(\d)([af]?)(?:-virtual)?", name) for name in architectures.split()]
    if not built or None in built:
        return None
    codes = sorted((int(code[1]), int(code[2]), code[3]) for code in built)
    for major, minor, kind in codes:
        if capability == (major, minor) or (kind != "a" and capability[0] == major and capability[1] > minor):
            return None
    *newest, kind = codes[-1]
    if not kind and capability >= tuple(newest):
        return None
    return f"the CUDA library has no code for sm_{capability[0]}{capability[1]}, only for {architectures}"


def _why_no_code() -> str | None:
    """The same of every GPU that torch has begun to use: what runs is chosen by the type of the device."""
    begun = torch.cuda.is_initialized() or hasattr(torch.cuda._tls, "is_initializing")  # what it calls then counts
    if why_no_cpp() is not None or not begun:
        return None
    from . import _C

    architectures = _C.build_info()["cuda_architectures"]
    devices = range(torch.cuda.device_count())
    reasons = (why_no_code(architectures, torch.cuda.get_device_capability(device)) for device in devices)
    return next((reason for reason in reasons if reason), None)


@functools.cache
def why_no_triton() -> str | None:
    """None when the Triton kernels are imported, else the reason."""
    try:
        importlib.import_module("h2ot_kernels.triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "the package triton is not installed"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 at import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_device() -> str:
    """The type of the tensors that Triton kernels take."""
    return "cpu" if interpreting() else "cuda"


def can_run(op: str, backend: str, device: str | torch.device) -> tuple[bool, str]:
    """Whether `backend` can run `op` on tensors of `device` ("cpu", "cuda", ...), and why (not).

    Raises ValueError for an unknown op or backend, TypeError for what is no device.

    >>> can_run("gather_tokens", "cuda", "cpu")
    (False, 'tensors are on cpu, not cuda')
    """
    if not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"device: got {type(device).__name__}, wanted a device or its name")
    op, device = _RUNS_AS.get(op, op), torch.device(device).type
    if op not in _implementations:
        public = {*_implementations, *_RUNS_AS} & vars(sys.modules[__package__]).keys()
        raise ValueError(f"op: got {op!r}, wanted one of {', '.join(sorted(public))}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return True, "plain PyTorch runs everywhere"
    if backend == "cpp":
        wanted, missing = "cpu", why_no_cpp
    elif backend == "cuda":
        wanted, missing = "cuda", lambda: why_no_cuda() or _why_no_code()
    else:
        wanted, missing = triton_device(), why_no_triton
    if device != wanted:
        hint = "; TRITON_INTERPRET=1 interprets on the CPU" if (backend, device) == ("triton", "cpu") else ""
        return False, f"tensors are on {device}, not {wanted}{hint}"
    reason = missing()
    if reason:
        return False, reason
    if backend not in _implementations[op]:
        return False, f"{op} has no {backend} kernel"
    return True, f"{backend} kernel on {device}"


def _order(device: str, named: str | None) -> tuple[str, ...]:
    return (named,) if named else _DEFAULT_ORDER.get(device, ("reference",))


def _resolve(op: str, device: str, named: str | None) -> Callable:
    reasons = []
    for backend in _order(device, named):
        ok, reason = can_run(op, backend, device)
        if ok:
            _resolved[op, device, named] = _implementations[op][backend]
            return _implementations[op][backend]
        reasons.append(f"{backend}: {reason}")
    raise RuntimeError(f"{op} cannot run on {device} ({'; '.join(reasons)}); backend='reference' runs everywhere")


def chosen_backend(op: str, device: str | torch.device) -> str:
    """The backend that `op` uses on `device` when none is named in the call."""
    named = _override or _from_environment
    kind = torch.device(device).type
    _resolve(op, kind, named)  # raises where nothing can run
    return next(name for name in _order(kind, named) if can_run(op, name, kind)[0])


def check_named(device: str | torch.device) -> None:
    """Raise ValueError where the backend that `use_backend` or the environment names cannot run every operation."""
    for op in _implementations:
        try:
            chosen_backend(op, device)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def dispatch(op: str, tensor: Tensor, backend: str | None) -> Callable:
    """The implementation of `op` for `tensor`: the named backend, else `use_backend`, the environment, the device."""
    named = backend or _override or _from_environment
    device = "cpu" if tensor.is_cpu else tensor.device.type  # the first costs a fifth of the second
    choice = op, device, named
    return _resolved.get(choice) or _resolve(*choice)


def is_cpp(op: str, tensor: Tensor) -> bool:
    """Whether a call that names no backend would run the C++ kernel of `op`."""
    return dispatch(op, tensor, None) is _implementations[op].get("cpp")


def is_reference(backend: str | None) -> bool:
    """Whether a call that names `backend`, or none, is asked to run plain PyTorch."""
    return (backend or _override or _from_environment) == "reference"


def write(op: str, tensor: Tensor, backend: str | None, arguments: tuple, out: Tensor) -> Tensor:
    """Run `op` with its result in out, which comes back. What autograd has saved of out is known to be overwritten."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
    dispatch(f"{op}_out", tensor, backend)(*arguments, out)
    return out


def copying(function: Callable) -> Callable:
    """`function` with its result copied into a last argument `out`."""

    def run(*arguments) -> None:
        arguments[-1].copy_(function(*arguments[:-1]))

    return run


def resolve_all() -> None:
    """Fill the table of choices for the devices of this torch, so that no call, compilation or capture pays for it.

    Once more when torch has begun to use its GPUs: not before is it known which they are.
    """
    _fill()
    if torch.version.cuda:
        torch.cuda._lazy_call(_fill)


def _fill() -> None:
    _resolved.clear()
    for op in _implementations:
        for device in ("cpu", "cuda") if torch.version.cuda else ("cpu",):
            for named in (None, *BACKENDS):
                if any(can_run(op, backend, device)[0] for backend in _order(device, named)):
                    _resolve(op, device, named)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block every call that names no backend uses this one, in the whole process.

    Of blocks that overlap in several threads the last one entered counts, as long as it is open.
    Raises ValueError for an unknown name; the call raises RuntimeError where the backend cannot run.

    >>> import torch, h2ot_kernels as h2ot
    >>> with h2ot.use_backend("reference"):
    ...     h2ot.select_tokens(torch.tensor([[0.1, 0.9, 0.5]]), 2)
    tensor([[1, 2]])
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(BACKENDS)}")
    entry = _Entry(backend)
    _change(_entered.append, entry)
    try:
        yield
    finally:
        _change(_entered.remove, entry)


class _Entry:
    """One block of use_backend; equal to itself only."""

    def __init__(self, backend: str):
        self.backend = backend


def _change(how: Callable[[_Entry], None], entry: _Entry) -> None:
    """Enter or leave: the last block that is still open counts, whichever thread leaves first."""
    global _override
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _entering:  # a graph knows no locks
        how(entry)
        _override = _entered[-1].backend if _entered else None


def explain(op: str, *tensors: Tensor) -> str:
    """Which backend `op` would use for these tensors (none: the CPU), and why not the others: one line each.

    Where some options are another operator, a last line says what that uses.
    Raises TypeError for what is no tensor, ValueError for an unknown op, RuntimeError where the backend that is named
    cannot run it.

    >>> import torch, h2ot_kernels as h2ot
    >>> print(h2ot.explain("gather_tokens", torch.zeros(1, 9, 4)).splitlines()[0])
    gather_tokens on cpu: cpp
    """
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"tensors: got {type(x).__name__}, wanted tensors")
    device = tensors[0].device if tensors else torch.device("cpu")
    if op == "prune_sample":
        return f"{op} on {device.type}: Python on the host, from the numbers alone; no backend has a kernel of it"
    lines = [f"{op} on {device.type}: {chosen_backend(_RUNS_AS.get(op, op), device)}"]
    for backend in BACKENDS:
        ok, reason = can_run(op, backend, device)
        lines.append(f"  {backend:9} {'can run' if ok else 'cannot run'}: {reason}")
    if op in _RUNS_WITH:
        operator, options = _RUNS_WITH[op]
        try:
            lines.append(f"  with {options}: {chosen_backend(operator, device)}")
        except RuntimeError as error:
            lines.append(f"  with {options}: {error}")
    return "\n".join(lines)


def env_report() -> dict:
    """What a bug report needs: versions, device, backends built or why not, CPU capability, threads.

    Raises nothing: what cannot be told is left out or "unknown". JSON can hold it.

    >>> sorted(env_report()["backends"])
    ['cpp', 'cuda', 'reference', 'triton']
    """
    import importlib.metadata
    import platform

    from . import __version__

    installed = {}
    for package in ("numpy", "triton", "onnx", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    report = {
        "h2ot_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "packages": installed,
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_ENVIRONMENT)},
        "backends": {
            "cpp": why_no_cpp() or "built",
            "cuda": why_no_cuda() or "built",
            "triton": why_no_triton() or ("interpreted on the CPU" if interpreting() else "importable"),
            "reference": "built",
        },
    }
    if why_no_cpp() is None:
        from . import _C

        report["build"] = _C.build_info()
        report["cpu_capability"] = _C.capability()
        report["cpu_capabilities"] = _C.runnable_capabilities().split(",")
        report["cpu_tiles"] = _C.tiles_run()
        report["cpu_bf16_dots"] = _C.dots_run()
    return report


_ENVIRONMENT = ("H2OT_KERNELS_", "TRITON_", "OMP_", "CUDA_VISIBLE_DEVICES")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else "unknown"


_from_environment = environment.backend(BACKENDS)
