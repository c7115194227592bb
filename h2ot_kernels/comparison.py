"""One operation beside its rivals: first whether it is right, then how fast. Used by demo and bench."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .backend import chosen_backend
from .timing import Machine, Timing, interleave, replayed


@dataclass(frozen=True)
class Verdict:
    """How far official formulation and ours are from the float64 oracle.

    agreement: the share of indices (or labels) that are the oracle's, or of elements within the bound.
    error: the largest deviation of ours, or the number of differing indices; right when error <= bound.
    """

    agreement_official: float
    agreement_ours: float
    error: float
    bound: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Comparison:
    """official and ours on the same data, the check, and the counted work: least FLOPs, least bytes moved.

    checked: what of the result the check looks at.
    kernel: the registered operation that does most of the work, where it has another name, "" where there is none; its
    backend is reported.
    """

    op: str
    shape: dict[str, int]
    official: Callable
    arguments: tuple
    ours: Callable[[], object]
    check: Callable[[], Verdict]
    flops: int = 0
    num_bytes: int = 0
    kernel: str | None = None
    checked: str = "everything"

    @property
    def dtype(self) -> torch.dtype:
        """That of the first tensor of floats among the arguments: at its rate the FLOPs are counted."""
        floats = (x.dtype for x in self.arguments if isinstance(x, Tensor) and x.is_floating_point())
        return next(floats, torch.float32)

    def backend(self, device: torch.device) -> str:
        """The backend that ours uses on device, "none" for an operation without a kernel."""
        kernel = self.op if self.kernel is None else self.kernel
        return chosen_backend(kernel, device) if kernel else "none"


@dataclass(frozen=True)
class Result:
    """A checked and, if right, timed comparison; floor in seconds. timings by rival: "official", "compile", "ours", ...

    On a GPU also "official, graph", "ours, graph" (where they can be captured), and these of ours with ", cold L2".
    """

    op: str
    shape: dict[str, int]
    verdict: Verdict
    timings: dict[str, Timing]
    floor: float | None
    backend: str
    checked: str

    @property
    def speed_up(self) -> float | None:
        return self.timings["official"].p50 / self.timings["ours"].p50 if self.timings else None

    @property
    def share_of_peak(self) -> float | None:
        return self.floor / self.timings["ours"].p50 if self.timings and self.floor else None

    @property
    def shares_of_floor(self) -> dict[str, float]:
        """Floor over the median, of each way that ours was timed."""
        ways = [rival for rival in self.timings if rival.split(",")[0] == "ours"] if self.floor else []
        return {rival: self.floor / self.timings[rival].p50 for rival in ways}

    def row(self) -> dict:
        """Plain values, for JSON."""
        derived = {
            "is_right": self.verdict.is_right,
            "speed_up": self.speed_up,
            "share_of_peak": self.share_of_peak,
            "shares_of_floor": self.shares_of_floor,
        }
        return asdict(self) | derived


def compare(
    comparison: Comparison,
    machine: Machine,
    *,
    seconds: float = 0.5,
    with_compile: bool = False,
    others: Mapping[str, Callable[[], object]] | None = None,
) -> Result:
    """Check; only what is right is timed. with_compile adds `torch.compile` of the official formulation.

    others: further rivals, which the caller has checked.
    """
    with torch.inference_mode():
        verdict = comparison.check()
        known = comparison.backend(machine.device), comparison.checked
        if not verdict.is_right:
            return Result(comparison.op, comparison.shape, verdict, {}, None, *known)
        rivals = {"official": lambda: comparison.official(*comparison.arguments)}
        if with_compile:
            compiled = torch.compile(comparison.official, dynamic=False)
            rivals["compile"] = lambda: compiled(*comparison.arguments)
        rivals |= {"ours": comparison.ours, **(others or {})}
        if machine.device.type == "cuda":
            rivals |= _on_a_gpu(rivals["official"], comparison.ours)
        timings = interleave(rivals, machine.device, seconds=seconds, cold=COLD)
        has_work = comparison.flops or comparison.num_bytes
        floor = machine.floor(comparison.flops, comparison.num_bytes, comparison.dtype) if has_work else None
    return Result(comparison.op, comparison.shape, verdict, timings, floor, *known)


COLD = "ours, cold L2", "ours, graph, cold L2"


def _on_a_gpu(official: Callable, ours: Callable) -> dict[str, Callable]:
    """What is timed on a GPU besides plain calls: both replayed as CUDA graphs, ours with a cold L2 cache."""
    found = {COLD[0]: ours}
    for name, function in (("official, graph", official), ("ours, graph", ours)):
        replay = replay_or_none(name, function)
        if replay is not None:
            found[name] = replay
    if "ours, graph" in found:
        found[COLD[1]] = found["ours, graph"]
    return found


def replay_or_none(name: str, function: Callable) -> Callable | None:
    """The replay of function as a CUDA graph; None, and why in print, where it cannot be captured."""
    try:
        return replayed(function)
    except RuntimeError as error:
        print(f"{name}: cannot be captured: {str(error).splitlines()[0]}")
        return None


def same_index(official: Tensor, ours: Tensor, oracle: Tensor, *more_of_ours: tuple[Tensor, Tensor]) -> Verdict:
    """Verdict on kept indices [B, K] in any order: none of ours may differ from the oracle.

    more_of_ours: further pairs (ours, oracle), counted into ours: the worst agreement and all differences.
    """
    pairs = [(ours, oracle), *more_of_ours]
    shares = [_shared(mine, truth) for mine, truth in pairs]
    missed = sum(round((1 - share) * truth.numel()) for share, (_, truth) in zip(shares, pairs, strict=True))
    return Verdict(_shared(official, oracle), min(shares), missed, 0)


def same_labels(official: Tensor, ours: Tensor, oracle: Tensor) -> Verdict:
    """Verdict on labels, position by position."""
    return Verdict(_equal(official, oracle), _equal(ours, oracle), int((ours != oracle).sum()), 0)


def same_values(official: Tensor, ours: Tensor, oracle: Tensor, channels: int, *, moved: bool = False) -> Verdict:
    """Verdict on floats: within max(4 x the official formulation's error, eps sqrt(channels) x the largest value).

    moved: only data movement, which must be exact.
    """
    oracle = oracle.double()
    off_official, off_ours = (official.double() - oracle).abs(), (ours.double() - oracle).abs()
    eps = torch.finfo(ours.dtype if ours.dtype != torch.float64 else torch.float32).eps
    scale = oracle.abs().max().item()
    bound = 0.0 if moved else max(4 * off_official.max().item(), eps * channels**0.5 * scale)
    return Verdict(within(off_official, bound), within(off_ours, bound), off_ours.max().item(), bound)


def _shared(index: Tensor, oracle: Tensor) -> float:
    return (index[:, :, None] == oracle[:, None, :]).any(-1).double().mean().item()


def _equal(labels: Tensor, oracle: Tensor) -> float:
    return (labels == oracle).double().mean().item()


def within(deviation: Tensor, bound: float) -> float:
    """The share of elements whose deviation is at most bound."""
    return (deviation <= bound).double().mean().item()
