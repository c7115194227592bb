"""`./dev sanitize [address | thread]`: the whole CPU extension, instrumented, under the calls that tests make.

address: AddressSanitizer and UndefinedBehaviorSanitizer over every operation, the fuzz and the case lists, on every
instruction set. thread: ThreadSanitizer over Python threads that call mixed operations. Each is built in a directory of
its own, loaded from a copy of the package (which the run asserts), and must report a planted error. While nothing has
changed since all was clean (unchanged.py), address runs a share of its tests, drawn by --seed; --all: the others, too.
Exit code 1: a finding, a wrong result, or a planted error that was not seen. A JSON line with the counts is last.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # passive: threads of OpenMP that wait do not spin (two test files: 164 to 135 s of CPU).
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
    },
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=66:halt_on_error=1", "OMP_NUM_THREADS": "1"},
}
FINDING = re.compile(r"(AddressSanitizer|ThreadSanitizer|runtime error): .*")
RACE = ("csrc/cpu/worker.h", "static thread_local Scratch slots", "static Scratch slots")


def build(which: str, name: str, sources: Path = ROOT, *options: str) -> Path:
    """The folder of a package whose CPU libraries are instrumented."""
    import torch

    folder = BUILD / name
    configure = ["cmake", "-S", sources, "-B", folder, "-G", "Ninja", f"-DTORCH_DIR={Path(torch.__file__).parent}",
                 f"-DPython_EXECUTABLE={sys.executable}", f"-DH2OT_KERNELS_SANITIZE={which}",
                 f"-DCMAKE_INSTALL_PREFIX={folder / 'package' / 'h2ot_kernels'}", *options]  # fmt: skip
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stdout[-4000:]}\nsanitize: the build of {name} failed")
    for part in ("h2ot_kernels", "python_ref", "tests", "bench"):
        shutil.rmtree(folder / "package" / part, ignore_errors=True)
        shutil.copytree(ROOT / part, folder / "package" / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", folder / "package")
    subprocess.run(["cmake", "--install", folder], stdout=subprocess.DEVNULL, check=True)
    return folder / "package"


def runnable_sets() -> str:
    """The build's option that leaves out what this CPU has no instructions for."""
    from h2ot_kernels import _C

    return f"-DH2OT_CPU_SETS={_C.runnable_capabilities().replace(',', ';')}"


def environment(which: str, package: Path) -> dict[str, str]:
    """For a Python process that imports `package` and runs under the sanitizer."""
    # libstdc++ with it: the sanitizer must find the real __cxa_throw when it starts.
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in (LIBRARIES[which], "libstdc++.so.6")
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | {"LD_PRELOAD": " ".join(paths), "PYTHONPATH": str(package), **OPTIONS[which]}


def inside(which: str, package: Path, *arguments: str) -> subprocess.CompletedProcess:
    """This file's `main` in a process that runs under the sanitizer."""
    command = [sys.executable, "-m", "tests.sanitize", "--inside", which, *arguments]
    if which == "thread" and shutil.which("setarch"):  # its shadow memory wants addresses that are not random
        command = ["setarch", "-R", *command]
    env = environment(which, package)
    return subprocess.run(command, cwd=package, env=env, capture_output=True, text=True, check=False)


def assert_instrumented(which: str) -> None:
    """The library that this process has mapped is the instrumented one of this package."""
    maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "h2ot_kernels" in line}
    libraries = [Path(path) for path in maps if "libh2ot_kernels_cpu" in path]
    assert libraries == [Path.cwd() / "h2ot_kernels" / "libh2ot_kernels_cpu.so"], libraries
    checks = {"address": rb"__asan_(report_)?load", "thread": rb"__tsan_read"}  # one is called, or made in place
    assert re.search(checks[which], libraries[0].read_bytes())


def watch_address(seed: int | None) -> dict:
    from h2ot_kernels import _C

    from . import every_op, unchanged

    calls, capabilities = 0, _C.runnable_capabilities().split(",")
    for capability in capabilities:
        _C.set_capability(capability)
        made, wrong = every_op.run("cpu", many=1601)
        assert not wrong, wrong
        calls += made
    _C.set_capability(capabilities[0])  # what products of pairs and tiles belong to
    large = "351x1536 or 5120" + "".join(f" or ((1601 or 243x) and {name})" for name in capabilities[1:])
    chosen = " or ".join([*capabilities, "native", "halves", "any_valid_input", "test_strides", "takes_what_fits"])
    apart = "planted or compiled or dots or emulated"  # sources that such tests compile are not instrumented
    watched = Watched(seed)
    plain = ["-x", "-s", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]  # -s: findings are not captured
    tests = unchanged.tests_of(unchanged.SANITIZE)
    assert pytest.main([*plain, "-k", f"({chosen}) and not ({large} or {apart})", *tests], [watched]) == 0
    return {"capabilities": capabilities, "calls": calls, "tests": watched.passed}


