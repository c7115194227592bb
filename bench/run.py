"""Benchmarks: `./dev bench [--ops OP ...] [--device cpu|cuda] [--quick | --sweep] [--compile] [--compare A B] ...`.

--gpu-sizes: instead of the ordinary sizes those that are asked of a GPU, in their own dtypes. Cases of the first dtype
come first; what runs out of time is then the least important. Peak memory is that of float32 or the first dtype.

Each case is checked against python_ref first; what is wrong is not timed and makes the exit code 1. Then the official
formulation, with --compile `torch.compile` of it, ours, every other backend with a kernel, and other libraries (those
that are installed; "stage 1 only" where they do less) are timed in turn in this process. One JSON row per case is
appended to FILE (default bench/results/<device>.jsonl): sizes, quantiles, first call, peak memory, the counted floor,
device, versions, date. --sweep varies N, B, C and K of prune_cluster and a CPU's threads one at a time, for the scaling
plots.

A run of all cases on a CPU ends with what is asked of one (bench/targets.py), a table in FILE with the ending .md.
"""

import argparse
import json
import math
import sys
import traceback
from pathlib import Path

import torch

from h2ot_kernels import can_run, use_backend
from h2ot_kernels.backend import BACKENDS, interpreting
from h2ot_kernels.comparison import Comparison, Result, compare
from h2ot_kernels.timing import Machine

from . import memory, peers
from .rows import case_row, environment_row
from .shapes import DTYPES, Case, all_ops, build, cases, gpu_cases, sweep

KERNELS = ("cpp", "cuda", "triton")


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; 0: all right and timed, 1: something was wrong, 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", metavar="OP", default=all_ops(), help=f"some of {', '.join(all_ops())}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--quick", action="store_true", help="only the first size of each operation")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sweep", action="store_true", help="scaling of prune_cluster in N, B, C, K and threads")
    which.add_argument("--gpu-sizes", action="store_true", help="the sizes asked of a GPU, in their own dtypes")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="show two result files; measure nothing")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory (4 s a case on a CPU)")
    parser.add_argument("--no-peers", action="store_true", help="no other libraries")
    parser.add_argument("--backends", nargs="*", default=KERNELS, metavar="NAME", help="default: those with a kernel")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the official formulation")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing per case (default: 2)")
    parser.add_argument("--out", type=Path, help="JSONL file to append to (default: bench/results/<device>.jsonl)")
    given = parser.parse_args(arguments)
    is_whole = False
    try:
        if given.compare:
            from .compare import show  # needs rich, which a GPU machine may not have

            return show(*given.compare)
        if given.sweep:
            chosen = sweep(given.device)
        elif given.gpu_sizes:
            chosen = gpu_cases(given.ops, quick=given.quick)
        else:
            chosen = cases(given.ops, quick=given.quick, dtypes=given.dtype)
            if is_whole := chosen == cases(all_ops()) and given.device == "cpu":
                chosen += cases(["recover_pose"], dtypes=["bfloat16"])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    if unknown := [name for name in given.backends if name not in BACKENDS]:
        parser.error(f"--backends: got {', '.join(unknown)}, wanted some of {', '.join(BACKENDS)}")
    if not (given.seconds > 0 and math.isfinite(given.seconds)):
        parser.error(f"--seconds: got {given.seconds:g}, wanted more than 0")
    if given.threads is not None:
        if given.threads < 1:
            parser.error(f"--threads: got {given.threads}, wanted 1 or more")
        torch.set_num_threads(given.threads)

    out = given.out or Path(__file__).parent / "results" / f"{given.device}.jsonl"
    try:  # before anything is measured
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        parser.error(f"--out: {error}")
    machine, environment = Machine(given.device), environment_row(given.device)
    no_memory = "not asked for" if given.no_memory else memory.why_not(machine.device)
    wrong, absent, rows = 0, {}, []
    print(f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}")
    print(f"best float32 product of this run: {machine.flops() / 1e9:.0f} GFLOP/s")
    if machine.device.type == "cuda":
        launch, replay = machine.launch_seconds * 1e6, machine.replay_seconds * 1e6
        print(
            f"between two events, with nothing to do: a launch {launch:.1f} us, the replay of a graph {replay:.1f} us"
        )
    threads = torch.get_num_threads()
    with out.open("a") as file:
        for case in chosen:
            torch.set_num_threads(case.threads or threads)
            try:
                comparison = build(case, machine.device)
                others, missing = ({}, {}) if given.no_peers else peers.rivals(comparison, machine.device)
                kernels, unfit, failed = other_backends(comparison, machine.device, given.backends)
                others |= kernels
                absent |= missing | unfit
                wrong += failed
                result = compare(comparison, machine, seconds=given.seconds, with_compile=given.compile, others=others)
                wrong += not result.verdict.is_right
                print(line(case, result), flush=True)
                peak = {}
                of_first = given.gpu_sizes or case.dtype in ("float32", given.dtype[0])
                if no_memory is None and result.verdict.is_right and of_first:
                    known = machine.device, comparison
                    peak = {rival: memory.peak_bytes(case, rival, *known) for rival in ("official", "ours")}
                values = case_row(case, result, machine, environment) | {"peak_bytes": peak}
                file.write(json.dumps(values, allow_nan=False) + "\n")
                file.flush()
                rows.append(values)
            except Exception:  # whatever stops one case: the others are measured
                traceback.print_exc(file=sys.stdout)
                print(f"{case!s:58} FAILED, not timed", flush=True)
                wrong += 1
    torch.set_num_threads(threads)
    for label, reason in absent.items():
        print(f"not timed: {label}: {reason}")
    print(f"peak memory: {no_memory or 'in the rows'}")
    print(f"{len(chosen) - wrong} of {len(chosen)} cases right and timed; rows appended to {out}")
    if is_whole and not wrong:
        from . import targets  # needs rich and matplotlib, which a GPU machine may not have

        lines = targets.table(list(targets.targets(rows, threads, given.seconds)))
        title = f"{environment['device']}, threads: {environment['threads']}, {environment['date'][:10]}"
        out.with_suffix(".md").write_text("\n".join([f"# What is asked of a CPU: {title}", "", *lines, ""]))
        print("\n".join(lines))
    return int(wrong > 0)


