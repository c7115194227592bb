"""Two result files beside each other: `./dev bench --compare A.jsonl B.jsonl`."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .rows import case_key, case_name, read_rows


def changes(before: list[dict], after: list[dict]) -> list[dict]:
    """For every case and rival in both (the last row of each counts): medians in seconds and before / after."""
    known = {case_key(row): row for row in before}
    latest = {case_key(row): row for row in after}
    return [
        {
            "case": case_name(row),
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
