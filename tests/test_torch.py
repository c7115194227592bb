"""What PyTorch users rely on: opcheck, compile, export, checkpointing, autocast, profiler, FLOP counts, fakes."""

import math
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import h2ot_kernels as h2ot
from bench import hosts as bench_hosts
from bench import shapes
from h2ot_kernels import backend, linear_floats
from h2ot_kernels.inference import dots_run, tiles_run

from .linear_layers import samples_of_some_cpus
from .runners import runners
from .test_bench import TINY
from .test_determinism import CALLS

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
        yield OPS.cluster_tokens, (x.detach(), 3, 2, torch.tensor([[4]]), mask, None)
        yield OPS.assign_clusters, (x.detach(), INDEX, mask)
        yield OPS.assign_by_parent, (x.detach(), INDEX, torch.arange(-1, 8).expand(2, -1), mask)
        yield OPS.merge_tokens, (x, torch.randint(-1, 3, (2, 9)), 3, torch.rand(2, 9).requires_grad_())
        yield OPS.recover_interpolate, (x, None, 20, False)
        yield OPS.recover_interpolate_backward, (x, INDEX, 3, True)
        yield OPS.recover_attention, (rand(1, 7, C, grad=True), x, rand(2, 9, C, grad=True), 1, 0.5)
        y = x.detach()
        yield OPS.gather_tokens_out, (y, INDEX, None, 1, 2, torch.zeros(2, C, 3))
        yield OPS.recover_interpolate_out, (y, None, 20, False, torch.zeros(2, 20, C))
        yield OPS.recover_attention_out, (rand(1, 7, C), y, rand(2, 9, C), 1, 0.5, torch.zeros(2, 7, C))
        yield OPS.recover_tail, (rand(9, C), x.detach(), rand(C), rand(C), rand(3, C), rand(3), 1e-5)
        depths = sum(C - c for c in range(0, C, 32))
        attending = rand(9, C), y, y + 1, 1, 0.5
        yield OPS.recover_rotated, (*attending, rand(9, 32), rand(depths, 32), rand(3, 32), rand(3), 1e-5)
        yield OPS.add_norm, (y, rand(2, 9, C, dtype=torch.bfloat16), rand(C), rand(C), 1e-5, torch.bfloat16)
        yield OPS.add_norm, (y[0], None, None, rand(C), 1e-5, torch.float16)
        yield OPS.add_norm, (y.half(), y.half(), rand(C), None, 1e-5, torch.float16)
        nodes = (rand(9), None, rand(9), rand(9).abs(), 1e-5, 1)
        yield OPS.graph_update, (y, y + 1, rand(2, 9, C), y, rand(C), None, 3, *nodes)
        yield OPS.graph_update, (y, y, y, y, rand(C), torch.rand(2, 9, 9) < 0.5, 0, *nodes)
    y, weight, norm = rand(2, 5, 33), linear_floats.pack(rand(6, 33), 2), (rand(33), None, 1e-5)
    yield OPS.linear_floats, (y, weight, rand(6), None, 6, 2, True, *norm)
    yield OPS.linear_floats, (y[0, 0], weight[:1], None, rand(3), 3, 1, False)
    yield OPS.mlp_floats, (y, weight[:1], rand(3), 3, linear_floats.pack(rand(5, 3), 1), None, None, 5, *norm)
    qkv, proj = linear_floats.pack(rand(99, 33), 3), linear_floats.pack(rand(33, 33), 1)
    yield OPS.attend_floats, (y, qkv, rand(99), 1, 3, proj, None, y + 1, *norm)
    yield OPS.attend_floats_out, (y, qkv, rand(99), 1, 3, proj, None, y + 1, *norm, rand(2, 5, 33))
    yield OPS.linear_floats_out, (y, proj, None, None, 33, 1, True, *norm, rand(2, 5, 33))
    heads = rand(2, 5, 2, 9, 4).mT.contiguous().mT
    yield OPS.prune_attention, (heads, heads, 3, None, 0.5)
    yield OPS.attention_scores, (heads, heads, 0.5)


def declared() -> set[str]:
    """The operators of this package, but Triton's, which have tests of their own."""
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name for space, name in names if space == "h2ot_kernels" and not name.endswith("_triton")}


