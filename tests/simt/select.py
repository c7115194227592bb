"""Runs csrc/cuda/select.cu on the CPU, as tests/simt does with score.cu."""

import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import SANITIZED, build
from . import run as run_calls


@dataclass
class Choice:
    """One call of launch_select."""

    score: Tensor
    num_tokens: int
    mask: Tensor | None = None
    keep: Tensor | None = None
    seed: int = 1
    error: int | None = field(default=None, init=False)
    index: Tensor | None = field(default=None, init=False)

    def record(self) -> bytes:
        keep = self.keep if self.keep is not None else torch.zeros(0, 0, dtype=torch.int64)
        header = [self.seed, *self.score.shape, self.num_tokens, self.mask is not None, *keep.shape]
        parts = [struct.pack(f"<{len(header)}q", *header), self.score.double().contiguous().numpy().tobytes()]
        if self.mask is not None:
            parts.append(self.mask.contiguous().numpy().tobytes())
        return b"".join([*parts, keep.contiguous().numpy().tobytes()])

    def take(self, data: memoryview) -> memoryview:
        count = self.score.shape[0] * self.num_tokens
        self.error, *index = np.frombuffer(data[: 8 + 8 * count], np.int64).tolist()
        self.index = torch.tensor(index, dtype=torch.int64).reshape(self.score.shape[0], self.num_tokens)
        return data[8 + 8 * count :]


def run(
    choices: list[Choice], folder: Path, driver: Path | None = None, mistake: int = 0
) -> subprocess.CompletedProcess:
    """`tests.simt.run` of this driver."""
    return run_calls(choices, driver or build(SANITIZED, name="select_driver"), folder, mistake=mistake)
