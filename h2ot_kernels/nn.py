"""The operations as modules: four pruners (and a caller's own scores), two recoveries.

Tokens are [B, F, C] or [B, F, J, C]; another frame axis, or rows [(B J), F, C], by `frame_dim` and `num_joints`.
"""

import torch
from torch import Tensor, nn

from . import checks
from .gather import gather_tokens
from .linear import Linear
from .recover_attention import recover_attention
from .recover_interpolation import recover_interpolate
from .recover_pose import project, recover_pose
from .select import prune_attention, prune_cluster, prune_motion, prune_sample, select_tokens
from .watched import is_own, is_plain, is_silent


class TokenPruning(nn.Module):
    """Keeps `num_tokens` frames; each subclass says which. Has no parameters.

    num_tokens: K. frame_dim: the axis of x that holds the frames, 1 or more. num_joints: where given, x is
    [(B J), F, C] and the J rows of a sample share one index.
    """

    # The names of what `select` reads beside x and keep.
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def __init__(self, num_tokens: int, *, frame_dim: int = 1, num_joints: int | None = None):
        super().__init__()
        checks.integer("num_tokens", num_tokens, 1)
        checks.integer("frame_dim", frame_dim, 1)
        if num_joints is not None:
            checks.integer("num_joints", num_joints, 1)
        self.num_tokens, self.frame_dim, self.num_joints = num_tokens, frame_dim, num_joints

    def forward(self, x: Tensor, *, pos_embed: Tensor | None = None, **signals) -> tuple[Tensor, Tensor]:
        """x [B, F, ..., C] -> (its kept frames + pos_embed [1, K, C] where given, index [B, K] or [1, K]).

        signals: what `select` takes. The gradient goes through the tokens, not through the choice.
        """
        self.check(x)
        index = self.select(x, **signals)
        return gather_tokens(x, index, pos_embed, dim=self.frame_dim), index

    def select(self, x: Tensor, **signals) -> Tensor:
        """The ascending int64 index, [B, K] or [1, K], of the frames to keep."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tokens it keeps")

    def check(self, x: Tensor) -> None:
        """x has its frames on axis frame_dim, and rows for num_joints."""
        checks.is_tensor("x", x)
        if x.dim() <= self.frame_dim:
            raise ValueError(f"x: got shape {checks.shape(x)}, wanted its frames on axis {self.frame_dim}")
        if self.num_joints is not None and x.shape[0] % self.num_joints:
            raise ValueError(f"x: got shape {checks.shape(x)}, wanted {self.num_joints} rows a sample on axis 0")

    def tokens(self, x: Tensor) -> Tensor:
        """x as [B, F, C] or, joints not yet pooled, [B, F, J, C]."""
        if self.num_joints is not None:
            x = x.unflatten(0, (-1, self.num_joints))
            return x.movedim(self.frame_dim + 1, 1)
        return x.movedim(self.frame_dim, 1)

    def extra_repr(self) -> str:
        joints = "" if self.num_joints is None else f", num_joints={self.num_joints}"
        return f"num_tokens={self.num_tokens}, frame_dim={self.frame_dim}{joints}"


class TokenPruningCluster(TokenPruning):
    """TPC: the frames with the largest DPC-kNN scores (`prune_cluster`); k: how many neighbours make the density.

    >>> import torch
    >>> from h2ot_kernels.nn import TokenPruningCluster
    >>> tokens, index = TokenPruningCluster(2)(torch.tensor([[[0.0], [0.1], [5.0], [5.1]]]))
    >>> index
    tensor([[0, 2]])
    """

    optional = ("mask", "noise")

    def __init__(self, num_tokens: int, k: int = 2, **layout):
        super().__init__(num_tokens, **layout)
        checks.integer("k", k, 1)
        self.k = k

    def select(
        self, x: Tensor, *, keep=None, mask: Tensor | None = None, noise: Tensor | torch.Generator | None = None
    ) -> Tensor:
        """mask, noise: [B, F], see `score_tokens`. A generator draws the noise as the official code does."""
        tokens = self.tokens(x)
        if isinstance(noise, torch.Generator):
            noise = torch.rand(tokens.shape[:2], generator=noise, dtype=x.dtype, device=x.device) * 1e-6
        return prune_cluster(tokens, self.num_tokens, self.k, keep=keep, mask=mask, noise=noise)


class TokenPruningSampler(TokenPruning):
    """TPS: evenly spaced frames, the same for every input (`prune_sample`).

    >>> import torch
    >>> from h2ot_kernels.nn import TokenPruningSampler
    >>> TokenPruningSampler(3)(torch.zeros(1, 9, 4))[1]
    tensor([[0, 4, 8]])
    """

    def select(self, x: Tensor, *, keep=None) -> Tensor:
        return prune_sample(checks.size_of(x, self.frame_dim), self.num_tokens, keep=keep, device=x.device)


class TokenPruningMotion(TokenPruning):
    """TPMo: the frames that moved most in the 2D pose (`prune_motion`).

    >>> import torch
    >>> from h2ot_kernels.nn import TokenPruningMotion
    >>> pose = torch.tensor([0.0, 0.0, 3.0, 3.0, 4.0]).reshape(1, 5, 1, 1)
    >>> tokens, index = TokenPruningMotion(2)(torch.zeros(1, 5, 8), pose=pose)
    >>> index, tokens.shape
    (tensor([[2, 4]]), torch.Size([1, 2, 8]))
    """

    needed = ("pose",)

    def select(self, x: Tensor, *, pose: Tensor, keep=None) -> Tensor:
        """pose: [B, F, J, D], of the frames that x holds."""
        checks.signal("pose", pose, x.shape[self.frame_dim])
        return prune_motion(pose, self.num_tokens, keep=keep)


class TokenPruningAttention(TokenPruning):
    """TPA: the frames that received most attention in the block before the cut (`prune_attention`).

    >>> import torch
    >>> from h2ot_kernels.nn import TokenPruningAttention
    >>> query, key = torch.ones(1, 1, 3, 1), torch.tensor([0.0, 2.0, 1.0]).reshape(1, 1, 3, 1)
    >>> tokens, index = TokenPruningAttention(2)(torch.zeros(1, 3, 8), query=query, key=key)
    >>> index, tokens.shape
    (tensor([[1, 2]]), torch.Size([1, 2, 8]))
    """

    needed = ("query", "key")

    def select(self, x: Tensor, *, query: Tensor, key: Tensor, keep=None) -> Tensor:
        """query, key: that attention's, [B, H, F, D] or [B, J, H, F, D]; with num_joints [(B J), H, F, D]."""
        checks.signal("query", query, x.shape[self.frame_dim], -2)
        if self.num_joints is not None:
            query, key = (heads.unflatten(0, (-1, self.num_joints)) for heads in (query, key))
        return prune_attention(query, key, self.num_tokens, keep=keep)


