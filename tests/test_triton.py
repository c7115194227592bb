"""What holds for every Triton stem: no PyTorch arithmetic, the gate covers the choosers, the dispatcher's checks."""

import ast
from pathlib import Path

import pytest
import torch
import triton.language as tl
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import h2ot_kernels as h2ot
from h2ot_kernels.triton import common

from .aot_samples import calls
from .runners import DEVICE

PACKAGE = Path(common.__file__).parent
OPS = torch.ops.h2ot_kernels
INDEX = torch.tensor([[0, 4, 8], [1, 2, 3]], device=DEVICE)

# Allocation, types and questions; views. Everything else of a tensor is arithmetic or a copy.
ALLOWED_TORCH = {"empty", "Tensor", "dtype", "bool", "uint8", "int32", "int64", "float16", "bfloat16", "float32"}
ALLOWED_TORCH |= {"float64", "ops", "cuda", "device"}
VIEWS = {"new_empty", "stride", "size", "dim", "numel", "element_size", "view", "reshape", "unsqueeze", "expand"}
VIEWS |= {"unflatten", "flatten", "movedim", "transpose", "permute", "squeeze", "is_contiguous", "get_device"}
HOST = {"index", "type", "device", "shape", "dtype", "values", "data_ptr"}  # Python's own names, and an address
ARITHMETIC = {name for name in dir(torch.Tensor) if not name.startswith("_")} - VIEWS - HOST


