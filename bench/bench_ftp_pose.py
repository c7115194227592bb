"""FTP-Pose pruned at every place by every ratio: `python -m bench.bench_ftp_pose [--sizes SIZE ...] [--batches B ...]`.

For each (size, batch) the unpruned model and every (prune_at, epsilon) are timed in turn in this process, after the
heatmaps of the kernels were checked against those of the reference backend. Prints FLOPs (batch 1, every matrix
product), milliseconds, speed-up over the unpruned model and peak extra memory, then the pairs that reach the paper's
1.938x; appends a JSON row for each to --out and draws FLOPs, latency and memory over epsilon beside it (.png).
"""

import argparse
import ctypes
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import h2ot_kernels as h2ot
from h2ot_kernels import hosts
from h2ot_kernels.hosts.ftp_pose import FTPPose, load_frames
from h2ot_kernels.timing import interleave

from .rows import environment_row

PAPER = 1.938  # the paper's speed over its unpruned baseline: "93.8 % faster"
EPSILONS = tuple(round(0.1 * step, 1) for step in range(10))
ARGUMENTS: dict[str, dict] = {name: {"size": name} for name in ("small", "base")}


def build(size: str, device: str) -> FTPPose:
    torch.manual_seed(0)
    return hosts.build("ftp_pose", **ARGUMENTS[size]).eval().to(device)


def places(model: FTPPose) -> list[int | str]:
    """Every prune_at."""
    return [*range(len(model.vit.blocks)), "encoder"]


def run(model: FTPPose, frames: Tensor, epsilon: float, prune_at: int | str) -> Tensor:
    model.set_pruning(epsilon, prune_at)
    return model(frames)


def is_right(model: FTPPose, frames: Tensor, epsilon: float, prune_at: int | str) -> bool:
    """Whether the kernels keep the tokens, and give the heatmaps, that the reference backend does."""
    model.set_pruning(epsilon, prune_at)
    heatmaps, index = model(frames[:1], return_index=True)
    with h2ot.use_backend("reference"):
        expected, kept = model(frames[:1], return_index=True)
    return torch.equal(index, kept) and torch.allclose(heatmaps, expected, rtol=1e-4, atol=1e-4)


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Memory that the call adds at most; None where the system does not say."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def field(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what the allocator has kept of earlier calls would hide this one's
    reset.write_text("5")  # VmHWM starts again at what is in use
    before = field("VmRSS")
    call()
    return max(0, field("VmHWM") - before)


def measure(size: str, frames: Tensor, epsilons: list[float], chosen: list[str] | None, seconds: float) -> list[dict]:
    """Rows: the unpruned model, and every pair; those of a place that is wrong are not timed."""
    device = frames.device.type
    model = build(size, device)
    at = [place for place in places(model) if chosen is None or str(place) in chosen]
    pairs = [(0.0, place) for place in at[:1]]
    pairs += [(epsilon, place) for place in at for epsilon in epsilons if epsilon > 0]
    right = {place: is_right(model, frames, max(epsilons) or 0.5, place) for place in at}
    calls = {pair: functools.partial(run, model, frames, *pair) for pair in pairs if right[pair[1]]}
    timings = interleave(calls, device, seconds=seconds, min_calls=2, warm_up=1)
    counted = model if device == "cpu" else build(size, "cpu")
    rows = []
    for epsilon, place in pairs:
        counted.set_pruning(epsilon, place)
        rows.append(
            {
                "op": "ftp_pose",
                "size": size,
                "batch": frames.shape[0],
                "epsilon": epsilon,
                "prune_at": place if epsilon else None,
                "kept_per_frame": counted.kept_per_frame,
                "flops": hosts.count_flops(counted, "total"),
                "peak_bytes": peak_bytes(lambda pair=(epsilon, place): run(model, frames, *pair), device),
                "is_right": right[place],
                "timing": dataclasses.asdict(timings[epsilon, place]) if right[place] else None,
                **environment_row(device),
            }
        )
    baseline = rows[0]["timing"]
    for row in rows:
        row["speed_up"] = baseline["p50"] / row["timing"]["p50"] if baseline and row["timing"] else None
    return rows