class TokenPruningScores(TokenPruning):
    """The frames with the largest of a caller's own scores (`select_tokens`).

    >>> import torch
    >>> from h2ot_kernels.nn import TokenPruningScores
    >>> tokens, index = TokenPruningScores(2)(torch.zeros(1, 4, 8), scores=torch.tensor([[0.1, 0.9, 0.5, 0.2]]))
    >>> index, tokens.shape
    (tensor([[1, 2]]), torch.Size([1, 2, 8]))
    """

    needed = ("scores",)
    optional = ("mask",)

    def select(self, x: Tensor, *, scores: Tensor, keep=None, mask: Tensor | None = None) -> Tensor:
        """scores, mask: [B, F]."""
        checks.signal("scores", scores, x.shape[self.frame_dim])
        return select_tokens(scores, self.num_tokens, keep=keep, mask=mask)


class TokenRecoveringAttention(nn.Module):
    """TRA: token + proj(attention of the recovery token over the kept tokens), with the official parameter names.

    channels: C. num_heads divides C. The learnable recovery token [1, F, C] stays with the model (`x_token`).

    >>> import torch
    >>> from h2ot_kernels.nn import TokenRecoveringAttention
    >>> TokenRecoveringAttention(64)(torch.zeros(1, 243, 64), torch.randn(2, 81, 17, 64)).shape
    torch.Size([2, 243, 17, 64])
    """

    def __init__(self, channels: int, num_heads: int = 8, qkv_bias: bool = True):
        super().__init__()
        checks.integer("num_heads", num_heads, 1)
        if channels % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, wanted a divisor of channels = {channels}")
        self.num_heads = num_heads
        self.linear_q = Linear(channels, channels, bias=qkv_bias)
        self.linear_k = Linear(channels, channels, bias=qkv_bias)
        self.linear_v = Linear(channels, channels, bias=qkv_bias)
        self.proj = Linear(channels, channels)

    def forward(self, token: Tensor, x: Tensor, *, frame_dim: int = 1, head: nn.Module | None = None) -> Tensor:
        """token [1, F, C], x [B, ..., K, ..., C] with K on axis frame_dim -> [B, ..., F, ..., C].

        The query is projected once, not once a sample and joint. head: applied to the result where given, in one pass
        with the recovery (`recover_pose`) where it is LayerNorm + Linear without hooks and no gradient is recorded.
        """
        rows = x.movedim(frame_dim, -2)
        others, rows = rows.shape[:-2], rows.flatten(0, -3).contiguous()
        query, key, value = project(token, rows, self.linear_q, self.linear_k, self.linear_v)
        unseen = (is_own(self.proj, Linear) or is_own(self.proj, nn.Linear)) and not torch.is_grad_enabled()
        if unseen and _is_norm_linear(head) and is_silent(head, *head) and is_plain(head[1].weight):
            tail = (self.proj, *head, self.num_heads)
            recovered = recover_pose(token, query, key, value, *tail, num_joints=1).squeeze(1)
        else:
            recovered = self.proj(recover_attention(query, key, value, self.num_heads))
            # In place where nobody else has it: another 34 MB a call for 4 clips of 512 channels take 8000 page faults.
            alone = unseen and is_plain(self.proj.weight) and recovered.dtype == token.dtype
            recovered = recovered.add_(token) if alone else token + recovered
            recovered = recovered if head is None else head(recovered)
        return recovered.unflatten(0, others).movedim(-2, frame_dim)