def rand(*shape, grad=False, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_(grad)


def counted(call) -> list[str]:
    """The kernels that a call launches, in order."""
    with common.record() as launches:
        call()
    return [launch.kernel.__name__ for launch in launches]


def host_calls(tree: ast.Module):
    """Every method call outside the kernels, which speak tl and not torch."""
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in function.decorator_list):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    yield node


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_torch_arithmetic(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr in ALLOWED_TORCH, f"{path.name}:{node.lineno}: torch.{node.attr}"
    for node in host_calls(tree):
        assert node.func.attr not in ARITHMETIC, f"{path.name}:{node.lineno}: .{node.func.attr}()"


def test_the_check_for_arithmetic_sees_it():
    tree = ast.parse("def f(x):\n    return x.contiguous().sum()")
    assert {node.func.attr for node in host_calls(tree)} <= ARITHMETIC


def test_every_kernel_is_launched_through_the_recorder():
    """kernel[grid](...) stands in `launch` and what it calls: what is not recorded is neither counted nor compiled."""
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert path.name in ("common.py", "repeated.py"), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "repeated.launch":
                assert path.name == "common.py", f"{path.name}:{node.lineno}"


@pytest.fixture(scope="module")
def compiled_by_the_gate():
    """Constants of every launch that tests/aot.py compiles, by kernel."""
    found = {}
    with common.record() as launches:
        for call in calls():
            call()
    for launch in launches:
        found.setdefault(launch.kernel.__name__, []).append(launch.constants)
    return found


def test_products_are_contracted_nowhere(compiled_by_the_gate):
    """Threads that share a sum hold the same bits only then (common.launch)."""
    assert compiled_by_the_gate
    for name, launches in compiled_by_the_gate.items():
        assert all(constants["enable_fp_fusion"] is False for constants in launches), name


def covered(choice: dict, constants: list[dict]) -> bool:
    return any(choice.items() <= given.items() for given in constants)


def test_the_gate_covers_every_tile(compiled_by_the_gate):
    """The choosers are pure functions of shapes: what they give over a sweep of shapes must have been compiled."""
    from h2ot_kernels.triton import (
        attention_scores,
        cluster,
        gather,
        pairs,
        recover_attention,
        recover_interpolation,
        recover_pose,
        recover_project,
        recover_tail,
        score,
        score_large,
        select,
    )

    chosen = {
        "gather_kernel": [gather.tile(inner) for inner in (*range(1, 600), 5120, 17 * 5120, 2**33)],
        "interpolate_kernel": [recover_interpolation.interpolate_tile(S) for S in (*range(1, 600), 2**33)],
        "interpolate_backward_kernel": [recover_interpolation.interpolate_tile(S) for S in (*range(1, 600), 2**33)],
        "pool_kernel": [score.pool_tile(C) for C in (*range(1, 600), 5120)],
        "select_kernel": [select.select_tile(N) for N in range(1, select.ONE_PROGRAM + 1)],
        "delta_kernel": [score.delta_tile(N, False) for N in range(1, score.SMALL + 1)],
        "assign_kernel": [cluster.assign_tile(double) for double in (False, True)],
        "merge_kernel": [cluster.merge_tile(C) for C in (*range(1, 600), 5120)],
        "projected_tail_kernel": [
            recover_tail.tail_tile(rows, C, M, dtype, group) | {"GROUP": group}
            for dtype, group in (
                *((dtype, 0) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
                *((torch.float32, group) for group in (32, 64)),
            )
            for rows in (1, 27, 4131, 9000, 16524, 10**6)
            for C in (3, 100, 512, 5120)
            for M in (1, 3, 5, 51)
            if group < 64 or C % 16 == 0
        ],
        "pair_kernel": [pairs.pair_tile(C) for C in (*range(1, 600), 5120)],
        "project_kernel": [
            recover_project.project_tile(rows, C)
            for rows in (1, 27, 1377, 5508, 10**6)
            for C in (*range(1, 600, 7), 512, 5120)
        ],
        "nearest_kernel": [
            score_large.stream_tile(B, N, slots, dtype, gaussian)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
            for B in (1, 4, 256)
            for N in (513, 2048, 16384, 65536)
            for slots, gaussian in ((4, False), (8, False), (32, False), (4, True))
        ],
        "gram_kernel": [
            {name: score.gram_tile(N, k, False)[name] for name in ("TILE", "BLOCK", "ROWS", part)}
            for N in range(16, score.SMALL + 1)
            for k in range(1, 17)
            for part in ("WIDTH", "SLOTS")
        ],
        "attention_kernel": [
            recover_attention.attention_tile(K, D, dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
            for K in range(1, 130)
            for D in (5, 16, 64, 200)
        ],
        "attention_pairs_kernel": [recover_pose.pose_tile(K, D) for K in range(1, 130) for D in (5, 16, 32, 64, 200)],
        **{
            kernel: [
                attention_scores.scores_tile(F, D, dtype, tensor_memory)
                for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
                for F in frames
                for D in (5, 16, 64, 128)
                for tensor_memory in (False, True)
            ]
            for kernel, frames in (("received_once_kernel", (1, 9, 16, 243)), ("level_kernel", (257, 1000)))
        },
        "mean_kernel": [{"ROWS": 128, "FRAMES": 16}],
    }
    for kernel, choices in chosen.items():
        for choice in choices:
            assert covered(choice, compiled_by_the_gate[kernel]), (kernel, choice)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def tail_modules(C):
    modules = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 3)
    return [module.to(DEVICE).requires_grad_(False) for module in modules]


INT = torch.int64
# "Fused" is counted: the kernels of one call.
COUNTS = {
    "prune path of 512 tokens": (
        lambda t: t.score.prune_cluster(meta(4, 512, 17, 64), 81, 2, meta(1, 1, dtype=INT), None, None),
        ["pool_kernel", "gram_kernel", "delta_kernel"],
    ),
    "scores": (
        lambda t: t.score.score_tokens(meta(4, 243, 64), 5, None, meta(4, 243, dtype=torch.float64)),
        ["pool_kernel", "gram_kernel", "delta_kernel"],
    ),
    "Gaussian scores": (
        lambda t: t.score.score_variant(meta(4, 243, 64), 2, None, None, 0.0, True, 0.4),
        ["pool_kernel", "gram_kernel", "delta_kernel"],
    ),
    "selection": (lambda t: t.select.select_tokens(meta(4, 1024), 81, None, None), ["select_kernel"]),
    "motion": (lambda t: t.select.prune_motion(meta(4, 243, 17, 2), 81, None), ["motion_kernel", "select_kernel"]),
    "gather": (
        lambda t: t.gather.gather_tokens(meta(4, 243, 17, 64), meta(4, 81, dtype=INT), meta(81, 64), 1, 2),
        ["gather_kernel"],
    ),
    "scatter": (
        lambda t: t.gather.scatter_tokens(meta(4, 17, 81, 64), meta(4, 81, dtype=INT), 243, 1, 2),
        ["gather_kernel"],
    ),
    "assignment": (
        lambda t: t.cluster.assign_clusters(meta(4, 243, 64), meta(4, 81, dtype=INT), None),
        ["pool_kernel", "assign_kernel"],
    ),
    "merging": (
        lambda t: t.cluster.merge_tokens(meta(4, 243, 64), meta(4, 243, dtype=INT), 81, None),
        ["merge_kernel"],
    ),
    "recovery": (
        lambda t: t.recover_attention.recover_attention(meta(243, 64), meta(34, 81, 64), meta(34, 81, 64), 8, 1.0),
        ["attention_kernel"],
    ),
    "projection, residual, norm and head": (
        lambda t: t.recover_tail.recover_projected_tail(
            meta(243, 64), meta(34, 243, 64), meta(64, 64), meta(64), meta(64), meta(64), meta(3, 64), meta(3), 1e-5
        ),
        ["pair_kernel", "projected_tail_kernel"],
    ),
    "query, key and value": (
        lambda t: t.recover_project.recover_project(meta(243, 64), meta(2754, 64), *(meta(64, 64), meta(64)) * 3),
        ["pair_kernel", "project_kernel"],
    ),
    "recovery tail": (
        lambda t: h2ot.recover_pose(
            rand(3, 8), rand(3, 8), rand(2, 2, 8), rand(2, 2, 8), *tail_modules(8), 2, num_joints=1, backend="triton"
        ),
        ["attention_pairs_kernel", "projected_tail_kernel"],
    ),
    "interpolation": (
        lambda t: t.recover_interpolation.recover_interpolate(meta(4, 81, 17, 3), meta(4, 81, dtype=INT), 243, False),
        ["interpolate_kernel"],
    ),
    "interpolation backward": (
        lambda t: t.recover_interpolation.recover_interpolate_backward(
            meta(4, 243, 17, 3), meta(4, 81, dtype=INT), 81, False
        ),
        ["interpolate_backward_kernel"],
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_kernels_per_call(name):
    import h2ot_kernels.triton as stems

    call, expected = COUNTS[name]
    assert counted(lambda: call(stems)) == expected


def test_numbers_are_arguments_not_constants():
    """One compilation serves every scale and eps, and none is rounded to float32 on the way to a float64 kernel."""
    with common.record() as launches:
        for call in calls():
            call()
    numbers = set()
    for launch in launches:
        assert not any(isinstance(value, float) for value in launch.constants.values()), launch.kernel.__name__
        for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):
            if isinstance(value, float):
                assert launch.kernel.fn.__annotations__.get(name) is tl.float64, (launch.kernel.__name__, name)
                numbers.add(launch.kernel.__name__)
    assert {"attention_kernel", "received_once_kernel", "projected_tail_kernel"} <= numbers


@pytest.mark.parametrize(
    "call",
    [
        lambda score, x: score.score_tokens(x, 5, None, None),
        lambda score, x: score.score_variant(x, 5, None, None, 0.0, True, 0.4),
        lambda score, x: score.prune_cluster(x, 1000, 5, None, None, None),
    ],
    ids=["scores", "gaussian", "kept tokens"],
)
def test_no_square_buffer_above_512_tokens(call):
    import h2ot_kernels.triton as stems

    x = meta(1, 16384, 64, dtype=torch.bfloat16)
    with common.record() as launches:
        call(stems.score, x)
    buffers = {id(arg): arg for launch in launches for arg in launch.arguments if isinstance(arg, torch.Tensor)}
    written = sum(arg.numel() * arg.element_size() for arg in buffers.values() if arg is not x)
    assert written < 16384 * 300


def samples():
    """(operator, arguments): contiguous, permuted and sliced inputs."""
    for x in (rand(2, 9, 4, grad=True), rand(2, 4, 9).mT.requires_grad_(), rand(2, 9, 9)[..., ::2].detach()):
        C = x.shape[2]
        yield OPS.gather_tokens_triton, (x, INDEX, rand(3, C, grad=True), 1, 1)
        yield OPS.scatter_tokens_triton, (x, torch.arange(9, device=DEVICE)[None], 12, 2, 1)
    for x in (rand(2, 9, 4, grad=True), rand(2, 4, 9).mT.requires_grad_()):
        y, mask = x.detach(), torch.rand(2, 9, device=DEVICE) > 0.2
        yield OPS.score_tokens_triton, (y, 2, mask, None)
        yield OPS.score_variant_triton, (y, 2, mask, None, 0.5, True, 0.3)
        yield OPS.prune_cluster_triton, (y, 3, 2, torch.tensor([[4]], device=DEVICE), mask, None)
        yield OPS.select_tokens_triton, (y[..., 0], 3, None, mask)
        yield OPS.prune_motion_triton, (y[..., None], 3, None)
        yield OPS.assign_clusters_triton, (y, INDEX, mask)
        labels = torch.randint(-1, 3, (2, 9), device=DEVICE)
        yield OPS.merge_tokens_triton, (x, labels, 3, torch.rand(2, 9, device=DEVICE).requires_grad_())
        yield OPS.recover_interpolate_triton, (x, None, 20, False)
        yield OPS.gather_tokens_out_triton, (y, INDEX, None, 1, 2, rand(2, 4, 3))
        yield OPS.recover_interpolate_out_triton, (y, None, 20, False, rand(2, 20, 4))
        yield OPS.recover_attention_out_triton, (rand(1, 7, 4), y, rand(2, 9, 4), 1, 0.5, rand(2, 7, 4))
        yield OPS.recover_interpolate_backward_triton, (x, INDEX, 3, True)
        yield OPS.recover_attention_triton, (rand(1, 7, 4, grad=True), x, rand(2, 9, 4, grad=True), 1, 0.5)
        vectors = rand(4), rand(4), rand(4)
        attention = rand(1, 7, 4), y, rand(2, 9, 4), 2, 0.5
        yield OPS.recover_project_triton, (rand(9, 4), rand(6, 4), *(rand(4, 4), rand(4)) * 2, rand(4, 4), None)
        yield OPS.recover_pose_triton, (rand(7, 4), *attention, rand(4, 4), *vectors, rand(3, 4), rand(3), 1e-5)
        yield OPS.recover_projected_tail_triton, (rand(9, 4), y, rand(4, 4), *vectors, rand(3, 4), rand(3), 1e-5)
    heads = rand(2, 5, 2, 9, 4).mT.contiguous().mT
    yield OPS.prune_attention_triton, (heads, heads, 3, None, 0.5)


def test_opcheck():
    checked = set()
    for op, arguments in samples():
        torch.library.opcheck(op, arguments)
        checked.add(op.default.name().removeprefix("h2ot_kernels::"))
    declared = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("h2ot_kernels::")
    }
    # Its own derivative raises, so it is checked through the forward operator.
    assert {name for name in declared if name.endswith("_triton")} - checked == {"recover_attention_backward_triton"}


def whole_path(x, query, embed):
    with h2ot.use_backend("triton"):
        index = h2ot.prune_cluster(x, 3, keep=3)
        kept = h2ot.gather_tokens(x, index, embed, out_dim=2).flatten(0, 1)
        merged = h2ot.merge_tokens(x[:, :, 0], h2ot.assign_clusters(x, index), 3)
        recovered = h2ot.recover_attention(query, kept, kept, 2)
        indices = (h2ot.prune_motion(x, 3) + h2ot.prune_attention(x.movedim(2, 1), x.movedim(2, 1), 3)).sum()
        return h2ot.recover_interpolate(merged, index, 9).sum() + recovered.square().sum() + indices


def test_compile_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(whole_path, fullgraph=True, backend="aot_eager")
    inputs = rand(2, 9, 3, 8, grad=True), rand(9, 8, grad=True), rand(1, 3, 8, grad=True)
    results = []
    for function in (whole_path, compiled):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs)))
    for ours, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, eager)


