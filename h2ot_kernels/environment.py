"""What is read from the environment when the package is imported. A value that is none of those named here raises
ValueError, and ends `python -m h2ot_kernels` in one line:
H2OT_KERNELS_BACKEND: the backend of calls that name none.
H2OT_KERNELS_CAPABILITY: the instruction set of the CPU kernels ("portable", "avx2", "avx512", "neon"), one that this
machine can run; without it the best of them.
H2OT_KERNELS_TILES: whether kernels may use a tile unit (AMX), "1" or "0", which leaves it alone; without it they may.
H2OT_KERNELS_TRITON_LAUNCH: "ordinary" leaves every launch to Triton; without it repeated ones go past it.
"""

import os
import sys
from collections.abc import Sequence


def backend(known: Sequence[str]) -> str | None:
    """The backend that is named, after a look at what other files read."""
    name = os.environ.get("H2OT_KERNELS_BACKEND") or None
    if name is not None and name not in known:
        raise _refusal("H2OT_KERNELS_BACKEND", name, f"one of {', '.join(known)}")
    tiles = os.environ.get("H2OT_KERNELS_TILES") or "1"  # csrc/capability.cpp reads it
    if tiles not in ("0", "1"):
        raise _refusal("H2OT_KERNELS_TILES", tiles, "0 or 1")
    launch = os.environ.get("H2OT_KERNELS_TRITON_LAUNCH") or "ordinary"  # triton/repeated.py reads it
    if launch != "ordinary":
        raise _refusal("H2OT_KERNELS_TRITON_LAUNCH", launch, "ordinary or nothing")
    return name


def choose_capability() -> None:
    """Let the CPU kernels that H2OT_KERNELS_CAPABILITY names run."""
    name = os.environ.get("H2OT_KERNELS_CAPABILITY")
    if not name:
        return
    from . import _C

    runnable = _C.runnable_capabilities().split(",")
    if name not in runnable:
        raise _refusal("H2OT_KERNELS_CAPABILITY", name, f"one of {', '.join(runnable)}")
    _C.set_capability(name)


def _refusal(name: str, value: str, wanted: str) -> BaseException:
    message = f"{name}: got {value!r}, wanted {wanted}"
    # sys.argv is that while `python -m` imports a package, before its __main__.py runs.
    if sys.argv[:1] != ["-m"] or __package__ not in sys.orig_argv:
        return ValueError(message)
    print(f"h2ot_kernels: {message}", file=sys.stderr)
    return SystemExit(2)
