"""The patch on the official HoT MixSTE: `python -m bench.bench_dropin [--device D] [--batch N ...] [--dtype T ...]`.

dtype: float32, or bfloat16 for float32 weights under autocast; default both. Eval. Checked first: in float64 the
patched model gives the unpatched one's poses to 1e-9 of their scale, in float32 to 1e-4 (given the same kept frames),
under autocast it is as near to float32 as the unpatched one. Then both are timed in turn in this process; a row per
batch and dtype is appended to FILE (default bench/results/<device>.jsonl). linear_share: of the patched time, what its
linear layers took, with the attention that is one operator with its projections (torch.profiler): they run at what the
machine's products can, so the rest is all that could still be won.
"""

import argparse
import copy
import functools
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from h2ot_kernels import dropin
from h2ot_kernels.timing import Machine, interleave
from python_ref import official, official_mixste

from .rows import environment_row

DTYPES = ("float32", "bfloat16")


def main(arguments: list[str] | None = None) -> int:
    """0: right and timed, 1: something was wrong, 2: bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_dropin", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="clips at once (default: 1)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--frames", type=int, default=243, help="input frames; a third is kept (default: 243)")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=30.0, help="timing per row (default: 30)")
    parser.add_argument("--out", type=Path, help="JSONL file to append to (default: bench/results/<device>.jsonl)")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    if given.threads is not None:
        if given.threads < 1:
            parser.error(f"--threads: got {given.threads}, wanted 1 or more")
        torch.set_num_threads(given.threads)
    if given.frames < 9 or given.channels % 8:
        parser.error(f"--frames, --channels: got {given.frames}, {given.channels}, wanted 9 or more, a multiple of 8")
    if min(given.batch) < 1:
        parser.error(f"--batch: got {given.batch}, wanted 1 or more")
    torch.manual_seed(0)
    stages = {3: given.frames // 3}
    plain = official_mixste.build("hot_mixste", num_frames=given.frames, channels=given.channels, stages=stages).eval()
    plain = plain.to(given.device)
    inputs = [(torch.randn(batch, given.frames, 17, 2).cumsum(1) * 0.05).to(given.device) for batch in given.batch]
    models = {"unpatched": plain, "patched": copy.deepcopy(plain)}
    namespaces = [vars(official), vars(official_mixste)]
    before = [dict(names) for names in namespaces]
    with dropin.patch(models["patched"]) as handle:
        after = [dict(names) for names in namespaces]
        print(handle.report())
        environment, machine = environment_row(given.device), Machine(given.device)
        print(f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}")
        print(f"products, GFLOP/s: {', '.join(f'{name} {rate / 1e9:.0f}' for name, rate in machine.products.items())}")

        def poses(of: str, x: Tensor, index: Tensor | None = None) -> Tensor:
            """The functions are shared by both models: each is run with its own."""
            for names, own in zip(namespaces, after if of == "patched" else before, strict=True):
                names.update(own)
            torch.manual_seed(0)  # the noise of the clustering
            try:
                return models[of](x, index)
            finally:
                for names, own in zip(namespaces, after, strict=True):
                    names.update(own)

        wrong, out = 0, given.out or Path(__file__).parent / "results" / f"{given.device}.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file, torch.no_grad():  # weights made in inference mode are not packed
            for x, dtype in itertools.product(inputs, given.dtype):
                error, bound = check(models, poses, x, dtype)
                shape = {"B": len(x), "F": given.frames, "C": given.channels}
                row = {"op": "dropin_hot_mixste", "shape": shape, "dtype": dtype}
                row |= {"is_right": error <= bound, "error": error, "bound": bound}
                wrong += not row["is_right"]
                print(f"B {len(x)} {dtype}: error {error:.3g}, bound {bound:.3g}")
                if row["is_right"]:
                    row |= timed(functools.partial(poses, x=x), dtype, given.device, given.seconds)
                else:
                    print("WRONG, not timed")
                file.write(json.dumps(row | environment, allow_nan=False) + "\n")
                file.flush()
    print(f"rows appended to {out}")
    return int(wrong > 0)


def check(models: dict[str, nn.Module], poses: Callable, x: Tensor, dtype: str) -> tuple[float, float]:
    """(error of the patched poses over the unpatched ones' scale, what it may be); see the top."""
    for model in models.values():
        model.double()
    error = deviation(poses("patched", x.double()), poses("unpatched", x.double()))
    for model in models.values():
        model.float()
    if error > 1e-9:
        return error, 1e-9
    index = official.prune_sample(x.shape[1], x.shape[1] // 3).to(x.device)
    exact = poses("unpatched", x, index)
    if dtype == "float32":
        return deviation(poses("patched", x, index), exact), 1e-4
    with torch.autocast(x.device.type, torch.bfloat16):
        return tuple(deviation(poses(of, x, index), exact) * f for of, f in (("patched", 1), ("unpatched", 4)))


def deviation(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def timed(poses: Callable, dtype: str, device: str, seconds: float) -> dict:
    """What a row says about time; seconds."""
    calls = {of: functools.partial(poses, of) for of in ("unpatched", "patched")}
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        timings = interleave(calls, device, seconds=seconds)
        linear_share = share_of_linear(calls["patched"], device)
    speed_up = timings["unpatched"].p50 / timings["patched"].p50
    times = "  ".join(f"{of} {timing.p50 * 1e3:.1f} ms" for of, timing in timings.items())
    share = "not measured" if linear_share is None else f"{100 * linear_share:.0f} % of the patched time"
    print(f"{dtype}: {times}  {speed_up:.2f}x; linear layers: {share}")
    row = {"timings": {of: asdict(timing) for of, timing in timings.items()}}
    return row | {"speed_up": speed_up, "linear_share": linear_share}


def share_of_linear(call: Callable, device: str) -> float | None:
    """Of the device's own time in one call; a GPU's kernels count for the operators that launched them.

    None where the profiler is not allowed to see the GPU.
    """
    with torch.profiler.profile() as profile:
        call()
    of = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    operators = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    times = {event.key: getattr(event, of) for event in operators}
    ours = tuple(
        f"h2ot_kernels::{kind}_{of}" for kind in ("linear", "mlp", "attend") for of in ("tiles", "halves", "floats")
    )
    linear = (*ours, "mkldnn::_linear_pointwise", "aten::addmm", "aten::mm")
    total = sum(times.values())
    return sum(times.get(name, 0.0) for name in linear) / total if total else None


if __name__ == "__main__":
    sys.exit(main())
