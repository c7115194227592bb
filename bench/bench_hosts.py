"""The hosts: `python -m bench.bench_hosts [--models NAME ...] [--batch N ...] [--dtype T ...] [--mode M ...]`.

For each host and variant the official formulation beside ours, in inference and in one training step (forward,
backward, AdamW), timed in turn in this process after the check. One JSON row each is appended to --out (default
bench/results/<device>-hosts.jsonl): ms, frames per second, speed-up over the official float32 and over the official of
the same dtype, peak memory, FLOPs, bytes of saved activations; for a pruned host also the gain over our own unpruned
one. The variants of one host are timed together; on a GPU in inference also as replays of CUDA graphs, where they can
be captured, because at batch 1 the calls themselves take the time. bfloat16 and float16 are the model's dtype in
inference, autocast in training (float16: without a scaled loss).
"""

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from h2ot_kernels import hosts
from h2ot_kernels.comparison import replay_or_none
from h2ot_kernels.demo.models import base_of, deviation_bound
from h2ot_kernels.hosts.flops import flops_by_convention
from h2ot_kernels.timing import Timing, interleave

from .rows import environment_row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Rival:
    """One model in one dtype: what is timed, and what it takes."""

    name: str
    whose: str
    dtype: str
    model: nn.Module
    x: Tensor

    def infer(self) -> Tensor:
        with torch.inference_mode():
            result = self.model(self.x)
            return result[0] if isinstance(result, tuple) else result

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        optimizer.step()

    def loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, DTYPES[self.dtype], enabled=self.dtype != "float32"):
            result = self.model(self.x)
        pose = result[0] if isinstance(result, tuple) else result
        return pose.float().norm(dim=-1).mean()

    def saved_bytes(self) -> int:
        """Bytes of distinct storages that the forward keeps for the backward, parameters aside."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}
        alive = []  # a storage whose address is given again would not count

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss()
        return sum(kept.values())


def make_rivals(name: str, batch: int, dtypes: list[str], training: bool, device: str) -> list[Rival]:
    """Ours and the official formulation with the same random weights; in inference cast to each dtype."""
    rivals = []
    for dtype in dtypes:
        torch.manual_seed(0)
        ours = hosts.build(name)
        official = importlib.import_module(f"python_ref.official_{base_of(name)}").build(name)
        official.load_state_dict(ours.state_dict())
        x = torch.randn(batch, *ours.in_shape, generator=torch.Generator().manual_seed(1))
        for whose, model in (("official", official), ("ours", ours)):
            model = model.train(training).requires_grad_(training).to(device)
            if training:
                rivals.append(Rival(name, whose, dtype, model, x.to(device)))
            else:
                rivals.append(Rival(name, whose, dtype, model.to(DTYPES[dtype]), x.to(device, DTYPES[dtype])))
    return rivals


@torch.inference_mode()
def check(rivals: list[Rival]) -> dict[str, float]:
    """Largest deviation of ours from the official formulation of one model in float32 (else: the first dtype).

    A share of the largest coordinate, given the frames that ours keeps. Raises ArithmeticError above the bound.
    """
    errors = {}
    of = {(rival.whose, rival.dtype): rival for rival in rivals}
    first = rivals[0]
    training = first.model.training
    for rival in rivals:
        rival.model.eval()
    _, index = of["ours", first.dtype].model(first.x, return_index=True)
    pruned = {"index": index} if of["ours", first.dtype].model.hourglass.stages else {}

    def pose(rival: Rival, **given) -> Tensor:
        with torch.autocast(rival.x.device.type, DTYPES[rival.dtype], enabled=training and rival.dtype != "float32"):
            result = rival.model(rival.x, **given, **pruned)
        return (result[0] if isinstance(result, tuple) else result).float()

    exact = pose(of["official", first.dtype])
    scale = exact.abs().max()
    for (whose, dtype), rival in of.items():
        if whose == "ours":
            theirs = ((pose(of["official", dtype]) - exact).abs().max() / scale).item()
            errors[dtype] = ((pose(rival, return_index=True) - exact).abs().max() / scale).item()
            # In 16 bits what the official formulation is off by, twice, or two of the output's own steps.
            steps = torch.finfo(DTYPES[dtype]).eps if dtype != "float32" else 0.0
            bound = max(deviation_bound(rival.name), 2 * theirs, steps)
            if not errors[dtype] <= bound:
                raise ArithmeticError(
                    f"{rival.name} {dtype}: off by {errors[dtype]:.3g}, official {theirs:.3g}: not timed"
                )
    for rival in rivals:
        rival.model.train(training)
    return errors


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Most bytes that torch holds above what stands before, in one call. (oneDNN's own scratch does not count.)"""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@functools.cache
def flops(name: str) -> dict[str, int]:
    """Of the host of this name in both conventions."""
    with torch.device("meta"):
        model = hosts.build(name)
    return flops_by_convention(model)


