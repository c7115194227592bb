"""Runs csrc/cuda/gather.cu on the CPU, as tests/simt does with score.cu."""

import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import _DTYPES, SANITIZED, build
from . import run as run_calls


@dataclass
class Move:
    """One call: x [B, ..., F, ...] gathered by index, or (num_frames given) x scattered by it into so many frames.

    dim: the frame axis of x; out_dim: that of the result. unaligned: elements before the first of the result.
    """

    x: Tensor
    index: Tensor
    embed: Tensor | None = None
    dim: int = 1
    out_dim: int = 1
    num_frames: int | None = None
    unaligned: int = 0
    wide: bool = False
    seed: int = 1
    error: int | None = field(default=None, init=False)
    out: Tensor | None = field(default=None, init=False)

    @property
    def size(self) -> list[int]:
        size = list(self.x.shape)
        del size[self.dim]
        size.insert(self.out_dim, self.index.shape[1] if self.num_frames is None else self.num_frames)
        return size

    def record(self) -> bytes:
        x, size = self.x.detach(), self.size
        stride, item = list(x.stride()), x.element_size()
        stride.insert(self.out_dim, stride.pop(self.dim))
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
        raw = x.as_strided((last + 1,), (1,)).contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""
        spare = [0] * (8 - x.dim())
        header = [
            *(self.num_frames is not None, self.seed, _DTYPES[x.dtype], x.dim(), self.out_dim, x.shape[self.dim]),
            *(*self.index.shape, self.embed is not None, len(raw), int(np.prod(size)) * item, self.unaligned * item),
            *(self.wide, *size, *spare, *stride, *spare),
        ]
        parts = [struct.pack(f"<{len(header)}q", *header), raw, self.index.contiguous().numpy().tobytes()]
        if self.embed is not None:
            parts.append(self.embed.to(x.dtype).contiguous().view(torch.uint8).numpy().tobytes())
        return b"".join(parts)

    def take(self, data: memoryview) -> memoryview:
        self.error = int(np.frombuffer(data[:8], np.int64)[0])
        end = 8 + int(np.prod(self.size)) * self.x.element_size()
        self.out = torch.empty(self.size, dtype=self.x.dtype)
        if end > 8:
            self.out.view(torch.uint8).flatten()[:] = torch.from_numpy(np.frombuffer(data[8:end], np.uint8).copy())
        return data[end:]


def run(moves: list[Move], folder: Path, driver: Path | None = None, mistake: int = 0) -> subprocess.CompletedProcess:
    """`tests.simt.run` of this driver."""
    return run_calls(moves, driver or build(SANITIZED, name="gather_driver"), folder, mistake=mistake)
