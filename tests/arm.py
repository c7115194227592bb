"""`./dev arm`: the NEON kernels, cross-compiled for aarch64 and run by qemu, under the ordinary tests of the kernels.

The driver (tests/driver) answers for torch's CPU operators, so the case lists, bounds and errors are those of every
other instruction set; each call is made by one thread and by two, between guard bands. A driver with a planted mistake
must fail them. Exit code 1: a failure, or a planted mistake that was not seen. A JSON line with the counts is last.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from h2ot_kernels import _C

from .driver import ROOT, Driver, build

BUILD = ROOT / "build" / "arm"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CROSS = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
STEMS = ["score", "select", "cluster", "gather", "recover_attention", "recover_interpolation"]
STEMS += ["recover_rotated", "add_norm", "graph", "linear_floats", "fuzz"]
# B N^2 C of a case: above LARGE it meets one test only, of the call that scores, selects and labels; above MOST none.
LARGE, MOST = 2.5e7, 1.95e8
# In the search that all of scoring shares: the last lane of a vector is never found.
PLANTED = ("csrc/cpu/distance.h", "uint32x4_t{1, 2, 4, 8}", "uint32x4_t{1, 2, 4, 0}")


class Selection:
    """The tests of this instruction set, without the cases that are too large; how many passed and failed."""

    def __init__(self):
        self.passed, self.failed, self.left_out = 0, 0, []

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
        items[:] = chosen

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed
        self.failed += report.failed


def check(driver: Path, *arguments: str) -> tuple[Selection, int]:
    """The tests, with this driver in place of the CPU operators, and the number of its calls."""
    selection = Selection()
    with Driver(EMULATOR, driver) as running:
        name = running.capability
        assert name == "neon", name
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
    if missing := [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]:
        sys.exit(f"arm: {' and '.join(missing)} not found (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    torch.set_num_threads(1)  # of the oracle; on a busy machine more of them wait for each other
    real, calls = check(made(), *(f"tests/test_{stem}.py" for stem in STEMS))
    left_out = sorted(set(real.left_out))
    print(f"arm: cases that are too large for the emulator, left out: {len(left_out)}", *left_out, sep="\n  ")
    quiet = ["--no-header", "--tb=no", "-r", "N"]
    wrong, _ = check(made(PLANTED), *quiet, "tests/test_score.py", "-k", "duplicates or smooth")
    counts = {"capability": "neon", "tests": real.passed, "failed": real.failed, "calls": calls}
    counts |= {"cases_left_out": len(left_out), "planted": f"{wrong.failed} of {wrong.passed + wrong.failed} failed"}
    (BUILD / "kernels" / "driver").unlink()  # the one with the mistake
    print(json.dumps(counts))
    if not wrong.failed:
        sys.exit("arm: the planted mistake was not seen")
    return int(real.failed > 0 or not real.passed)


if __name__ == "__main__":
    sys.exit(main())
