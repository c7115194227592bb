"""What the hosts are built of. Activations stay [B, F, J, C] from end to end: no block permutes or copies them.

Every matrix product of a host is a `Linear` (nn.Linear, packed in CPU inference) or nn.Conv1d module.
"""

from torch import Tensor, nn
from torch.nn import functional

from ..linear import Linear


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention over T of [B, ..., H, T, D] -> [B, ..., T, H * D]. No N x N weights are stored.

    The axes before H are viewed as one: always possible for B = 1, where strided inputs are then read in place.
    """
    sequences = (x.flatten(0, -4) for x in (query, key, value))
    attended = functional.scaled_dot_product_attention(*sequences)
    return attended.transpose(1, 2).flatten(-2).unflatten(0, query.shape[:-3])


def drop_path(x: Tensor, rate: float, dim: int) -> Tensor:
    """Each sequence along axis `dim` of x [..., C] becomes 0 with probability `rate`; the others are scaled up."""
    size = [1 if axis in (dim, x.dim() - 1) else length for axis, length in enumerate(x.shape)]
    return x * x.new_empty(size).bernoulli_(1 - rate).div_(1 - rate)


class Attention(nn.Module):
    """Self-attention along one axis, with the parameters `qkv` and `proj`."""

    def __init__(self, channels: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor, dim: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, ..., C] -> attention along axis dim, and (query, key) [B, ..., H, T, D] with dim moved to T."""
        last = x.dim() - 2
        if dim != last and x.shape[0] > 1:
            # Of several samples the sequences along an outer axis cannot be read in place: one copy, of x alone.
            attended, query_key = self.forward(x.movedim(dim, last).contiguous(), last)
            return attended.movedim(last, dim), query_key
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(dim, -2)
        query, key, value = qkv.unbind(-4)
        return self.proj(attend(query, key, value).movedim(-2, dim)), (query, key)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, activation="gelu"))


class Block(nn.Module):
    """Pre-norm transformer block: attention along one axis, then an MLP, each with a residual and drop-path."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float, drop_path_rate: float = 0.0, eps: float = 1e-6):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.attn = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, eps=eps)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor, dim: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, ..., C] -> the block's output along axis dim, and its attention's (query, key)."""
        attended, query_key = self.attn(self.norm1(x), dim)
        x = x + self._dropped(attended, dim)
        return x + self._dropped(self.mlp(self.norm2(x)), dim), query_key

    def _dropped(self, branch: Tensor, dim: int) -> Tensor:
        if not self.training or self.drop_path_rate == 0:
            return branch
        return drop_path(branch, self.drop_path_rate, dim)
