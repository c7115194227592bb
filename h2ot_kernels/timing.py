"""Timing rivals fairly: interleaved in one process, medians with quantiles, and what this machine can do at best."""

import functools
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn import functional

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `calls` timed calls; `first`: the very first call, None where it came before the timing."""

    p10: float
    p50: float
    p90: float
    p99: float
    first: float | None
    calls: int


def _once(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU between two events, the queue empty before."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


L2_BYTES = 1 << 28  # more than the L2 cache of any GPU so far


def replayed(function: Callable[[], object]) -> Callable[[], object]:
    """function captured in a CUDA graph: its replay. Raises RuntimeError where it cannot be captured (a host sync)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def interleave(
    rivals: Mapping[Name, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 1.0,
    min_calls: int = 3,
    max_calls: int = 200,
    warm_up: int = 2,
    cold: Collection[Name] = (),
    on_round: Callable[[float], None] | None = None,
) -> dict[Name, Timing]:
    """Time the rivals in turn, A B C B C A C A B ..., until about `seconds` are spent; at least min_calls calls each.

    warm_up calls of each, the first among them, are not part of the quantiles; 0 where the caller has warmed them up.
    cold: names of those whose every timed call finds the GPU's L2 cache full of other data.
    on_round is called between rounds with the share of the time that is spent.

    >>> timings = interleave({"sum": lambda: sum(range(100))}, seconds=0.01)
    >>> timings["sum"].p10 <= timings["sum"].p50 <= timings["sum"].p99
    True
    """
    device = torch.device(device)
    first = {name: _once(function, device) if warm_up else None for name, function in rivals.items()}
    for _ in range(warm_up - 1):
        for function in rivals.values():
            _once(function, device)
    names = list(rivals)
    evict = torch.empty(L2_BYTES, dtype=torch.uint8, device=device).zero_ if cold and device.type == "cuda" else None
    samples: dict[Name, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for calls in range(max_calls):
        spent = time.perf_counter() - begin
        if calls >= min_calls and spent > seconds:
            break
        if on_round is not None:
            on_round(min(spent / seconds, 1.0) if seconds else 1.0)
        for position in range(len(names)):
            name = names[(position + calls) % len(names)]
            if evict is not None and name in cold:
                evict()
            samples[name].append(_once(rivals[name], device))
    return {name: _summary(samples[name], first[name]) for name in names}


def _summary(samples: list[float], first: float | None) -> Timing:
    quantiles = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    )
    return Timing(*quantiles.tolist(), first, len(samples))


def _best(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest seconds of a call among those that fit into `seconds`, after three calls of warm-up."""
    for _ in range(3):
        function()
    deadline = time.perf_counter() + seconds
    best = _once(function, device)
    while time.perf_counter() < deadline:
        best = min(best, _once(function, device))
    return best


class Machine:
    """What this machine reached in this process, as the measure for "share of the peak".

    flops(): the best float32 rate (FLOP/s, an FMA counts 2) among the library products tried: `torch.mm` and, on a
    CPU with oneDNN, its packed linear layer: a proxy for the FMA peak, not the data sheet's figure. flops(dtype) of a
    16-bit dtype on a GPU: that of `torch.mm` in it; on a CPU, and for any other dtype, the float32 rate.
    launch_seconds: from one event to the next around a kernel with nothing to do; 0 on a CPU.
    replay_seconds: the same around the replay of a CUDA graph of one such kernel: in every "graph" timing; 0 on a CPU.
    copy_rate(n): bytes read plus bytes written per second of a warm `Tensor.copy_` that moves n bytes in all.
    """

    def __init__(self, device: torch.device | str = "cpu", seconds: float = 0.25):
        self.device = torch.device(device)
        self.seconds = seconds
        self.copy_rates: dict[int, float] = {}
        self.half_rates: dict[torch.dtype, float] = {}

    @functools.cached_property
    def products(self) -> dict[str, float]:
        """FLOP/s of each product that was tried, size 1536 on a CPU and 8192 on a GPU."""
        rates, size = {"torch.mm": self._product_rate(torch.float32)}, self._product_size()
        if self.device.type == "cpu" and torch.backends.mkldnn.is_available():
            packed, weight = (torch.randn(size, size).to_mkldnn() for _ in range(2))
            with torch.inference_mode():
                seconds = _best(lambda: functional.linear(packed, weight), self.device, self.seconds)
            rates["oneDNN linear"] = 2 * size**3 / seconds
        return rates

    def _product_size(self) -> int:
        return 8192 if self.device.type == "cuda" else 1536

    def _product_rate(self, dtype: torch.dtype) -> float:
        size = self._product_size()
        x = torch.randn(size, size, device=self.device).to(dtype)
        out = torch.empty_like(x)
        return 2 * size**3 / _best(lambda: torch.mm(x, x, out=out), self.device, self.seconds)

    def flops(self, dtype: torch.dtype = torch.float32) -> float:
        if self.device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            return max(self.products.values())
        if dtype not in self.half_rates:
            self.half_rates[dtype] = self._product_rate(dtype)
        return self.half_rates[dtype]

    def copy_rate(self, num_bytes: int) -> float:
        """Of the power of two at or above num_bytes, from 4 KiB to 256 MiB; measured once per size."""
        size = 1 << (min(max(num_bytes, 4096), 1 << 28) - 1).bit_length()
        if size not in self.copy_rates:
            source = torch.ones(size // 8, device=self.device)
            target = torch.empty_like(source)
            self.copy_rates[size] = size / _best(lambda: target.copy_(source), self.device, self.seconds / 4)
        return self.copy_rates[size]

    @functools.cached_property
    def launch_seconds(self) -> float:
        if self.device.type != "cuda":
            return 0.0
        nothing = torch.empty(1, device=self.device)
        return _best(nothing.zero_, self.device, self.seconds / 4)

    @functools.cached_property
    def replay_seconds(self) -> float:
        if self.device.type != "cuda":
            return 0.0
        nothing = torch.empty(1, device=self.device)
        return _best(replayed(nothing.zero_), self.device, self.seconds / 4)

    def floor(self, flops: float, num_bytes: int, dtype: torch.dtype = torch.float32) -> float:
        """Seconds that this much work in dtype takes at those rates, or one launch, whichever is highest."""
        return max(flops / self.flops(dtype), num_bytes / self.copy_rate(num_bytes), self.launch_seconds)