def test_opcheck():
    checked = set()
    for op, arguments in [*samples(), *samples_of_some_cpus()]:
        torch.library.opcheck(op, arguments)
        checked.add(op.default.name().removeprefix("h2ot_kernels::"))
    # Backward operators whose own derivative raises are checked through the forward; linear layers where they run.
    absent = {of for of, run in (("tiles", tiles_run()), ("halves", dots_run())) if not run}
    kinds = ("linear_{}", "linear_{}_out", "mlp_{}", "attend_{}", "attend_{}_out")
    layers = {kind.format(of) for kind in kinds for of in absent} | ({"pack_tiles"} if "tiles" in absent else set())
    assert declared() - checked == {"recover_attention_backward"} | layers


def whole_path(x, query, embed):
    """Every public operation but the fused tail, which hosts compile."""
    index, labels_at_once, score = h2ot.cluster_tokens(x, 4, keep=3)
    index = torch.where(index == h2ot.prune_cluster(x, 4, keep=3), index, -1)
    at_once = h2ot.select_tokens(h2ot.score_tokens(x).score - score, 4) + labels_at_once[:, :4]
    kept = h2ot.gather_tokens(x, index, embed, out_dim=2).flatten(0, 1)
    labels = h2ot.assign_clusters(x, index)
    at_once = at_once + h2ot.assign_clusters(x, index, parent=h2ot.score_tokens(x).parent)[:, :4]
    merged = h2ot.merge_tokens(x.mean(2), labels, 4)
    recovered = h2ot.recover_attention(query, kept, kept, 2)
    moved = h2ot.prune_motion(x, 4)
    attended = h2ot.prune_attention(x.movedim(2, 1), x.movedim(2, 1), 4)
    sampled = h2ot.prune_sample(9, 4, device=x.device)
    gaussian = h2ot.prune_cluster(x, 4, metric="cosine", density="gaussian", cutoff=0.1, exclude_self=True)
    moved = moved + gaussian + at_once
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
            with torch.compiler.set_stance("default" if B == 2 else "fail_on_recompile"):
                out = function(*inputs)
            results.append((out, *torch.autograd.grad(out, inputs)))
        for ours, eager in zip(*reversed(results), strict=True):
            torch.testing.assert_close(ours, eager)


class Named(torch.Tensor):
    """A subclass that says which operators it meets."""

    met: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.met.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_subclass_meets_the_operator_and_has_its_gradient():
    """Plain tensors are recorded before the dispatcher is asked (library._recorded); these must not be."""
    x, index = rand(2, 9, 4, grad=True), h2ot.prune_sample(9, 3)
    Named.met.clear()
    named = h2ot.gather_tokens(x.as_subclass(Named), index)
    plain = h2ot.gather_tokens(x, index)
    assert any("gather_tokens" in name for name in Named.met)
    assert type(named) is Named
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (named, plain)]
    assert torch.equal(torch.Tensor(grads[0]), grads[1])


def into_buffers(x, query, moved, attended, full):
    index = h2ot.prune_sample(9, 4, device=x.device)
    kept = h2ot.gather_tokens(x, index, out_dim=2, out=moved).flatten(0, 1)
    h2ot.recover_attention(query, kept, kept, 2, out=attended)
    return h2ot.recover_interpolate(kept, index, 9, out=full)


def test_out_compiles_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(into_buffers, fullgraph=True, dynamic=True)
    for B in (2, 3):
        inputs, results = (rand(B, 9, 3, 8), rand(9, 8)), []
        for function in (into_buffers, compiled, torch.inference_mode()(into_buffers)):
            buffers = [torch.full(size, math.nan) for size in ((B, 3, 4, 8), (3 * B, 9, 8), (3 * B, 9, 8))]
            with torch.compiler.set_stance("default" if B == 2 else "fail_on_recompile"):
                assert function(*inputs, *buffers) is buffers[2]
            results.append(buffers)
        for eager, *others in zip(*results, strict=True):
            assert all(torch.equal(ours, eager) for ours in others)


