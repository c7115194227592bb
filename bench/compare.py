"""Two result files beside each other: `./dev bench --compare A.jsonl B.jsonl`."""

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

NEEDED = ("op", "shape", "device", "threads", "torch", "date")


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


def key(row: dict) -> tuple:
    """What makes two rows the same measurement."""
    return row["op"], tuple(sorted(row["shape"].items())), row.get("kind", ""), row.get("dtype", "float32")


def name(row: dict) -> str:
    """gather_tokens B1 J17 F243 C512 K81 smooth, and the dtype where it is not float32"""
    sizes = (f"{size}{value}" for size, value in row["shape"].items())
    dtype = row.get("dtype", "float32")
    return " ".join([row["op"], *sizes, row.get("kind", ""), *([dtype] if dtype != "float32" else [])])


def changes(before: list[dict], after: list[dict]) -> list[dict]:
    """For every case and rival in both (the last row of each counts): medians in seconds and before / after."""
    known = {key(row): row for row in before}
    latest = {key(row): row for row in after}
    return [
        {
            "case": name(row),
            "rival": rival,
            "before": known[case]["timings"][rival]["p50"],
            "after": timing["p50"],
            "ratio": known[case]["timings"][rival]["p50"] / timing["p50"],
        }
        for case, row in latest.items()
        if case in known
        for rival, timing in row.get("timings", {}).items()
        if rival in known[case].get("timings", {})
    ]


def circumstances(rows: list[dict]) -> str:
    """The devices, threads and versions that a file's rows were measured with."""
    return "; ".join(sorted({f"{row['device']}, {row['threads']} threads, torch {row['torch']}" for row in rows}))


def show(first: Path, second: Path) -> int:
    """Print the table. 0, or 1 where the files have no case in common."""
    before, after = read_rows(first), read_rows(second)
    found = changes(before, after)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(f"A: {first}: {circumstances(before)}\nB: {second}: {circumstances(after)}", markup=False)
    if circumstances(before) != circumstances(after):
        console.print("measured under different circumstances: read the ratios of ours beside those of official")
    table = Table("case", "rival", "A ms", "B ms", "A / B", box=box.SIMPLE)
    for row in found:
        numbers = f"{row['before'] * 1e3:.4f}", f"{row['after'] * 1e3:.4f}", f"{row['ratio']:.2f}"
        table.add_row(row["case"], row["rival"], *numbers)
    console.print(table if found else "no case in common")
    return int(not found)
