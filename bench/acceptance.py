"""What a run on a GPU says in sum, as Markdown: made from its rows, nothing is measured here.

`python -m bench.acceptance FILE ...` prints the tables of result files. Every ratio is official over ours: above 1 ours
is faster. "plain": calls from Python; "graph": replays of CUDA graphs.
"""

import contextlib
import json
import sys
from pathlib import Path

PLAIN, GRAPH = ("official", "ours"), ("official, graph", "ours, graph")


def read(*files: Path, since: str = "") -> list[dict]:
    """The rows of those result files that exist, measured at that date or later."""
    rows = []
    for line in (line for file in files if file.exists() for line in file.read_text().splitlines()):
        with contextlib.suppress(json.JSONDecodeError):  # cut off, where its process was stopped
            rows.append(json.loads(line))
    return [row for row in rows if row.get("date", "") >= since]


def latest(rows: list[dict]) -> list[dict]:
    """The last row of each case, where the first one stood."""
    return list({_case(row): row for row in rows}.values())


def _ratio(row: dict, official: str, ours: str) -> str:
    """Of the medians; - where one was not timed (as a graph: cannot be captured)."""
    timings = row["timings"]
    if official not in timings or ours not in timings:
        return "-"
    return f"{timings[official]['p50'] / timings[ours]['p50']:.2f}x"


def _microseconds(row: dict, rival: str) -> str:
    return f"{row['timings'][rival]['p50'] * 1e6:.1f}" if rival in row["timings"] else "-"


def _share(row: dict, rival: str) -> str:
    share = (row.get("shares_of_floor") or {}).get(rival)
    return f"{100 * share:.0f} %" if share else "-"


def _case(row: dict) -> str:
    sizes = " ".join(f"{name} {size}" for name, size in row["shape"].items())
    return f"{row['op']} {sizes} {row.get('kind', '')} {row.get('dtype', 'float32')}"


def columns_and_lines(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """A line per case: the four ways to set both beside each other, torch.compile, shares of the floor, memory."""
    columns = ["case", "plain / plain", "plain / graph", "graph / graph", "compile / plain", "compile / graph"]
    columns += ["official, us", "ours, us", "official graph, us", "ours graph, us", "floor, us", "of the floor"]
    columns += ["graph, of the floor", "graph, cold L2, of the floor", "memory official / ours", "agreement", "checked"]
    lines = []
    for row in latest(rows):
        verdict, peak = row["verdict"], row.get("peak_bytes") or {}
        if not row["timings"]:
            lines.append([_case(row), "WRONG, not timed", *[""] * (len(columns) - 2)])
            continue
        memory = f"{peak['official'] / peak['ours']:.1f}x" if peak.get("ours") else "-"
        lines.append(
            [
                _case(row),
                _ratio(row, *PLAIN),
                _ratio(row, "official", "ours, graph"),
                _ratio(row, *GRAPH),
                _ratio(row, "compile", "ours"),
                _ratio(row, "compile", "ours, graph"),
                *(_microseconds(row, rival) for rival in (*PLAIN, *GRAPH)),
                f"{row['floor'] * 1e6:.1f}" if row["floor"] else "-",
                *(_share(row, rival) for rival in ("ours", "ours, graph", "ours, graph, cold L2")),
                memory,
                f"{verdict['agreement_official']:.3f} / {verdict['agreement_ours']:.3f}",
                row.get("checked", "-"),
            ]
        )
    return columns, lines


def models(rows: list[dict]) -> list[str]:
    """A line per host, batch and dtype: ours beside the official formulation, pruned beside unpruned."""
    columns = ["host", "B", "dtype", "plain / plain", "graph / graph", "ours, ms", "ours graph, ms", "FPS", "graph FPS"]
    columns += ["FPS over our unpruned", "graph FPS over our unpruned"]

    def times(value: float | None) -> str:
        return f"{value:.2f}x" if value else "-"

    lines = []
    for row in (row for row in rows if row.get("whose") == "ours" and row.get("mode") == "inference"):
        graph, base = row.get("graph_seconds"), row.get("of_baseline", {})
        lines.append(
            [
                row["model"],
                str(row["batch"]),
                row["dtype"],
                times(row["over_official"]),
                times(row.get("over_official_graph")),
                f"{row['seconds'] * 1e3:.2f}",
                f"{graph * 1e3:.2f}" if graph else "-",
                f"{row['frames_per_second']:.0f}",
                f"{row['graph_frames_per_second']:.0f}" if graph else "-",
                times(base.get("frames_per_second")),
                times(base.get("graph_frames_per_second")),
            ]
        )
    return table("Hosts, inference", columns, lines)


def patched(rows: list[dict]) -> list[str]:
    """A line per batch and dtype of the official HoT MixSTE with and without the patch."""
    lines = []
    for row in (row for row in rows if row.get("op") == "dropin_hot_mixste"):
        times, speed = ["-", "-"], "WRONG, not timed"
        if row["is_right"]:
            times = [f"{row['timings'][of]['p50'] * 1e3:.2f}" for of in ("unpatched", "patched")]
            speed = f"{row['speed_up']:.2f}x"
        lines.append([str(row["shape"]["B"]), row["dtype"], *times, speed])
    return table("The official HoT MixSTE, patched", ["B", "dtype", "unpatched, ms", "patched, ms", "speed-up"], lines)


def machine(rows: list[dict]) -> list[str]:
    """What this machine did at best in this run."""
    shown = [row for row in rows if row.get("best_flops")]
    if not shown:
        return []
    rates = {row.get("dtype", "float32"): row["best_flops"] for row in shown}
    products = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in rates.items())
    last = shown[-1]
    launch, replay = last["launch_seconds"] * 1e6, last["replay_seconds"] * 1e6
    empty = f"between two events with nothing to do: a launch {launch:.1f} us, the replay of a graph {replay:.1f} us"
    return [f"{last['device']}, torch {last['torch']}. Best products: {products}; {empty} (part of every time).", ""]


def table(title: str, columns: list[str], lines: list[list[str]]) -> list[str]:
    """Lines of Markdown; none for an empty table."""
    if not lines:
        return []
    head = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*head, *("| " + " | ".join(cells) + " |" for cells in lines), ""]


def tables(rows: list[dict]) -> list[str]:
    """All that these rows have something for; ratios are official over ours, medians of one run."""
    timed = [row for row in rows if "verdict" in row]
    asked = table("What is asked of a GPU", *columns_and_lines([row for row in timed if row.get("gpu_size")]))
    others = table("Other sizes", *columns_and_lines([row for row in timed if not row.get("gpu_size")]))
    return [*machine(rows), *asked, *models(rows), *patched(rows), *others]


if __name__ == "__main__":
    print("\n".join(tables(read(*map(Path, sys.argv[1:])))))
