"""The fast forwards that patched modules get: mixed into the module's own class, falling back to its own forward.

A patched module differs from the unpatched one only in its class. So parameters, buffers, hooks, state_dict and mode
are untouched, and copies (deepcopy, DataParallel's replicas) run on their own weights.
"""

import copy
import functools
import inspect

import torch
from torch import Tensor, nn

from ..add_norm import add_norm, takes
from ..attention import attend_rows
from ..checks import FLOATS
from ..linear import Linear, is_silent, mlp
from ..linear_halves import adds_to_float
from ..recover_attention import has_plain_tail, norm_and_head
from .hot import is_transformed, shared_rows

PROJECTIONS = (("linear_q", "linear_k", "linear_v"), ("q", "k", "v"))
PASSIVE = (nn.Identity, nn.Dropout, nn.Softmax)  # what a fast forward leaves out: it does nothing there, or the softmax
LARGEST_HEAD = 8  # outputs, four of which share a pass over a row: with more the product by itself is as fast


class Fast:
    """Mixed in by `fast_class`: `original` is the module's own class, `extra` its forward's further arguments.

    `kernel`: the switch. `trains`: whether the own forward computes in training what it computes in eval mode, the
    children's dropout aside. All are read from the class: a module may have attributes of these names.
    """

    kernel: str
    original: type
    extra: dict
    trains: bool

    def __reduce_ex__(self, protocol):
        """A patched module is pickled as the unpatched one: it loads without this package."""
        return object.__new__, (self.original,), self.__getstate__()

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def _is_usual(self, args: tuple = (), kwargs: dict | None = None) -> bool:
        """The further arguments have their defaults, and nothing wants to see each operation."""
        extra = type(self).extra
        given = dict(zip(extra, args, strict=False)) | (kwargs or {})
        usual = all(_same(value, extra.get(name, self)) for name, value in given.items())
        return usual and len(args) <= len(extra) and not is_transformed()


def _same(value, default) -> bool:
    return value is default or (type(value) is type(default) and type(value) in (int, float, str) and value == default)


@functools.cache
def fast_class(mixin: type, original: type, trains: bool = True) -> type:
    """original with mixin's forward, under original's name; `extra`: the defaults of its forward's extra arguments."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1 + mixin.inputs :]
    extra = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY}
    documented = {"__module__": original.__module__, "__doc__": original.__doc__}
    names = {"original": original, "extra": extra, "trains": trains} | documented
    return type(original.__name__, (mixin, original), names)


class FastLinear(Fast, Linear):
    """Packed weights in CPU inference."""

    kernel = "linear"
    inputs = 1


class FastMlp(Fast):
    """fc2(act(fc1(x))) with an exact GELU in the same pass as fc1."""

    kernel = "mlp"
    inputs = 1

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        others = [module for name, module in self._modules.items() if name != "fc2"]
        records = self.training or torch.is_grad_enabled()
        if records or not (self._is_usual(args, kwargs) and is_plain_mlp(self) and is_silent(*others)):
            return super().forward(x, *args, **kwargs)
        return mlp(x, self.fc1, self.fc2)


def is_plain_mlp(module: nn.Module) -> bool:
    """Whether its parts, which may have been exchanged, are packed layers and an exact GELU, and others do nothing."""
    parts, act = module._modules, module._modules.get("act")
    exact = type(act) is nn.GELU and act.approximate == "none"
    return exact and isinstance(module.fc1, Linear) and are_passive(parts, "fc1", "act", "fc2")


def are_passive(modules: dict[str, nn.Module | None], *but: str) -> bool:
    return all(child is None or name in but or isinstance(child, PASSIVE) for name, child in modules.items())


class FastHead(Fast):
    """LayerNorm and a Linear to few outputs in one pass, where a kernel of the tail without projection runs (C++).

    torch.compile gets the module's own forward, as of packed Linear layers.
    """

    kernel = "head"
    inputs = 1

    def forward(self, input: Tensor) -> Tensor:
        layers = norm_and_linear(self)
        records = self.training or torch.is_grad_enabled()
        others = layers is None or records or torch.compiler.is_compiling()
        if others or not (self._is_usual() and is_silent(*layers)):
            return super().forward(input)
        norm, linear = layers
        given = input, norm.weight, norm.bias, linear.weight, linear.bias
        dtypes = _head_dtypes(given, linear.in_features, linear.out_features)
        if dtypes is None or not has_plain_tail(input):
            return super().forward(input)
        inside, outside = dtypes
        x, *vectors = (t if t is None else t.to(inside) for t in given)
        return norm_and_head(x, *vectors, eps=norm.eps).to(outside)


def norm_and_linear(module: nn.Module) -> tuple[nn.LayerNorm, nn.Linear] | None:
    """The two children of a head: LayerNorm over the last axis, Linear to few outputs; None for anything else."""
    children = tuple(module._modules.values())
    if tuple(map(type, children)) != (nn.LayerNorm, nn.Linear):
        return None
    norm, linear = children
    fits = norm.normalized_shape == (linear.in_features,) and linear.out_features <= LARGEST_HEAD
    return children if fits else None


def _head_dtypes(given: tuple[Tensor | None, ...], C: int, M: int) -> tuple[torch.dtype, torch.dtype] | None:
    """(of the kernel, of the result: the linear layer's) for x [..., C] and a head's vectors; None: not for the kernel.

    Plain tensors of the CPU; the kernel trusts the shapes, so what does not fit is left to the own forward to refuse.
    """
    tensors = [t for t in given if t is not None]
    if not all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and not t.is_nested for t in tensors):
        return None
    x, *vectors = given
    sizes = zip(vectors, ((C,), (C,), (M, C), (M,)), strict=True)
    if x.shape[-1:] != (C,) or any(t is not None and t.shape != size for t, size in sizes):
        return None
    dtypes = {t.dtype for t in tensors}
    if torch.is_autocast_enabled("cpu"):
        casts = dtypes <= {torch.float32, torch.bfloat16, torch.float16}
        return (torch.float32, torch.get_autocast_dtype("cpu")) if casts else None
    return (x.dtype, x.dtype) if len(dtypes) == 1 and x.dtype in FLOATS else None


class FastAttention(Fast):
    """Self-attention over the last but one axis of x [..., N, C], with `qkv` and `proj`: no N x N weights."""

    kernel = "attention"
    inputs = 1
    frame_dim = -2

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not (self._is_usual(args, kwargs) and stores_nothing(self, x)):
            return super().forward(x, *args, **kwargs)
        return attend(self, self.qkv(x), type(self).frame_dim)


class FastAttentionFrames(FastAttention):
    """MotionAGFormer's temporal attention: x [B, F, J, C], over the frames of each joint."""

    frame_dim = 1


class FastAttentionInPlace(Fast):
    """MotionBERT's spatial attention: `FastAttention` whatever `seqlen` is."""

    kernel = "attention"
    inputs = 1

    def forward(self, x: Tensor, seqlen: int = 1) -> Tensor:
        if not (self._is_usual() and stores_nothing(self, x)):
            return super().forward(x, seqlen)
        return attend(self, self.qkv(x))


class FastAttentionAcross(Fast):
    """MotionBERT's temporal attention: x [(B F), J, C] with F = seqlen, over the frames of each joint."""

    kernel = "attention"
    inputs = 1

    def forward(self, x: Tensor, seqlen: int = 1) -> Tensor:
        if not (self._is_usual() and stores_nothing(self, x)):
            return super().forward(x, seqlen)
        return attend(self, self.qkv(x).unflatten(0, (-1, seqlen)), frame_dim=1).flatten(0, 1)


class FastCrossAttention(Fast):
    """Cross-attention of (x_1, x_2, x_3) with three projections: an x_1 that all rows share is projected once."""

    kernel = "cross_attention"
    inputs = 3

    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor, *args, **kwargs) -> Tensor:
        names = projections(self)
        if not (self._is_usual(args, kwargs) and stores_nothing(self, x_1, x_3, project=names)):
            return super().forward(x_1, x_2, x_3, *args, **kwargs)
        to_query, to_key, to_value = (getattr(self, name) for name in names)
        query, key, value = to_query(shared_rows(x_1)), to_key(x_2), to_value(x_3)
        return project_out(self, attend_rows(query, key, value, self.num_heads, float(self.scale)))


