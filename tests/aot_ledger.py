"""The ledger of the compile-only gate, bench/results/aot/rows.txt: what was compiled before, and what came of it.

A build has a key (tests/aot_key.py). While that is in the ledger, its rows stand for what would be compiled; a share of
them, drawn by a seed, is compiled again and must come out the same. Every entry is sealed: what was not written here is
not read.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .aot_rows import ARCHITECTURES, Row

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "bench" / "results" / "aot" / "rows.txt"
SHARE = 16  # one in so many of the recorded builds is compiled again
HEAD = """\
# What ./dev aot compiled; written by ./dev aot --record (tests/aot_ledger.py). An entry is a build:
# its key, its seal, the kernel, the configuration; then for each architecture
# registers, bytes spilled, bytes of shared memory, bytes of the widest load, matrix instructions.
"""
_BUILD = re.compile(r"([0-9a-f]{16}) ([0-9a-f]{8}) (\w+) (\S.*)")
_ROW = re.compile(r" +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) (-|[\w ]*\w)")

Entries = dict[str, list[Row]]  # by key


def _seal(*lines: str) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _lines(key: str, rows: list[Row]) -> list[str]:
    name = f"{rows[0].kernel} {rows[0].configuration}"
    numbers = [
        f" {row.arch:3} {row.registers:3} {row.spills} {row.shared:6} {row.load_bytes:2} {row.products}" for row in rows
    ]
    return [f"{key} {_seal(key, name, *numbers)} {name}", *numbers]


def text_of(entries: Entries) -> str:
    return HEAD + "".join(f"{line}\n" for key, rows in entries.items() for line in _lines(key, rows))


def write(entries: Entries) -> None:
    LEDGER.parent.mkdir(parents=True, exist_ok=True)
    LEDGER.write_text(text_of(entries))


def read(text: str) -> tuple[Entries, list[str]]:
    """The entries, and what is wrong with the others."""
    entries, faults, blocks = {}, [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            continue
        if heading := _BUILD.fullmatch(line):
            blocks.append((number, line, heading.groups(), []))
        elif (row := _ROW.fullmatch(line)) and blocks:
            _, _, (_, _, kernel, configuration), rows = blocks[-1]
            arch, registers, spills, shared, load_bytes = map(int, row.groups()[:5])
            rows.append(Row(kernel, configuration, arch, registers, spills, shared, load_bytes, row[6], recorded=True))
        else:
            faults.append(f"line {number} is neither a build nor a row of one: {line}")
    for number, line, (key, _, kernel, _), rows in blocks:
        if not rows or _lines(key, rows)[0] != line:
            faults.append(f"line {number}: the entry of {kernel} is not as it was written")
        elif key in entries:
            faults.append(f"line {number}: the key of {kernel} is there twice")
        else:
            entries[key] = rows
    return entries, faults


def drawn(keys: Sequence[str], seed: int) -> set[str]:
    """Those of recorded builds that are compiled again."""
    return set(random.Random(seed).sample(keys, -(-len(keys) // SHARE)))


def compared(made: list[Row], recorded: list[Row]) -> list[Row]:
    """The rows made of a build; those that were recorded, and are not as recorded, have an error."""
    recorded_of, result = {row.arch: row for row in recorded}, []
    for row in made:
        before = recorded_of.get(row.arch, row)
        if not row.error and row != before:
            was = " ".join(before.numbers.split())
            row = replace(row, error=f"recorded as {was}, by the same key: see tests/aot_key.py")
        result.append(row)
    return result


def renewed(entries: Entries, made: Entries, wanted: Iterable[str]) -> Entries:
    """The ledger after `made` was compiled, in the order of the keys that are wanted: the builds without a fault."""
    after = {
        key: rows
        for key, rows in (entries | made).items()
        if [row.arch for row in rows] == list(ARCHITECTURES) and not any(row.problem for row in rows)
    }
    return {key: after[key] for key in wanted if key in after}


def stale(entries: Entries, selected: Iterable[str], wanted: Iterable[str]) -> str:
    """What a ledger lacks of the selected keys, and has beyond all that are wanted, in words; empty if nothing."""
    missing, idle = len(set(selected) - entries.keys()), len(entries.keys() - set(wanted))
    said = [f"{missing} builds are not in it"] if missing else []
    said += [f"{idle} entries are of no build"] if idle else []
    return ", ".join(said)
