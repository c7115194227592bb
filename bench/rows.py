"""A row of results: one line of JSON, as it is written, read and named."""

import datetime
import json
from pathlib import Path

import torch

from h2ot_kernels import env_report
from h2ot_kernels.comparison import Result
from h2ot_kernels.timing import Machine

from . import peers
from .shapes import Case, gpu_cases

NEEDED = ("op", "shape", "device", "threads", "torch", "date")


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
        "peers": peers.versions(torch.device(device)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def case_row(case: Case, result: Result, machine: Machine, environment: dict) -> dict:
    """One line of the results file; times in seconds, rates per second. Where threads are varied they are a size."""
    dtype = getattr(torch, case.dtype)
    shape = result.shape | ({"threads": case.threads} if case.threads else {})
    return result.row() | {
        "shape": shape,
        "kind": case.kind,
        "dtype": case.dtype,
        "gpu_size": case in gpu_cases([case.op]),
        "best_float32_flops": machine.flops(),
        "best_flops": machine.flops(dtype),
        "launch_seconds": machine.launch_seconds,
        "replay_seconds": machine.replay_seconds,
        **environment,
    }


def read_rows(path: Path) -> list[dict]:
    """The rows of a result file. Raises ValueError that names the line which is no row.

    Rows of bench_hosts are of a model: they get the op "model", and, like those of bench_ftp_pose, the names that other
    rows have for their values.
    """
    rows = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if isinstance(row, dict) and "model" in row:
                row = _of_model(row)
            if isinstance(row, dict) and row.get("op") == "ftp_pose":
                row = _of_ftp_pose(row)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        except KeyError as error:
            raise ValueError(f"{path}:{number}: got {line[:40]!r}, wanted {error} among its names, too") from error
        missing = [name for name in NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}:{number}: got {line[:40]!r}, wanted an object with {', '.join(missing)}")
        rows.append(row)
    return rows


def _of_model(row: dict) -> dict:
    kind = f"{row['model']} {row['mode']}"
    shared = {"op": "model", "shape": {"B": row["batch"]}, "kind": f"{kind} {row['whose']}"}
    return row | shared | {"timings": {row["whose"]: {"p50": row["seconds"]}}}


def _of_ftp_pose(row: dict) -> dict:
    kind = f"{row['size']} epsilon {row['epsilon']} prune_at {row['prune_at']}"
    timings = {"ours": row["timing"]} if row["timing"] else {}
    return row | {"shape": {"B": row["batch"]}, "kind": kind, "timings": timings}


def case_key(row: dict) -> tuple:
    """What makes two rows the same measurement."""
    return row["op"], tuple(sorted(row["shape"].items())), row.get("kind", ""), row.get("dtype", "float32")


def case_name(row: dict) -> str:
    """gather_tokens B1 J17 F243 C512 K81 smooth, and the dtype where it is not float32"""
    sizes = (f"{size}{value}" for size, value in row["shape"].items())
    dtype = row.get("dtype", "float32")
    return " ".join([row["op"], *sizes, row.get("kind", ""), *([dtype] if dtype != "float32" else [])])
