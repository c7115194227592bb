"""What a pruner alone loses, without any weights: keep K of the true frames, interpolate back, measure."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import h2ot_kernels as h2ot

from .keypoints import Clip, cut_windows, join_windows

KEPT = (27, 41, 61, 81, 121, 162)
UNIFORM = "sampler"


@dataclass(frozen=True)
class Recovery:
    """Of one pruner: kept index [B, K] in the frames of each window and error per frame [T] in `unit`, by K."""

    pruner: str
    unit: str
    index: dict[int, Tensor]
    error: dict[int, np.ndarray]

    def mean(self, kept: int) -> float:
        return float(self.error[kept].mean())

    def row(self) -> dict:
        """Plain values, for JSON."""
        return {
            "pruner": self.pruner,
            "unit": self.unit,
            "mean": {kept: self.mean(kept) for kept in self.error},
            "worst_frame": {kept: float(error.max()) for kept, error in self.error.items()},
        }


def pruners(clip: Clip, window: int, device: torch.device) -> dict[str, Callable[[int], Tensor]]:
    """name -> (K -> index [B or 1, K]), for the clip cut into windows.

    cluster: the 2D poses as tokens. attention: the standardised poses of a window as query and as key, one head.
    """
    pose = torch.from_numpy(cut_windows(clip.normalised, window)).to(device)
    tokens = pose.flatten(2)
    centred = tokens - tokens.mean(1, keepdim=True)
    standard = (centred / centred.std(1, keepdim=True, correction=0).clamp(min=1e-6))[:, None].contiguous()
    return {
        "cluster": lambda kept: h2ot.prune_cluster(tokens, kept),
        UNIFORM: lambda kept: h2ot.prune_sample(window, kept, device=device),
        "motion": lambda kept: h2ot.prune_motion(pose, kept),
        "attention": lambda kept: h2ot.prune_attention(standard, standard, kept),
    }


def measure(clip: Clip, window: int, device: torch.device, kept: tuple[int, ...] = KEPT) -> list[Recovery]:
    """Recovery error of every pruner over the whole clip, window by window.

    The mean over joints of the distance between a true frame and the interpolated one: in millimetres of the 3D joints
    (camera or world coordinates, not relative to the root) where the clip has them, else in the unit of the 2D points.
    """
    unit, scale, truth = ("mm", 1000.0, clip.joints_3d) if clip.joints_3d is not None else (clip.unit, 1.0, clip.points)
    frames = torch.from_numpy(cut_windows(truth * scale, window)).to(device)
    found = []
    for name, prune in pruners(clip, window, device).items():
        index = {K: prune(K).expand(frames.shape[0], -1) for K in kept}
        error = {K: _error(frames, index[K], clip.num_frames) for K in kept}
        found.append(Recovery(name, unit, {K: rows.cpu() for K, rows in index.items()}, error))
    return found


def _error(frames: Tensor, index: Tensor, num_frames: int) -> np.ndarray:
    """[T]: frames [B, F, J, D] against what the kept ones interpolate to."""
    kept = h2ot.gather_tokens(frames, index)
    recovered = h2ot.recover_interpolate(kept, index, frames.shape[1])
    return join_windows((recovered - frames).norm(dim=-1).mean(-1).cpu().numpy(), num_frames)
