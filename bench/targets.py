"""What is asked of a CPU beside what was measured: the table at the end of a whole `./dev bench --device cpu`.

Ratios are official formulation / ours of one run. The wanted figures are for AMD's Zen 4 and 5; on another CPU the
table is a report. What the run's own cases do not hold is measured here, after the same checks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import h2ot_kernels as h2ot
from h2ot_kernels.timing import interleave

from . import bench_large, peak
from .figures import slope
from .rows import case_name
from .shapes import Case, build

LONG = (8192, 16384)  # tokens
CLIPS = (2048, 4096, 8192, 16384)  # of which the slope is taken


@dataclass(frozen=True)
class Target:
    """One line of the table: what is wanted at least (of times and bytes: at most), and what was measured, by case."""

    what: str
    floor: float
    goal: float
    unit: str
    measured: dict[str, float]
    more_is_better: bool = True

    @property
    def worst(self) -> tuple[str, float]:
        choose = min if self.more_is_better else max
        return choose(self.measured.items(), key=lambda item: item[1])

    def holds(self, wanted: float) -> bool:
        return self.worst[1] >= wanted if self.more_is_better else self.worst[1] <= wanted

    @property
    def verdict(self) -> str:
        return "goal" if self.holds(self.goal) else "passed" if self.holds(self.floor) else "missed"


def targets(rows: list[dict], threads: int, seconds: float) -> Iterator[Target]:
    """rows: those of the run, of all its cases, each right and timed."""
    clusters = _rows(rows, "cluster_tokens")
    yield Target("selection + labels, each", 6, 8, "x", _speed_ups(clusters))
    for kind in ("smooth", "random"):
        ratios = [row["speed_up"] for row in clusters if row["kind"] == kind]
        yield Target(f"the same, geometric mean, {kind}", 9, 11, "x", {f"{len(ratios)} sizes": _mean(ratios)})
    against, shares = {}, {}
    for row in clusters:
        against[case_name(row)], took = _against_products(row, seconds)
        flops = row["shape"]["B"] * row["shape"]["N"] * (row["shape"]["N"] - 1) * row["shape"]["C"]
        if row["shape"]["C"] >= 256:
            shares[case_name(row)] = 100 * flops / took / peak.multiply_adds(threads)
    yield Target("the same against torch.bmm(x, x.mT) alone", 3, 4, "x", against)
    yield Target("share of the multiply-adds' measured peak, C at least 256", 75, 85, "%", shares)
    for kind, floor, goal in (("random", 18, 30), ("smooth", 25, 45)):
        yield Target(f"index only, N 8192 and 16384, {kind}", floor, goal, "x", _many_tokens(kind, seconds))
    memory = {kind: bench_large.extra_memory("ours", LONG[-1], kind, threads) / 1e6 for kind in bench_large.KINDS}
    yield Target("extra memory, N 16384, C 128", 32, 17, "MB", memory, more_is_better=False)
    yield Target("pool, score, select, gather, embedding", 5.5, 9, "x", _speed_ups(_rows(rows, "prune_step")))
    for dtype, floor, goal in (("float32", 3.8, 4.5), ("bfloat16", 6.5, 9)):
        yield Target(f"recover_pose, {dtype}", floor, goal, "x", _speed_ups(_rows(rows, "recover_pose", dtype)))
    features = _rows(rows, "recover_interpolate")
    few = [row for row in features if row["shape"]["C"] < 1000]  # channels of all joints
    yield Target("interpolation, 3 channels", 10, 16, "x", _speed_ups(few))
    yield Target("interpolation, 512 channels", 3, 20, "x", _speed_ups([row for row in features if row not in few]))
    yield Target("a call of the smallest size", 10, 4, "us", _calls(seconds, grad=False), more_is_better=False)
    yield Target("the same, recorded by autograd", 15, 8, "us", _calls(seconds, grad=True), more_is_better=False)
    agreement = {case_name(row): row["verdict"]["agreement_ours"] for row in clusters if row["kind"] == "smooth"}
    yield Target("indices that are float64's, walks with a still stretch", 1, 1, "", agreement)
    clips = f"N {CLIPS[0]} to {CLIPS[-1]}"
    yield Target("exponent of the time in N, walks", 1.8, 1.8, "", {clips: _exponent(seconds)}, more_is_better=False)


def table(found: list[Target]) -> list[str]:
    """As Markdown."""
    lines = ["| what | floor | goal | measured, the worst | of | |", "|---|---|---|---|---|---|"]
    for target in found:
        case, value = target.worst
        numbers = (_shown(number, target.unit) for number in (target.floor, target.goal, value))
        lines.append("| " + " | ".join((target.what, *numbers, case, target.verdict)) + " |")
    return lines


def _shown(number: float, unit: str) -> str:
    return f"{number:.3g}x" if unit == "x" else f"{number:.3g} {unit}".strip()


def _rows(rows: list[dict], op: str, dtype: str = "float32") -> list[dict]:
    return [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]


def _speed_ups(rows: list[dict]) -> dict[str, float]:
    return {case_name(row): row["speed_up"] for row in rows}


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


@torch.inference_mode()
def _against_products(row: dict, seconds: float) -> tuple[float, float]:
    """(all products of the tokens by torch.bmm alone / ours, in turn; seconds of ours)"""
    comparison = build(Case("cluster_tokens", row["kind"], row["shape"]), "cpu")
    x = comparison.arguments[0]
    found = interleave({"products": lambda: torch.bmm(x, x.mT), "ours": comparison.ours}, seconds=seconds / 2)
    return found["products"].p50 / found["ours"].p50, found["ours"].p50


@torch.inference_mode()
def _many_tokens(kind: str, seconds: float) -> dict[str, float]:
    """Official / ours of the index alone, by N."""
    found = {}
    for N in LONG:
        x = bench_large.tokens(N, kind)
        error, wrong = bench_large.sampled_errors(x)
        if error > bench_large.LARGEST_ERROR or wrong:
            raise ArithmeticError(f"N {N}, {kind}: a density is off by {error:.3g}, {wrong} parents are wrong")
        calls = {"official": lambda x=x: bench_large.their_index(x), "ours": lambda x=x: bench_large.our_index(x)}
        timings = interleave(calls, seconds=seconds, min_calls=2, warm_up=1)
        found[f"N {N}"] = timings["official"].p50 / timings["ours"].p50
    return found


@torch.inference_mode()
def _exponent(seconds: float) -> float:
    every = {N: bench_large.tokens(N) for N in CLIPS}
    timings = interleave({N: lambda x=x: bench_large.ours(x) for N, x in every.items()}, seconds=seconds)
    return slope(list(CLIPS), [timings[N].p50 for N in CLIPS])


def _calls(seconds: float, *, grad: bool) -> dict[str, float]:
    """Microseconds of a call in which the kernel has next to nothing to do, by operation, one operation at a time."""
    x, index, score = torch.randn(1, 2, 1), torch.tensor([[0, 1]]), torch.randn(1, 2)
    query = torch.randn(2, 1)
    x.requires_grad_(grad)
    calls: dict[str, Callable[[], object]] = {
        "gather_tokens": lambda: h2ot.gather_tokens(x, index),
        "merge_tokens": lambda: h2ot.merge_tokens(x, index, 2),
        "recover_attention": lambda: h2ot.recover_attention(query, x, x, 1),
        "recover_interpolate": lambda: h2ot.recover_interpolate(x, index, 2),
    }
    if not grad:
        pose = torch.randn(1, 2, 1, 2)
        calls |= {
            "select_tokens": lambda: h2ot.select_tokens(score, 1),
            "score_tokens": lambda: h2ot.score_tokens(x, 1),
            "prune_cluster": lambda: h2ot.prune_cluster(x, 1, 1),
            "cluster_tokens": lambda: h2ot.cluster_tokens(x, 1, 1),
            "assign_clusters": lambda: h2ot.assign_clusters(x, index),
            "prune_motion": lambda: h2ot.prune_motion(pose, 1),
            "prune_attention": lambda: h2ot.prune_attention(pose, pose, 1),
        }
    found = {}
    with torch.set_grad_enabled(grad):
        for op, call in calls.items():
            found |= interleave({op: call}, seconds=seconds / len(calls), max_calls=5000, warm_up=100)
    return {op: timing.p50 * 1e6 for op, timing in found.items()}
