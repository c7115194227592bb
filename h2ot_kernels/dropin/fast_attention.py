"""The fast forwards of attention, cross-attention and pre-norm blocks (`fast.py`)."""

import torch
from torch import Tensor, nn

from ..add_norm import add_norm, takes
from ..attention import attend_in_one_call, attend_rows
from ..linear_fused import mlp
from ..linear_halves import adds_to_float
from ..watched import is_silent
from .fast import Fast, FastMlp, Tried, are_passive, is_packed, is_plain_mlp
from .hot import shared_rows

PROJECTIONS = (("linear_q", "linear_k", "linear_v"), ("q", "k", "v"))


class FastAttention(Tried):
    """Self-attention over the last but one axis of x [..., N, C], with `qkv` and `proj`: no N x N weights."""

    kernel = "attention"
    in_training = True
    frame_dim = -2

    def _is_fast_for(self, x: Tensor) -> bool:
        return stores_nothing(self, x)

    def _fast_forward(self, x: Tensor) -> Tensor:
        frame_dim = type(self).frame_dim
        attended = attend_whole(self, x, frame_dim)
        return attend(self, self.qkv(x), frame_dim) if attended is None else drop_last(self, attended)


class FastAttentionFrames(FastAttention):
    """MotionAGFormer's temporal attention: x [B, F, J, C], over the frames of each joint; or [B, F, C]."""

    frame_dim = 1


class FastAttentionInPlace(Tried):
    """MotionBERT's spatial attention: `FastAttention` whatever the number of frames is."""

    kernel = "attention"
    in_training = True
    by_name = ("seqlen", "seq_len")  # of which the own forward has one; the second is mmpose's

    def _is_fast_for(self, x: Tensor, seqlen: int) -> bool:
        return stores_nothing(self, x)

    def _fast_forward(self, x: Tensor, seqlen: int) -> Tensor:
        attended = attend_whole(self, x)
        return attend(self, self.qkv(x)) if attended is None else drop_last(self, attended)


class FastAttentionAcross(FastAttentionInPlace):
    """MotionBERT's temporal attention: x [(B F), J, C] with F = seqlen, over the frames of each joint."""

    def _fast_forward(self, x: Tensor, seqlen: int) -> Tensor:
        clips = -1, seqlen
        attended = attend_whole(self, x.unflatten(0, clips), frame_dim=1)
        if attended is None:
            return attend(self, self.qkv(x).unflatten(0, clips), frame_dim=1).flatten(0, 1)
        return drop_last(self, attended.flatten(0, 1))


