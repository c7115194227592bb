"""What PyTorch users rely on: opcheck, torch.compile, fakes of other devices, module loading."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import h2ot_kernels as h2ot

OPS = torch.ops.h2ot_kernels
INDEX = torch.tensor([[0, 4, 8], [1, 2, 3]])


def rand(*shape, grad=False, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def samples():
    """(operator, arguments): contiguous, permuted and sliced inputs."""
    for x in (rand(2, 9, 4, grad=True), rand(2, 4, 9).mT.requires_grad_(), rand(2, 9, 9)[..., ::2].detach()):
        C = x.shape[2]
        mask = torch.rand(2, 9) > 0.2
        yield OPS.score_tokens, (x.detach(), 2, mask, torch.rand(2, 9, dtype=torch.float64))
        yield OPS.score_variant, (x.detach(), 2, mask, None, 0.5, True, 0.3)
        yield OPS.prune_cluster, (x.detach(), 3, 2, torch.tensor([[4]]), mask, None)
        yield OPS.select_tokens, (x.detach()[..., 0], 3, None, mask)
        yield OPS.prune_motion, (x.detach()[..., None], 3, None)
        yield OPS.gather_tokens, (x, INDEX, rand(3, C, grad=True), 1, 1)
        yield OPS.gather_tokens, (x, INDEX, None, 1, 2)
        yield OPS.scatter_tokens, (x, torch.arange(9)[None], 12, 2, 1)
        yield OPS.assign_clusters, (x.detach(), INDEX, mask)
        yield OPS.assign_by_parent, (x.detach(), INDEX, torch.arange(-1, 8).expand(2, -1), mask)
        yield OPS.merge_tokens, (x, torch.randint(-1, 3, (2, 9)), 3, torch.rand(2, 9).requires_grad_())
        yield OPS.recover_interpolate, (x, None, 20, False)
        yield OPS.recover_interpolate_backward, (x, INDEX, 3, True)
        yield OPS.recover_attention, (rand(1, 7, C, grad=True), x, rand(2, 9, C, grad=True), 1, 0.5)
        yield OPS.recover_tail, (rand(9, C), x.detach(), rand(C), rand(C), rand(3, C), rand(3), 1e-5)
    heads = rand(2, 5, 2, 9, 4).mT.contiguous().mT
    yield OPS.prune_attention, (heads, heads, 3, None, 0.5)
    yield OPS.attention_scores, (heads, heads, 0.5)


def test_opcheck():
    checked = set()
    for op, arguments in samples():
        torch.library.opcheck(op, arguments)
        checked.add(op.default.name().removeprefix("h2ot_kernels::"))
    declared = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("h2ot_kernels::")
    }
    # Backward operators whose own derivative raises are checked through the forward; Triton's in their own tests.
    assert {name for name in declared if not name.endswith("_triton")} - checked == {"recover_attention_backward"}


def whole_path(x, query, embed):
    index = h2ot.prune_cluster(x, 4, keep=3)
    kept = h2ot.gather_tokens(x, index, embed, out_dim=2).flatten(0, 1)
    labels = h2ot.assign_clusters(x, index)
    merged = h2ot.merge_tokens(x.mean(2), labels, 4)
    recovered = h2ot.recover_attention(query, kept, kept, 2)
    moved = h2ot.prune_motion(x, 4)
    attended = h2ot.prune_attention(x.movedim(2, 1), x.movedim(2, 1), 4)
    sampled = h2ot.prune_sample(9, 4, device=x.device)
    gaussian = h2ot.prune_cluster(x, 4, metric="cosine", density="gaussian", cutoff=0.1, exclude_self=True)
    moved = moved + gaussian
    indices = (moved + attended + sampled).sum()
    return h2ot.recover_interpolate(merged, index, 9).sum() + recovered.square().sum() + indices


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(whole_path, fullgraph=True, dynamic=dynamic)
    for B in (2, 3, 5) if dynamic else (2,):
        inputs = rand(B, 9, 3, 8, grad=True), rand(9, 8, grad=True), rand(1, 4, 8, grad=True)
        results = []
        for function in (whole_path, compiled):
            out = function(*inputs)
            results.append((out, *torch.autograd.grad(out, inputs)))
        for ours, eager in zip(*reversed(results), strict=True):
            torch.testing.assert_close(ours, eager)


def test_fakes_of_a_cuda_device():
    """The shapes, dtypes and strides that tracing sees, for a device that need not be here."""
    with FakeTensorMode():
        x = torch.empty(2, 9, 17, 8, device="cuda", dtype=torch.bfloat16)
        index = torch.empty(2, 3, device="cuda", dtype=torch.int64)
        assert OPS.prune_cluster(x, 3, 2, None, None, None).shape == (2, 3)
        kept = OPS.gather_tokens(x, index, None, 1, 2)
        assert (kept.shape, kept.device.type, kept.is_contiguous()) == ((2, 17, 3, 8), "cuda", True)
        assert OPS.recover_interpolate(torch.empty(2, 3, 8, device="cuda"), index, 9, False).shape == (2, 9, 8)


def test_autocast_leaves_distances_alone():
    x = rand(2, 27, 16)
    expected = h2ot.score_tokens(x).score
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(h2ot.score_tokens(x).score, expected)


def test_func_transforms():
    x = rand(2, 9, 4)
    gather = torch.func.grad(lambda x, **given: h2ot.gather_tokens(x, INDEX, **given).sum())
    assert gather(x, backend="reference").sum() == 24
    with pytest.raises(RuntimeError, match="functorch"):
        gather(x)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: h2ot.gather_tokens(x, INDEX), (x,), (x,))
