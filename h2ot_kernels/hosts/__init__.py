"""Video pose transformers with official parameter names, whole and as hourglasses."""

from torch import nn

from .checkpoint import load_checkpoint
from .flops import count_flops
from .ftp_pose import FTPPose
from .mixste import MixSTE

__all__ = ["HOSTS", "FTPPose", "MixSTE", "build", "count_flops", "load_checkpoint"]

HOSTS = {
    "mixste": (MixSTE, {}),
    "hot_mixste": (MixSTE, {"stages": {3: 81}, "pruner": "cluster", "recover": "attention", "pos_embed": True}),
    "tpc_mixste": (MixSTE, {"stages": {7: 61}, "pruner": "cluster", "recover": None, "keep": "centre"}),
    "h2ot_mixste": (MixSTE, {"stages": {1: 121, 2: 81}, "pruner": "sampler", "recover": "interpolation"}),
    "ftp_pose": (FTPPose, {}),
}


def build(name: str, **overrides) -> nn.Module:
    """The host `name`, weights random, in training mode as any new module; overrides: arguments of its class.

    >>> from h2ot_kernels import hosts
    >>> model = hosts.build("h2ot_mixste", num_frames=27, channels=32, depth=4, stages={1: 13, 2: 9})
    >>> model.hourglass.stages
    {1: 13, 2: 9}
    """
    if name not in HOSTS:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(HOSTS)}")
    host, preset = HOSTS[name]
    return host(**{**preset, **overrides})
