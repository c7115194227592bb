"""Whole hosts: frames per second against tokens kept: `python -m bench.bench_kept [--hosts NAME ...] [--kept K ...]`.

Each host is checked against the reference backend (the same network, every operation by its definition), then timed at
batch 1 in turn with all its other sizes. The last row says what keeping K frames alone loses: the error of a made-up
walk whose other frames are interpolated, by pruner; no trained weights are needed for that. Rows are appended to FILE.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
from torch import nn

from h2ot_kernels import hosts as host_family
from h2ot_kernels import use_backend
from h2ot_kernels.demo import pruners
from h2ot_kernels.demo.models import deviation_bound
from h2ot_kernels.demo.skeleton import walking_clip
from h2ot_kernels.timing import interleave

from . import hosts
from .rows import environment_row


def stages(name: str, frames: int, kept: int) -> dict[int, int]:
    """The host's stages with `kept` frames after the last, the earlier ones in equal ratios in between."""
    blocks = list(host_family.HOSTS[name][1]["stages"])
    return {block: round(frames * (kept / frames) ** (i / len(blocks))) for i, block in enumerate(blocks, start=1)}


def deviation(model: nn.Module, x: torch.Tensor) -> float:
    """Largest difference from the reference backend, relative to the largest coordinate."""
    with torch.inference_mode():
        ours = model(x, return_index=True)[0]
        with use_backend("reference"):
            wanted = model(x, return_index=True)[0]
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


def measure(names: list[str], kept: list[int], *, seconds: float, device: str, overrides: dict) -> list[dict]:
    """A row per host and K; what is wrong has no timings."""
    rows, rivals = {}, {}
    for name in names:
        frames = overrides.get("num_frames", hosts.num_frames(name))
        pruned = bool(host_family.HOSTS[name][1].get("stages"))
        for K in [K for K in kept if frames > K] if pruned else [frames]:
            given = overrides | ({"stages": stages(name, frames, K)} if pruned else {})
            model = hosts.build(name, **given).to(device)
            x = hosts.keypoints(model, 1).to(device)
            worst = deviation(model, x)
            rows[name, K] = {
                "op": "host",
                "shape": {"B": 1, "F": frames, "K": K},
                "kind": name,
                "tokens": [frames, *model.hourglass.stages.values()],
                "gflops": host_family.count_flops(model.cpu()) / 1e9,
                "deviation": worst,
                "is_right": worst <= deviation_bound(name),
                "timings": {},
            }
            if rows[name, K]["is_right"]:
                rivals[name, K] = functools.partial(model.to(device), x)
    with torch.inference_mode():
        timings = interleave(rivals, device, seconds=seconds * len(rivals), min_calls=2, max_calls=50, warm_up=1)
    for case, timing in timings.items():
        rows[case] |= {"timings": {"ours": vars(timing)}, "frames_per_second": rows[case]["shape"]["F"] / timing.p50}
    return list(rows.values())


def recovery_row(kept: list[int], window: int = 243) -> dict:
    """What keeping K of the window's frames loses, in the unit of the walk's joints."""
    clip = walking_clip(4 * window)
    found = pruners.measure(clip, window, torch.device("cpu"), tuple(K for K in kept if window > K))
    return {"op": "recovery", "shape": {"F": window}, "kind": clip.name, "pruners": [result.row() for result in found]}


def main(arguments: list[str] | None = None) -> int:
    """0: all right; 1: some host was wrong, and not timed."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_kept", description=__doc__.splitlines()[0])
    names = hosts.LIFTING
    parser.add_argument("--hosts", nargs="+", metavar="NAME", choices=names, default=names)
    parser.add_argument("--kept", nargs="+", type=int, default=list(pruners.KEPT), metavar="K")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=5.0, help="timing per host and K (default: 5)")
    parser.add_argument("--channels", type=int, help="fewer channels, to try the command")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hosts.jsonl")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    overrides = {"channels": given.channels} if given.channels else {}
    rows = measure(given.hosts, given.kept, seconds=given.seconds, device=given.device, overrides=overrides)
    environment = environment_row(given.device)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a") as file:
        for row in [*rows, recovery_row(given.kept)]:
            file.write(json.dumps(row | environment, allow_nan=False) + "\n")
    for row in rows:
        state = f"{row['frames_per_second']:8.0f} FPS" if row["is_right"] else "WRONG, not timed"
        print(f"{row['kind']:24} {' > '.join(map(str, row['tokens'])):20} {row['gflops']:7.2f} GFLOP {state}")
    return int(not all(row["is_right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
