"""The CPU kernels in a program without torch (driver.cpp), and the operators of csrc/registration.cpp on top of it.

So kernels that were built for another processor pass the ordinary tests: `Driver.replace_cpu_operators`.
"""

import struct
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from h2ot_kernels.linear_floats import pack

ROOT = Path(__file__).resolve().parents[2]
NAME_BYTES = 32
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ERRORS = {
    1: IndexError("index, labels or keep hold a value outside their range"),
    2: IndexError("index is not strictly ascending in every row"),
    3: IndexError("keep names more tokens than num_tokens"),
    4: RuntimeError("no memory for the kernel's scratch"),
    5: IndexError("parent holds a value outside its range"),
    100: AssertionError("one thread and two differ"),
    101: AssertionError("a guard band is damaged"),
}


def build(folder: Path, sources: Path = ROOT, *options: str) -> Path:
    """The driver, built in `folder` from the project at `sources`."""
    configure = ["cmake", "-S", sources, "-B", folder, "-G", "Ninja", "-DH2OT_DRIVER=ON", *options]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{done.stdout[-4000:]}\nthe build of the driver failed")
    return folder / "driver"


@dataclass
class Out:
    """An output of a call."""

    size: tuple[int, ...]
    dtype: torch.dtype


class Driver:
    """A running driver. Its methods named like operators take and return what those do."""

    def __init__(self, *command: str | Path):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.calls = 0
        self.capability = self._read(NAME_BYTES).rstrip(b"\0").decode()
        (self.panel,) = struct.unpack("<q", self._read(8))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait() == 0 or error[0], f"the driver ended with {self.process.returncode}"

    def _read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise RuntimeError(f"the driver ended with {self.process.wait()}")
        return data

    def call(self, kernel: str, *arguments: int | float | Tensor | Out | None) -> list[Tensor]:
        """The outputs of a kernel. Arguments in the order of launch.h; None: no array."""
        integers = [int(a) for a in arguments if isinstance(a, int)]
        reals = [a for a in arguments if isinstance(a, float)]
        arrays = [a for a in arguments if a is None or isinstance(a, (Tensor, Out))]
        assert len(integers) + len(reals) + len(arrays) == len(arguments)
        sent = [kernel.encode().ljust(NAME_BYTES, b"\0"), struct.pack("<3q", len(integers), len(reals), len(arrays))]
        sent.append(struct.pack(f"<{len(integers)}q{len(reals)}d", *integers, *reals))
        for array in arrays:
            if array is None:
                sent.append(struct.pack("<2q", 0, 0))
            elif isinstance(array, Out):
                sent.append(struct.pack("<2q", 2, torch.Size(array.size).numel() * array.dtype.itemsize))
            else:
                raw = memory_of(array)
                sent.append(struct.pack("<2q", 1, len(raw)) + raw)
        self.process.stdin.write(b"".join(sent))
        self.process.stdin.flush()
        (status,) = struct.unpack("<q", self._read(8))
        self.calls += 1
        outputs = []
        for out in (array for array in arrays if isinstance(array, Out)):
            data = self._read(torch.Size(out.size).numel() * out.dtype.itemsize)
            values = torch.frombuffer(bytearray(data), dtype=out.dtype) if data else torch.empty(0, dtype=out.dtype)
            outputs.append(values.reshape(out.size))
        if status:
            raise type(ERRORS[status])(f"{kernel}: {ERRORS[status]}")
        return outputs

    def replace_cpu_operators(self) -> torch.library.Library:
        """Run torch's CPU operators here, in this process and for as long as the result lives."""
        library = torch.library.Library("h2ot_kernels", "IMPL")
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is a kernel already
            for name in OPERATORS:
                library.impl(name, getattr(self, name), "CPU", allow_override=True)
        return library

    def _score(self, x, k, mask, noise, outputs, area=0.0, exclude_self=False, cutoff=0.0):
        given = dense(mask, torch.bool), dense(noise, torch.float64)
        return *tokens(x), k, *given, *outputs, area, exclude_self, cutoff

    def _select(self, B, N, K, keep):
        keep = dense(keep, torch.int64)
        return B, N, K, keep, *((0, 0) if keep is None else keep.shape), Out((B, K), torch.int64)

    def score_variant(self, x, k, mask, noise, scale, exclude_self, cutoff):
        outputs = [*(Out(x.shape[:2], torch.float64) for _ in range(3)), Out(x.shape[:2], torch.int64), None]
        return tuple(self.call("score", *self._score(x, k, mask, noise, outputs, scale * scale, exclude_self, cutoff)))

    def score_tokens(self, x, k, mask, noise):
        return self.score_variant(x, k, mask, noise, 0.0, False, 0.0)

    def _selectable(self, x):
        return None, None, Out(x.shape[:2], torch.float64), None, Out(x.shape[:2], torch.bool)

    def prune_cluster(self, x, num_tokens, k, keep, mask, noise):
        score, valid = self.call("score", *self._score(x, k, mask, noise, self._selectable(x)))
        return self.select_tokens(score, num_tokens, keep, valid)

    def cluster_tokens(self, x, num_tokens, k, keep, mask, noise):
        arguments = self._score(x, k, mask, noise, self._selectable(x))
        select, labels = self._select(*x.shape[:2], num_tokens, keep), Out(x.shape[:2], torch.int64)
        score, _, index, labels = self.call("cluster", *arguments, *select, labels)
        return index, labels, score

    def select_tokens(self, score, num_tokens, keep, mask):
        given = dense(score, torch.float64), dense(mask, torch.bool)
        return self.call("select", *given, *self._select(*score.shape, num_tokens, keep))[0]

    def prune_motion(self, pose, num_tokens, keep):
        out = Out(pose.shape[:2], torch.float64)
        (score,) = self.call("motion", pose, DTYPES[pose.dtype], *pose.shape, *pose.stride(), out)
        return self.select_tokens(score, num_tokens, keep, None)

    def attention_scores(self, query, key, scale):
        if query.dim() == 4:
            query, key = (x.as_strided(*with_axis(x)) for x in (query, key))
        B, P, H, F, D = query.shape
        out = Out((B, F), precision(query))
        strides = *query.stride(), *key.stride()
        return self.call("attention_score", query, key, DTYPES[query.dtype], B, P, H, F, D, scale, out, *strides)[0]

    def prune_attention(self, query, key, num_tokens, keep, scale):
        return self.select_tokens(self.attention_scores(query, key, scale), num_tokens, keep, None)

    def gather_tokens(self, x, index, pos_embed, dim, out_dim):
        moved, index = x.movedim(dim, out_dim), dense(index)
        size = [index.shape[1] if axis == out_dim else n for axis, n in enumerate(moved.shape)]
        given = x, DTYPES[x.dtype], x.dim(), out_dim, x.shape[dim], index, index.shape[0], dense(pos_embed, x.dtype)
        return self.call("gather", *given, Out(size, x.dtype), *size, *moved.stride())[0]

    def scatter_tokens(self, grad, index, num_frames, dim, out_dim):
        moved, index = grad.movedim(out_dim, dim), dense(index)
        size = [num_frames if axis == dim else n for axis, n in enumerate(moved.shape)]
        given = grad, DTYPES[grad.dtype], grad.dim(), dim, index.shape[1], index, index.shape[0]
        return self.call("scatter", *given, Out(size, grad.dtype), *size, *moved.stride())[0]

    def assign_by_parent(self, x, index, parent, mask):
        index, out = dense(index), Out(x.shape[:2], torch.int64)
        given = index, *index.shape, dense(mask, torch.bool), out, dense(parent, torch.int64)
        return self.call("assign", *tokens(x), *given)[0]

    def assign_clusters(self, x, index, mask):
        return self.assign_by_parent(x, index, None, mask)

    def merge_tokens(self, x, labels, num_clusters, weight):
        B, N, C = x.shape
        wide = precision(x)
        given = DTYPES[x.dtype], B, N, C, num_clusters, *x.stride(), dense(labels), dense(weight, wide)
        return tuple(self.call("merge", x, *given, Out((B, num_clusters, C), x.dtype), Out((B, num_clusters), wide)))

    def _recover(self, query, key, value, num_heads, scale, out):
        B, K, C = key.shape
        rows = [(0, *x.stride())[-3:-1] for x in (query, key, value)]
        sizes = B, query.shape[-2], K, C, num_heads, query.shape[0] if query.dim() == 3 else 1
        return query, key, value, DTYPES[value.dtype], *sizes, *(n for row in rows for n in row), scale, out

    def recover_attention(self, query, key, value, num_heads, scale):
        tensors = [x if x.stride(-1) == 1 else dense(x) for x in (query, key, value)]
        out = Out((key.shape[0], query.shape[-2], key.shape[2]), value.dtype)
        return self.call("recover_attention", *self._recover(*tensors, num_heads, scale, out))[0]

    def recover_attention_backward(self, grad, query, key, value, num_heads, scale):
        tensors = [dense(x) for x in (query, key, value)]
        outputs = [Out(x.shape, x.dtype) for x in tensors]
        given = self._recover(*tensors, num_heads, scale, None)
        return tuple(self.call("recover_attention_backward", *given, dense(grad), *outputs))

    def recover_tail(self, token, projected, norm_weight, norm_bias, head_weight, head_bias, eps):
        (R, F, C), M, dtype = projected.shape, head_weight.shape[0], projected.dtype
        norm = dense(norm_weight, dtype), dense(norm_bias, dtype)
        given = dense(token), dense(projected), *norm, dense(head_weight), dense(head_bias, dtype)
        return self.call("recover_tail", *given, DTYPES[dtype], R, F, C, M, eps, Out((R, F, M), dtype))[0]

    def recover_rotated(self, query, key, value, num_heads, scale, token, triangle, head, bias, eps):
        tensors = [x if x.stride(-1) == 1 else dense(x) for x in (query, key, value)]
        given = *self._recover(*tensors, num_heads, scale, None), dense(token), dense(triangle), dense(head)
        M, out = head.shape[0], Out((key.shape[0], query.shape[-2], head.shape[0]), torch.float32)
        return self.call("recover_rotated", *given, dense(bias), M, eps, out)[0]

    def add_norm(self, x, y, weight, bias, eps, dtype):
        C = x.shape[-1]
        kinds = DTYPES[x.dtype], DTYPES[x.dtype if y is None else y.dtype], DTYPES[dtype]
        vectors = dense(weight), dense(bias)
        of_vectors = next((DTYPES[v.dtype] for v in vectors if v is not None), kinds[0])
        outputs = None if y is None else Out(x.shape, x.dtype), Out(x.shape, dtype)
        arguments = dense(x), dense(y), *kinds, x.numel() // C, C, C, C, *vectors, of_vectors, eps, *outputs
        made = self.call("add_norm", *arguments)
        return (x.new_empty(0), *made) if y is None else tuple(made)

    def graph_update(
        self, x, u, v, residual, scale, adjacency, neighbours, norm_weight, norm_bias, mean, variance, eps, dim
    ):
        T, C = x.shape[dim], x.shape[-1]
        lines, inner = x.shape[:dim].numel(), x.shape[dim + 1 : -1].numel()
        stride = 0 if adjacency is None or adjacency.dim() == 2 else T * T
        tokens, vectors = map(dense, (x, u, v, residual)), map(dense, (norm_weight, norm_bias, mean, variance))
        links = dense(adjacency, torch.bool), stride, neighbours
        sizes = DTYPES[x.dtype], lines, T, inner, C
        return self.call("graph_update", *tokens, *sizes, *links, *vectors, eps, dense(scale), Out(x.shape, x.dtype))[0]

    def _repacked(self, packed, M):
        """Weights of M outputs a chunk, as the kernels here take them."""
        weight = packed.transpose(-1, -2).flatten(1, 2)[:, :M]
        return dense(pack(weight.flatten(0, 1), len(packed), self.panel))

    def linear_floats(
        self, x, packed, bias, residual, out_features, chunks, gelu, norm_weight=None, norm_bias=None, eps=-1.0
    ):
        C, M = x.shape[-1], out_features // chunks
        size = (*x.shape[:-1], M)
        out = Out(size if chunks == 1 else (chunks, *size), torch.float32)
        vectors = dense(norm_weight), dense(norm_bias)
        sizes = x.numel() // C, chunks, M, C
        given = dense(x), self._repacked(packed, M), *sizes, dense(bias), dense(residual), int(gelu)
        return self.call("linear_floats", *given, out, int(eps >= 0), *vectors, eps)[0]

    def mlp_floats(
        self,
        x,
        packed,
        bias,
        hidden,
        second_packed,
        second_bias,
        residual,
        M,
        norm_weight=None,
        norm_bias=None,
        eps=-1.0,
    ):
        C = x.shape[-1]
        rows = x.numel() // C
        out = Out((*x.shape[:-1], M), torch.float32)
        norm = int(eps >= 0), dense(norm_weight), dense(norm_bias), eps
        first = dense(x), self._repacked(packed, hidden), rows, 1, hidden, C, dense(bias), None, 1, None, *norm
        second = None, self._repacked(second_packed, M), rows, 1, M, hidden, dense(second_bias), dense(residual), 0, out
        return self.call("mlp_floats", *first, *second, 0, None, None, 0.0)[0]

    def attend_floats(self, x, packed, bias, dim, num_heads, proj_packed, proj_bias, residual, *norm):
        C, width = x.shape[-1], x.shape[dim + 1 :].numel()
        projected = self.linear_floats(x, packed, bias, None, 3 * C, 3, False, *norm)
        rows = [part.reshape(-1, x.shape[dim], width) for part in projected]
        attended = self.recover_attention(*rows, width // C * num_heads, (C // num_heads) ** -0.5)
        return self.linear_floats(attended.reshape(x.shape), proj_packed, proj_bias, residual, C, 1, False)

    def _interpolate(self, x, x_shape, frames, index, nearest, out):
        index = dense(index, torch.int64)
        B, K, *trailing = x_shape
        sizes = B, K, frames, torch.Size(trailing).numel()
        return x, *sizes, index, 0 if index is None else index.shape[0], nearest, out

    def recover_interpolate(self, x, index, num_frames, nearest):
        out = Out((x.shape[0], num_frames, *x.shape[2:]), x.dtype)
        x, *given = self._interpolate(dense(x), x.shape, num_frames, index, nearest, out)
        return self.call("interpolate", x, DTYPES[x.dtype], *given)[0]

    def recover_interpolate_backward(self, grad, index, num_kept, nearest):
        shape = grad.shape[0], num_kept, *grad.shape[2:]
        x, *given = self._interpolate(None, shape, grad.shape[1], index, nearest, None)
        out = Out(shape, grad.dtype)
        return self.call("interpolate_backward", x, DTYPES[grad.dtype], *given, dense(grad), out)[0]


def _into_out(name: str):
    """The operator that writes the result of `name` into its last argument."""

    def run(self, *arguments):
        arguments[-1].copy_(getattr(self, name)(*arguments[:-1]))

    return run


for _name in ("gather_tokens", "recover_attention", "recover_interpolate", "linear_floats", "attend_floats"):
    setattr(Driver, f"{_name}_out", _into_out(_name))
OPERATORS = [name for name in vars(Driver) if name.startswith(("score_", "prune_", "select_", "attention_", "gather_",
             "scatter_", "assign_", "cluster_", "merge_", "recover_", "add_", "graph_",
             "linear_", "mlp_", "attend_"))]  # fmt: skip


def memory_of(x: Tensor) -> bytes:
    """The bytes from the first to the last element of x, with what lies between."""
    if x.numel() == 0:
        return b""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((last + 1,), (1,)).contiguous().view(torch.uint8).numpy().tobytes()


def dense(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if x is None else x.detach().to(dtype or x.dtype).contiguous()


def precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def with_axis(x: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of [B, H, F, D] as [B, 1, H, F, D]."""
    return [x.shape[0], 1, *x.shape[1:]], [x.stride(0), 0, *x.stride()[1:]]


def tokens(x: Tensor) -> tuple:
    (B, N), C = x.shape[:2], x.shape[-1]
    J, stride_j = (x.shape[2], x.stride(2)) if x.dim() == 4 else (1, 0)
    return x, DTYPES[x.dtype], B, N, J, C, x.stride(0), x.stride(1), stride_j, x.stride(-1)
