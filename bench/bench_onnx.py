"""Hosts on the CPU through onnxruntime: `python -m bench.bench_onnx [--hosts NAME ...] [--check] [--threads N] ...`.

Each host is exported once (float32, dynamic batch) and quantised by onnxruntime (int8 weights, dynamic). The float32
graph is checked against PyTorch at batches 1 and 2 before anything is timed; int8 is an approximation, whose deviation
is reported. Then PyTorch, float32 and int8 are timed in turn at batch 1. A row per host is appended to FILE.
--check: reduced sizes, the check only, for every host.
"""

import argparse
import contextlib
import functools
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import h2ot_kernels.onnx
from h2ot_kernels.demo.models import deviation_bound
from h2ot_kernels.timing import interleave

from . import hosts
from .rows import environment_row

# Reduced hosts are held to rounding: of the largest coordinate, two or three blocks in float32, sums in another order.
# That needs input at which a perturbation of 1e-6 changes no host's decisions, which a walk is not.
REDUCED_BOUND, REDUCED_NOISE = 1e-5, 1.0

# Loggers, and how their messages begin that say nothing of a host (GatherElements of one row: not evaluated while the
# graph is made, but where it runs); and a warning of PyTorch about its own use of itself.
FOLDING = "onnxscript.optimizer._constant_folding"
KNOWN_MESSAGES = (
    ("torch.onnx._internal.exporter._registration", "torchvision is not installed"),
    (FOLDING, "Skipping constant folding for op"),
    (FOLDING, "Evaluation failed: cannot reshape array of size 1"),
    ("root", "Please consider to run pre-processing before quantization"),
)
KNOWN_WARNING = r"`isinstance\(treespec, LeafSpec\)` is deprecated"


@contextlib.contextmanager
def without_known_messages() -> Iterator[None]:
    """Drops these messages of the exporter and the quantiser, and no others."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", KNOWN_WARNING, FutureWarning)
        for name, start in KNOWN_MESSAGES:
            logger = logging.getLogger(name)
            told = functools.partial(lambda start, record: not record.getMessage().startswith(start), start)
            logger.addFilter(told)
            stack.callback(logger.removeFilter, told)
        yield


def session(path: Path) -> onnxruntime.InferenceSession:
    """On the CPU, with as many threads as PyTorch has here."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Else its threads spin on while another is timed: half as long again for PyTorch on two cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def call(runner: onnxruntime.InferenceSession, x: Tensor) -> list[Tensor]:
    return [torch.from_numpy(value) for value in runner.run(None, {runner.get_inputs()[0].name: x.numpy()})]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        found = model(x)
    return list(found) if isinstance(found, tuple) else [found]


def deviation(found: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """(largest difference of the poses relative to their largest coordinate, share of equal entries of the index)."""
    difference = (found[0] - wanted[0]).abs().max() / wanted[0].abs().max()
    equal = [(mine == theirs).double().mean().item() for mine, theirs in zip(found[1:], wanted[1:], strict=True)]
    return difference.item(), min(equal, default=1.0)


def measure(name: str, *, reduced: bool, seconds: float) -> dict:
    """One row; timings are empty where the float32 graph is wrong, and for seconds = 0."""
    model = hosts.build(name, reduced=reduced)
    noise = {"noise": REDUCED_NOISE} if reduced else {}
    x, two, three = (hosts.keypoints(model, batch, **noise) for batch in (1, 2, 3))
    with tempfile.TemporaryDirectory() as folder:
        full, small = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        with without_known_messages():
            h2ot_kernels.onnx.export(model, (two,), full)
            quantize_dynamic(full, small, weight_type=QuantType.QInt8)
        float32, int8 = session(full), session(small)
        sizes = {"float32": full.stat().st_size, "int8": small.stat().st_size}
        pairs = [(given, outputs(model, given)) for given in (x, two, three)]
        checked = [deviation(call(float32, given), wanted) for given, wanted in pairs]
        quantised = deviation(call(int8, x), pairs[0][1])
    worst, same = max(error for error, _ in checked), min(share for _, share in checked)
    is_right = worst <= (REDUCED_BOUND if reduced else deviation_bound(name)) and same == 1.0
    timings = {}
    if is_right and seconds:
        rivals = {
            "pytorch": lambda: outputs(model, x),
            "onnx float32": lambda: call(float32, x),
            "onnx int8": lambda: call(int8, x),
        }
        timings = interleave(rivals, seconds=seconds, min_calls=3, max_calls=50, warm_up=1)
    frames = model.in_shape[0]
    return {
        "op": "onnx_host",
        "shape": {"B": 1, "F": frames},
        "kind": name,
        "tokens": [frames, *model.hourglass.stages.values()],
        "is_right": is_right,
        "deviation": {"onnx float32": worst, "onnx int8": quantised[0]},
        "same_frames": {"onnx float32": same, "onnx int8": quantised[1]},
        "bytes": sizes,
        "timings": {rival: vars(timing) for rival, timing in timings.items()},
        "frames_per_second": {rival: frames / timing.p50 for rival, timing in timings.items()},
        "onnxruntime": onnxruntime.__version__,
    }


def table(rows: list[dict]) -> Table:
    """Frames per second and deviations, a line per host."""
    found = Table(
        "host", "tokens", "PyTorch FPS", "float32 FPS", "int8 FPS", "float32 dev.", "int8 dev.", box=box.SIMPLE
    )
    for row in rows:
        rates = (row["frames_per_second"].get(rival) for rival in ("pytorch", "onnx float32", "onnx int8"))
        deviations = (f"{row['deviation'][rival]:.1e}" for rival in ("onnx float32", "onnx int8"))
        tokens = " > ".join(map(str, row["tokens"]))
        name = row["kind"] if row["is_right"] else f"{row['kind']} WRONG, not timed"
        found.add_row(name, tokens, *("-" if rate is None else f"{rate:.0f}" for rate in rates), *deviations)
    return found


def measured(given: argparse.Namespace) -> Iterator[dict]:
    """A row per host; a check runs in a process per core, for exporting takes one thread."""
    if not given.check:
        for name in given.hosts:
            yield measure(name, reduced=given.reduced, seconds=given.seconds)
        return
    processes = min(len(given.hosts), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(functools.partial(measure, reduced=True, seconds=0.0), given.hosts)


def main(arguments: list[str] | None = None) -> int:
    """0: all float32 graphs are right; 1: some are not."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_onnx", description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", nargs="+", metavar="NAME", choices=hosts.LIFTING, default=hosts.LIFTING)
    parser.add_argument("--check", action="store_true", help="reduced sizes, no timing, no file")
    parser.add_argument("--reduced", action="store_true", help="reduced sizes (to try the command)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=15.0, help="timing per host (default: 15)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx.jsonl")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    rows, environment = [], environment_row("cpu")
    for row in measured(given):
        rows.append(row | environment)
        name = row["kind"]
        state = "right" if rows[-1]["is_right"] else "WRONG"
        print(f"{name}: {state}, deviation {rows[-1]['deviation']['onnx float32']:.1e}", flush=True)
    if not given.check:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with given.out.open("a") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    return int(not all(row["is_right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
