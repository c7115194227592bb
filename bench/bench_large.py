"""Many tokens: `python -m bench.bench_large [--sizes N ...] [--kinds K ...] [--threads T] [--seconds S] [--out FILE]`.

Per N (C 128, k 5, a quarter kept) and kind (smooth: a long walk; random): index and labels of ours and of the official
formulation (up to N 16384, 5 GB), index only of both, and scikit-learn's brute-force neighbours: stage 1 only, no
density, no delta, no labels. Sampled rows of ours are first checked in float64. Timed in turn in this process; the
extra memory of each rival is the growth of VmHWM in a process of its own. One JSON row per N and kind is appended.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels.demo.operations import motion_tokens
from h2ot_kernels.demo.skeleton import walking_clip
from h2ot_kernels.timing import interleave
from python_ref import official

from .rows import environment_row

C, NEIGHBOURS, SHARE = 128, 5, 4
OFFICIAL_TOKENS = 16384  # its N x N arrays take 5 GB there
LARGEST_ERROR = 1e-11  # of a density: float64 sums in another order
STAGE_1 = "scikit-learn, stage 1 only"
KINDS = ("smooth", "random")


def tokens(N: int, kind: str = "smooth") -> Tensor:
    """[1, N, C]: a long walk, seen through a fixed random map, or noise."""
    if kind == "random":
        return torch.randn(1, N, C, generator=torch.Generator().manual_seed(0))
    return motion_tokens(torch.from_numpy(walking_clip(N).normalised)[None].flatten(2), C)


def ours(x: Tensor) -> tuple[Tensor, Tensor]:
    """(index [1, K], labels [1, N])."""
    return h2ot.cluster_tokens(x, x.shape[1] // SHARE, NEIGHBOURS)[:2]


def our_index(x: Tensor) -> Tensor:
    return h2ot.prune_cluster(x, x.shape[1] // SHARE, NEIGHBOURS)


def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
    return official.cluster_dpc_knn(x, x.shape[1] // SHARE, NEIGHBOURS, noise=_noise(x))


def their_index(x: Tensor) -> Tensor:
    score = official.density_peaks(x, NEIGHBOURS, noise=_noise(x))[0]
    return torch.topk(score, x.shape[1] // SHARE, dim=-1).indices


def _noise(x: Tensor) -> Tensor:
    return torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)) * 1e-6


def stage_1(x: Tensor, threads: int):
    """The k nearest tokens of each by scikit-learn; ImportError says how to get it."""
    try:
        from sklearn.neighbors import NearestNeighbors
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing; pip install scikit-learn, or --without-scikit-learn") from error
    rows = x[0].numpy()
    with threadpool_limits(threads):
        return NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(rows).kneighbors(rows)


def rivals(N: int, threads: int, with_sklearn: bool) -> dict[str, Callable[[Tensor], object]]:
    found: dict[str, Callable[[Tensor], object]] = {"ours": ours, "ours, index only": our_index}
    if N <= OFFICIAL_TOKENS:
        found |= {"official": theirs, "official, index only": their_index}
    if with_sklearn:
        found[STAGE_1] = functools.partial(stage_1, threads=threads)
    return found


def sampled_errors(x: Tensor, count: int = 64) -> tuple[float, int]:
    """Of `count` random rows, in float64: the largest error of the density, and how many parents are wrong."""
    rows = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))[:count]
    scores, wide = h2ot.score_tokens(x, NEIGHBOURS), x.double()
    squared = python_ref.squared_distances(wide[:, rows], wide)[0]
    m = squared.sort(-1).values[:, :NEIGHBOURS].sum(-1) / (NEIGHBOURS * C)
    error = (scores.density[0, rows] - torch.exp(-m)).abs().max().item()
    # Ties of the density (still frames round to 1) are decided by m, which scores do not hold: a parent that is at
    # least as dense and as near as the nearest strictly denser token is right.
    density, parent = scores.density[0], scores.parent[0, rows]
    limit = squared.masked_fill(density <= density[rows, None], float("inf")).amin(-1)
    at_parent = squared.gather(1, parent.clamp(min=0)[:, None])[:, 0]
    wrong = (parent >= 0) & ((density[parent] < density[rows]) | (at_parent > limit))
    return error, int(wrong.sum())


def extra_memory(name: str, N: int, kind: str, threads: int) -> int:
    """Bytes by which one call grows a fresh process beyond its tokens."""
    arguments = ["--peak", name, "--sizes", str(N), "--kinds", kind, "--threads", str(threads)]
    command = [sys.executable, "-m", "bench.bench_large", *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(name: str, N: int, kind: str, threads: int) -> None:
    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10

    x, call = tokens(N, kind), rivals(N, threads, with_sklearn=True)[name]
    call(x[:, :1600].clone())
    before = status("VmRSS")
    call(x)
    print(status("VmHWM") - before)


def measure(N: int, kind: str, threads: int, seconds: float, with_sklearn: bool) -> dict:
    """One row of the results."""
    x = tokens(N, kind)
    error, wrong = sampled_errors(x)
    calls = {name: functools.partial(call, x) for name, call in rivals(N, threads, with_sklearn).items()}
    timings = {}
    if error <= LARGEST_ERROR and not wrong:
        timings = interleave(calls, seconds=seconds, min_calls=2, warm_up=1)
    return {
        "op": "cluster_tokens",
        "shape": {"B": 1, "N": N, "C": C, "K": N // SHARE, "k": NEIGHBOURS},
        "checked": {"density_error": error, "wrong_parents": wrong, "rows": 64},
        "timings": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
        "extra_bytes": {name: extra_memory(name, N, kind, threads) for name in calls},
        "kind": kind,
        "dtype": "float32",
        **environment_row("cpu"),
    }


def main(arguments: list[str] | None = None) -> int:
    """0: every size right and timed, 1: something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_large", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536], metavar="N")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="timing per size (default: 5)")
    parser.add_argument("--without-scikit-learn", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "large.jsonl")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.peak:
        print_peak(given.peak, given.sizes[0], given.kinds[0], given.threads)
        return 0
    given.out.parent.mkdir(parents=True, exist_ok=True)
    right = True
    for N, kind in itertools.product(given.sizes, given.kinds):
        row = measure(N, kind, given.threads, given.seconds, not given.without_scikit_learn)
        right &= bool(row["timings"])
        print(f"N {N}, {kind}: {row['checked']['wrong_parents']} wrong parents of 64 sampled rows")
        for name, timing in row["timings"].items():
            print(f"  {name:28} {timing['p50'] * 1e3:9.1f} ms   {row['extra_bytes'][name] / 2**20:8.1f} MB", flush=True)
        with given.out.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
