"""The pictures of the report, each from result rows of one machine; None where the rows have nothing to show."""

import math
from collections import defaultdict
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .rows import case_name

COLOURS = {"official": "#8c8c8c", "ours": "#0b6e4f", "compile": "#c98a00"}
MARKERS = "osD^vP<X>*dph"
WIDTH = 5.0  # inches; 360 points: on a phone, which is about 360 pixels wide, a point of type is a pixel


def operations(rows: list[dict]) -> list[dict]:
    """The timed rows of single operations."""
    return [row for row in rows if "official" in row.get("timings", {}) and "verdict" in row]


def slope(x: list[float], y: list[float]) -> float:
    """Of the straight line through log y over log x: the exponent of growth.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


AXES = {"N": 3, "B": 3, "C": 3, "K": 3, "threads": 2}  # and how many sizes make a line


def series(rows: list[dict], axis: str) -> list[dict]:
    """Rows of prune_cluster that differ in `axis` alone, as many as there are, in its order; none where too few."""
    groups = defaultdict(dict)
    for row in operations(rows):
        if row["op"] == "prune_cluster" and axis in row["shape"]:
            others = tuple((size, value) for size, value in row["shape"].items() if size != axis)
            groups[others, row["kind"]][row["shape"][axis]] = row
    longest = max(groups.values(), key=len, default={})
    return [longest[size] for size in sorted(longest)] if len(longest) >= AXES[axis] else []


def _few_ticks(axes, form: str) -> None:
    """1, 2 and 5 of every decade of a logarithmic x axis, written as numbers."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(form)
    axes.xaxis.set_minor_formatter(NullFormatter())


def speed_up(rows: list[dict]) -> Figure | None:
    """How many times faster ours is than the official formulation."""
    shown = [row for row in operations(rows) if row["speed_up"]]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 0.7 + 0.36 * len(shown)))
    places = range(len(shown))
    bars = axes.barh(places, [row["speed_up"] for row in shown], height=0.4, color=COLOURS["ours"])
    axes.bar_label(bars, [f"{row['speed_up']:.1f}x" for row in shown], padding=3, fontsize=8)
    inside = axes.get_yaxis_transform()
    for place, row in enumerate(shown):  # above its bar: beside it the name would take half of the width
        axes.text(0.01, place - 0.25, case_name(row), transform=inside, fontsize=7, va="bottom")
    axes.set_yticks([])
    axes.set(xscale="log", xlabel="official formulation / ours, medians")
    _few_ticks(axes, "{x:g}x")
    axes.axvline(1, color="0.75", linewidth=0.8, zorder=0)
    axes.margins(x=0.15)
    axes.set_ylim(-0.9, len(shown) - 0.5)
    axes.invert_yaxis()
    return figure


def roofline(rows: list[dict]) -> Figure | None:
    """Achieved seconds over the counted floor, a marker per operation; below the line work was saved, not done."""
    shown = [row for row in operations(rows) if row.get("floor")]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 5.4))
    for place, op in enumerate(dict.fromkeys(row["op"] for row in shown)):
        of_op = [row for row in shown if row["op"] == op]
        floors = [row["floor"] * 1e3 for row in of_op]
        style = {"marker": MARKERS[place % len(MARKERS)], "s": 34, "linewidths": 0.8}
        for rival, colours in (
            ("official", {"facecolors": "none", "edgecolors": COLOURS["official"]}),
            ("ours", {"color": f"C{place % 10}", "label": op}),
        ):
            axes.scatter(floors, [row["timings"][rival]["p50"] * 1e3 for row in of_op], **style, **colours)
    floors = [row["floor"] * 1e3 for row in shown]
    ends = min(floors) / 2, max(floors) * 2
    axes.plot(ends, ends, color="black", linewidth=0.8, label="floor")
    axes.scatter([], [], facecolors="none", edgecolors=COLOURS["official"], label="official, of each")
    axes.set(xscale="log", yscale="log", xlabel="counted floor, ms", ylabel="measured median, ms")
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    return figure


