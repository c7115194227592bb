"""`./dev report [--rows FILE ...] [--out DIR]`: one self-contained HTML page and its pictures as PNG files.

--rows: result files of ./dev bench, bench.bench_large, _hosts, _dropin, _kept, _ftp_pose and _onnx. Without them this
machine is measured first, briefly (about 6 minutes), into DIR/rows.jsonl.
"""

import argparse
import base64
import io
import sys
from pathlib import Path

import jinja2
from matplotlib import pyplot as plt

from . import acceptance, bench_kept, bench_onnx, run
from .figures import FIGURES, operations
from .rows import case_key, case_name, read_rows

TEMPLATE = Path(__file__).parent / "report.html.j2"


def measure(rows: Path, seconds: float = 0.5) -> int:
    """Append this machine's rows, a few sizes of everything, `seconds` for each of an operation. 0: all right."""
    few = ["--out", str(rows), "--seconds"]
    wrong = run.main([*few, str(seconds), "--quick"])
    wrong |= run.main([*few, str(seconds), "--sweep", "--no-peers"])
    names = "mixste", "hot_mixste", "h2ot_mixste"
    wrong |= bench_kept.main([*few, str(6 * seconds), "--hosts", *names, "--kept", "27", "81", "162"])
    return wrong | bench_onnx.main([*few, str(10 * seconds), "--hosts", *names])


def latest(rows: list[dict]) -> list[dict]:
    """The last row of each measurement."""
    return list({case_key(row): row for row in rows}.values())