class TokenRecoveringInterpolation(nn.Module):
    """TRI: linear in time between the kept frames (`recover_interpolate`). Has no parameters.

    num_frames: F. mode: "linear" or "nearest". align: "index", or "uniform", which ignores the index.

    >>> import torch
    >>> from h2ot_kernels.nn import TokenRecoveringInterpolation
    >>> TokenRecoveringInterpolation(4)(torch.tensor([[[0.0], [3.0]]]), torch.tensor([[0, 3]])).flatten()
    tensor([0., 1., 2., 3.])
    """

    def __init__(self, num_frames: int, *, mode: str = "linear", align: str = "index"):
        super().__init__()
        checks.integer("num_frames", num_frames, 1)
        checks.choice("mode", mode, ("linear", "nearest"))
        checks.choice("align", align, ("index", "uniform"))
        self.num_frames, self.mode, self.align = num_frames, mode, align

    def forward(self, x: Tensor, index: Tensor | None, *, frame_dim: int = 1) -> Tensor:
        """x [B, ..., K, ...] with K on axis frame_dim; index [B, K], [1, K], or [B / R, K] for R rows a sample."""
        rows = x.movedim(frame_dim, 1)
        if index is not None:
            checks.tensor("index", index, (2,), "[B, K] or [1, K]", (torch.int64,))
        if index is not None and index.shape[0] not in (1, x.shape[0]):
            checks.index("index", index, x)
            index = index.repeat_interleave(x.shape[0] // index.shape[0], 0)
        recovered = recover_interpolate(rows, index, self.num_frames, mode=self.mode, align=self.align)
        return recovered.movedim(1, frame_dim)

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}, mode={self.mode!r}, align={self.align!r}"


PRUNERS = {
    "cluster": TokenPruningCluster,
    "sampler": TokenPruningSampler,
    "motion": TokenPruningMotion,
    "attention": TokenPruningAttention,
    "scores": TokenPruningScores,
}


def _is_norm_linear(head: nn.Module | None) -> bool:
    """Whether it is LayerNorm + Linear and runs them in turn, as dropin.patch's form of it does, too."""
    of_class = getattr(type(head), "original", type(head))  # what dropin.patch has exchanged
    runs_in_turn = isinstance(head, nn.Sequential) and of_class.forward is nn.Sequential.forward
    return runs_in_turn and [type(module) for module in head] == [nn.LayerNorm, nn.Linear]
