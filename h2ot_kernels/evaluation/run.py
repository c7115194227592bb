"""A host over whole videos, and its error."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import checks
from ..demo.keypoints import cut_windows, join_windows
from ..modes import in_eval_mode
from .human36m import LEFT, RIGHT, Video
from .metrics import mpjpe, p_mpjpe


@dataclass(frozen=True)
class Score:
    """Means over the frames of an action (name "mean": over the actions), in millimetres."""

    action: str
    frames: int
    mpjpe: float
    p_mpjpe: float


def flip(pose: Tensor, left: Sequence[int] = LEFT, right: Sequence[int] = RIGHT) -> Tensor:
    """The mirrored pose(s) [..., J, C]: the first coordinate negated, left and right joints exchanged.

    >>> import torch
    >>> from h2ot_kernels.evaluation import flip
    >>> flip(torch.tensor([[1.0, 5.0], [2.0, 6.0]]), left=[0], right=[1])
    tensor([[-2.,  6.],
            [-1.,  5.]])
    """
    order = list(range(pose.shape[-2]))
    for one, other in zip(left, right, strict=True):
        order[one], order[other] = other, one
    sign = pose.new_ones(pose.shape[-1])
    sign[0] = -1
    return pose[..., order, :] * sign


@torch.no_grad()
def lift(
    model: nn.Module, keypoints: Tensor, *, with_flip: bool = True, batch: int = 8, device: str | torch.device = "cpu"
) -> Tensor:
    """The 3D poses [T, J, 3] that a host makes of normalised 2D keypoints [T, J, 2]; on the CPU.

    seq2seq: windows of F frames back to back, the last one ending with the video (a shorter video is padded with its
    last frame). seq2frame: a window around each frame, the video's first and last frame repeated at its ends.
    with_flip: the mean of the pose and the mirrored pose of the mirrored keypoints; the second pass keeps the frames
    that the first one chose. A third input channel, where the host has one, is a confidence of 1. The model is moved to
    device, and runs in eval mode; then each of its modules is in the mode it was in before.
    Raises ValueError for a host that lifts no keypoints, or gives only the kept frames (build it with
    pipeline="seq2frame").
    """
    checks.tensor("keypoints", keypoints, (3,), "[T, J, 2]", (torch.float32, torch.float64))
    if not (hasattr(model, "hourglass") and hasattr(model, "in_shape")):
        raise ValueError(f"model: got {type(model).__name__}, wanted a host that lifts keypoints (hosts.LIFTING)")
    frames, joints, channels = model.in_shape
    checks.has_shape("keypoints", keypoints, (keypoints.shape[0], joints, 2), "[T, J, 2]")
    checks.integer("batch", batch, 1)
    if not len(keypoints):
        raise ValueError(f"keypoints: got shape {checks.shape(keypoints)}, wanted at least one frame")
    hourglass = model.hourglass
    by_frame = hourglass.pipeline == "seq2frame"
    if hourglass.stages and hourglass.recovery is None and not by_frame:
        raise ValueError('model: gives its kept frames only, wanted one built with pipeline="seq2frame"')
    parameter = next(model.parameters())
    windows = (
        _frame_windows(keypoints, frames) if by_frame else torch.from_numpy(cut_windows(keypoints.numpy(), frames))
    )
    model = model.to(device)
    lifted = []
    with in_eval_mode(model):
        for x in windows.split(batch):
            x = x.to(device, parameter.dtype)
            poses, index = model(_with_confidence(x, channels), return_index=True)
            if with_flip:
                again = index if hourglass.stages else None
                mirrored, _ = model(_with_confidence(flip(x), channels), again, return_index=True)
                poses = (poses + flip(mirrored)) / 2
            lifted.append(poses.cpu().float())
    lifted = torch.cat(lifted)
    return lifted[:, 0] if by_frame else torch.from_numpy(join_windows(lifted.numpy(), len(keypoints)))


def evaluate(model: nn.Module, videos: Iterable[Video], **options) -> list[Score]:
    """MPJPE and P-MPJPE (mm) of every action, and their mean over the actions as the last one.

    videos: with targets, see `Video`; options: of `lift`. Root-relative: the predicted root is set to 0, as the
    target's is. The frames of an action count alike, in whichever video they are.
    """
    errors: dict[str, list[Tensor]] = {}
    for video in videos:
        if video.poses is None:
            raise ValueError(f"{video.name}: has no 3D poses to compare with")
        predicted = lift(model, video.keypoints, **options)
        predicted[:, 0] = 0
        target = video.poses - video.poses[:, :1]
        millimetres = 1000 * torch.stack([mpjpe(predicted, target).double(), p_mpjpe(predicted, target)])
        errors.setdefault(video.action, []).append(millimetres)
    if not errors:
        raise ValueError("videos: got none, wanted at least one")
    scores = []
    for action, parts in sorted(errors.items()):
        every = torch.cat(parts, 1)
        scores.append(Score(action, every.shape[1], *every.mean(1).tolist()))
    means = [sum(values) / len(scores) for values in zip(*((s.mpjpe, s.p_mpjpe) for s in scores), strict=True)]
    return [*scores, Score("mean", sum(score.frames for score in scores), *means)]


def _frame_windows(keypoints: Tensor, frames: int) -> Tensor:
    """[T, F, J, 2]: window t has frame t at its centre (F - 1) // 2. A view, not T copies."""
    before = (frames - 1) // 2
    padded = functional.pad(keypoints.permute(1, 2, 0), (before, frames - 1 - before), mode="replicate")
    return padded.unfold(-1, frames, 1).permute(2, 3, 0, 1)


def _with_confidence(x: Tensor, channels: int) -> Tensor:
    return functional.pad(x, (0, channels - x.shape[-1]), value=1.0)