def by_machine(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows that may be compared with each other: of one device, number of threads and torch."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        threads = f"{row['threads']} thread{'s' * (row['threads'] != 1)}"
        found.setdefault(f"{row['device']}, {threads}, torch {row['torch']}", []).append(row)
    return {title: latest(of_machine) for title, of_machine in found.items()}


def _milliseconds(timing: dict | None, quantile: str = "p50") -> str:
    value = timing and timing[quantile]
    return f"{value * 1e3:.3f}" if value else "-"


def operation_table(rows: list[dict]) -> dict | None:
    """A line per case: medians of all rivals, ours' p99 and first call, speed-up, shares of the floor, memory.

    Of a GPU's rows the share of the floor is that of a call, of a replay, and of a replay with a cold L2 cache.
    """
    shown = [row for row in rows if "verdict" in row]
    rivals = list(dict.fromkeys(rival for row in operations(rows) for rival in row["timings"]))
    columns = ["operation", "speed-up", *(f"{rival}, ms" for rival in rivals), "ours p99", "ours first"]
    columns += ["of the floor", "agreement official / ours", "memory official / ours, MB"]
    lines = []
    for row in shown:
        timings, verdict, peak = row["timings"], row["verdict"], row.get("peak_bytes") or {}
        ours = timings.get("ours")
        shares = list((row.get("shares_of_floor") or {"ours": row.get("share_of_peak")}).items())
        shares = [share for rival, share in shares if rival != "ours, cold L2" and share]
        lines.append(
            [
                case_name(row),
                f"{row['speed_up']:.2f}x" if row["speed_up"] else "WRONG",
                *(_milliseconds(timings.get(rival)) for rival in rivals),
                _milliseconds(ours, "p99"),
                _milliseconds(ours, "first"),
                " / ".join(f"{100 * share:.0f} %" for share in shares) or "-",
                f"{verdict['agreement_official']:.3f} / {verdict['agreement_ours']:.3f}",
                " / ".join(f"{peak[rival] / 1e6:.1f}" for rival in ("official", "ours")) if peak else "-",
            ]
        )
    return {"title": "Operations", "columns": columns, "lines": lines} if lines else None


def gpu_table(rows: list[dict]) -> dict | None:
    """The table of `bench.acceptance`: calls and replays beside each other, a line per case that was timed on a GPU."""
    on_a_gpu = [row for row in rows if "verdict" in row and "ours, graph" in row["timings"]]
    head, lines = acceptance.columns_and_lines(on_a_gpu)
    return {"title": "Official over ours, on a GPU", "columns": head, "lines": lines} if lines else None


def host_table(rows: list[dict]) -> dict | None:
    """A line per host and number of tokens."""
    columns = ["host", "tokens", "GFLOP", "frames a second", "p50, ms", "p99, ms"]
    lines = []
    for row in (row for row in rows if row["op"] == "host"):
        rate, ours = row.get("frames_per_second"), row["timings"].get("ours")
        times = _milliseconds(ours), _milliseconds(ours, "p99")
        tokens = " > ".join(map(str, row["tokens"]))
        lines.append([row["kind"], tokens, f"{row['gflops']:.1f}", f"{rate:.0f}" if rate else "WRONG", *times])
    return {"title": "Whole hosts, batch 1", "columns": columns, "lines": lines} if lines else None


def model_table(rows: list[dict]) -> dict | None:
    """A line per host, mode and dtype: ours, and how many times faster than the official formulation."""
    columns = ["host", "mode", "dtype", "batch", "ours, ms", "ours, FPS", "speed-up", "over float32"]
    columns += ["graph, ms", "graph over graph", "deviation"]
    lines = []
    for row in (row for row in rows if row["op"] == "model" and row["whose"] == "ours"):
        over = [f"{row[over]:.2f}x" if row[over] else "-" for over in ("over_official", "over_official_float32")]
        speed = f"{row['seconds'] * 1e3:.1f}", f"{row['frames_per_second']:.0f}", *over
        case = row["model"], row["mode"], row["dtype"], str(row["batch"])
        graph, gain = row.get("graph_seconds"), row.get("over_official_graph")
        replays = f"{graph * 1e3:.2f}" if graph else "-", f"{gain:.2f}x" if gain else "-"
        lines.append([*case, *speed, *replays, f"{row['deviation']:.1e}"])
    title = "Whole hosts beside the official formulation, in its dtype and in float32"
    return {"title": title, "columns": columns, "lines": lines} if lines else None


def large_table(rows: list[dict]) -> dict | None:
    """A line per number of tokens: time and extra memory of every rival."""
    shown = [row for row in rows if "extra_bytes" in row]
    rivals = list(dict.fromkeys(rival for row in shown for rival in row["extra_bytes"]))
    columns = ["tokens", *(f"{rival}, {unit}" for rival in rivals for unit in ("ms", "extra MB"))]
    lines = []
    for row in shown:
        extra = [f"{row['extra_bytes'][rival] / 1e6:.1f}" if rival in row["extra_bytes"] else "-" for rival in rivals]
        times = [_milliseconds(row["timings"].get(rival)) for rival in rivals]
        pairs = zip(times, extra, strict=True)
        lines.append([case_name(row) if row["timings"] else "WRONG", *(cell for pair in pairs for cell in pair)])
    return {"title": "Many tokens", "columns": columns, "lines": lines} if lines else None


def onnx_table(rows: list[dict]) -> dict | None:
    """A line per host: frames per second and deviation of the float32 and the int8 graph."""
    rivals = ("pytorch", "onnx float32", "onnx int8")
    columns = ["host", "tokens", *(f"{rival}, FPS" for rival in rivals), "float32 deviation", "int8 deviation"]
    lines = []
    for row in (row for row in rows if row["op"] == "onnx_host"):
        rates = [row["frames_per_second"].get(rival) for rival in rivals]
        deviations = [f"{row['deviation'][rival]:.1e}" for rival in rivals[1:]]
        cells = [f"{rate:.0f}" if rate else "WRONG" for rate in rates]
        lines.append([row["kind"], " > ".join(map(str, row["tokens"])), *cells, *deviations])
    title = "onnxruntime on the CPU; deviation relative to the largest coordinate"
    return {"title": title, "columns": columns, "lines": lines} if lines else None


def patch_table(rows: list[dict]) -> dict | None:
    """A line per patched model: `dropin.patch` beside the model as it was."""
    columns = ["model", "unpatched, ms", "patched, ms", "speed-up", "deviation"]
    lines = []
    for row in (row for row in rows if row["op"].startswith("dropin_")):
        times = [_milliseconds(row.get("timings", {}).get(rival)) for rival in ("unpatched", "patched")]
        gain = f"{row['speed_up']:.2f}x" if row["is_right"] else "WRONG"
        lines.append([case_name(row), *times, gain, f"{row['error']:.1e}"])
    return {"title": "Existing code, patched", "columns": columns, "lines": lines} if lines else None


def ftp_pose_table(rows: list[dict]) -> dict | None:
    """A line per epsilon and place of pruning of FTP-Pose, over its own unpruned model."""
    columns = ["FTP-Pose", "tokens a frame", "GFLOP", "ms", "over unpruned", "extra MB"]
    lines = []
    for row in (row for row in rows if row["op"] == "ftp_pose"):
        peak, gain = row["peak_bytes"], row.get("speed_up")
        lines.append(
            [
                case_name(row).removeprefix("ftp_pose "),
                str(row["kept_per_frame"]),
                f"{row['flops'] / 1e9:.1f}",
                _milliseconds(row["timings"].get("ours")),
                f"{gain:.2f}x" if gain else "WRONG",
                f"{peak / 1e6:.1f}" if peak is not None else "-",
            ]
        )
    return {"title": "FTP-Pose: tokens of images", "columns": columns, "lines": lines} if lines else None


TABLES = (operation_table, gpu_table, large_table, model_table, patch_table, host_table, ftp_pose_table, onnx_table)


def write(rows: list[dict], out: Path) -> Path:
    """report.html and a PNG per picture and machine in out; returns the page's path."""
    machines = []
    for number, (title, of_machine) in enumerate(by_machine(rows).items(), start=1):
        pictures = []
        for stem, (caption, draw) in FIGURES.items():
            figure = draw(of_machine)
            if figure is None:
                continue
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            (out / f"{number}-{stem}.png").write_bytes(buffer.getvalue())
            pictures.append({"title": caption, "data": base64.b64encode(buffer.getvalue()).decode()})
        tables = [make(of_machine) for make in TABLES]
        dates = sorted(row["date"][:10] for row in of_machine)
        detail = f"measured {dates[0]}" + ("" if dates[0] == dates[-1] else f" to {dates[-1]}")
        tables = [table for table in tables if table]
        machines.append({"title": title, "detail": detail, "tables": tables, "pictures": pictures})
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = out / "report.html"
    page.write_text(template.from_string(TEMPLATE.read_text()).render(machines=machines, count=len(rows)))
    return page


def main(arguments: list[str] | None = None) -> int:
    """0; 1: something measured here was wrong."""
    parser = argparse.ArgumentParser(prog="./dev report", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=Path, metavar="FILE", help="default: measure this machine first")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("report_out"), help="default: report_out")
    given = parser.parse_args(arguments)
    try:  # before anything is measured
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    wrong, files = 0, given.rows
    if files is None:
        files = [given.out / "rows.jsonl"]
        wrong = measure(files[0])
    try:
        rows = [row for file in files for row in read_rows(file)]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not rows:
        parser.error("--rows: got files without rows")
    print(f"report: {write(rows, given.out)}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
