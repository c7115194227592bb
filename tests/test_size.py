"""Large results' memory; more than 2^31 elements: strides that reach beyond, for real on the CPU; shapes by fakes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import h2ot_kernels as h2ot
from h2ot_kernels import _C

BEYOND = 2**31 + 2**20  # elements


def far(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The values of x, its first and last entries of an axis more than 2^31 elements apart; only what it holds is used.

    The memory between is reserved, never touched.
    """
    try:
        memory = torch.empty(BEYOND, dtype=x.dtype)
    except RuntimeError as error:
        pytest.skip(f"{BEYOND * x.element_size()} bytes of address space cannot be reserved: {error}")
    strides, step = [0] * x.dim(), 1
    for other in reversed(range(x.dim())):
        if other != axis:
            strides[other], step = step, step * x.shape[other]
    strides[axis] = (BEYOND - step) // (x.shape[axis] - 1)
    view = memory.as_strided(x.shape, strides)
    assert view.stride(axis) * (x.shape[axis] - 1) > 2**31
    return view.copy_(x)


INDEX = torch.tensor([[0, 3, 8], [1, 2, 7]])
LABELS = torch.tensor([[0, 1, 2] * 3] * 2)
CALLS = {
    "score_tokens": lambda x: h2ot.score_tokens(x),
    "prune_cluster": lambda x: [h2ot.prune_cluster(x, 3)],
    "prune_motion": lambda x: [h2ot.prune_motion(x, 3)],
    "prune_attention": lambda x: [h2ot.prune_attention(x.movedim(2, 1), x.movedim(2, 1), 3)],
    "gather_tokens": lambda x: [h2ot.gather_tokens(x, INDEX)],
    "gather_tokens, frames out": lambda x: [h2ot.gather_tokens(x, INDEX, out_dim=2)],
    "scatter_tokens": lambda x: [torch.ops.h2ot_kernels.scatter_tokens(x, torch.arange(9)[None], 12, 1, 1)],
    "assign_clusters": lambda x: [h2ot.assign_clusters(x, INDEX)],
    "merge_tokens": lambda x: [h2ot.merge_tokens(x[:, :, 0], LABELS, 3)],
    "recover_attention": lambda x: [h2ot.recover_attention(x[0, :, 0], x[:, :, 0], x[:, :, 1], 2)],
    "recover_interpolate": lambda x: [h2ot.recover_interpolate(x[:, :3], INDEX, 9)],
}


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_strides_beyond_2_31_elements(axis):
    x = torch.randn(2, 9, 3, 16).to(torch.bfloat16)
    distant = far(x, axis)
    for capability in _C.runnable_capabilities().split(","):
        _C.set_capability(capability)
        for name, call in CALLS.items():
            for ours, expected in zip(call(distant), call(x), strict=True):
                assert torch.equal(ours, expected), (name, capability)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_of_results_beyond_2_31_elements(device):
    B, F, J, C, K = 4096, 243, 17, 512, 81
    with FakeTensorMode():
        ops = torch.ops.h2ot_kernels
        x = torch.empty(B, F, J, C, device=device)
        assert x.numel() > 2**32
        index = ops.prune_cluster(x, K, 2, None, None, None)
        assert index.shape == (B, K)
        kept = ops.gather_tokens(x, index, None, 1, 2)
        assert (kept.shape, kept.stride()) == ((B, J, K, C), (J * K * C, K * C, C, 1))
        assert kept.numel() > 2**31
        assert ops.scatter_tokens(kept, index, F, 1, 2).shape == x.shape
        assert ops.score_tokens(x, 2, None, None)[0].shape == (B, F)
        flat, query = torch.empty(B * J, K, C, device=device), torch.empty(F, C, device=device)
        assert ops.recover_attention(query, flat, flat, 8, 1.0).shape == (B * J, F, C)
        assert ops.recover_interpolate(flat, None, F, False).shape == (B * J, F, C)
        assert ops.merge_tokens(torch.empty(B, F * J, C, device=device), index, F, None)[0].shape == (B, F, C)


PAGES_OF_RESULTS = """
from pathlib import Path
import torch
import h2ot_kernels as h2ot, python_ref

def flags_of(x):
    "The kernel's flags of the memory in the middle of x."
    at, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= at < end
        elif inside and first == "VmFlags:":
            return rest
    return []

x, index = torch.randn(1, 9000, 1024), torch.arange(8448)[None]  # 33 MB come out
large = h2ot.gather_tokens(x, index, backend="cpp")
assert "hg" in flags_of(large), flags_of(large)
small = h2ot.gather_tokens(x, index[:, :2048], backend="cpp")
assert flags_of(small) and "hg" not in flags_of(small), flags_of(small)
assert torch.equal(large, python_ref.gather_tokens(x, index))
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages for the asking"
)
def test_a_large_output_asks_for_huge_pages():
    """In a process of its own: memory that malloc gives out again keeps what was asked for it before."""
    done = subprocess.run([sys.executable, "-c", PAGES_OF_RESULTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_number_of_tokens_stays_free_in_an_exported_program():
    class Clusters(torch.nn.Module):
        def forward(self, x):
            index, labels, _ = h2ot.cluster_tokens(x, 3)
            return index, h2ot.merge_tokens(x, labels, 3)

    N = torch.export.Dim("N", min=4)
    program = torch.export.export(Clusters(), (torch.randn(2, 9, 8),), dynamic_shapes=({1: N},)).module()
    x = torch.randn(2, 30, 8)
    assert all(map(torch.equal, program(x), Clusters()(x)))


def test_operators_refuse_more_tokens_than_they_can_number():
    """What only an exported program, or a call of the operator itself, brings there."""
    x = torch.zeros(1, 1, 1).expand(1, 2**31, 1)
    ops, index = torch.ops.h2ot_kernels, torch.zeros(1, 1, dtype=torch.int64)
    for call in (
        lambda: ops.score_tokens(x, 1, None, None),
        lambda: ops.prune_cluster(x, 1, 1, None, None, None),
        lambda: ops.cluster_tokens(x, 1, 1, None, None, None),
        lambda: ops.assign_clusters(x, index, None),
        lambda: ops.merge_tokens(x, index, 1, None),
    ):
        with pytest.raises(ValueError, match="x: got 2147483648 tokens a sample, wanted at most 2147483647"):
            call()
