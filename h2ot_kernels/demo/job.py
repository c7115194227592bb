"""The main job: from 2D keypoints to a screen that says how right and how fast everything is on this machine."""

import datetime
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import h2ot_kernels as h2ot

from .. import hosts
from ..backend import check_named
from ..comparison import compare
from ..timing import Machine
from . import models as hosts_side
from . import pictures, pruners, screen
from .keypoints import Clip, read_clip, window_starts
from .operations import WINDOW, demo_comparisons
from .skeleton import walking_clip

KEPT = 81


def run(
    source: str | Path | None = None,
    models: Sequence[str] = (),
    out: str | Path = "demo_out",
    checkpoint: str | Path | None = None,
    *,
    with_compile: bool = False,
    device: str | None = None,
    seconds: float = 60.0,
) -> dict:
    """Run the demo, print its screen, write its files into `out`; returns the report.

    source: a keypoint file (`keypoints`), else the made-up walker. models: host names, else `models.DEFAULT`.
    checkpoint: an official one, for the one model named. with_compile: `torch.compile` of the official one, too.
    device: "cpu" or "cuda", else a GPU where there is one. seconds: about how long the timing may take.
    Raises KeypointError for a bad input, ValueError or OSError for a bad model, checkpoint, folder, device or number,
    and where the backend that H2OT_KERNELS_BACKEND names cannot run.
    """
    for name in models:
        hosts.require_lifting("models", name)
    if checkpoint is not None and len(models) != 1:
        raise ValueError(f"checkpoint: fits one model, got {len(models)} named models; name one with --model")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got 'cuda', but torch {torch.__version__} sees no CUDA device here")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_named(device)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"seconds: got {seconds:g}, wanted more than 0")
    clip = read_clip(source) if source is not None else walking_clip()
    names = list(models) or list(hosts_side.DEFAULT)
    baselines = sorted({hosts_side.base_of(name) for name in names} - set(names))
    built = {name: hosts_side.build_ours(name, checkpoint, device) for name in names}
    built |= {name: hosts_side.build_ours(name, None, device) for name in baselines}

    for model in built.values():
        hosts_side.model_windows(model, clip, device)  # refuses a clip that does not fit before anything is timed
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    machine = Machine(device)
    with screen.new_progress() as progress:
        comparisons = demo_comparisons(clip, device)
        steps = screen.Steps(progress, len(comparisons) + 2 * len(names) + 4)
        steps.begin("machine")
        machine.flops()
        results = []
        for comparison in comparisons:
            steps.begin(comparison.op)
            share = seconds / 4 / len(comparisons)
            results.append(compare(comparison, machine, seconds=share, with_compile=with_compile))
        steps.begin("recovery error")
        recoveries = pruners.measure(clip, WINDOW, device)
        steps.begin("pictures")
        drawn = pictures.draw_all(folder, clip, recoveries, WINDOW, KEPT)
        steps.begin("models", len(names))
        model_results = hosts_side.measure(
            built,
            clip,
            device,
            seconds=seconds * 0.6,
            with_compile=with_compile,
            only_ours=baselines,
            on_round=steps.within,
        )
        poses = {}
        for name in names:
            steps.begin(f"poses of {name}")
            limit = seconds * 0.15 / len(names) if checkpoint is None else float("inf")
            poses[name], kept = hosts_side.lift(built[name], clip, device, seconds=limit)
            if kept is not None:
                poses[f"{name}_kept"] = kept
    unpruned = {found.name: found.seconds("ours") for found in model_results}
    shown = [found for found in model_results if found.name in names]
    over_unpruned = {found.name: _over(unpruned, found) for found in shown}

    np.savez_compressed(folder / "poses.npz", window_starts=window_starts(clip.num_frames, WINDOW), **poses)
    weights = "random weights: the poses mean nothing" if checkpoint is None else f"weights of {checkpoint}"
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": h2ot.env_report(),
        "device": device_name(device),
        "backends": backends(device, {result.backend for result in results}),
        "clip": _clip_row(clip),
        "weights": weights,
        "frames_lifted": {name: len(poses[name]) for name in names},
        "machine": _machine_row(machine),
        "operations": [result.row() for result in results],
        "models": [found.row() | {"over_unpruned": over_unpruned[found.name]} for found in shown],
        "recovery": [found.row() for found in recoveries],
        "files": [str(path) for path in (folder / "report.json", folder / "poses.npz", *drawn)],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False, default=str) + "\n")
    console = screen.new_console()
    console.print(screen.header(report))
    console.print(screen.operations_section(results, with_compile))
    console.print(screen.models_section(shown, over_unpruned, with_compile, weights))
    console.print(screen.recoveries_section(recoveries, WINDOW))
    console.print(f"written: {', '.join(report['files'])}", highlight=False, soft_wrap=True)
    return report


def is_right(report: dict) -> bool:
    """Whether every operation and model of the report passed its check."""
    return all(row["is_right"] for row in (*report["operations"], *report["models"]))


def device_name(device: torch.device) -> str:
    """What the run used, in words."""
    if device.type == "cuda":
        return f"GPU: {torch.cuda.get_device_name(device)}"
    return f"CPU: {h2ot.env_report()['cpu']}, {torch.get_num_threads()} threads"


def backends(device: torch.device, ran: set[str]) -> dict[str, dict]:
    """Per backend: is it built, did this run use it (ran), and why not."""
    rows = {}
    for name, state in h2ot.env_report()["backends"].items():
        is_built = state == "built" or state.startswith(("importable", "interpreted"))
        _, reason = h2ot.can_run("gather_tokens", name, device)
        rows[name] = {"is_built": is_built, "ran_here": name in ran, "reason": reason if is_built else state}
    return rows


def _clip_row(clip: Clip) -> dict:
    return {
        "name": clip.name,
        "frames": clip.num_frames,
        "joints": clip.num_joints,
        "fps": clip.fps,
        "unit": clip.unit,
        "note": clip.note,
        "filled_joints": clip.repaired,
        "has_3d": clip.joints_3d is not None,
        "windows": len(window_starts(clip.num_frames, WINDOW)),
    }


def _machine_row(machine: Machine) -> dict:
    return {
        "float32_products_flops": machine.products,
        "best_float32_flops": machine.flops(),
        "large_copy_bytes_per_second": machine.copy_rate(1 << 28),
        "platform": platform.platform(),
    }


def _over(unpruned: dict[str, float | None], found: hosts_side.ModelResult) -> float | None:
    ours, base = found.seconds("ours"), unpruned.get(hosts_side.base_of(found.name))
    return base / ours if ours and base else None