def measure(names: list[str], batch: int, dtypes: list[str], mode: str, device: str, seconds: float) -> list[dict]:
    """The rows of the variants of one host, all timed in turn together."""
    training = mode == "training"
    rivals, errors, calls = [], {}, {}
    for name in names:
        made = make_rivals(name, batch, dtypes, training, device)
        errors[name] = check(made)
        rivals += made
    for rival in rivals:
        key = (rival.name, rival.whose, rival.dtype)
        if training:
            calls[key] = functools.partial(rival.step, torch.optim.AdamW(rival.model.parameters(), lr=1e-6))
        else:
            calls[key] = rival.infer
        calls[key]()  # warm: weights are packed, optimizer states made
    memory = {key: peak_memory(call, device) for key, call in calls.items()}
    saved = {key: rival.saved_bytes() if training else None for key, rival in zip(calls, rivals, strict=True)}
    counted = {name: flops(name) for name in names}
    graphs = {}
    for key, call in calls.items() if device == "cuda" and not training else ():
        replay = replay_or_none(f"{' '.join(key)}, graph", call)
        if replay is not None:
            graphs[(*key, "graph")] = replay
    timings = interleave({**calls, **graphs}, device, seconds=seconds, min_calls=3, warm_up=0)
    rows = []
    for rival in rivals:
        key = (rival.name, rival.whose, rival.dtype)
        rows.append(
            {
                "model": rival.name,
                "whose": rival.whose,
                "dtype": rival.dtype,
                "mode": mode,
                "batch": batch,
                **numbers(timings, key, batch * rival.x.shape[1]),
                "peak_bytes": memory[key],
                "saved_bytes": saved[key],
                "flops_linear": counted[rival.name]["linear"],
                "flops_total": counted[rival.name]["total"],
                "deviation": errors[rival.name][rival.dtype],
            }
        )
    for row in rows:
        row |= over_own_baseline(row, rows)
    return rows


def numbers(timings: dict[tuple, Timing], key: tuple, frames: int) -> dict:
    """What a row says about time; graph: of the replay, over_official_graph: over that of the official formulation."""
    name, _, dtype = key
    seconds = timings[key].p50

    def over(opponent: tuple, seconds: float | None = seconds) -> float | None:
        return timings[opponent].p50 / seconds if opponent in timings and seconds else None

    graph = timings[(*key, "graph")].p50 if (*key, "graph") in timings else None
    return {
        "graph_seconds": graph,
        "graph_frames_per_second": frames / graph if graph else None,
        "over_official_graph": over((name, "official", dtype, "graph"), graph),
        "seconds": seconds,
        "p10": timings[key].p10,
        "p90": timings[key].p90,
        "calls": timings[key].calls,
        "frames_per_second": frames / seconds,
        "over_official_float32": over((name, "official", "float32")),
        "over_official": over((name, "official", dtype)),
    }


def over_own_baseline(row: dict, rows: list[dict]) -> dict:
    """What pruning gains over the same code unpruned: shares of its FLOPs, time, saved bytes and frames per second."""
    same = ("whose", "dtype", "mode", "batch")
    base = [r for r in rows if r["model"] == base_of(row["model"]) and all(r[key] == row[key] for key in same)]
    if not base or base[0] is row:
        return {}
    shares = {key: row[key] / base[0][key] for key in ("flops_total", "seconds", "saved_bytes") if row[key]}
    shares["frames_per_second"] = row["frames_per_second"] / base[0]["frames_per_second"]
    if row["graph_seconds"] and base[0]["graph_seconds"]:
        shares["graph_frames_per_second"] = base[0]["graph_seconds"] / row["graph_seconds"]
    return {"of_baseline": shares}


def line(row: dict) -> str:
    over = row["over_official_float32"] or row["over_official"]
    text = f"{row['model']:20} {row['mode']:9} B {row['batch']:<2} {row['dtype']:8} {row['whose']:8} "
    text += f"{row['seconds'] * 1e3:9.2f} ms "
    text += f"graph {row['graph_seconds'] * 1e3:.2f} ms " if row["graph_seconds"] else ""
    text += f"{row['frames_per_second']:8.0f} FPS {over:5.2f}x "
    text += f"peak {row['peak_bytes'] / 2**20:7.0f} MiB {row['flops_total'] / 1e9:7.2f} GFLOP"
    if row["saved_bytes"]:
        text += f" saved {row['saved_bytes'] / 2**20:7.0f} MiB"
    if "of_baseline" in row:
        share = row["of_baseline"]
        text += f" | over the unpruned: FLOPs {100 * share['flops_total'] - 100:+.2f} %"
        text += f" FPS {100 * share['frames_per_second'] - 100:+.1f} % time {share['seconds']:.2f}"
        text += f" saved {share['saved_bytes']:.2f}" if "saved_bytes" in share else ""
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run; 0: all right and timed, 1: something was wrong, 2: bad arguments."""
    everything = [name for name in hosts.HOSTS if name != "ftp_pose"]
    parser = argparse.ArgumentParser(prog="python -m bench.bench_hosts", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", choices=everything, default=everything)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--mode", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=20.0, help="timing of one host's variants (default: 20)")
    parser.add_argument(
        "--out", type=Path, help="JSONL file to append to (default: bench/results/<device>-hosts.jsonl)"
    )
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    out = given.out or Path(__file__).parent / "results" / f"{given.device}-hosts.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    environment, wrong = environment_row(given.device), 0
    print(f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}")
    groups: dict[str, list[str]] = {}
    for name in given.models:
        groups.setdefault(base_of(name), []).append(name)
    with out.open("a") as file:
        for mode in given.mode:
            for batch in given.batch:
                for names in groups.values():
                    try:
                        rows = measure(names, batch, given.dtype, mode, given.device, given.seconds)
                    except ArithmeticError as error:
                        wrong += 1
                        print(error, flush=True)
                        continue
                    for row in rows:
                        print(line(row), flush=True)
                        file.write(json.dumps(row | environment, allow_nan=False) + "\n")
                    file.flush()
    print(f"rows appended to {out}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
