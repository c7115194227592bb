"""`./dev versions [2.10.0 triton-3.9.0 ...]`: other releases of torch and of Triton, each by itself in build/versions/.

Twice for each torch: the extension is built there (with the CUDA library where nvcc is), and its libraries must load;
then the libraries of this environment are put in their place, as a wheel would bring them, and the tests run with
those. A registry's torch brings its CUDA packages: some GB a release. With each Triton, beside this environment's
torch, the tests of its kernels run, interpreted, and the compile gate makes every build for sm_90. What was seen is
printed and, with the date, written to bench/results/reliability/versions.json. Exit code 1: something failed.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "versions"
RESULT = ROOT / "bench" / "results" / "reliability" / "versions.json"
RELEASES = ("2.10.0", "2.11.0", "2.12.1", "2.14.1", "2.15.0")
TRITONS = ("triton-3.7.1", "triton-3.8.0", "triton-3.9.0")
ARCHITECTURE = "90"  # of the gate's builds
PACKAGES = ("numpy<2.4", "setuptools>=77", "wheel", "cmake>=3.24", "ninja", "pybind11>=2.13", "pytest>=8",
            "hypothesis>=6", "pytest-xdist>=3", "rich>=13", "matplotlib>=3.9", "jinja2>=3.1")  # fmt: skip
LOADED = """
import json, h2ot_kernels.backend as backend
print(json.dumps({"cpp": backend.why_no_cpp() or "loaded", "cuda": backend.why_no_cuda() or "loaded"}))
"""
# Triton has releases of its own here, exports belong to one of onnx; documentation and gates to the tree.
LEFT_OUT = (
    "test_triton", "test_ptx", "test_aot", "test_onnx", "test_cuda_simt", "test_guard", "test_driver", "test_build",
    "test_docs",
)  # fmt: skip


class NotInstalledError(Exception):
    """No such release for this machine: what was seen before stands."""


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=folder, env=kept | environment, text=True, check=False, **output)


def environment_of(release: str) -> Path:
    """The interpreter of an environment that holds this release, made where it is not there."""
    folder = BUILD / release / "venv"
    python = folder / "bin" / "python"
    if run([python, "-c", "import torch, pytest"], ROOT).returncode if python.exists() else True:
        venv.create(folder, with_pip=True, clear=True)
        done = run([python, "-m", "pip", "install", "-q", f"torch=={release}", *PACKAGES], ROOT)
        if done.returncode:
            raise NotInstalledError(f"{done.stdout[-4000:]}\nversions: torch {release} could not be installed")
    return python


def tree_of(release: str) -> Path:
    """A copy of what git knows of this tree, as it is now."""
    folder = BUILD / release / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def examine(release: str, jobs: int) -> dict:
    """What was seen with this release of torch."""
    python, tree = environment_of(release), tree_of(release)
    cuda = "1" if shutil.which("nvcc") else "0"
    build = run([python, "setup.py", "-q", "build_ext", "--inplace"], tree, H2OT_KERNELS_CUDA=cuda)
    row = {"torch": release, "built": build.returncode == 0}
    if build.returncode:
        return row | {"output": build.stdout[-3000:]}
    loaded = run([python, "-c", LOADED], tree)
    row |= json.loads(loaded.stdout.splitlines()[-1]) if loaded.returncode == 0 else {"output": loaded.stdout[-3000:]}
    for library in (tree / "h2ot_kernels").glob("*.so"):
        library.unlink()
    for library in (ROOT / "h2ot_kernels").glob("*.so"):
        shutil.copy(library, tree / "h2ot_kernels")
    files = [path for path in sorted(tree.glob("tests/test_*.py")) if not path.stem.startswith(LEFT_OUT)]
    options = ["-p", "no:cacheprovider", "-n", str(jobs), "--dist", "loadfile", "-k", "not triton"]
    tests = run([python, "-m", "pytest", *options, *files], tree)
    row |= counted(tests.stdout)
    if tests.returncode:
        row["output"] = tests.stdout[-6000:]
    return row | {"tests": tests.returncode == 0}


def counted(pytest_output: str) -> dict[str, int]:
    return {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", pytest_output)}


def examine_triton(release: str, jobs: int) -> dict:
    """What was seen with this release of Triton."""
    folder = BUILD / release
    shutil.rmtree(folder, ignore_errors=True)
    named = release.replace("-", "==")
    install = run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), named], ROOT)
    if install.returncode:
        raise NotInstalledError(f"{install.stdout[-4000:]}\nversions: {release} could not be installed")
    own = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "TRITON_CACHE_DIR": str(folder / "cache")}
    options = ["-p", "no:cacheprovider", "-n", str(jobs), "--dist", "loadfile", "-k", "triton and not mutants"]
    tests = run([sys.executable, "-P", "-m", "pytest", *options, "tests"], ROOT, **own)
    gate = run([sys.executable, "-P", "-m", "tests.aot", "--jobs", str(jobs), "--arch", ARCHITECTURE], ROOT, **own)
    built = re.search(r"aot: (\d+) rows.* (\d+) failed", gate.stdout)
    row = {"triton": release.removeprefix("triton-"), **counted(tests.stdout)}
    row |= {"builds": int(built[1]), "builds_failed": int(built[2])} if built else {}
    green = not tests.returncode and not gate.returncode
    return row | {"tests": green} | ({} if green else {"output": tests.stdout[-6000:] + gate.stdout[-6000:]})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev versions", description=__doc__.splitlines()[0])
    every = (*RELEASES, *TRITONS)
    parser.add_argument("release", nargs="*", default=every, help=f"default: {' '.join(every)}")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args(arguments)
    seen = json.loads(RESULT.read_text()) if RESULT.exists() else []
    known = {row.get("torch") or f"triton-{row['triton']}": row for row in seen}
    green = True
    for release in given.release:
        try:
            row = (examine_triton if release.startswith("triton-") else examine)(release, given.jobs)
        except NotInstalledError as error:
            print(error, flush=True)
            green = False
            continue
        print(row.pop("output", ""), end="")
        green &= row.get("tests", False)
        known[release] = row | {"python": sys.version.split()[0], "date": datetime.date.today().isoformat()}
        print(f"{release}: {json.dumps(row)}", flush=True)
        RESULT.write_text(json.dumps([known[name] for name in sorted(known)], indent=1) + "\n")
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())
