"""Peak memory of one call beyond its inputs.

On a GPU what PyTorch's allocator held at most. On a CPU the growth of resident memory in a process of its own (Linux
only), so that scratch memory which kernels keep between calls counts too.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from h2ot_kernels.comparison import Comparison

from .shapes import Case, build

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SMALL = {"B": 1, "N": 32, "F": 32, "C": 16, "K": 8}


def why_not(device: torch.device) -> str | None:
    """None where peak memory can be measured on device, else the reason."""
    return None if device.type == "cuda" or RESET.exists() else "peak memory on a CPU needs Linux's /proc"


def peak_bytes(case: Case, rival: str, device: torch.device, comparison: Comparison | None = None) -> int:
    """Of `rival`, "official" or "ours", on device. comparison: the case's, where it stands on a GPU already."""
    if device.type == "cuda":
        call = _of(rival, comparison or build(case, device))
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    command = [sys.executable, "-m", "bench.memory", json.dumps(asdict(case)), rival, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return int(done.stdout)


def _of(rival: str, comparison: Comparison) -> Callable:
    return comparison.ours if rival == "ours" else lambda: comparison.official(*comparison.arguments)


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


def main() -> None:
    case, rival = Case(**json.loads(sys.argv[1])), sys.argv[2]
    torch.set_num_threads(int(sys.argv[3]))
    with torch.inference_mode():
        small = {name: min(size, SMALL.get(name, size)) for name, size in case.sizes.items()}
        _of(rival, build(Case(case.op, case.kind, small), "cpu"))()  # loads what is loaded once
        call = _of(rival, build(case, "cpu"))
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
        before = _kilobytes("VmRSS")
        result = call()
        print((_kilobytes("VmHWM") - before) * 1024)
        del result


if __name__ == "__main__":
    main()