@pytest.mark.parametrize("runner", runners("gather_tokens_out"))
def test_autograd_knows_that_out_was_overwritten(runner):
    x, buffer = rand(2, 9, 4), torch.empty(2, 3, 4, device=runner.device)
    weight = torch.randn(4, device=runner.device, requires_grad=True)
    with torch.no_grad():
        runner.run(h2ot.gather_tokens, x, INDEX, out=buffer)
    product = buffer * weight
    with torch.no_grad():
        runner.run(h2ot.gather_tokens, x, INDEX, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_host_compiles_once_for_all_batch_sizes():
    torch._dynamo.reset()
    model = bench_hosts.build("hot_mixste", reduced=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (5, 6, 3):  # first a size that no other axis has: torch.compile takes equal sizes for one
        x = bench_hosts.keypoints(model, B)
        with torch.compiler.set_stance("default" if B == 5 else "fail_on_recompile"):
            ours = compiled(x)
        torch.testing.assert_close(ours, model(x))


class EveryOperation(nn.Module):
    """The whole path, and the fused tail."""

    def __init__(self):
        super().__init__()
        self.query, self.embed = nn.Parameter(rand(9, 8)), nn.Parameter(rand(1, 4, 8))
        self.recover, self.head = (
            h2ot.nn.TokenRecoveringAttention(8, 2),
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)),
        )

    def forward(self, x):
        kept = h2ot.gather_tokens(x, h2ot.prune_sample(9, 4, device=x.device))
        return whole_path(x, self.query, self.embed), self.recover(self.query[None], kept, head=self.head)


