"""Runs csrc/cuda/cluster.cu on the CPU, as tests/simt does with score.cu."""

import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import DISTANCES, SANITIZED, SEARCHES, build, tokens_record
from . import run as run_calls


@dataclass
class Labelling:
    """One call: labels of x by a given index [B or 1, K], or (an int) by the so many tokens that scoring keeps.

    plan: (search, distance), None for the counted one; the search matters where scoring goes before. side: of the tiles
    of products, 0 for the counted one.
    """

    x: Tensor
    index: Tensor | int
    mask: Tensor | None = None
    k: int = 2
    keep: Tensor | None = None
    plan: tuple[str, str] | None = None
    samples: int = 65535
    side: int = 0
    multiprocessors: int = 132
    seed: int = 1
    error: int | None = field(default=None, init=False)
    kept: Tensor | None = field(default=None, init=False)
    labels: Tensor | None = field(default=None, init=False)

    @property
    def is_given(self) -> bool:
        return isinstance(self.index, Tensor)

    @property
    def index_size(self) -> tuple[int, int]:
        return tuple(self.index.shape) if self.is_given else (self.x.shape[0], self.index)

    def record(self) -> bytes:
        tokens, raw = tokens_record(self.x)
        search, distance = (0, -1) if self.plan is None else (SEARCHES[self.plan[0]], DISTANCES[self.plan[1]])
        keep = self.keep if self.keep is not None else torch.zeros(0, 0, dtype=torch.int64)
        header = [
            *(self.seed, *tokens, self.mask is not None, *self.index_size, 0 if self.is_given else self.k),
            *(search, distance, self.samples, self.side, self.multiprocessors, *keep.shape),
        ]
        parts = [struct.pack(f"<{len(header)}q", *header), raw]
        if self.mask is not None:
            parts.append(self.mask.contiguous().numpy().tobytes())
        parts.append(keep.contiguous().numpy().tobytes())
        if self.is_given:
            parts.append(self.index.contiguous().numpy().tobytes())
        return b"".join(parts)

    def take(self, data: memoryview) -> memoryview:
        rows, K = self.index_size
        sizes = (1,), (rows, K), tuple(self.x.shape[:2])
        found = []
        for size in sizes:
            count = int(np.prod(size))
            found.append(torch.from_numpy(np.frombuffer(data[: 8 * count], np.int64).copy()).reshape(size))
            data = data[8 * count :]
        self.error, self.kept, self.labels = found[0].item(), found[1], found[2]
        return data


def run(
    calls: list[Labelling], folder: Path, driver: Path | None = None, mistake: int = 0
) -> subprocess.CompletedProcess:
    """`tests.simt.run` of this driver."""
    return run_calls(calls, driver or build(SANITIZED, name="cluster_driver"), folder, timeout=600, mistake=mistake)
