"""Compiles nothing twice: CMAKE_CXX_COMPILER_LAUNCHER="python3;tests/object_cache.py" with H2OT_OBJECTS, a folder.

An object is kept under what decides it: the compiler, its flags but for paths, and the preprocessed source. `.ci/run`
uses it: the wheel gate, which builds a copy of the sources, need not compile what `./dev test` has compiled. Objects
with debug information, which holds lines and folders, are always made anew. No imports but Python's own: this starts
once per file.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SEEN = ("-I", "-D", "-U", "-ffile-prefix-map=")  # in the preprocessed source


def without(command: list[str], *options: str) -> list[str]:
    """The command without these options, each of which has a value of its own."""
    left, given = [], iter(command)
    for part in given:
        if part in options:
            next(given)
        else:
            left.append(part)
    return left


def state(command: list[str]) -> str:
    """What decides the object. The dependency file, where one is asked for, is written."""
    text = subprocess.run(
        [*(part for part in without(command, "-o") if part != "-c"), "-E", "-P"], stdout=subprocess.PIPE, check=True
    ).stdout
    source = Path(command[command.index("-c") + 1]).name
    flags = [part for part in without(command, "-o", "-c", "-isystem", "-MF", "-MT") if not part.startswith(SEEN)]
    compiler = subprocess.run([command[0], "--version"], stdout=subprocess.PIPE, check=True).stdout
    return hashlib.sha256(b"\0".join([compiler, *map(os.fsencode, (*flags, source)), text])).hexdigest()


def main() -> int:
    command = sys.argv[1:]
    debugged = any(part.startswith("-g") for part in command)
    if "H2OT_OBJECTS" not in os.environ or "-c" not in command or "-o" not in command or debugged:
        return subprocess.run(command, check=False).returncode
    made = Path(command[command.index("-o") + 1])
    kept = Path(os.environ["H2OT_OBJECTS"]) / f"{state(command)}.o"
    if kept.exists():
        shutil.copyfile(kept, made)
        return 0
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(made, unfinished)
        unfinished.rename(kept)
    return status


if __name__ == "__main__":
    sys.exit(main())