@torch.no_grad()
def test_every_operation_is_exported_with_dynamic_batch_saved_and_loaded(tmp_path):
    model = EveryOperation().eval()
    program = torch.export.export(model, (rand(2, 9, 3, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = {str(node.target).split(".")[1] for node in program.graph.nodes if "h2ot_kernels" in str(node.target)}
    assert called == {op for op in backend._implementations if not op.endswith("_out")}
    torch.export.save(program, tmp_path / "operations.pt2")
    loaded = torch.export.load(tmp_path / "operations.pt2").module()
    for B in (1, 2, 5):
        x = rand(B, 9, 3, 8)
        torch.testing.assert_close(loaded(x), model(x))


def test_an_exported_program_whose_result_has_names_is_saved(tmp_path):
    class Named(nn.Module):
        def forward(self, x):
            return h2ot.score_tokens(x), h2ot.cluster_tokens(x, 3)

    x = rand(2, 9, 4)
    torch.export.save(torch.export.export(Named(), (x,)), tmp_path / "named.pt2")
    scores, clusters = torch.export.load(tmp_path / "named.pt2").module()(x)
    assert torch.equal(scores.score, h2ot.score_tokens(x).score)
    assert torch.equal(clusters.labels, h2ot.cluster_tokens(x, 3).labels)


@pytest.mark.parametrize(
    "make", [h2ot.score_tokens, partial(h2ot.cluster_tokens, num_tokens=3)], ids=["score", "cluster"]
)
def test_a_result_with_names_is_saved_and_loaded(make, tmp_path):
    result = make(rand(2, 9, 4))
    torch.save({"result": result}, tmp_path / "result.pt")
    loaded = torch.load(tmp_path / "result.pt", weights_only=True)["result"]
    assert type(loaded) is type(result)
    for ours, saved in zip(loaded, result, strict=True):
        assert torch.equal(ours, saved)


@torch.no_grad()
def test_the_fused_tail_compiles_once_for_all_batch_sizes():
    torch._dynamo.reset()
    model = EveryOperation().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (5, 6, 2):
        x = rand(B, 9, 3, 8)
        with torch.compiler.set_stance("default" if B == 5 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["hot_mixste", "h2ot_mixste"])
def test_export_with_dynamic_batch_saved_and_loaded(name, tmp_path):
    model = bench_hosts.build(name, reduced=True)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (bench_hosts.keypoints(model, 2),), dynamic_shapes=({0: batch},))
    assert any("h2ot_kernels" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "host.pt2")
    loaded = torch.export.load(tmp_path / "host.pt2").module()
    for B in (1, 2, 5):
        x = bench_hosts.keypoints(model, B)
        torch.testing.assert_close(loaded(x), model(x))


def test_activation_checkpointing():
    """The forward pass is run again in the backward pass: the same frames are kept, the gradients are the same."""
    inputs = rand(2, 9, 3, 8, grad=True), rand(9, 8, grad=True), rand(1, 4, 8, grad=True)
    results = []
    for use in (lambda: whole_path(*inputs), lambda: checkpoint(whole_path, *inputs, use_reentrant=False)):
        out = use()
        results.append((out, *torch.autograd.grad(out, inputs)))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_profiler_shows_named_ranges():
    """Of every operation that has kernels: prune_sample, integers that are kept, has none."""
    inputs = rand(2, 9, 3, 8), rand(9, 8), [torch.empty(size) for size in ((2, 3, 4, 8), (6, 9, 8), (6, 9, 8))]
    model = bench_hosts.build("h2ot_mixste", reduced=True)
    with torch.profiler.profile() as profile:
        for name in ("cpp", "reference"):
            with h2ot.use_backend(name):
                for call in CALLS.values():
                    call(slice(0, 2))
                into_buffers(*inputs[:2], *inputs[2])
        model(bench_hosts.keypoints(model, 1))
    seen = {event.key for event in profile.key_averages()}
    wanted = {f"h2ot_kernels::{op}{end}" for op in backend._implementations for end in ("", " (reference)")}
    assert wanted | {"Hourglass.prune", "Hourglass.recover"} <= seen


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("op", TINY)
def test_flop_counter_counts_what_the_benchmarks_count(op):
    comparison = shapes.build(shapes.Case(op, "random", TINY[op]), "cpu")
    wanted = 0 if op == "recover_interpolate" else comparison.flops
    with torch.set_grad_enabled(op == "recover_attention"):
        found = counted(comparison.ours)
    if op == "recover_pose" and not (
        tiles_run() or linear_floats.floats_run()
    ):  # its layers are oneDNN's then: not counted
        B, J, F, K, C = (comparison.shape[name] for name in "BJFKC")
        wanted = B * J * F * C * (4 * K + 6)
    assert found == wanted


def test_flop_counter_knows_every_operator_with_products_or_distances():
    moving = {"gather_tokens", "gather_tokens_out", "scatter_tokens", "pack_tiles", "add_norm"}
    adding = {"recover_interpolate", "recover_interpolate_out", "recover_interpolate_backward", "merge_tokens"}
    choosing = {"select_tokens", "prune_motion", "assign_by_parent"}
    assert {op for op in declared() if getattr(OPS, op) not in flop_registry} == moving | adding | choosing
    x, heads = rand(2, 9, 4), rand(2, 5, 2, 9, 4)
    assert counted(lambda: h2ot.score_tokens(x, exclude_self=True)) == math.prod((2, 9, 8, 4))
    assert counted(lambda: OPS.attention_scores(heads, heads, 0.5)) == 2 * math.prod((2, 5, 2, 9, 9, 4))
    rotated = rand(5, 4), x, x, 2, 0.5, rand(5, 32), rand(4, 32), rand(3, 32), rand(3), 1e-5
    attended = 2 * 5 * 4  # 9 kept, a triangle of 4, 3 outputs
    assert counted(lambda: OPS.recover_rotated(*rotated)) == attended * (4 * 9 + 5 + 2 * 3)


def test_flop_counter_counts_the_backward_pass():
    x, query = rand(2, 9, 8, grad=True), rand(7, 8, grad=True)
    forward = counted(lambda: h2ot.recover_attention(query, x, x, 2))
    both = counted(lambda: h2ot.recover_attention(query, x, x, 2).sum().backward())
    assert forward == 4 * math.prod((2, 7, 9, 8))
    with torch.no_grad():
        assert forward == counted(lambda: h2ot.recover_attention(query, x, x, 2, out=torch.empty(2, 7, 8)))
    assert both == forward + 10 * math.prod((2, 7, 9, 8))


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
    """Nothing is cast down: not the distances, not the choice, not the sums of float32 tokens.

    But PyTorch's own products: the projection in recover_pose, and means and attention of the reference.
    """
    chooses = ("score", "prune", "cluster", "assign", "labels", "select")
    of_distances = [op for op in CALLS if op.startswith(chooses)]
    for name, ops in (("cpp", CALLS.keys() - {"recover_pose"}), ("reference", of_distances)):
        for op in ops:
            call = CALLS[op]
            with h2ot.use_backend(name):
                expected = call(slice(0, 2))
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    found = call(slice(0, 2))
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == theirs.dtype, op
                assert torch.equal(ours, theirs), op
