"""The ledger of the CUDA gate, bench/results/aot/cuda.json: the registers of each kernel for every architecture, none
of which had a fault, and the key of what they were compiled from.

While the key is the same, only DRAWN architectures, by a seed, are compiled again; they must come out as recorded.
"""

import hashlib
import json
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "bench" / "results" / "aot" / "cuda.json"
DRAWN = 2

Registers = dict[str, dict[str, int]]  # of each kernel, by architecture


def key(*asked: object) -> str:
    """Of the sources, what is asked of them, and the compiler's version."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    files = sorted([*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc").glob("*.h"), *ROOT.glob("csrc/cuda_*.cpp")])
    parts = [version, repr(asked), *(f"{path.name}\n{path.read_text()}" for path in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def read(wanted: str) -> Registers:
    """What is recorded under this key; empty where that is another's, or where there is none."""
    ledger = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    return ledger["registers"] if ledger.get("key") == wanted else {}


def write(of: str, registers: Registers) -> None:
    LEDGER.parent.mkdir(parents=True, exist_ok=True)
    LEDGER.write_text(json.dumps({"key": of, "registers": registers}, indent=1) + "\n")


def drawn(architectures: Sequence[int], seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(list(architectures), min(DRAWN, len(architectures))))


def differences(recorded: Registers, compiled: Registers, architectures: Sequence[int]) -> list[str]:
    """Where what was compiled of these architectures is not as recorded."""
    found = []
    for architecture in map(str, architectures):
        for kernel in sorted(recorded.keys() | compiled.keys()):
            before, now = (table.get(kernel, {}).get(architecture) for table in (recorded, compiled))
            if before != now:
                found.append(f"sm_{architecture}: {kernel}: {now} registers, recorded by the same key: {before}")
    return found
