"""`./dev arm`: the NEON kernels, cross-compiled for aarch64 and run by qemu, under the ordinary tests of the kernels.

The driver (tests/driver) answers for torch's CPU operators, so the case lists, bounds and errors are those of every
other instruction set; each call is made by one thread and by two, between guard bands. A driver with a planted mistake
must fail them. While nothing has changed since all of them passed (unchanged.py), a share of them runs, drawn by
--seed; --all: the others, too. Exit code 1: a failure, or a planted mistake that was not seen. A JSON line with the
counts is last.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from h2ot_kernels import _C

from . import sample, unchanged
from .driver import ROOT, Driver, build

BUILD = ROOT / "build" / "arm"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CROSS = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
# B N^2 C of a case: above LARGE it meets one test only, of the call that scores, selects and labels; above MOST none.
LARGE, MOST = 2.5e7, 1.95e8
# In the search that all of scoring shares: the last lane of a vector is never found.
PLANTED = ("csrc/cpu/distance.h", "uint32x4_t{1, 2, 4, 8}", "uint32x4_t{1, 2, 4, 0}")


class Selection:
    """The tests of this instruction set, without the cases that are too large; with a seed a share of them. How many
    passed and failed.
    """

    def __init__(self, seed: int | None):
        self.seed, self.passed, self.failed, self.left_out = seed, 0, 0, []

    def pytest_collection_modifyitems(self, items):
        chosen = []
        for item in items:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            case, runner = given.get("case"), given.get("runner")
            if (runner and runner.capability is None) or "keypoint_file" in item.name:
                continue
            size = case.B * case.N**2 * case.C if case else 0
            if size > MOST:
                self.left_out.append(str(case))
            elif size > LARGE and "one_call" not in item.name:
                continue
            else:
                chosen.append(item)
        if self.seed is not None:
            others = set(sample.thinned({item.nodeid: [item] for item in chosen}, self.seed))
            chosen = [item for item in chosen if item not in others]
        items[:] = chosen

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed


def check(driver: Path, seed: int | None, *arguments: str) -> tuple[Selection, int]:
    """The tests, with this driver in place of the CPU operators, and the number of its calls."""
    selection = Selection(seed)
    with Driver(EMULATOR, driver) as running:
        name = running.capability
        assert name == "neon", name
        if "avx2" in _C.runnable_capabilities().split(","):  # what is packed for a tile unit is not for NEON
            _C.set_capability("avx2")
        _C.runnable_capabilities = _C.capability = lambda: name
        _C.set_capability = lambda wanted: None
        library = running.replace_cpu_operators()
        pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments], [selection])
        del library
    return selection, running.calls


def made(mistake: tuple[str, str, str] | None = None) -> Path:
    """The driver, from a copy of the sources, with the mistake: (file, text, replacement). Builds what has changed."""
    sources = [
        *ROOT.glob("csrc/*.*"),
        *ROOT.glob("csrc/cpu/*"),
        *ROOT.glob("tests/driver/*.cpp"),
        ROOT / "CMakeLists.txt",
    ]
    for source in sources:
        name, text = str(source.relative_to(ROOT)), source.read_text()
        if mistake and name == mistake[0]:
            assert text.count(mistake[1]) == 1, f"{name}: {mistake[1]!r} stands there {text.count(mistake[1])} times"
            text = text.replace(*mistake[1:])
        copy = BUILD / "sources" / name
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
    return build(BUILD / "kernels", BUILD / "sources", *CROSS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev arm", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every test, whatever was proven before")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of those that run of the proven")
    given = parser.parse_args()
    if missing := [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]:
        sys.exit(f"arm: {' and '.join(missing)} not found (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    seed = given.seed if not given.all and unchanged.is_unchanged(unchanged.ARM) else None
    if seed is not None:
        print(f"arm: nothing has changed since every test passed; one in {sample.UNCHANGED} runs (--seed {seed})")
    torch.set_num_threads(1)  # of the oracle; on a busy machine more of them wait for each other
    real, calls = check(made(), seed, *unchanged.tests_of(unchanged.ARM))
    left_out = sorted(set(real.left_out))
    print(f"arm: cases that are too large for the emulator, left out: {len(left_out)}", *left_out, sep="\n  ")
    quiet = ["--no-header", "--tb=no", "-r", "N"]
    wrong, _ = check(made(PLANTED), None, *quiet, "tests/test_score.py", "-k", "duplicates or smooth")
    counts = {"capability": "neon", "tests": real.passed, "failed": real.failed, "calls": calls}
    counts |= {"cases_left_out": len(left_out), "planted": f"{wrong.failed} of {wrong.passed + wrong.failed} failed"}
    (BUILD / "kernels" / "driver").unlink()  # the one with the mistake
    print(json.dumps(counts))
    if not wrong.failed:
        sys.exit("arm: the planted mistake was not seen")
    return int(real.failed > 0 or not real.passed)


if __name__ == "__main__":
    sys.exit(main())