class Watched:
    """With a seed a share of the cases, and of the tests that have none. How many tests passed."""

    def __init__(self, seed: int | None):
        self.seed, self.passed = seed, 0

    @pytest.hookimpl(trylast=True)  # of those that -k leaves
    def pytest_collection_modifyitems(self, items):
        if self.seed is not None:
            from .sample import thinned

            of_case = {}  # whose oracle, which takes longest, is made once for all of its tests
            for item in items:
                case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
                of_case.setdefault(str(case or item.nodeid), []).append(item)
            others = set(thinned(of_case, self.seed))
            items[:] = [item for item in items if item not in others]

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed


def watch_thread() -> dict:
    from h2ot_kernels import _C

    from .test_determinism import CALLS, same

    whole, expected, calls = slice(0, 3), {}, 0
    capabilities = _C.runnable_capabilities().split(",")
    for capability in capabilities:
        _C.set_capability(capability)
        expected = {name: call(whole) for name, call in CALLS.items()}

        def worker(seed, expected=expected):
            names = list(CALLS) * 2
            random.Random(seed).shuffle(names)
            return sum(same(CALLS[name](whole), expected[name]) for name in names)

        with ThreadPoolExecutor(4) as pool:
            right = sum(pool.map(worker, range(4)))
        assert right == 8 * len(CALLS), f"{right} of {8 * len(CALLS)} results are those of serial calls"
        calls += right
    return {"capabilities": capabilities, "calls": calls, "threads": 4}


def plant_address() -> None:
    """Reads past the end: a tensor whose storage was cut under it."""
    import torch

    import h2ot_kernels as h2ot

    x = torch.randn(1, 64, 64)
    x.untyped_storage().resize_(64)
    h2ot.gather_tokens(x, torch.tensor([[0, 40]]))


def planted(which: str) -> str:
    """The first line that the sanitizer prints about the planted error."""
    if which == "address":
        return first_finding(inside("address", BUILD / "address" / "package", "--plant"))
    sources = BUILD / "planted-source"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", sources)
    file, text, replacement = RACE
    path = sources / file
    source = path.read_text()
    assert source.count(text) == 1, f"{file}: {text!r} stands there {source.count(text)} times"
    path.write_text(source.replace(text, replacement))
    return first_finding(inside("thread", build("thread", "planted", sources, "-DH2OT_CPU_SETS=portable")))


def first_finding(done: subprocess.CompletedProcess) -> str:
    found = FINDING.search(done.stderr)
    if not (found and done.returncode):
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-2000:]}\nsanitize: the planted error was not reported")
    return found.group()


def share_of_proven(seed: int | None) -> tuple[str, ...]:
    """Arguments of a run inside: which share, where nothing has changed; else none."""
    from . import sample, unchanged

    if not unchanged.is_unchanged(unchanged.SANITIZE):
        return ()
    seed = random.randrange(10**6) if seed is None else seed
    print(f"sanitize: nothing has changed since all was clean; one case in {sample.UNCHANGED} (--seed {seed})")
    return "--seed", str(seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", metavar="address | thread", help="default: both")
    parser.add_argument("--all", action="store_true", help="every test, whatever was proven before")
    parser.add_argument("--seed", type=int, help="of those that run of the proven; default: drawn")
    parser.add_argument("--inside", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--plant", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.inside:
        import h2ot_kernels  # noqa: F401 - loads the library

        assert_instrumented(given.inside)
        if given.plant:
            plant_address()
        print(json.dumps(watch_address(given.seed) if given.inside == "address" else watch_thread()))
        return 0
    if wrong := set(given.which) - set(LIBRARIES):
        parser.error(f"got {', '.join(wrong)}, wanted address or thread")
    share = share_of_proven(given.seed) if "address" in (given.which or LIBRARIES) and not given.all else ()
    results, bad = {}, False
    for which in given.which or LIBRARIES:
        done = inside(which, build(which, which, ROOT, runnable_sets()), *share)
        findings = [match.group() for match in FINDING.finditer(done.stderr)]
        if done.returncode:
            bad = True
            first = FINDING.search(done.stderr)
            report = done.stderr[first.start() :][:6000] if first else done.stderr[-6000:]
            print(done.stdout[-2000:], report, f"sanitize: {which} failed, exit code {done.returncode}", sep="\n")
            counts = {}
        else:
            counts = json.loads(done.stdout.splitlines()[-1])
        results[which] = {**counts, "findings": len(findings), "planted": planted(which)}
        bad |= bool(findings)
    print(json.dumps(results))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