def table(rows: list[dict]) -> str:
    lines = ["size    B prune_at epsilon kept  GFLOPs       ms  faster      MB"]
    for row in rows:
        place = "-" if row["prune_at"] is None else str(row["prune_at"])
        timing, speed_up, peak = row["timing"], row["speed_up"], row["peak_bytes"]
        milliseconds = f"{timing['p50'] * 1e3:8.1f}" if timing else "   WRONG"
        faster = f"{speed_up:6.2f}x" if speed_up else f"{'-':>7}"
        megabytes = f"{'-':>7}" if peak is None else f"{peak / 2**20:7.1f}"
        lines.append(
            f"{row['size']:6} {row['batch']:2} {place:>8} {row['epsilon']:7.1f} {row['kept_per_frame']:4} "
            f"{row['flops'] / 1e9:7.2f} {milliseconds} {faster} {megabytes}"
        )
    return "\n".join(lines)


def reaching(rows: list[dict]) -> str:
    """The pairs at least as fast as the paper's figure, one line per size and batch."""
    lines = []
    for size, batch in dict.fromkeys((row["size"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["size"], row["batch"]) == (size, batch)]
        found = [f"({row['epsilon']}, {row['prune_at']})" for row in own if (row["speed_up"] or 0) >= PAPER]
        lines.append(f"{size}, B {batch}: {PAPER}x is reached by {', '.join(found) or 'no pair'} (epsilon, prune_at)")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """One row of axes per (size, batch): FLOPs, latency and memory over epsilon, a line per prune_at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    figure, axes = pyplot.subplots(len(groups), 3, figsize=(13, 3.6 * len(groups)), squeeze=False, layout="constrained")
    quantities = {
        "GFLOPs": lambda row: row["flops"] / 1e9,
        "ms": lambda row: row["timing"]["p50"] * 1e3 if row["timing"] else float("nan"),
        "peak extra MB": lambda row: float("nan") if row["peak_bytes"] is None else row["peak_bytes"] / 2**20,
    }
    for (size, batch), line in zip(groups, axes, strict=True):
        own = [row for row in rows if (row["size"], row["batch"]) == (size, batch)]
        places = list(dict.fromkeys(row["prune_at"] for row in own[1:]))
        for axis, (name, quantity) in zip(line, quantities.items(), strict=True):
            for number, place in enumerate(places):
                pruned = [own[0], *(row for row in own if row["prune_at"] == place)]
                colour = pyplot.get_cmap("viridis")(number / max(len(places) - 1, 1))
                axis.plot([row["epsilon"] for row in pruned], [*map(quantity, pruned)], label=str(place), color=colour)
            axis.set(xlabel="epsilon", ylabel=name, title=f"FTP-Pose {size}, B {batch}", ylim=(0, None))
        line[1].axhline(quantities["ms"](own[0]) / PAPER, color="grey", linestyle=":", linewidth=1)
        line[-1].legend(title="prune_at", fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """0: everything right and timed, 1: something was wrong, 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_ftp_pose", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=tuple(ARGUMENTS), default=["small"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1], metavar="B")
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(EPSILONS), metavar="E")
    parser.add_argument("--prune-at", nargs="+", metavar="P", help="block numbers, encoder (default: every place)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=20.0, help="timing per size and batch (default: 20)")
    parser.add_argument("--input", nargs=3, type=Path, metavar="IMAGE", help="three frames (default: random ones)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ftp_pose.jsonl")
    given = parser.parse_args(arguments)
    if not all(0 <= epsilon < 1 for epsilon in given.epsilons) or min(given.batches) < 1:
        parser.error("--epsilons: wanted 0 to below 1; --batches: wanted 1 or more")
    if given.threads is not None:
        torch.set_num_threads(given.threads)

    rows = []
    with torch.inference_mode():
        for size in given.sizes:
            image_size = build(size, "cpu").in_shape[2:]
            random = torch.randn(1, 3, 3, *image_size, generator=torch.Generator().manual_seed(0))
            frames = (load_frames(given.input, image_size) if given.input else random).to(given.device)
            for batch in given.batches:
                batched = frames.repeat(batch, 1, 1, 1, 1)
                rows += measure(size, batched, given.epsilons, given.prune_at, given.seconds)
    print(f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}")
    print(table(rows))
    print(reaching(rows))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    picture = given.out.with_suffix(".png")
    draw(rows, picture)
    print(f"{len(rows)} rows appended to {given.out}; plot: {picture}")
    return int(not all(row["is_right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