def other_backends(comparison: Comparison, device: torch.device, names: tuple[str, ...]):
    """(name -> ours by that backend, label -> why it cannot run, how many are wrong); the default is left out."""
    op = comparison.op if comparison.kernel is None else comparison.kernel
    found, unfit, wrong = {}, {}, 0
    for name in names:
        if not op or name == comparison.backend(device) or (name == "triton" and interpreting()):
            continue
        if not can_run(op, name, device)[0]:
            continue

        def call(name=name):
            with use_backend(name):
                return comparison.ours()

        label = f"{comparison.op} by {name}"
        try:
            with torch.inference_mode(), use_backend(name):
                is_right = comparison.check().is_right
        except RuntimeError as error:
            if "cannot run on" not in str(error):
                raise
            unfit[label] = str(error)  # one of its operations has no such kernel
            continue
        if is_right:
            found[name] = call
        else:
            wrong += 1
            print(f"{label}: WRONG, not timed")
    return found, unfit, wrong


def line(case: Case, result: Result) -> str:
    """One line of the screen."""
    verdict = result.verdict
    agreement = f"agreement {verdict.agreement_official:.3f} / {verdict.agreement_ours:.3f}"
    if not verdict.is_right:
        return f"{case!s:58} {agreement}  WRONG: error {verdict.error:.3g} above {verdict.bound:.3g}, not timed"
    times = "  ".join(f"{rival} {timing.p50 * 1e3:9.4f} ms" for rival, timing in result.timings.items())
    shares = (f"{rival.removeprefix('ours, ')} {100 * share:.0f} %" for rival, share in result.shares_of_floor.items())
    share = f"  peak: {', '.join(shares)}" if result.shares_of_floor else ""
    return f"{case!s:58} {agreement}  {times}  {result.speed_up:6.2f}x{share}"


if __name__ == "__main__":
    sys.exit(main())
