"""What only native Triton does to the kernels, seen without a GPU: tests/aot_forms.py, and strides beyond 2^31."""

import os
import subprocess
import sys

import pytest
import torch

import h2ot_kernels as h2ot
from h2ot_kernels.triton import score, select

from . import aot_forms, aot_read
from .runners import DEVICE
from .sample import drawn
from .test_size import INDEX, LABELS, far

BARRIER = """
  tt.func public @kernel(%keys: !tt.ptr<i64>, %out: !tt.ptr<i64>) {
    %0 = tt.splat %keys : !tt.ptr<i64> -> tensor<64x!tt.ptr<i64>>
    %1 = tt.addptr %0, %column : tensor<64x!tt.ptr<i64>>, tensor<64xi32>
    tt.store %1, %key : tensor<64x!tt.ptr<i64>>
    gpu.barrier
    %2 = tt.load %1 : tensor<64x!tt.ptr<i64>>
    %3 = tt.splat %out : !tt.ptr<i64> -> tensor<64x!tt.ptr<i64>>
    tt.store %3, %2 : tensor<64x!tt.ptr<i64>>
"""
PAIR = """
	shl.b64 	%rd127, %rd126, 36;
	mul.wide.u32 	%rd128, %r1, 2147483648;
	or.b64 	%rd129, %rd128, %rd127;
	mov.b64 	{_, %r9}, %rd129;
"""


def test_no_kernel_leans_on_what_native_triton_does_not_promise():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot_forms"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reading_of_forms_sees_each_fault():
    assert aot_forms.unseen_stores(BARRIER) == []
    assert aot_forms.unseen_stores(BARRIER.replace("gpu.barrier", "")) == [
        "%keys is stored and loaded without a barrier between"
    ]
    assert aot_read.overruns(PAIR) == ["%rd128 may run over into %rd127 in %rd129, a pair"]
    assert aot_read.overruns(PAIR.replace("mul.wide.u32 \t%rd128, %r1, 2147483648", "and.b64 \t%rd128, %rd9, -2"))
    assert aot_read.overruns(PAIR.replace("mul.wide.u32 \t%rd128, %r1, 2147483648", "cvt.u64.u32 \t%rd128, %r1")) == []


X, MASK = (
    torch.randn(2, 9, 2, 4).bfloat16(),
    torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 1, 1]]) > 0,
)
ROWS, FLAT = X[:, :, 0].clone(), X[:, :, 1].clone()
OPS = torch.ops.h2ot_kernels
# Each with the tensors whose axes are drawn apart, one at a time.
CALLS = {
    "score_tokens": (lambda x, mask: h2ot.score_tokens(x, mask=mask), X, MASK),
    "select_tokens": (
        lambda scores, mask, keep: [h2ot.select_tokens(scores, 3, mask=mask, keep=keep)],
        FLAT[:, :, 0].clone(),
        MASK,
        torch.tensor([[1, 5], [0, 3]]),
    ),
    "assign_clusters": (lambda index: [h2ot.assign_clusters(ROWS, index)], INDEX),
    "merge_tokens": (lambda x, labels, w: h2ot.merge_tokens(x, labels, 3, w), ROWS, LABELS, torch.rand(2, 9)),
    "gather_tokens": (lambda x, index: [h2ot.gather_tokens(x, index, out_dim=2)], X, INDEX),
    "scatter_tokens": (lambda grad: [OPS.scatter_tokens_triton(grad, torch.arange(9)[None], 12, 1, 2)], X),
    "prune_motion": (lambda pose: [h2ot.prune_motion(pose, 3)], X),
    "prune_attention": (lambda q: [h2ot.prune_attention(q, X.movedim(2, 1), 3)], X.movedim(2, 1).clone()),
    "recover_interpolate": (lambda x, index: [h2ot.recover_interpolate(x, index, 9)], X[:, :3].clone(), INDEX),
    "interpolation backward": (lambda g: [OPS.recover_interpolate_backward_triton(g, INDEX, 3, False)], X),
    "recover_attention": (lambda q, key: [h2ot.recover_attention(q, key, FLAT, 2)], FLAT.flip(1), ROWS),
    "attention backward": (lambda g, k: OPS.recover_attention_backward_triton(g, FLAT, k, ROWS, 2, 0.3), FLAT, ROWS),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="memory is reserved and not touched on a CPU only")
@pytest.mark.parametrize("name", CALLS)
def test_strides_beyond_2_31_elements_in_triton(name):
    call, *given = CALLS[name]
    with h2ot.use_backend("triton"):
        expected = call(*given)
        for position, x in enumerate(given):
            for axis in drawn(range(x.dim()), 2):
                apart = [far(x, axis) if other == position else value for other, value in enumerate(given)]
                assert all(map(torch.equal, call(*apart), expected)), (position, axis)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory is reserved and not touched on a CPU only")
@pytest.mark.parametrize("name", ["score_tokens", "select_tokens"])
def test_strides_beyond_2_31_elements_of_many_tokens(name, monkeypatch):
    monkeypatch.setattr(score, "SMALL", 4)
    monkeypatch.setattr(select, "ONE_PROGRAM", 4)
    test_strides_beyond_2_31_elements_in_triton(name)
