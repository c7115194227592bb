"""Video pose transformers with official parameter names, whole and as hourglasses."""

import inspect

from torch import nn

from .checkpoint import load_checkpoint
from .flops import count_flops
from .ftp_pose import FTPPose
from .host import Host
from .mhformer import MHFormer
from .mixste import MixSTE
from .motionagformer import MotionAGFormer
from .motionbert import MotionBERT

__all__ = [
    "HOSTS",
    "FTPPose",
    "MHFormer",
    "MixSTE",
    "MotionAGFormer",
    "MotionBERT",
    "build",
    "count_flops",
    "load_checkpoint",
]

HOT = {"pruner": "cluster", "recover": "attention", "pos_embed": True}
TPC = {"pruner": "cluster", "recover": None, "keep": "centre"}
H2OT = {"pruner": "sampler", "recover": "interpolation"}
HOSTS = {
    "mixste": (MixSTE, {}),
    "hot_mixste": (MixSTE, {"stages": {3: 81}, **HOT}),
    "tpc_mixste": (MixSTE, {"stages": {7: 61}, **TPC}),
    "h2ot_mixste": (MixSTE, {"stages": {1: 121, 2: 81}, **H2OT}),
    "motionbert": (MotionBERT, {}),
    "hot_motionbert": (MotionBERT, {"stages": {1: 81}, **HOT}),
    "h2ot_motionbert": (MotionBERT, {"stages": {1: 121, 2: 81}, **H2OT}),
    "mhformer": (MHFormer, {}),
    "tpc_mhformer": (MHFormer, {"stages": {1: 117}, **TPC}),
    "h2ot_mhformer": (MHFormer, {"stages": {1: 176, 2: 117}, **H2OT}),
    "motionagformer": (MotionAGFormer, {}),
    "hot_motionagformer": (MotionAGFormer, {"stages": {7: 81}, **HOT}),
    "h2ot_motionagformer": (MotionAGFormer, {"stages": {3: 121, 7: 81}, **H2OT}),
    "ftp_pose": (FTPPose, {}),
}
LIFTING = tuple(name for name, (host, _) in HOSTS.items() if issubclass(host, Host))  # keypoints in, 3D poses out
# Without recovery they give their kept frames; what is published of them is the centre (pipeline="seq2frame").
SEQ2FRAME = tuple(name for name, (_, preset) in HOSTS.items() if preset.get("recover", "") is None)


def require_lifting(argument: str, name: str) -> None:
    """Raise ValueError for a known host that lifts no keypoints."""
    if name in HOSTS and name not in LIFTING:
        raise ValueError(f"{argument}: got {name!r}, which lifts no keypoints, wanted one of {', '.join(LIFTING)}")


def build(name: str, **overrides) -> nn.Module:
    """The host `name`, weights random, in training mode as any new module; overrides: arguments of its class.

    Raises ValueError for an unknown name, TypeError or ValueError as the class does. What it takes: a float tensor
    [B, *model.in_shape]; "motionbert" fewer frames, too, as the official one (`Host.may_be_shorter`).

    >>> from h2ot_kernels import hosts
    >>> model = hosts.build("h2ot_mixste", num_frames=27, channels=32, depth=4, stages={1: 13, 2: 9})
    >>> model.hourglass.stages
    {1: 13, 2: 9}
    """
    if name not in HOSTS:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(HOSTS)}")
    host, preset = HOSTS[name]
    if name in LIFTING:
        _check_arguments(name, host, overrides)
    return host(**{**preset, **overrides})


def _check_arguments(name: str, host: type[Host], given: dict) -> None:
    """Raise TypeError for an argument that the host does not have, nor Host, which gets what it does not know."""
    known = [one.name for one in inspect.signature(host).parameters.values() if one.kind != one.VAR_KEYWORD]
    known += [one.name for one in inspect.signature(Host).parameters.values() if one.kind == one.KEYWORD_ONLY]
    if unknown := [argument for argument in given if argument not in known]:
        raise TypeError(f"{unknown[0]}: got an argument that {name} does not have, wanted some of {', '.join(known)}")
