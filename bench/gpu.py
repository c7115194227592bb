"""Everything that needs a GPU, in one command and under 9 minutes: `./dev gpu [--stage NAME ...]`.

Each stage is a process group with its own time budget, and ends when the time of the whole command does; one that
fails, hangs or loses the device does not stop the others. Sanitizers, guard bands and the GPU's own tests run side by
side; what is timed, and the case list, which takes every core, alone. Leaves in $OUT (default gpu_out/), as far as it
came after every stage: summary.md (with the tables of what was measured), results.jsonl, hosts.jsonl, env.json and
logs.tar.gz.
"""

import argparse
import asyncio
import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from . import acceptance

SECONDS = 540  # of the whole command, the build included
LEAST = 5  # seconds that a stage needs to be worth a start
BUILD_LOG = Path(__file__).parents[1] / "build" / "log"  # of ./dev


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    command: tuple[str, ...]
    needs: str | None = None  # a program on the PATH
    environment: tuple[tuple[str, str], ...] = ()
    kept: float = 0  # seconds that the stages before leave to it
    beside: bool = False  # with its neighbours of which the same is true


@dataclass(frozen=True)
class Outcome:
    stage: Stage
    state: str  # passed, failed, out of time, or not run
    seconds: float
    tail: str


def stages(out: Path) -> list[Stage]:
    """In the order of what is learnt from them: what comes last may find no time left."""
    python = sys.executable
    # Whatever plug-ins are here, and whether or not every test file can be imported; a line per test, for one that ran
    # out of time has said nothing else.
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=-ra -v --tb=short")

    def tests(share: int = 1) -> tuple[str, ...]:
        """On one in so many cores. A test that loses the device costs its worker, which is replaced."""
        workers = max(1, min(16, os.cpu_count() or 1) // share)
        spread = ("-n", str(workers), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
        return (python, *pytest, "--continue-on-collection-errors", *spread)

    every_op, every_plan = ((python, "-m", f"tests.{name}") for name in ("every_op", "every_plan"))
    rows = ("--device", "cuda", "--out", str(out / "results.jsonl"))
    bench = (python, "-m", "bench.run", *rows, "--seconds")
    asked = (*bench, "0.3", "--gpu-sizes", "--no-peers")
    every_size = (*bench, "0.1", "--dtype", "float32", "bfloat16", "float16")
    few = ("--quick", "--backends", "--ops", "prune_step", "gather_and_embed", "recover_pose")
    models = ("--models", "mixste", "hot_mixste", "h2ot_mixste", "--batch", "1", "4", "--mode", "inference")
    hosts = ("--device", "cuda", "--out", str(out / "hosts.jsonl"), *models, "--seconds", "2")
    triton_or_cuda = "triton or cuda or test_direct"
    without = "test_cuda_simt or test_cuda_plan or test_triton_mutants or test_triton_forms"  # need no GPU

    def beside(name: str, command: tuple[str, ...], needs: str | None = None, environment=()) -> Stage:
        return Stage(name, 150, command, needs, environment, kept=60, beside=True)

    def sanitizers(of: str, command: tuple[str, ...]) -> list[Stage]:
        alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # else all tensors lie in one allocation
        watch = ("compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20", "--tool")
        tools = ("memcheck", "racecheck", "initcheck")
        return [beside(f"{tool} {of}", (*watch, tool, *command), watch[0], alone) for tool in tools]

    return [
        Stage("device", 20, ("nvidia-smi",), "nvidia-smi"),
        Stage("environment", 30, (python, "-m", "h2ot_kernels", "env")),
        Stage("every operation", 70, every_op, kept=40),  # leaves compiled kernels to the others
        beside("gpu tests", (*tests(share=2), "-m", "gpu")),
        beside("guard bands", (*every_op, "--guard"), "nvcc"),
        beside("guard bands of plans", (*every_plan, "--guard"), "nvcc"),
        *sanitizers("of operations", every_op),
        *sanitizers("of plans", every_plan),
        Stage("case list", 200, (*tests(), "-m", "not gpu", "-k", f"({triton_or_cuda}) and not ({without})"), kept=80),
        Stage("asked sizes", 80, asked, kept=50),
        Stage("hosts", 45, (python, "-m", "bench.bench_hosts", *hosts), kept=30),
        Stage("patch", 35, (python, "-m", "bench.bench_dropin", *rows, "--batch", "1", "4", "--seconds", "1"), kept=25),
        Stage("compiled rivals", 45, (*asked, "--compile", *few), kept=30),
        Stage("benchmarks", 300, every_size, kept=60),
    ]


def cuda_library(logs: Path, build_log: Path = BUILD_LOG) -> Outcome:
    """Whether the stages run the CUDA library. Without it they pass over it, so that no other outcome would say so."""
    from h2ot_kernels import backend

    stage, reason = Stage("CUDA library", 0, (), "nvcc"), backend.why_no_cuda()
    if reason is None:
        return Outcome(stage, "passed", 0.0, "loaded")
    if shutil.which(stage.needs) is None:
        return Outcome(stage, "not run", 0.0, f"{reason}; {stage.needs} is not on the PATH")
    if not build_log.exists():
        return Outcome(stage, "failed", 0.0, f"{reason}; {build_log} is not there")
    shutil.copy(build_log, logs / "build.log")
    lines = build_log.read_text(errors="replace").splitlines()
    errors = [line for line in lines[:-20] if "error" in line.lower()]
    return Outcome(stage, "failed", 0.0, "\n".join([reason, "", *errors[:20], *lines[-20:]]))


def groups(chosen: list[Stage]) -> list[list[Stage]]:
    """The stages that run side by side, in order."""
    found: list[list[Stage]] = []
    for stage in chosen:
        if found and stage.beside and found[-1][0].beside:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def share(stage: Stage, later: list[list[Stage]], left: float) -> float:
    """Of the seconds left what a stage may take: what the later groups do not keep, or what is kept for it."""
    return min(left, max(left - sum(max(other.kept for other in group) for group in later), stage.kept))


async def _stop(process: asyncio.subprocess.Process) -> None:
    """The process and what it has started: a sanitizer's program would go on using the device.

    Asked first: pytest then says what has failed so far.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), LEAST)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def run(stage: Stage, logs: Path, left: float = SECONDS) -> Outcome:
    """Run one stage in at most its own seconds and those left; its output goes to logs/<name>.log."""
    if stage.needs and shutil.which(stage.needs) is None:
        return Outcome(stage, "not run", 0.0, f"{stage.needs} is not on the PATH")
    seconds = min(stage.seconds, left)
    if seconds < min(stage.seconds, LEAST):
        return Outcome(stage, "not run", 0.0, f"no time left: ./dev gpu --stage '{stage.name}' runs it alone")
    log, start = logs / f"{stage.name.replace(' ', '-')}.log", time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(stage.environment)}
    with log.open("w") as file:
        process = await asyncio.create_subprocess_exec(
            *stage.command, stdout=file, stderr=subprocess.STDOUT, env=environment, process_group=0
        )
        try:
            code = await asyncio.wait_for(process.wait(), seconds)
            state = "passed" if code == 0 else f"failed ({code})"
        except TimeoutError:
            await _stop(process)
            state = f"out of time ({seconds:.0f} s)"
        except asyncio.CancelledError:  # Ctrl-C reaches only this process: take the stage along
            await _stop(process)
            raise
    lines = log.read_text(errors="replace").splitlines()
    tail = "\n".join([*(line for line in lines[:-8] if " FAILED " in line), *lines[-8:]])
    return Outcome(stage, state, time.monotonic() - start, tail)


def tables(out: Path, since: str) -> list[str]:
    """What was measured; of rows that have no table it is said why: the stages that are left run all the same."""
    try:
        return acceptance.tables(acceptance.read(out / "results.jsonl", out / "hosts.jsonl", since=since))
    except Exception:  # whatever a GPU's rows hold that no other's do
        return ["No tables:", "", "```", traceback.format_exc(), "```"]


def write(outcomes: list[Outcome], out: Path, logs: Path, environment: dict) -> None:
    """summary.md, env.json and the archive of logs, as far as they go."""
    (out / "env.json").write_text(json.dumps(environment, indent=1) + "\n")
    lines = [f"# {environment.get('device', 'unknown device')}, {environment['date']}", ""]
    lines += ["| stage | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.stage.name} | {o.state} | {o.seconds:.0f} |" for o in outcomes]
    lines += ["", *tables(out, environment["date"])]
    for o in outcomes:
        lines += ["", f"## {o.stage.name}", "", "```", o.tail, "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(logs, "logs")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_out")))
    parser.add_argument("--stage", action="append", help="run only this stage (may be repeated)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of the whole command (default: {SECONDS})")
    parser.add_argument("--spent", type=float, default=0, help="seconds of them that setting up took")
    given = parser.parse_args(arguments)
    end = time.monotonic() + given.seconds - given.spent
    import torch

    known = {stage.name: stage for stage in stages(given.out)}
    unknown = set(given.stage or ()) - set(known)
    if unknown:
        parser.error(f"--stage: got {', '.join(sorted(unknown))}, wanted some of {', '.join(known)}")
    if not torch.cuda.is_available():
        print(f"./dev gpu needs a CUDA device; torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    from h2ot_kernels import env_report

    given.out.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    environment = {**env_report(), "date": date}
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [cuda_library(Path(folder))]
        print(f"{outcomes[0].stage.name}: {outcomes[0].state}", flush=True)

        async def run_and_write(stage: Stage, seconds: float) -> None:
            outcomes.append(await run(stage, Path(folder), seconds))
            print(f"{stage.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
            write(outcomes, given.out, Path(folder), environment)

        async def run_all() -> None:
            waiting = groups([known[name] for name in given.stage or known])
            while waiting:
                group, left = waiting.pop(0), end - time.monotonic()
                async with asyncio.TaskGroup() as running:  # when it is cancelled, it waits until all have stopped
                    for stage in group:
                        running.create_task(run_and_write(stage, share(stage, waiting, left)))

        asyncio.run(run_all())
    print(f"summary.md, result rows, env.json and logs.tar.gz are in {given.out.resolve()}")
    return int(any(o.state != "passed" and o.state != "not run" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