def test_flop_counter_counts_the_projection_in_the_tail():
    with FlopCounterMode(display=False) as counter:
        h2ot.recover_pose(
            rand(3, 8), rand(3, 8), rand(2, 5, 8), rand(2, 5, 8), *tail_modules(8), 2, num_joints=1, backend="triton"
        )
    assert counter.get_total_flops() == 4 * 2 * 3 * 5 * 8 + 2 * 2 * 3 * 8 * (8 + 3)


def test_fakes_of_a_cuda_device():
    with FakeTensorMode():
        x = torch.empty(2, 9, 17, 8, device="cuda", dtype=torch.bfloat16)
        index = torch.empty(2, 3, device="cuda", dtype=torch.int64)
        kept = OPS.gather_tokens_triton(x, index, None, 1, 2)
        assert (kept.shape, kept.device.type, kept.is_contiguous()) == ((2, 17, 3, 8), "cuda", True)
        back = OPS.scatter_tokens_triton(kept, index, 9, 1, 2)
        assert (back.shape, back.dtype) == (x.shape, torch.bfloat16)
        assert OPS.prune_cluster_triton(x, 3, 2, None, None, None).shape == (2, 3)
        density, _, _, parent = OPS.score_tokens_triton(x, 2, None, None)
        assert (density.dtype, parent.dtype, parent.device.type) == (torch.float64, torch.int64, "cuda")
        pose = torch.empty(2, 3, 8, device="cuda")
        assert OPS.recover_interpolate_triton(pose, index, 9, False).shape == (2, 9, 8)
        assert OPS.recover_attention_triton(torch.empty(1, 8, device="cuda"), pose, pose, 2, 1.0).shape == (2, 1, 8)
        weights = torch.empty(8, 8, device="cuda"), None, None, None, torch.empty(5, 8, device="cuda"), None
        tail = OPS.recover_projected_tail_triton(torch.empty(3, 8, device="cuda"), pose, *weights, 1e-5)
        assert (tail.shape, tail.dtype, tail.is_contiguous()) == ((2, 3, 5), torch.float32, True)
