"""The pictures of the demo: motion with the kept frames, the decision graph, recovery error against K."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

import h2ot_kernels as h2ot

from .keypoints import Clip, cut_windows, window_starts
from .pruners import UNIFORM, Recovery

COLOURS = {"cluster": "#1b6ca8", "sampler": "#4d4d4d", "motion": "#d1495b", "attention": "#2e8b57"}
LABELS = {
    "cluster": "cluster (TPC)",
    "sampler": "sampler (TPS, uniform)",
    "motion": "motion (TPMo)",
    "attention": "attention (TPA)",
}


def draw_all(folder: Path, clip: Clip, recoveries: list[Recovery], window: int, kept: int) -> list[Path]:
    """Write every picture into folder; their paths."""
    figures = {
        "motion.png": draw_motion(clip, recoveries, window, kept),
        "decision_graph.png": draw_decision(clip, window, kept),
        "recovery.png": draw_recovery(clip, recoveries, window),
    }
    for name, figure in figures.items():
        FigureCanvasAgg(figure).print_png(folder / name)
    return [folder / name for name in figures]


def _new_figure(width: float, height: float, **grid) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = np.atleast_1d(figure.subplots(**grid))
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_motion(clip: Clip, recoveries: list[Recovery], window: int, kept: int) -> Figure:
    """Mean joint speed over time; below, one row per pruner with a tick at each kept frame of each window."""
    figure, (speed_axis, kept_axis) = _new_figure(
        12, 5.2, nrows=2, sharex=True, gridspec_kw={"height_ratios": [1.2, 1.0]}
    )
    seconds = 1.0 if clip.fps is None else 1 / clip.fps
    speed = np.linalg.norm(np.diff(clip.points, axis=0), axis=-1).mean(-1)
    time = np.arange(1, clip.num_frames) * seconds
    speed_axis.fill_between(time, speed, color="#9db4c0", linewidth=0)
    speed_axis.set_ylabel(f"mean joint motion\n({clip.unit} per frame)")
    speed_axis.set_ylim(bottom=0)
    starts = window_starts(clip.num_frames, window)
    for row, recovery in enumerate(recoveries):
        frames = np.unique(np.concatenate(_new_frames(recovery.index[kept].numpy(), starts, window, clip.num_frames)))
        kept_axis.eventplot(
            frames * seconds, lineoffsets=-row, linelengths=0.8, linewidths=0.7, colors=COLOURS[recovery.pruner]
        )
    for axis in (speed_axis, kept_axis):
        for start in starts[1:]:
            axis.axvline(_first_new(start, starts, window) * seconds, color="#888888", linewidth=0.8, linestyle=":")
    kept_axis.set_yticks([-row for row in range(len(recoveries))], [LABELS[found.pruner] for found in recoveries])
    kept_axis.tick_params(axis="y", length=0)
    kept_axis.set_xlabel("frame" if clip.fps is None else f"time (s), {clip.fps:g} frames per second")
    kept_axis.set_xlim(0, max(clip.num_frames - 1, 1) * seconds)
    speed_axis.set_title(
        f"Which frames are kept: {kept} of every {window}-frame window (dotted: window edges) - {Path(clip.name).stem}",
        loc="left",
        fontsize=11,
    )
    return figure


def _first_new(start: int, starts: list[int], window: int) -> int:
    """The first frame that the window at start adds to those before it."""
    before = [other + window for other in starts if other < start]
    return max(before, default=0)


def _new_frames(index: np.ndarray, starts: list[int], window: int, num_frames: int) -> list[np.ndarray]:
    """Kept frames of the clip, window by window, each frame by the first window that holds it."""
    frames = [row + start for row, start in zip(index, starts, strict=True)]
    firsts = [_first_new(start, starts, window) for start in starts]
    return [rows[(rows >= first) & (rows < num_frames)] for rows, first in zip(frames, firsts, strict=True)]


def draw_decision(clip: Clip, window: int, kept: int) -> Figure:
    """m (the mean squared distance to the k nearest, density = exp(-m)) against distance, both logarithmic.

    The densities of smooth motion all round to nearly 1; m keeps them apart. The curve is the score of the cut.
    """
    poses = cut_windows(clip.normalised, window)
    speeds = [np.abs(np.diff(pose, axis=0)).sum() for pose in poses]
    busiest = int(np.argmax(speeds))
    tokens = torch.from_numpy(poses[busiest : busiest + 1]).flatten(2)
    scores = h2ot.score_tokens(tokens.double())
    chosen = np.zeros(window, bool)
    chosen[h2ot.prune_cluster(tokens.double(), kept)[0].numpy()] = True
    m = -scores.density[0].log().numpy()
    distance, score = scores.distance[0].numpy(), scores.score[0].numpy()

    figure, (axis,) = _new_figure(7.5, 5.4)
    m_floor, distance_floor = (_floor(values) for values in (m, distance))
    x, y = np.maximum(m, m_floor), np.maximum(distance, distance_floor)
    is_peak = np.isinf(score) & (score > 0)
    axis.scatter(
        x[~chosen], y[~chosen], s=26, facecolors="none", edgecolors="#9a9a9a", label=f"dropped ({(~chosen).sum()})"
    )
    shown = chosen & ~is_peak
    points = axis.scatter(
        x[shown], y[shown], s=30, c=np.flatnonzero(shown), cmap="viridis", label=f"kept ({chosen.sum()})"
    )
    axis.scatter(x[is_peak], y[is_peak], s=130, marker="*", color="#d1495b", label="densest (always first)", zorder=3)
    cut = score[chosen].min()
    if np.isfinite(cut):
        line = np.geomspace(x.min(), x.max(), 100)
        axis.plot(line, np.exp(cut + line), color="#d1495b", linewidth=1, label="score of the cut")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(x.max() * 1.3, x.min() / 1.3)
    axis.set_xlabel("m, mean squared distance to the 2 nearest (itself included); denser to the right")
    axis.set_ylabel("distance to the nearest denser frame")
    figure.colorbar(points, ax=axis, label="frame in the window", pad=0.01)
    axis.legend(frameon=False, fontsize=8, loc="best")
    at_floor = int(((m < m_floor) | (distance < distance_floor)).sum())
    note = f"; {at_floor} exact duplicates drawn at the edge" if at_floor else ""
    axis.set_title(
        f"Decision graph: 2D poses, window {busiest + 1} of {len(poses)}, K = {kept}{note}", loc="left", fontsize=10
    )
    return figure


def _floor(values: np.ndarray) -> float:
    """Where zeros are drawn on a logarithmic axis: a third of the smallest value that is not rounding."""
    positive = values[values > 1e-14]
    return float(positive.min()) / 3 if positive.size else 1e-14


def draw_recovery(clip: Clip, recoveries: list[Recovery], window: int) -> Figure:
    """Mean error (solid) and that of the worst 5 % of frames (dashed) against K."""
    figure, (axis,) = _new_figure(7.5, 4.8)
    for recovery in recoveries:
        kept = sorted(recovery.error)
        colour = COLOURS[recovery.pruner]
        width = 2.4 if recovery.pruner == UNIFORM else 1.6
        means = [recovery.mean(K) for K in kept]
        tails = [float(np.quantile(recovery.error[K], 0.95)) for K in kept]
        axis.plot(kept, means, color=colour, marker="o", markersize=4, linewidth=width, label=LABELS[recovery.pruner])
        axis.plot(kept, tails, color=colour, linewidth=0.9, linestyle="--", alpha=0.7)
    axis.plot([], [], color="#666666", linewidth=0.9, linestyle="--", label="95th percentile of the frames")
    axis.set_yscale("log")
    axis.set_xticks(kept)
    axis.set_xlabel(f"K, frames kept of {window}")
    axis.set_ylabel(f"recovery error ({recoveries[0].unit})")
    axis.grid(axis="y", which="major", color="#dddddd", linewidth=0.6)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    axis.set_title(f"True frames kept, the rest interpolated - {Path(clip.name).stem}", loc="left", fontsize=11)
    return figure
