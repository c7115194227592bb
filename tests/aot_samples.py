"""Calls on meta tensors that between them make every launch configuration that the choosers can produce."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch

from h2ot_kernels.triton import (
    attention_scores,
    cluster,
    gather,
    recover_attention,
    recover_interpolation,
    recover_pose,
    recover_project,
    recover_tail,
    score,
    select,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(rows: int, K: int) -> torch.Tensor:
    return tensor(rows, K, dtype=torch.int64)


def gather_calls() -> Iterator[Callable]:
    for dtype in DTYPES:
        for C in (3, 16, 64, 512) if dtype != torch.float16 else (512,):
            x = tensor(4, 243, 17, C, dtype=dtype)
            yield partial(gather.gather_tokens, x, index(4, 81), tensor(81, C, dtype=dtype), 1, 2)
    wide, narrow = tensor(4, 243, 17, 512), tensor(4, 243, 51)
    eight = tensor(2, 3, 4, 5, 6, 7, 8, 9).permute(0, 7, 6, 5, 4, 3, 2, 1)
    for x, dim, out_dim in ((wide, 1, 2), (narrow, 1, 2), (eight, 4, 4)):
        yield partial(gather.gather_tokens, x, index(1, 2), None, dim, out_dim)
        yield partial(gather.scatter_tokens, x, index(1, x.shape[out_dim]), 243, dim, out_dim)


def score_calls() -> Iterator[Callable]:
    """Widths 32 .. 512; k to 16; pooled and plain; with and without noise, mask and keep; N above 512 streams."""
    noise, mask, keep = tensor(4, 243, dtype=torch.float64), tensor(4, 243, dtype=torch.bool), index(1, 1)
    for dtype in DTYPES:
        yield partial(score.prune_cluster, tensor(4, 243, 512, dtype=dtype), 81, 2, None, None, None)
        yield partial(score.prune_cluster, tensor(1, 4000, 1024, dtype=dtype), 1000, 2, None, None, None)
        yield partial(score.prune_cluster, tensor(1, 16384, 1024, dtype=dtype), 1000, 5, None, None, None)
    yield partial(score.prune_cluster, tensor(4, 243, 17, 512), 81, 2, keep, mask, None)
    for N in (27, 60, 81, 128, 351, 500):
        for dtype in (torch.float32,) if N > 128 else (torch.float32, torch.bfloat16, torch.float64):
            yield partial(score.prune_cluster, tensor(1, N, 512, dtype=dtype), N // 3, 2, None, None, None)
    yield partial(score.score_tokens, tensor(4, 243, 512), 5, mask, noise)
    for N, k in ((27, 1), (27, 16), (60, 4), (123, 8), (351, 2), (500, 16)):
        yield partial(score.score_tokens, tensor(2, N, 64), k, None, None)
    for k in (1, 8, 16):
        yield partial(score.score_tokens, tensor(2, 600, 64), k, None, tensor(2, 600, dtype=torch.float64))
    yield partial(score.score_tokens, tensor(2, 5000, 64), 2, None, None)
    yield partial(score.score_tokens, tensor(4, 500, 64, dtype=torch.float64), 16, None, None)


def variant_calls() -> Iterator[Callable]:
    """Without the token itself, and Gaussian, stored and streamed; only Gaussian is a constant of its own."""
    nearest, gaussian, gaussian_of_others = (0.5, True, 0.0), (0.0, False, 0.4), (0.5, True, 0.4)
    for dtype in DTYPES:
        for N, options in ((243, nearest), (243, gaussian), (4000, nearest), (4000, gaussian), (16384, nearest)):
            yield partial(score.score_variant, tensor(1, N, 512, dtype=dtype), 2, None, None, *options)
    for N in (27, 60, 123, 500, 600):
        noise = tensor(2, N, dtype=torch.float64)
        yield partial(score.score_variant, tensor(2, N, 64), 2, None, noise, *gaussian_of_others)
    for N, k in ((27, 1), (123, 5), (500, 16), (600, 16)):
        yield partial(score.score_variant, tensor(2, N, 64), k, None, None, *nearest)
    yield partial(score.score_variant, tensor(2, 500, 64, dtype=torch.float64), 2, None, None, *gaussian_of_others)


def select_calls() -> Iterator[Callable]:
    for N in (50, 100, 243, 351, 1000, 4000):
        yield partial(select.select_tokens, tensor(4, N, dtype=torch.float64), 20, None, None)
    for dtype in DTYPES:
        scores, mask = tensor(4, 243, dtype=dtype), tensor(4, 243, dtype=torch.bool)
        yield partial(select.select_tokens, scores, 81, index(4, 3), mask)
        yield partial(select.prune_motion, tensor(4, 243, 17, 2, dtype=dtype), 81, None)


def attention_calls() -> Iterator[Callable]:
    """All keys in one tile of 64 to 256, or in blocks."""
    for dtype in DTYPES:
        few = dtype in (torch.float16, torch.float64)
        for F, D in ((243, 64), (9, 16)) if few else itertools.product((9, 100, 243, 300), (16, 64)):
            heads = tensor(2, 17, 8, F, D, dtype=dtype)
            yield partial(attention_scores.prune_attention, heads, heads, 9, None, 0.125)
    yield partial(with_tensor_memory, tensor(2, 17, 8, 243, 64))


def with_tensor_memory(heads: torch.Tensor) -> None:
    with mock.patch.object(attention_scores, "has_tensor_memory", return_value=True):
        attention_scores.attention_scores(heads, heads, 0.125)


def cluster_calls() -> Iterator[Callable]:
    for dtype in DTYPES:
        x = tensor(2, 243, 512, dtype=dtype)
        yield partial(cluster.assign_clusters, x, index(2, 81), tensor(2, 243, dtype=torch.bool))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        yield partial(cluster.merge_tokens, x, tensor(2, 243, dtype=torch.int64), 81, tensor(2, 243, dtype=wide))
    yield partial(cluster.merge_tokens, tensor(2, 243, 64), tensor(2, 243, dtype=torch.int64), 81, None)


def recovery_calls() -> Iterator[Callable]:
    for dtype in DTYPES:
        for K, D in ((81, 64),) if dtype == torch.float16 else itertools.product((9, 81, 243), (16, 64, 128)):
            key, query = tensor(34, K, 8 * D, dtype=dtype), tensor(243, 8 * D, dtype=dtype)
            yield partial(recover_attention.recover_attention, query, key, key, 8, 0.125)
        for K, C in ((81, 512), (9, 128), (81, 128), (9, 512)) if dtype == torch.float32 else ((81, 512),):
            key, query = tensor(34, K, C, dtype=dtype), tensor(243, C, dtype=dtype)
            grad = tensor(34, 243, C, dtype=dtype)
            yield partial(recover_attention.recover_attention_backward, grad, query, key, key, 8, 0.125)
        for S in (3, 51, 512) if dtype == torch.float32 else (51,):
            x = tensor(2, 81, S, dtype=dtype)
            yield partial(recover_interpolation.recover_interpolate, x, index(2, 81), 243, False)
            if S == 51:
                grad = tensor(2, 243, S, dtype=dtype)
                yield partial(recover_interpolation.recover_interpolate_backward, grad, index(2, 81), 81, False)
    for S in (3, 51, 512):
        yield partial(recover_interpolation.recover_interpolate, tensor(2, 81, S), None, 243, True)
        yield partial(recover_interpolation.recover_interpolate_backward, tensor(2, 243, S), None, 81, True)


def tail_calls() -> Iterator[Callable]:
    """Few to many rows, few and many outputs, C a multiple of 16 or not; and without all that can be left out."""
    shapes = [(R, C, M) for R, C in ((17, 512), (51, 512), (68, 512), (68, 100)) for M in (3, 51)]
    for dtype in DTYPES:
        for R, C, M in shapes if dtype in (torch.float32, torch.bfloat16) else shapes[:2]:
            vectors = [tensor(C, dtype=dtype) for _ in range(3)]
            token, attended, proj = (tensor(*shape, C, dtype=dtype) for shape in ((243,), (R, 243), (C,)))
            head = tensor(M, C, dtype=dtype), tensor(M, dtype=dtype)
            yield partial(recover_tail.recover_projected_tail, token, attended, proj, *vectors, *head, 1e-5)
    token, attended, proj = (tensor(*shape, 512) for shape in ((243,), (68, 243), (512,)))
    bare = proj, None, None, None, tensor(3, 512), None
    yield partial(recover_tail.recover_projected_tail, token, attended, *bare, 1e-5)


def pose_calls() -> Iterator[Callable]:
    """Heads of half a block of pairs, one and two; few to many rows, few and many outputs; C no multiple of 16."""
    shapes = [(R, C, 8, M) for C in (256, 512) for R, M in ((17, 3), (51, 3), (68, 3), (17, 51), (51, 51))]
    shapes += [(51, 100, H, M) for H in (2, 4) for M in (3, 51)]
    for R, C, H, M in (*shapes, (68, 1024, 8, 3)):
        query, token, kept, proj = (tensor(*shape, C) for shape in ((243,), (243,), (R, 81), (C,)))
        vectors = [tensor(C) for _ in range(3)] if M == 3 else [None] * 3
        given = token, query, kept, kept, H, 0.125, proj, *vectors, tensor(M, C), tensor(M) if M == 3 else None
        yield partial(recover_pose.recover_pose, *given, 1e-5)


def project_calls() -> Iterator[Callable]:
    """Few and many rows; channels that fill a block of pairs, less and more, and not a multiple of 16; no bias."""
    for rows, C in ((1377, 64), (1377, 512), (5508, 512), (5508, 1024), (5508, 100)):
        for bias in (tensor(C), None) if rows > C == 512 else (tensor(C),):
            weights = (tensor(C, C), bias) * 3
            yield partial(recover_project.recover_project, tensor(243, C), tensor(rows, C), *weights)


def calls() -> Iterator[Callable]:
    yield from gather_calls()
    yield from score_calls()
    yield from variant_calls()
    yield from select_calls()
    yield from attention_calls()
    yield from cluster_calls()
    yield from recovery_calls()
    yield from tail_calls()
    yield from pose_calls()
    yield from project_calls()


def calls_of_ones() -> Iterator[Callable]:
    """Sizes and strides of 1, which native Triton compiles in as constants."""
    one, two, mask = tensor(1, 1, 1), tensor(1, 1), tensor(1, 1, dtype=torch.bool)
    noise = tensor(1, 1, dtype=torch.float64)
    for x in (one, tensor(1, 600, 1), tensor(1, 1, 2, 1)):
        added = noise if x.shape[1] == 1 else None
        yield partial(score.prune_cluster, x, 1, 1, index(1, 1), mask if x.shape[1] == 1 else None, added)
        yield partial(score.score_tokens, x, 1, None, added)
        yield partial(score.score_variant, x, 1, None, None, 0.5, True, 0.4)
    yield partial(select.select_tokens, two, 1, index(1, 1), mask)
    yield partial(select.select_tokens, tensor(1, 4000), 1, index(1, 1), tensor(1, 4000, dtype=torch.bool))
    yield partial(select.prune_motion, tensor(1, 1, 1, 1), 1, None)
    yield partial(attention_scores.prune_attention, tensor(1, 1, 1, 1), tensor(1, 1, 1, 1), 1, None, 1.0)
    yield partial(cluster.assign_clusters, one, index(1, 1), None)
    yield partial(cluster.merge_tokens, one, index(1, 1), 1, two)
    yield partial(recover_attention.recover_attention, two, one, one, 1, 1.0)
    for B in (1, 2):
        many = tensor(B, 1, 1)
        yield partial(recover_attention.recover_attention_backward, many, two, many, many, 1, 1.0)
    for given in (None, index(1, 1)):
        yield partial(recover_interpolation.recover_interpolate, one, given, 1, False)
        yield partial(recover_interpolation.recover_interpolate_backward, one, given, 1, True)
    vector = tensor(1)
    yield partial(recover_tail.recover_projected_tail, two, one, two, vector, vector, vector, two, vector, 1.0)
    yield partial(recover_tail.recover_projected_tail, two, one, two, None, None, None, two, None, 1e-5)
    yield partial(recover_pose.recover_pose, two, two, one, one, 1, 1.0, two, *(vector,) * 3, two, vector, 1.0)
    yield partial(recover_project.recover_project, two, two, two, vector, two, vector, two, None)
    yield partial(gather.gather_tokens, tensor(1, 1, 1, 1), index(1, 1), two, 1, 2)
    yield partial(gather.gather_tokens, tensor(1, 1, 1, 1), index(1, 1), None, 3, 3)
    yield partial(gather.scatter_tokens, one, index(1, 1), 1, 1, 2)
