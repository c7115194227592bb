"""What the hosts are built of. Activations stay [B, F, J, C] from end to end: no block permutes or copies them.

Every matrix product of a host is a `Linear` (nn.Linear, packed in CPU inference), nn.Linear or nn.Conv1d module. What
stands around a `Linear` goes into its call by `call` only, so that whoever hooks, wraps or subclasses one of these
modules sees the inputs and outputs of the official model's. `Attention` and `Mlp` take the norm before and the residual
behind them: their calls are this package's own.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..attention import attend_in_one_call, attend_packed, attend_rows, takes_one_product
from ..checks import integer, size_of
from ..linear import Linear, call
from ..linear_fused import mlp
from ..watched import is_own, is_plain

QueryKey = tuple[Tensor, Tensor]


def check_heads(name: str, num_heads: int, of: str, channels: int) -> None:
    """num_heads, an argument of this name, divides the channels, an argument called `of`."""
    integer(of, channels, 1)
    integer(name, num_heads, 1)
    if channels % num_heads:
        raise ValueError(f"{name}: got {num_heads}, wanted a divisor of {of} = {channels}")


def drop_rates(last: float, depth: int) -> list[float]:
    """Of the blocks of a model: from 0 to `last`, evenly spaced."""
    return [last * block / max(depth - 1, 1) for block in range(depth)]


def drop_path(x: Tensor, rate: float, dim: int) -> Tensor:
    """Each sequence along axis `dim` of x [..., C] becomes 0 with probability `rate`; the others are scaled up."""
    size = [1 if axis in (dim, x.dim() - 1) else length for axis, length in enumerate(x.shape)]
    return x * x.new_empty(size).bernoulli_(1 - rate).div_(1 - rate)


class Attention(nn.Module):
    """Self-attention along one axis, with the parameters `qkv` and `proj`.

    dropout: of the result, in training. proj_first: the order of the two in the state_dict.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        *,
        proj_first: bool = False,
    ):
        super().__init__()
        check_heads("num_heads", num_heads, "channels", channels)
        self.num_heads, self.dropout = num_heads, dropout
        if proj_first:
            self.proj = Linear(channels, channels)
        self.qkv = Linear(channels, 3 * channels, bias=qkv_bias)
        if not proj_first:
            self.proj = Linear(channels, channels)

    def forward(
        self, x: Tensor, dim: int, *, with_query_key: bool = True, norm: nn.LayerNorm | None = None, **update
    ) -> tuple[Tensor, QueryKey | None]:
        """x [B, T, C], or [B, F, J, C] with dim 1 or 2 -> attention along axis dim, (query, key) [B, (J, F), H, T, D].

        with_query_key: False gives None for them: views cost as much as a launch. norm: what is done to x first.
        update: residual, scale, out as `Linear` takes them.
        """
        dropout, in_one_product = self.dropout if self.training else 0.0, takes_one_product(x, dim)
        if not (with_query_key or dropout or in_one_product):
            attended = attend_in_one_call(x, self.qkv, self.proj, dim, self.num_heads, norm, **update)
            if attended is not None:
                return attended, None
        query_key = None
        if in_one_product:
            attended, *heads = attend_packed(call(self.qkv, x, norm=norm), self.num_heads, dim)
            if with_query_key:
                others = x.shape[:-2] if dim == x.dim() - 2 else (1, x.shape[2])
                query_key = tuple(y.unflatten(0, others) for y in heads)
        else:
            heads = call(self.qkv, x, chunks=3, norm=norm)
            if with_query_key:
                query_key = tuple(y.unflatten(-1, (self.num_heads, -1)).movedim(dim, -2) for y in heads[:2])
            if dim == x.dim() - 2:
                attended = attend_rows(*(y.flatten(0, -3) for y in heads), self.num_heads)
            else:
                # The joints stand beside the heads: every sample is read and written in place.
                joints = size_of(x, 2)
                attended = attend_rows(*(y.flatten(2) for y in heads), joints * self.num_heads)
            attended = attended.view_as(x)
        return project(self.proj, attended, dropout, **update), query_key


def project(layer: Linear, x: Tensor, dropout: float, residual: Tensor | None = None, **given) -> Tensor:
    """residual + dropout(layer(x)), in one pass where nothing is dropped; given: scale, and out where nothing is."""
    if dropout == 0:
        return call(layer, x, residual=residual, **given)
    y = functional.dropout(call(layer, x, **given), dropout)
    return y if residual is None else residual + y


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))); dropout: after both, in training."""

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None, **update) -> Tensor:
        """norm: what is done to x first; update: residual, scale as `Linear` takes them."""
        if not (self.training and self.dropout):
            return mlp(x, self.fc1, self.fc2, norm=norm, **update)
        hidden = functional.dropout(call(self.fc1, x, "gelu", norm=norm), self.dropout)
        return project(self.fc2, hidden, self.dropout, **update)


class Block(nn.Module):
    """Pre-norm transformer block: attention along one axis, then an MLP, each with a residual and drop-path."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        hidden: int,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, hidden, dropout)

    def forward(self, x: Tensor, dim: int, *, with_query_key: bool = False) -> tuple[Tensor, QueryKey | None]:
        """x [B, ..., C] -> the block's output along axis dim, and its attention's (query, key) where asked for."""
        asked = {"with_query_key": with_query_key}
        if not self.training or self.drop_path_rate == 0:
            x, query_key = self.attn(x, dim, norm=self.norm1, residual=x, **asked)
            return self.mlp(x, norm=self.norm2, residual=x), query_key
        attended, query_key = self.attn(x, dim, norm=self.norm1, **asked)
        x = x + drop_path(attended, self.drop_path_rate, dim)
        return x + drop_path(self.mlp(x, norm=self.norm2), self.drop_path_rate, dim), query_key


def fused(layer: nn.Linear, first: Tensor, second: Tensor) -> Tensor:
    """The streams [..., C], each weighted at each position by the softmax of layer, 2C -> 2, over both.

    The two are never concatenated where nobody watches layer.
    """
    if (is_own(layer, nn.Linear) or is_own(layer, Linear)) and is_plain(layer.weight):
        C, weight = first.shape[-1], layer.weight
        logits = functional.linear(first, weight[:, :C], layer.bias) + functional.linear(second, weight[:, C:])
    else:
        logits = layer(torch.cat([first, second], -1))
    weights = logits.softmax(-1)
    return torch.lerp(second, first, weights[..., :1].to(first.dtype))


def joined(streams: list[QueryKey]) -> QueryKey:
    """The (query, key) [B, J, H, T, D] of several streams as one, the streams beside the joints."""
    query, key = (torch.cat(parts, 1) for parts in zip(*streams, strict=True))
    return query, key


class Representation(nn.Module):
    """tanh(fc(x)), the features that the last layer reads."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.fc = Linear(channels, features)

    def forward(self, x: Tensor) -> Tensor:
        return call(self.fc, x, "tanh")