class FastCrossAttention(Tried):
    """Cross-attention of (x_1, x_2, x_3) with three projections: an x_1 that all rows share is projected once."""

    kernel = "cross_attention"
    in_training = True
    inputs = 3

    def _is_fast_for(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> bool:
        if not (isinstance(x_2, Tensor) and isinstance(x_3, Tensor) and x_1.dim() == x_2.dim() == x_3.dim()):
            return False
        names, batches = projections(self), x_1.shape[0] == x_2.shape[0] == x_3.shape[0]
        return batches and names is not None and stores_nothing(self, x_1, x_3, project=names)

    def _fast_forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        to_query, to_key, to_value = (getattr(self, name) for name in projections(self))
        alone = (type(to_query) is nn.Linear or is_packed(to_query)) and is_silent(to_query)  # who looks sees all rows
        query, key, value = to_query(shared_rows(x_1) if alone else x_1), to_key(x_2), to_value(x_3)
        return project_out(self, attend_rows(query, key, value, self.num_heads, float(self.scale)))


class FastBlock(Tried):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): norms and additions in the same pass as the products they stand at.

    In inference, where nothing listens inside the block; of blocks whose attention and MLP are fast already.
    """

    kernel = "block"

    def _is_fast_for(self, x: Tensor) -> bool:
        if self.training or torch.is_grad_enabled() or not (x.numel() and is_fusible(self)):
            return False
        if not all([x.dim() in type(part).calls.ranks for part in (self.attn, self.mlp)]):  # exchanged since
            return False
        if not (is_norm(self.norm1, x.shape[-1]) and is_norm(self.norm2, x.shape[-1])):
            return False
        inside = parts_of(self)
        if beside(self) != type(self).known.beside or any([part.training for part in inside]):
            return False
        return is_silent(*inside)

    def _fast_forward(self, x: Tensor) -> Tensor:
        attention, feed, frame_dim = self.attn, self.mlp, type(self.attn).frame_dim
        attended = attend_whole(attention, x, frame_dim, norm=self.norm1, residual=x)
        if attended is not None:
            return mlp(attended, feed.fc1, feed.fc2, norm=self.norm2, residual=attended)
        qkv = attention.qkv(x, norm=self.norm1)
        if qkv.dtype == x.dtype or adds_to_float(qkv.dtype):
            x = attend(attention, qkv, frame_dim, residual=x)
            return mlp(x, feed.fc1, feed.fc2, norm=self.norm2, residual=x)
        y = attend(attention, qkv, frame_dim)  # under autocast these products cannot add to x
        if takes(x, y, self.norm2, y.dtype):
            x, normed = add_norm(x, y, self.norm2, y.dtype)
        else:
            x = x + y
            normed = self.norm2(x)
        return x + mlp(normed.contiguous(), feed.fc1, feed.fc2)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """All modules in it, in half the time that `modules()` takes; one that is there twice comes twice."""
    found = []
    for part in module._modules.values():
        if part is not None:
            found.append(part)
            if part._modules:
                found += parts_of(part)
    return found


def beside(block: nn.Module) -> tuple[tuple[str, type], ...]:
    """(name, class) of what a block holds beside its norms, attention and MLP: of a drop path."""
    own = ("norm1", "attn", "norm2", "mlp")
    return tuple([(name, type(part)) for name, part in block._modules.items() if name not in own])


def is_fusible(block: nn.Module) -> bool:
    """Whether its attention and MLP, which may be patched and unpatched on their own, are fast and of packed layers."""
    attention, feed = block.attn, block.mlp
    if not (isinstance(attention, FastAttention) and isinstance(feed, FastMlp)):
        return False
    packed = all(map(is_packed, (attention.qkv, attention.proj, feed.fc2)))
    return packed and is_plain_mlp(feed) and are_passive(attention, "qkv", "proj") and has_numbers(attention)


def is_norm(module: nn.Module | None, C: int) -> bool:
    return type(module) is nn.LayerNorm and module.normalized_shape == (C,)


def projections(module: nn.Module) -> tuple[str, str, str] | None:
    """The names of the three projections of a cross-attention."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return names
    return None


def stores_nothing(attention: Fast, *inputs: Tensor, project: tuple[str, ...] = ("qkv",)) -> bool:
    """Whether there is something to attend to, and what the fast path leaves out would do nothing."""
    known = type(attention).known
    called = (*project, "proj", "proj_drop") if known.drops_last else (*project, "proj")
    skipped = [part for name, part in attention._modules.items() if name not in called]
    same = (known.trains or not attention.training) and are_passive(attention, *called) and has_numbers(attention)
    return same and all(x.numel() for x in inputs) and is_silent(*skipped)


def has_numbers(attention: Fast) -> bool:
    """Whether its heads and scale are plain numbers, not what a gradient goes to."""
    return isinstance(attention.num_heads, int) and isinstance(attention.scale, float)


def attend_whole(attention: Fast, x: Tensor, frame_dim: int = -2, **around) -> Tensor | None:
    """Self-attention along frame_dim of x [..., C] with both projections in one operator; None where none does that.

    around: norm and residual.
    """
    heads = attention.num_heads
    if x.shape[-1] % heads or attention.scale != (x.shape[-1] // heads) ** -0.5:
        return None
    return attend_in_one_call(x, attention.qkv, attention.proj, frame_dim % x.dim(), heads, **around)


def attend(attention: Fast, qkv: Tensor, frame_dim: int = -2, residual: Tensor | None = None) -> Tensor:
    """Self-attention along frame_dim of qkv [..., 3 C], then the output projection and the residual: [..., C]."""
    qkv = qkv.transpose(frame_dim, -2)
    rows = qkv.flatten(0, -3).chunk(3, -1)
    attended = attend_rows(*rows, attention.num_heads, float(attention.scale))
    attended = attended.unflatten(0, qkv.shape[:-2]).transpose(frame_dim, -2).contiguous()
    return project_out(attention, attended) if residual is None else attention.proj(attended, residual=residual)


def project_out(attention: Fast, attended: Tensor) -> Tensor:
    return drop_last(attention, attention.proj(attended))


def drop_last(attention: Fast, projected: Tensor) -> Tensor:
    return attention.proj_drop(projected) if type(attention).known.drops_last else projected
