"""Small hosts in float64, their official partners with the same weights, and their inputs."""

import importlib

import torch

from h2ot_kernels import hosts

B, F, J = 2, 27, 17
NAMES = tuple(name for name in hosts.HOSTS if name != "ftp_pose")  # those that lift keypoints
PRUNED = tuple(name for name in NAMES if "_" in name)
SIZES = {
    "mixste": {"num_frames": F, "channels": 32, "depth": 5, "num_heads": 4},
    "motionbert": {"num_frames": F, "channels": 32, "depth": 3, "num_heads": 4, "representation": 48},
    "mhformer": {"num_frames": F, "channels": 32, "hidden": 48, "num_heads": 4, "encoder_depth": 2},
    "motionagformer": {"num_frames": F, "channels": 32, "depth": 4, "num_heads": 4, "representation": 48},
}
STAGES = {
    "hot_mixste": {3: 9},
    "tpc_mixste": {4: 7},
    "h2ot_mixste": {1: 13, 2: 9},
    "hot_motionbert": {1: 9},
    "h2ot_motionbert": {1: 13, 2: 9},
    "tpc_mhformer": {1: 9},
    "h2ot_mhformer": {1: 13, 2: 9},
    "hot_motionagformer": {2: 9},
    "h2ot_motionagformer": {1: 13, 3: 9},
}
# What makes training deterministic.
NO_DROP = {"mixste": {"drop_path_rate": 0.0}, "mhformer": {"drop_path_rate": 0.0, "dropout": 0.0}}


def base_of(name):
    return name.rsplit("_", 1)[-1]


def arguments(name, **overrides):
    stages = {"stages": STAGES[name]} if name in STAGES else {}
    return {**SIZES[base_of(name)], **stages, **overrides}


def small(name, **overrides):
    """A small host in float64, every parameter random (the embeddings and the recovery token start at zero)."""
    torch.manual_seed(3)
    model = hosts.build(name, **arguments(name, **overrides)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def official(name, model, **overrides):
    module = importlib.import_module(f"python_ref.official_{base_of(name)}")
    partner = module.build(name, **arguments(name, **overrides)).double()
    partner.load_state_dict(model.state_dict())
    return partner.train(model.training)


def inputs(name="mixste", dtype=torch.float64):
    """x [B, F, J, the channels of that host], noise [B, F]."""
    g = torch.Generator().manual_seed(11)
    channels = 2 if base_of(name) in ("mixste", "mhformer") else 3
    x = torch.randn(B, F, J, channels, generator=g, dtype=dtype)
    return x, torch.rand(B, F, generator=g, dtype=dtype) * 1e-6


def poses(result):
    return result[0] if isinstance(result, tuple) else result


def assert_near(ours, theirs, tolerance, scale=None):
    scale = theirs.abs().max().item() if scale is None else scale
    error = (ours.double() - theirs.double()).abs().max().item()
    assert error <= tolerance * scale, f"error {error:.3g} of scale {scale:.3g}"
