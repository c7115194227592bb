"""Everything that needs a GPU, in one command and under 9 minutes: `./dev gpu [--stage NAME ...]`.

Each stage is a process with its own time budget; one that fails or runs out does not stop the others. Leaves in $OUT
(default gpu_out/) summary.md, results.jsonl, env.json and logs.tar.gz.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: int
    command: tuple[str, ...]
    needs: str | None = None  # a program on the PATH


@dataclass(frozen=True)
class Outcome:
    stage: Stage
    state: str  # passed, failed, out of time, or not run
    seconds: float
    tail: str


def stages(out: Path) -> list[Stage]:
    python = sys.executable
    tests = (python, "-m", "pytest", "-p", "no:cacheprovider")
    every_op = (python, "-m", "tests.every_op")
    rows = ("--device", "cuda", "--out", str(out / "results.jsonl"))
    dtypes = ("--dtype", "float32", "bfloat16", "float16", "--seconds", "0.2")

    def sanitizer(tool: str) -> Stage:
        watch = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        return Stage(tool, 35, (*watch, *every_op), needs="compute-sanitizer")

    return [
        Stage("environment", 20, (python, "-m", "h2ot_kernels", "env")),
        Stage("every operation", 30, every_op),
        Stage("gpu tests", 70, (*tests, "-m", "gpu")),
        Stage("case list", 120, (*tests, "-m", "not gpu", "-k", "triton or cuda")),
        Stage("benchmarks", 120, (python, "-m", "bench.run", *rows, *dtypes)),
        Stage("compiled rivals", 50, (python, "-m", "bench.run", *rows, "--quick", "--compile", "--no-peers")),
        Stage("guard bands", 20, (*every_op, "--guard"), needs="nvcc"),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        sanitizer("initcheck"),
    ]


def run(stage: Stage, logs: Path) -> Outcome:
    """Run one stage; its output goes to logs/<name>.log."""
    if stage.needs and shutil.which(stage.needs) is None:
        return Outcome(stage, "not run", 0.0, f"{stage.needs} is not on the PATH")
    log, start = logs / f"{stage.name.replace(' ', '-')}.log", time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                stage.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=stage.seconds,
                env=environment,
                check=False,
            ).returncode
            state = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            state = f"out of time ({stage.seconds} s)"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
    return Outcome(stage, state, time.monotonic() - start, tail)


def write(outcomes: list[Outcome], out: Path, environment: dict) -> None:
    """summary.md, env.json and the archive of logs."""
    (out / "env.json").write_text(json.dumps(environment, indent=1) + "\n")
    lines = [f"# {environment.get('device', 'unknown device')}, {environment['date']}", ""]
    lines += ["| stage | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.stage.name} | {o.state} | {o.seconds:.0f} |" for o in outcomes]
    for o in outcomes:
        lines += ["", f"## {o.stage.name}", "", "```", o.tail, "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(out / "logs", "logs")
    shutil.rmtree(out / "logs")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_out")))
    parser.add_argument("--stage", action="append", help="run only this stage (may be repeated)")
    given = parser.parse_args(arguments)
    import torch

    from h2ot_kernels import env_report

    known = {stage.name: stage for stage in stages(given.out)}
    unknown = set(given.stage or ()) - set(known)
    if unknown:
        parser.error(f"--stage: got {', '.join(sorted(unknown))}, wanted some of {', '.join(known)}")
    if not torch.cuda.is_available():
        print(f"./dev gpu needs a CUDA device; torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    logs = given.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in given.stage or known:
        outcomes.append(run(known[name], logs))
        print(f"{name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write(outcomes, given.out, {**env_report(), "date": date})
    return int(any(o.state != "passed" and o.state != "not run" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
