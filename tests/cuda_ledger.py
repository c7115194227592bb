"""The ledger of the CUDA gate, bench/results/aot/cuda.json: the registers of each kernel for every architecture, none
of which had a fault, and the key of what they were compiled from.

While the key is the same, only one architecture, by a seed, is compiled again; it must come out as recorded.
"""

import hashlib
import json
import random
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "bench" / "results" / "aot" / "cuda.json"

Registers = dict[str, dict[str, int]]  # of each kernel, by architecture


def key(*asked: object) -> str:
    """Of the sources, what is asked of them, and the compiler's version."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, repr(asked), *(f"{path.name}\n{path.read_text()}" for path in sources())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def sources() -> list[Path]:
    """The kernels' files, and what they include of ours, however far. The gate compiles the others every time."""
    found, ahead = set(), sorted(ROOT.glob("csrc/cuda/*.cu"))
    while ahead:
        path = ahead.pop()
        found.add(path)
        named = re.findall(r'#include "([^"]+)"', path.read_text())
        near = [(folder / name).resolve() for name in named for folder in (path.parent, ROOT / "csrc")]
        ahead += [file for file in near if file.exists() and file not in found]
    return sorted(found)


def read(wanted: str) -> Registers:
    """What is recorded under this key; empty where that is another's, or where there is none."""
    ledger = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    return ledger["registers"] if ledger.get("key") == wanted else {}


def write(of: str, registers: Registers) -> None:
    LEDGER.parent.mkdir(parents=True, exist_ok=True)
    LEDGER.write_text(json.dumps({"key": of, "registers": registers}, indent=1) + "\n")


def drawn(architectures: Sequence[int], seed: int) -> list[int]:
    return [random.Random(seed).choice(list(architectures))]


def differences(recorded: Registers, compiled: Registers, architectures: Sequence[int]) -> list[str]:
    """Where what was compiled of these architectures is not as recorded."""
    found = []
    for architecture in map(str, architectures):
        for kernel in sorted(recorded.keys() | compiled.keys()):
            before, now = (table.get(kernel, {}).get(architecture) for table in (recorded, compiled))
            if before != now:
                found.append(f"sm_{architecture}: {kernel}: {now} registers, recorded by the same key: {before}")
    return found
