"""Tolerances, each with its reason."""

import torch
from torch import Tensor

# Density, distance and score are sums of float64 squares, whichever way they are ordered: C eps64 relative, with room.
SCORE_RTOL = 1e-11
SCORE_ATOL = 1e-11


def assert_scores(ours, exact) -> None:
    """TokenScores against the float64 oracle: values to float64 rounding, parents exactly."""
    for name in ("density", "distance", "score"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(exact, name), rtol=SCORE_RTOL, atol=SCORE_ATOL, msg=lambda m: f"{name}: {m}"
        )
    assert torch.equal(ours.parent, exact.parent), f"parent differs at {(ours.parent != exact.parent).nonzero()}"


def bound(exact: Tensor, same_precision: Tensor, dtype: torch.dtype, terms: int, scale: float | None = None) -> float:
    """max(4 x PyTorch's own error at this precision, 2 eps sqrt(terms) of the scale; in float64 twice the latter).

    scale: the largest result; for sums that may cancel altogether (one frame's gradient through a softmax), where the
    result says nothing of what was summed, the same sums over the magnitudes of their terms.

    4: two correctly implemented sums of the same terms differ by more than 2x on long rows; sqrt(terms): the random
    walk of rounding errors in one accumulation. In float64 the oracle takes such a walk, too, and PyTorch's own error,
    its distance from the oracle, says nothing.
    """
    if exact.numel() == 0:
        return 0.0
    own = (same_precision.double() - exact).abs().max().item()
    walks = 2 if dtype == torch.float64 else 1
    scale = exact.abs().max().item() if scale is None else scale
    return max(4 * own, walks * 2 * torch.finfo(dtype).eps * max(terms, 1) ** 0.5 * scale)


def attention_scales(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, H: int, scale: float | None = None
) -> list[float]:
    """Of recover_attention and its gradients to query, key and value: the largest sum of their terms' magnitudes.

    The gradient to the logits is P (dP - sum P dP), a difference of what may be equal.
    """
    B, F, C = weight.shape
    q, k, v, w = (
        x.double().expand(B, -1, -1).unflatten(-1, (H, C // H)).transpose(1, 2) for x in (query, key, value, weight)
    )
    scale = (C // H) ** -0.5 if scale is None else scale
    P = (q @ k.mT * scale).softmax(-1)
    dP = w.abs() @ v.abs().mT
    logits = P * (dP + (P * dP).sum(-1, keepdim=True)) * abs(scale)
    to_query = logits @ k.abs()
    if query.shape[0] < B:
        to_query = to_query.sum(0)
    sums = P @ v.abs(), to_query, logits.mT @ q.abs(), P.mT @ w.abs()
    return [x.max().item() if x.numel() else 0.0 for x in sums]


def assert_within(ours: Tensor, exact: Tensor, same_precision: Tensor, terms: int, scale: float | None = None) -> None:
    """ours is as near to the float64 result as PyTorch at the same precision is (see `bound`)."""
    assert ours.shape == exact.shape
    assert ours.dtype == same_precision.dtype
    if exact.numel() == 0:
        return
    error = (ours.double() - exact).abs().max().item()
    limit = bound(exact, same_precision, ours.dtype, terms, scale)
    assert error <= limit, f"error {error:.3g} above the bound {limit:.3g}"