class FastBlock(Fast):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): norms and additions in the same pass as the products they stand at.

    In inference, where nothing listens inside the block; of blocks whose attention and MLP are fast already.
    """

    kernel = "block"
    inputs = 1

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.training or torch.is_grad_enabled() or not self._can_fuse(x, args, kwargs):
            return super().forward(x, *args, **kwargs)
        attention, feed = self.attn, self.mlp
        qkv, frame_dim = attention.qkv(x, norm=self.norm1), type(attention).frame_dim
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

    def _can_fuse(self, x: Tensor, args: tuple, kwargs: dict) -> bool:
        _, *inside = self.modules()
        return self._is_usual(args, kwargs) and x.numel() > 0 and is_fusible(self) and is_silent(*inside)


def is_fusible(block: nn.Module) -> bool:
    """Whether its attention and MLP, which may be patched and unpatched on their own, are fast and of packed layers."""
    attention, feed = block.attn, block.mlp
    if not (isinstance(attention, FastAttention) and isinstance(feed, FastMlp)):
        return False
    packed = all(isinstance(layer, Linear) for layer in (attention.qkv, attention.proj, feed.fc2))
    return packed and is_plain_mlp(feed) and are_passive(attention._modules, "qkv", "proj")


def projections(module: nn.Module) -> tuple[str, str, str] | None:
    """The names of the three projections of a cross-attention."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return names
    return None


def stores_nothing(attention: Fast, *inputs: Tensor, project: tuple[str, ...] = ("qkv",)) -> bool:
    """Whether there is something to attend to, and what the fast path leaves out would do nothing."""
    called = (*project, "proj", "proj_drop")
    skipped = {name: module for name, module in attention._modules.items() if name not in called}
    same = (type(attention).trains or not attention.training) and are_passive(skipped)
    return same and all(x.numel() for x in inputs) and is_silent(*skipped.values())


def attend(attention: Fast, qkv: Tensor, frame_dim: int = -2, residual: Tensor | None = None) -> Tensor:
    """Self-attention along frame_dim of qkv [..., 3 C], then the output projection and the residual: [..., C]."""
    qkv = qkv.transpose(frame_dim, -2)
    rows = qkv.flatten(0, -3).chunk(3, -1)
    attended = attend_rows(*rows, attention.num_heads, float(attention.scale))
    attended = attended.unflatten(0, qkv.shape[:-2]).transpose(frame_dim, -2).contiguous()
    return project_out(attention, attended) if residual is None else attention.proj(attended, residual=residual)


def project_out(attention: Fast, attended: Tensor) -> Tensor:
    projected = attention.proj(attended)
    dropout = attention._modules.get("proj_drop")
    return projected if dropout is None else dropout(projected)
