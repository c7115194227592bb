"""`./dev reliability`: the proofs of RELIABILITY.md that are too long for `./dev test`, one after the other.

What each counted, how long it took, the versions and the date are printed and written to
bench/results/reliability/last.json. --only NAME ...: some of them. Exit code 1: one failed.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time

from h2ot_kernels import env_report

from . import unchanged
from .unchanged import ARM, CUDA, ONNX, RESULT, ROOT, SANITIZE, TRITON

PYTEST = ["-m", "pytest", "-p", "no:xdist"]
PROOFS = {
    "promises": [*PYTEST, "--all", "tests/test_bad_input.py", "tests/test_bad_index.py", "tests/test_determinism.py",
                 "tests/test_concurrency.py", "tests/test_size.py", "tests/test_checkpoint.py",
                 "tests/test_keypoints.py"],
    "kernels": [*PYTEST, "--all", "tests/test_score.py", "tests/test_triton_score.py", "tests/test_select.py",
                "tests/test_gather.py", "tests/test_cluster.py", "tests/test_recover_attention.py",
                "tests/test_recover_interpolation.py", "tests/test_official_ops.py"],
    CUDA: [*PYTEST, "--all", *unchanged.tests_of(CUDA), "tests/test_cuda_plan.py"],
    "triton, planted": [*PYTEST, "--all", "tests/test_triton_mutants.py"],
    TRITON: ["-m", "tests.ptx", "--all"],
    "triton, every architecture": ["-m", "tests.aot", "--all"],
    "cuda, every architecture": ["-m", "tests.cuda_gate", "--all"],
    "fuzz": [*PYTEST, "--hypothesis-profile=nightly", "tests/test_fuzz.py"],
    "tidy": ["-m", "tests.tidy"],
    SANITIZE: ["-m", "tests.sanitize", "--all"],
    ARM: ["-m", "tests.arm", "--all"],
    ONNX: ["-m", "tests.onnx_gate", "--all"],
    "mutants": ["-m", "tests.mutants", "--again"],
}  # fmt: skip
_TESTS = re.compile(r"(\d+) (passed|failed|skipped|deselected|error)")


def counted(output: str) -> dict:
    """What a proof says it counted: tests by outcome, and each line of counts."""
    found = {name: int(number) for number, name in _TESTS.findall(output)}
    said = [line for line in output.splitlines() if line.startswith(("fuzz ", "tidy: ", "barriers ", "aot: "))]
    last = (output.splitlines() or [""])[-1]
    return found | ({"counts": said} if said else {}) | (json.loads(last) if last.startswith("{") else {})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev reliability", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PROOFS, metavar="NAME", default=list(PROOFS))
    given = parser.parse_args(arguments)
    results = {}
    environment, report = os.environ | {"PYTHONPATH": str(ROOT)}, env_report()
    for name in given.only:
        began = time.monotonic()
        of = {"key": unchanged.key(name)} if name in unchanged.TESTS else {}
        done = subprocess.run(
            [sys.executable, *PROOFS[name]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        today = datetime.date.today().isoformat()
        row = {"passed": done.returncode == 0, "date": today, "seconds": round(time.monotonic() - began)}
        results[name] = row | of | {"cpu": report["cpu"], "counted": counted(done.stdout)}
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", flush=True)
    machine = {name: report[name] for name in ("python", "torch", "threads", "backends", "build")}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULT.read_text())["proofs"] if RESULT.exists() else {}  # of another run beside this one, too
    RESULT.write_text(json.dumps({"machine": machine, "proofs": known | results}, indent=1) + "\n")
    print(f"written to {RESULT.relative_to(ROOT)}")
    return int(not all(results[name]["passed"] for name in given.only))


if __name__ == "__main__":
    sys.exit(main())
