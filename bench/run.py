"""Benchmarks: `./dev bench [--ops OP ...] [--device cpu|cuda] [--quick] [--compile] [--threads N] [--out FILE]`.

Each case is checked against python_ref first; what is wrong is not timed and makes the exit code 1. Then the official
formulation, with --compile `torch.compile` of it, and ours are timed in turn in this process. One JSON row per case is
appended to FILE (default bench/results/<device>.jsonl): sizes, quantiles, the counted floor, device, versions, date.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch

from h2ot_kernels import env_report
from h2ot_kernels.comparison import Result, compare
from h2ot_kernels.timing import Machine

from .shapes import Case, all_ops, build, cases


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; 0: all right and timed, 1: something was wrong, 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", metavar="OP", default=all_ops(), help=f"some of {', '.join(all_ops())}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="only the first size of each operation")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the official formulation")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing per case (default: 2)")
    parser.add_argument("--out", type=Path, help="JSONL file to append to (default: bench/results/<device>.jsonl)")
    given = parser.parse_args(arguments)
    try:
        chosen = cases(given.ops, quick=given.quick)
    except ValueError as error:
        parser.error(str(error))
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    if given.threads is not None:
        if given.threads < 1:
            parser.error(f"--threads: got {given.threads}, wanted 1 or more")
        torch.set_num_threads(given.threads)

    out = given.out or Path(__file__).parent / "results" / f"{given.device}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    machine, environment = Machine(given.device), environment_row(given.device)
    wrong = 0
    print(f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}")
    print(f"best float32 product of this run: {machine.flops() / 1e9:.0f} GFLOP/s")
    with out.open("a") as file:
        for case in chosen:
            result = measure(case, machine, seconds=given.seconds, with_compile=given.compile)
            wrong += not result.verdict.is_right
            print(line(case, result), flush=True)
            file.write(json.dumps(row(case, result, machine, environment), allow_nan=False) + "\n")
            file.flush()
    print(f"{len(chosen) - wrong} of {len(chosen)} cases right and timed; rows appended to {out}")
    return int(wrong > 0)


def measure(case: Case, machine: Machine, *, seconds: float, with_compile: bool = False) -> Result:
    """The checked and timed comparison of one case."""
    return compare(build(case, machine.device), machine, seconds=seconds, with_compile=with_compile)


def environment_row(device: str) -> dict:
    """What a row says about where it was measured."""
    report = env_report()
    name = torch.cuda.get_device_name() if device == "cuda" else report["cpu"]
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": report["torch"],
        "python": report["python"],
        "cpu_capability": report.get("cpu_capability"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def row(case: Case, result: Result, machine: Machine, environment: dict) -> dict:
    """One line of the results file; times in seconds."""
    return result.row() | {
        "kind": case.kind,
        "dtype": "float32",
        "best_float32_flops": machine.flops(),
        **environment,
    }


def line(case: Case, result: Result) -> str:
    """One line of the screen."""
    verdict = result.verdict
    agreement = f"agreement {verdict.agreement_official:.3f} / {verdict.agreement_ours:.3f}"
    if not verdict.is_right:
        return f"{case!s:58} {agreement}  WRONG: error {verdict.error:.3g} above {verdict.bound:.3g}, not timed"
    times = "  ".join(f"{rival} {timing.p50 * 1e3:9.4f} ms" for rival, timing in result.timings.items())
    share = "" if result.share_of_peak is None else f"  peak {100 * result.share_of_peak:4.0f} %"
    return f"{case!s:58} {agreement}  {times}  {result.speed_up:6.2f}x{share}"


if __name__ == "__main__":
    sys.exit(main())
