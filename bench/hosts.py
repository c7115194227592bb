"""The hosts as the benchmarks and the ONNX tests build them: by name, at full or at reduced size, weights of a seed."""

import inspect

import torch
from torch import Tensor, nn

from h2ot_kernels import hosts
from h2ot_kernels.demo.skeleton import walking_clip

LIFTING = hosts.LIFTING  # bench_ftp_pose measures the one that reads images
REDUCED = {"num_frames": 27, "channels": 32, "hidden": 64, "representation": 64, "num_heads": 4}


def build(name: str, *, reduced: bool = False, **overrides) -> nn.Module:
    """The host `name` in eval mode. reduced: 27 frames, 32 channels, its stages before blocks 1, 2, ... and no more."""
    if reduced:
        overrides = reduced_arguments(name) | overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hosts.build(name, **overrides)
        with torch.no_grad():
            for parameter in model.parameters():  # embeddings and recovery tokens start at zero: nothing would be seen
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def reduced_arguments(name: str) -> dict:
    """Arguments of the host's class that make it small; those that the class does not have are left out."""
    host, preset = hosts.HOSTS[name]
    known = inspect.signature(host).parameters
    frames, small = num_frames(name), REDUCED["num_frames"]
    tokens = [kept * small // frames for kept in preset.get("stages", {}).values()]
    arguments = REDUCED | {"depth": len(tokens) + 1}
    arguments = {argument: value for argument, value in arguments.items() if argument in known}
    return arguments | ({"stages": dict(enumerate(tokens, start=1))} if tokens else {})


def num_frames(name: str) -> int:
    """How many frames the host takes if not told otherwise."""
    return inspect.signature(hosts.HOSTS[name][0]).parameters["num_frames"].default


def keypoints(model: nn.Module, batch: int, *, noise: float = 0.01) -> Tensor:
    """[B, F, J, in_channels] float32: a made-up walk, another stretch of it per sample, confidence 1.

    noise: standard deviation, a detector's by default. Where frames are as similar as in a walk, rounding decides the
    graph of MotionAGFormer; at 1 it does not.
    """
    frames, joints, channels = model.in_shape
    points = torch.from_numpy(walking_clip(frames + 7 * batch).normalised).float()
    x = torch.stack([points[7 * b : 7 * b + frames] for b in range(batch)])
    if x.shape[2] != joints:
        raise ValueError(f"model: got {joints} joints, wanted {x.shape[2]}, those of the walk")
    x += noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([x, x.new_ones(*x.shape[:-1], channels - 2)], -1)
