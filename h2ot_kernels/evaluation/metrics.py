"""Errors of 3D poses, in the unit of the poses."""

import torch
from torch import Tensor

from .. import checks


def mpjpe(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean per-joint position error: poses [..., J, 3] twice -> [...], the mean over the joints of the distances.

    >>> import torch
    >>> from h2ot_kernels.evaluation import mpjpe
    >>> mpjpe(torch.zeros(1, 17, 3), torch.full((1, 17, 3), 2.0))
    tensor([3.4641])
    """
    _check(predicted, target)
    return (predicted - target).norm(dim=-1).mean(-1)


def p_mpjpe(predicted: Tensor, target: Tensor) -> Tensor:
    """MPJPE of each pose after the similarity (scale, rotation, translation) that fits it best: [..., J, 3] -> [...].

    Rotations only, no reflections. A prediction whose joints coincide cannot be scaled: it stays a point. In float64.
    Source: Procrustes analysis by SVD; one 3 x 3 SVD a pose.

    >>> import torch
    >>> from h2ot_kernels.evaluation import p_mpjpe
    >>> pose = torch.randn(17, 3)
    >>> bool(p_mpjpe(2 * pose.roll(1, -1) + 5, pose) < 1e-5)  # cyclic permutations of the axes are rotations
    True
    """
    _check(predicted, target)
    centre = target.double().mean(-2, keepdim=True)
    x, y = predicted.double() - predicted.double().mean(-2, keepdim=True), target.double() - centre
    u, s, vh = torch.linalg.svd(x.mT @ y)
    # A reflection would fit better: turn the axis that counts least.
    turn = torch.ones_like(s)
    turn[..., -1] = torch.linalg.det(u @ vh).sign()
    rotation = (u * turn[..., None, :]) @ vh
    size = x.square().sum((-2, -1))
    scale = torch.where(size > 0, (s * turn).sum(-1) / size.where(size > 0, 1), 0)
    return mpjpe(scale[..., None, None] * (x @ rotation) + centre, target.double())


def _check(predicted: Tensor, target: Tensor) -> None:
    for name, x in (("predicted", predicted), ("target", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, wanted a tensor [..., J, 3]")
        if x.dim() < 2 or x.shape[-1] != 3 or x.shape[-2] == 0:
            raise ValueError(f"{name}: got shape {checks.shape(x)}, wanted [..., J, 3], J at least 1")
    if predicted.shape != target.shape:
        raise ValueError(f"predicted: got shape {checks.shape(predicted)}, wanted {checks.shape(target)}, the target's")
