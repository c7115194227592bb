"""The one screen of the demo: header, operations, models, pruners."""

import sys

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..comparison import Result
from .models import ModelResult
from .pruners import UNIFORM, Recovery

WIDTH = 128
MISSING = "-"


def new_console() -> Console:
    """Standard output, as wide as the terminal, or WIDTH columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def new_progress() -> Progress:
    """A bar on standard error; it shows only where that is a terminal, and is gone at the end."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:30}"), BarColumn(), TimeElapsedColumn())
    # No refreshing thread: it would run beside what is timed.
    return Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)


class Steps:
    """A progress bar over `total` steps, drawn when a step begins and between the rounds of a long one."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.done, self.size = progress, 0, 0
        self.task = progress.add_task("", total=total)

    def begin(self, name: str, size: int = 1) -> None:
        """The step before is done; this one counts for `size`."""
        self.done, self.size = self.done + self.size, size
        self.progress.update(self.task, description=name, completed=self.done, refresh=True)

    def within(self, share: float) -> None:
        """This share of the step is done."""
        self.progress.update(self.task, completed=self.done + share * self.size, refresh=True)


def header(report: dict) -> Panel:
    """What ran where, on what."""
    clip, machine, environment = report["clip"], report["machine"], report["environment"]
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in machine["float32_products_flops"].items())
    copy_rate = machine["large_copy_bytes_per_second"] / 1e9
    filled = f"; {clip['filled_joints']} joints not finite or unseen, filled in time" if clip["filled_joints"] else ""
    lines = [
        f"{report['device']}   torch {environment['torch']}   Python {environment['python']}",
        f"reached in this run: {products} GFLOP/s float32, large copies {copy_rate:.0f} GB/s",
        *_backends(report["backends"]),
        f"clip: {clip['name']}, {clip['frames']} frames of {clip['joints']} joints, {clip['windows']} windows; "
        f"{clip['note']}{filled}",
    ]
    return Panel(Text("\n".join(lines)), title="h2ot_kernels demo", title_align="left")


def _backends(backends: dict[str, dict]) -> list[str]:
    """What is built and ran; what never ran on this machine, and why."""
    missing = [name for name, row in backends.items() if not row["is_built"]]
    roles = {name: "ran here" if row["ran_here"] else "never ran here" for name, row in backends.items()}
    if not backends["reference"]["ran_here"]:
        roles["reference"] = "for equality only"
    lines = ["backends built: " + ", ".join(f"{name} ({roles[name]})" for name in backends if name not in missing)]
    unrun = {name: row["reason"] for name, row in backends.items() if roles[name] == "never ran here"}
    return lines + [f"  {name} never ran on this machine: {reason}" for name, reason in unrun.items()]


def _section(title: str, caption: str, columns: list[str], rows: list[list], left: int = 1) -> Group:
    """A titled table; the first `left` columns are aligned left."""
    table = Table(box=None, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return Group(Text(f"\n{title}", style="bold"), table, Text(caption, style="dim"))


def _ms(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.3g}x"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.0f} %"


def _wrong() -> Text:
    return Text("WRONG", style="bold red")


def operations_section(results: list[Result], with_compile: bool) -> Group:
    """Per operation: right or wrong, then how fast."""
    compile_column = ["compile"] if with_compile else []
    rows = []
    for result in results:
        verdict, timings = result.verdict, {name: timing.p50 for name, timing in result.timings.items()}
        rows.append(
            [
                result.op,
                " ".join(f"{name} {size}" for name, size in result.shape.items()),
                f"{verdict.agreement_official:.3f} / {verdict.agreement_ours:.3f}",
                f"{verdict.error:.2g}",
                f"{verdict.bound:.2g}",
                *[_ms(timings.get(name)) for name in ("official", *compile_column)],
                _ms(timings.get("ours")) if verdict.is_right else _wrong(),
                Text(_times(result.speed_up), style="bold"),
                _percent(result.share_of_peak),
            ]
        )
    return _section(
        "Operations, float32: checked, then timed in turn with the official formulation",
        "agreement: share of indices, labels or elements (within the bound) that are the float64 oracle's, official "
        "/ ours. ms: medians.\npeak: time of the counted work at this run's best library product, or as a warm copy, "
        "over our time",
        ["", "shape", "agreement", "error", "bound", "ms official", *compile_column, "ours", "speed-up", "peak"],
        rows,
        left=2,
    )


def models_section(
    results: list[ModelResult], over_unpruned: dict[str, float | None], with_compile: bool, weights: str
) -> Group:
    """Per model: what it costs, and how much faster it is than the official formulation and than itself unpruned."""
    compile_column = ["compile"] if with_compile else []
    rows = []
    for result in results:
        official, ours = result.seconds("official"), result.seconds("ours")
        speeds = [result.frames_per_second(rival) for rival in ("official", "ours")]
        rows.append(
            [
                result.name,
                " > ".join(map(str, result.tokens)),
                f"{result.gflops:.1f}",
                *[_ms(result.seconds(rival)) for rival in ("official", *compile_column)],
                _ms(ours) if result.is_right else _wrong(),
                *[MISSING if speed is None else f"{speed:.0f}" for speed in speeds],
                Text(_times(official / ours if official and ours else None), style="bold"),
                _times(over_unpruned[result.name]),
                MISSING if result.deviation is None else f"{result.deviation:.1g}",
            ]
        )
    rates, ratios = ["FPS official", "ours"], ["over official", "over unpruned"]
    return _section(
        f"Models, batch 1, {weights}",
        "FPS: frames of the window / median time of one forward. pose diff: largest difference from the official "
        "formulation's poses,\nsame weights and kept frames",
        ["", "tokens", "GFLOPs", "ms official", *compile_column, "ours", *rates, *ratios, "pose diff"],
        rows,
        left=2,
    )


def recoveries_section(recoveries: list[Recovery], window: int) -> Group:
    """Per pruner: error of the frames that it dropped, for several K."""
    unit, kept = recoveries[0].unit, list(recoveries[0].error)
    what = "MPJPE after interpolation" if unit == "mm" else "mean 2D joint distance after interpolation"
    uniform = next(found for found in recoveries if found.pruner == UNIFORM)
    rows = []
    for found in recoveries:
        name = f"{found.pruner} (uniform)" if found is uniform else found.pruner
        rows.append([name, *[f"{found.mean(K):.3g}{_ratio(found, uniform, K)}" for K in kept]])
    return _section(
        f"Recovery error of each pruner, no weights: K true frames of {window} kept, {what}, {unit}",
        "in brackets: over that of uniform sampling",
        ["", *[f"K {K}" for K in kept]],
        rows,
    )


def _ratio(found: Recovery, uniform: Recovery, kept: int) -> str:
    if found is uniform or uniform.mean(kept) == 0:
        return ""
    return f" ({found.mean(kept) / uniform.mean(kept):.2g}x)"
