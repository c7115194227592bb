"""Whole models: ours beside the official formulation of the same network, with the same weights."""

import functools
import importlib
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

import h2ot_kernels as h2ot

from .. import hosts
from ..timing import Timing, interleave
from .keypoints import Clip, cut_windows, join_windows, window_starts

DEFAULT = ("mixste", "hot_mixste", "tpc_mixste", "h2ot_mixste")
# Poses of a deep float32 network in another order of sums; the largest coordinate is about 1.
DEVIATION_BOUND = 1e-3
# The temporal graph of MotionAGFormer jumps where a frame's fourth and fifth neighbour are as near: between two float32
# runs in another order of sums some rows do (the official code against its own float64: poses up to 2e-2 off).
JUMPING_BOUND = {"motionagformer": 5e-2}


def base_of(name: str) -> str:
    """The unpruned model that `name` prunes."""
    return name.rsplit("_", 1)[-1]


@dataclass(frozen=True)
class ModelResult:
    """One model at batch 1.

    tokens: frames that enter, then those after each stage. timings: "official" (absent: why_no_official), "compile",
    "ours". deviation: largest difference of the poses from the official formulation, given the same kept frames.
    Models that are wrong (is_right) are not timed.
    """

    name: str
    tokens: list[int]
    gflops: float
    timings: dict[str, Timing]
    deviation: float | None
    why_no_official: str | None

    @property
    def is_right(self) -> bool:
        bound = JUMPING_BOUND.get(base_of(self.name), DEVIATION_BOUND)
        return self.deviation is None or self.deviation <= bound

    def seconds(self, rival: str) -> float | None:
        """Median of one forward."""
        return self.timings[rival].p50 if rival in self.timings else None

    def frames_per_second(self, rival: str) -> float | None:
        """Input frames per second: the window's frames over the time of one forward."""
        seconds = self.seconds(rival)
        return self.tokens[0] / seconds if seconds else None

    def row(self) -> dict:
        """Plain values, for JSON."""
        rates = {rival: self.frames_per_second(rival) for rival in self.timings}
        return asdict(self) | {"is_right": self.is_right, "frames_per_second": rates}


def build_official(name: str) -> tuple[nn.Module | None, str | None]:
    """The official formulation of a host, or why there is none."""
    module = f"python_ref.official_{base_of(name)}"
    try:
        built = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None, f"no official formulation of {base_of(name)} in this version"
    return built.build(name), None


def build_ours(name: str, checkpoint: str | None, device: torch.device) -> nn.Module:
    """The host in eval mode, with the checkpoint's weights, else random ones of a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hosts.build(name)
    if checkpoint is not None:
        hosts.load_checkpoint(model, checkpoint)
    return model.eval().requires_grad_(False).to(device)


def model_windows(model: nn.Module, clip: Clip, device: torch.device) -> Tensor:
    """The clip as the model reads it, [B, F, J, C]: normalised 2D poses, a confidence of 1 as third channel."""
    frames, joints, channels = model.in_shape
    if clip.num_joints != joints:
        raise ValueError(f"{clip.name}: has {clip.num_joints} joints, the models need {joints} (Human3.6M's)")
    x = torch.from_numpy(cut_windows(clip.normalised, frames))
    confidence = x.new_ones(*x.shape[:-1], channels - x.shape[-1])
    return torch.cat([x, confidence], -1).to(device)


def measure(
    models: dict[str, nn.Module],
    clip: Clip,
    device: torch.device,
    *,
    seconds: float,
    with_compile: bool = False,
    only_ours: Collection[str] = (),
    on_round: Callable[[float], None] | None = None,
) -> list[ModelResult]:
    """Every model beside its official formulation, on the first window of the clip; all are timed in turn, together.

    only_ours: models that are timed without an opponent. on_round: see `interleave`.
    """
    results, rivals = [], {}
    with torch.inference_mode():
        for name, model in models.items():
            x = model_windows(model, clip, device)[:1]
            official, why_not = (None, "not asked for") if name in only_ours else build_official(name)
            deviation = None
            runs = {"ours": model}
            if official is None:
                model(x)
            else:
                official.load_state_dict(model.state_dict())
                official.eval().requires_grad_(False).to(device)
                deviation = deviate(model, official, x)
                runs = {"official": official, "ours": model}
                if with_compile:
                    runs["compile"] = torch.compile(official)
                    runs["compile"](x)
            tokens = [model.in_shape[0], *model.hourglass.stages.values()]
            results.append(ModelResult(name, tokens, hosts.count_flops(model) / 1e9, {}, deviation, why_not))
            if results[-1].is_right:
                rivals |= {(name, rival): functools.partial(run, x) for rival, run in runs.items()}
        timings = interleave(rivals, device, seconds=seconds, min_calls=1, max_calls=20, warm_up=0, on_round=on_round)
    for (name, rival), timing in timings.items():
        next(result for result in results if result.name == name).timings[rival] = timing
    return results


def deviate(model: nn.Module, official: nn.Module, x: Tensor) -> float:
    """Largest difference between the poses of the two, the official one keeping the frames that ours chose."""
    poses, index = model(x, return_index=True)
    theirs = official(x, index=index) if model.hourglass.stages else official(x)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    return (theirs - poses).abs().max().item()


def lift(model: nn.Module, clip: Clip, device: torch.device, *, seconds: float) -> tuple[np.ndarray, np.ndarray | None]:
    """poses [T', J, 3] of the clip, and kept [B, K], frames of the clip (None without stages).

    Window after window until about `seconds` are spent, at least one. A model that returns only its kept frames is
    interpolated in between.
    """
    windows = model_windows(model, clip, device)
    frames = model.in_shape[0]
    lifted, kept = [], []
    deadline = time.perf_counter() + seconds
    with torch.inference_mode():
        for window, start in zip(windows, window_starts(clip.num_frames, frames), strict=True):
            if lifted and time.perf_counter() > deadline:
                break
            poses, index = model(window[None], return_index=True)
            last = index[-1] if isinstance(index, tuple) and index else index
            if poses.shape[1] != frames:
                poses = h2ot.recover_interpolate(poses, last, frames)
            lifted.append(poses[0])
            if model.hourglass.stages:
                kept.append(last[0] + start)
    done = len(lifted) == len(windows)
    poses = torch.stack(lifted).cpu().numpy()
    joined = join_windows(poses, clip.num_frames if done else len(lifted) * frames)
    return joined, torch.stack(kept).cpu().numpy() if kept else None