def _growth(axes, shown: list[dict], axis: str, value: Callable[[dict, str], float]) -> None:
    sizes = [row["shape"][axis] for row in shown]
    for rival in ("official", "ours"):
        values = [value(row, rival) for row in shown]
        if all(found > 0 for found in values):
            label = f"{rival}: slope {slope(sizes, values):.2f}"
            axes.plot(sizes, values, marker="o", markersize=4, color=COLOURS[rival], label=label)
    axes.set(xscale="log", yscale="log", xlabel=axis)
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7)


def scaling(rows: list[dict]) -> Figure | None:
    """prune_cluster over N, B, C, K and threads, log-log; the slope is the exponent."""
    found = {axis: shown for axis in AXES if (shown := series(rows, axis))}
    if not found:
        return None
    columns = min(2, len(found))
    grid = math.ceil(len(found) / columns), columns
    figure, every = plt.subplots(*grid, figsize=(WIDTH, 2.7 * grid[0]), squeeze=False, layout="constrained")
    for axes in every.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (axis, shown) in zip(every.flat, found.items(), strict=False):
        _growth(axes, shown, axis, lambda row, rival: row["timings"][rival]["p50"] * 1e3)
        axes.set_ylabel("ms")
    return figure


def memory(rows: list[dict]) -> Figure | None:
    """Peak memory of one prune_cluster beyond its inputs, over N."""
    shown = series([row for row in rows if row.get("peak_bytes")], "N")
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    _growth(axes, shown, "N", lambda row, rival: row["peak_bytes"][rival] / 1e6)
    axes.set_ylabel("MB")
    return figure


def hosts_of(rows: list[dict]) -> dict[str, list[dict]]:
    """name -> timed rows of that host, by tokens kept."""
    found = defaultdict(list)
    for row in rows:
        if row["op"] == "host" and row["timings"]:
            found[row["kind"]].append(row)
    return {host: sorted(of_host, key=lambda row: row["shape"]["K"]) for host, of_host in found.items()}


def frames_per_second(rows: list[dict]) -> Figure | None:
    """End to end, over the tokens that are left after the last stage."""
    found = hosts_of(rows)
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2))
    for host, of_host in found.items():
        kept = [row["shape"]["K"] for row in of_host]
        axes.plot(kept, [row["frames_per_second"] for row in of_host], marker="o", markersize=4, label=host)
    axes.set(xlabel="tokens kept after the last stage", ylabel="input frames a second", ylim=(0, None))
    axes.legend(fontsize=7)
    return figure


def trade_off(rows: list[dict]) -> Figure | None:
    """Speed against what keeping K frames alone loses, one curve per host and pruner."""
    losses = [row for row in rows if row["op"] == "recovery"]
    found = {host: of_host for host, of_host in hosts_of(rows).items() if len(of_host) > 1}
    if not losses or not found:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 4.6))
    for pruner in losses[-1]["pruners"]:
        if pruner["pruner"] not in ("cluster", "sampler", "motion"):
            continue
        error = {int(K): value for K, value in pruner["mean"].items()}
        for host, of_host in found.items():
            points = [
                (row["frames_per_second"], error[row["shape"]["K"]]) for row in of_host if row["shape"]["K"] in error
            ]
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{host}, {pruner['pruner']}")
    unit = losses[-1]["pruners"][0]["unit"]
    axes.set(
        xlabel="input frames a second", ylabel=f"error of the interpolated walk, {unit}", xscale="log", yscale="log"
    )
    _few_ticks(axes, "{x:g}")
    axes.legend(fontsize=6)
    return figure


FIGURES = {
    "speed-up": ("Speed-up over the official formulation", speed_up),
    "roofline": ("Achieved against the counted floor", roofline),
    "scaling": ("Scaling of cluster pruning in N, B, C, K and threads", scaling),
    "memory": ("Peak memory of cluster pruning against N", memory),
    "fps": ("Frames per second against tokens kept", frames_per_second),
    "trade-off": ("Trade-off: speed and what is lost by keeping fewer frames", trade_off),
}
