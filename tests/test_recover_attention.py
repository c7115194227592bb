"""Cross-attention recovery and its fused inference tail: within max(4 x PyTorch's own error, 2 eps sqrt(terms))."""

import copy
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels.backend import dispatch
from h2ot_kernels.linear import Linear
from h2ot_kernels.recover_pose import project

from .cases import DTYPES
from .compare import assert_within
from .runners import runners
from .sample import drawn

# B, F, K, C, H, shared query
SHAPES = [
    (3, 27, 9, 64, 8, True),
    (2, 27, 9, 64, 8, False),
    (1, 243, 81, 64, 4, True),
    (2, 5, 3, 6, 2, True),
    (35, 5, 3, 6, 2, True),  # the gradient of the query is summed by groups of samples
    (1, 1, 1, 1, 1, False),
    (2, 13, 117, 100, 4, True),
    (0, 9, 3, 8, 2, True),
]


def pairs(shapes):
    """Every shape with every runner; in Triton's interpreter three tiles of frames and two of keys stand for more."""
    made = []
    for (B, F, K, *rest), runner in itertools.product(shapes, runners("recover_attention")):
        F, K = (min(F, 83), min(K, 70)) if runner.values[0].interpreted else (F, K)
        shape = B, F, K, *rest
        made.append(pytest.param(*shape, runner.values[0], id="-".join(map(str, (*shape, runner.id)))))
    return made


def inputs(B, F, K, C, shared, dtype):
    return torch.randn(F if shared else B * F, C).reshape(-1, F, C).to(dtype), *torch.randn(2, B, K, C).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "F", "K", "C", "H", "shared", "runner"), pairs(SHAPES))
def test_attention_within_bound(B, F, K, C, H, shared, dtype, runner):
    tensors = inputs(B, F, K, C, shared, dtype)
    exact = python_ref.recover_attention(*(x.double() for x in tensors), H)
    same = python_ref.recover_attention(*tensors, H)
    assert_within(runner(h2ot.recover_attention, *tensors, H), exact, same, K + C // H)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "F", "K", "C", "H", "shared", "runner"), pairs([s for s in SHAPES if s[0]]))
def test_gradients_within_bound(B, F, K, C, H, shared, dtype, runner):
    tensors = inputs(B, F, K, C, shared, dtype)
    weight = torch.randn(B, F, C)

    def gradients(function, to):
        leaves = [x.to(to).requires_grad_() for x in tensors]
        out = function(*leaves, H)
        return torch.autograd.grad((out * weight.to(out)).sum(), leaves)

    ours = gradients(lambda *args: runner(h2ot.recover_attention, *args), dtype)
    exact, same = (gradients(python_ref.recover_attention, to) for to in (torch.float64, dtype))
    for name, mine, oracle, own in zip(("query", "key", "value"), ours, exact, same, strict=True):
        terms = max(F, K) * (B if shared and name == "query" else 1) + C // H
        assert_within(mine, oracle, own, terms)


@pytest.mark.parametrize("runner", runners("recover_attention"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_takes_the_result(dtype, runner):
    shapes = [SHAPES[3], (2, 5, 3, 6, 2, False)] + SHAPES[:2] * (not runner.interpreted)
    for B, F, K, C, H, shared in drawn(shapes, 2):
        runner.assert_fills_out(h2ot.recover_attention, *inputs(B, F, K, C, shared, dtype), H, scale=0.3)


@pytest.mark.parametrize("runner", runners("recover_attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_the_parts_of_one_projection_in_place(dtype, runner):
    """Rows far apart, frames on an outer axis, channels apart: the bits of contiguous tensors."""
    parts = torch.randn(3, 19, 3 * 64).to(dtype).chunk(3, -1)
    outer = [x[0] for x in torch.randn(3, 1, 19, 5, 64).transpose(2, 3).to(dtype)]
    apart = [x.mT for x in torch.randn(3, 2, 64, 19).to(dtype)]
    for query, key, value in (parts, outer, apart):
        expected = runner(h2ot.recover_attention, query.contiguous(), key.contiguous(), value.contiguous(), 4)
        ours = runner(h2ot.recover_attention, query, key, value, 4)
        exact = python_ref.recover_attention(query.double(), key.double(), value.double(), 4)
        assert_within(ours, exact, python_ref.recover_attention(query, key, value, 4), 19 + 16)
        assert torch.equal(ours, expected)
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        gradients = torch.autograd.grad(h2ot.recover_attention(*leaves, 4).sum(), leaves)
        dense = [x.detach().contiguous().requires_grad_() for x in (query, key, value)]
        expected = torch.autograd.grad(h2ot.recover_attention(*dense, 4).sum(), dense)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("runner", runners("recover_attention"))
def test_large_logits_stay_finite(runner):
    query, key, value = torch.randn(4, 8) * 1e4, torch.randn(1, 5, 8) * 1e4, torch.randn(1, 5, 8)
    ours = runner(h2ot.recover_attention, query, key, value, 2)
    exact = python_ref.recover_attention(query.double(), key.double(), value.double(), 2)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runner", runners("recover_attention"))
@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float32, 1e20), (torch.bfloat16, 1e20), (torch.float64, 1e160)], ids=str
)
def test_first_keys_whose_products_overflow_weigh_nothing(dtype, large, runner):
    """Whole blocks of keys with logits of -inf, before some that are finite."""
    K, few, C = 140, 10, 16
    query, key, value = torch.ones(1, 20, C), -torch.ones(1, K, C), torch.randn(1, K, C)
    query, key = query.double() * large, key.double() * large
    key[:, K - few :] = torch.randn(1, few, C) / large
    leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    ours = runner(h2ot.recover_attention, *leaves, 1)
    rest = [x.detach()[:, -few:] if x.shape[1] == K else x.detach() for x in leaves]
    exact = python_ref.recover_attention(*(x.double() for x in rest), 1)
    assert_within(ours, exact, python_ref.recover_attention(*rest, 1), few + C)
    for x in torch.autograd.grad(ours.sum(), leaves):
        assert x.isfinite().all()


@pytest.mark.parametrize("runner", runners("recover_attention"))
def test_scale_and_query_shapes_agree(runner):
    query, (key, value) = torch.randn(6, 8), torch.randn(2, 3, 5, 8)
    one = runner(h2ot.recover_attention, query, key, value, 2, scale=0.7)
    assert torch.equal(one, runner(h2ot.recover_attention, query[None], key, value, 2, scale=0.7))
    each = runner(h2ot.recover_attention, query.expand(3, -1, -1), key, value, 2, scale=0.7)
    torch.testing.assert_close(one, each, rtol=1e-6, atol=1e-6)
    turned = runner(h2ot.recover_attention, -query, key, value, 2, scale=-0.7)  # the largest logit weighs least
    torch.testing.assert_close(one, turned, rtol=1e-6, atol=1e-6)
    uniform = runner(h2ot.recover_attention, query, key, value, 2, scale=0.0)
    torch.testing.assert_close(uniform, value.mean(1, keepdim=True).expand(-1, 6, -1))


@pytest.mark.parametrize("scale", [None, -0.7])
def test_gradcheck(scale):
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (2, 3, 6), (2, 3, 6))]
    assert torch.autograd.gradcheck(lambda *args: h2ot.recover_attention(*args, 2, scale=scale), tensors)


def test_second_order_raises():
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((4, 6), (2, 3, 6), (2, 3, 6))]
    grads = torch.autograd.grad(h2ot.recover_attention(*tensors, 2).square().sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grads[0].sum().backward()


@pytest.mark.parametrize("runner", runners("recover_tail"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("joints", "F", "K", "C", "H"), [(5, 27, 9, 64, 8), (3, 5, 2, 12, 2), (1, 1, 1, 8, 1)])
def test_fused_tail_within_bound(joints, F, K, C, H, dtype, runner):
    proj, norm, head = Linear(C, C).eval(), nn.LayerNorm(C, eps=0.1), nn.Linear(C, 3)
    nn.init.normal_(norm.weight)
    token, query, (key, value) = torch.randn(1, F, C), torch.randn(1, F, C), torch.randn(2, 2 * joints, K, C)
    tensors = [x.to(dtype) for x in (token, query, key, value)]

    def kernel(*args, **kwargs):
        return runner(h2ot.recover_pose, *args, **kwargs)

    @torch.no_grad()
    def run(function, to):
        on = runner.device if function is kernel else "cpu"
        modules = [module.to(on, to) for module in (proj, norm, head)]
        return function(*(x.to(to) for x in tensors), *modules, H, num_joints=joints)

    for module in (proj, norm, head):
        module.to(dtype)  # the weights that the backend sees
    same = run(python_ref.recover_pose, dtype)
    ours = run(kernel, dtype)
    exact = run(python_ref.recover_pose, torch.float64)
    assert ours.shape == (2, joints, F, 3)
    assert_within(ours, exact, same, C)


# R, F, C, outputs, which vectors are there: of the projection, norm weight and bias, of the head
TAILS = [
    (2, 1, 3, 3, (True, True, True, True)),
    (3, 5, 64, 1, (True, True, False, False)),
    (2, 27, 100, 3, (False, False, False, True)),
    (1, 5, 512, 3, (True, True, True, True)),
    (1, 243, 64, 5, (False, True, True, True)),
    (2, 3, 8, 17, (True, False, False, True)),
    (0, 9, 8, 3, (True, True, True, True)),
]


def tail_of(C, outputs, there, to):
    """proj, norm and head: weights that show a wrong channel, with or without their vectors."""
    made = torch.Generator().manual_seed(C + outputs)
    proj, head = nn.Linear(C, C, bias=there[0]), nn.Linear(C, outputs, bias=there[3])
    norm = nn.LayerNorm(C, eps=1e-3, elementwise_affine=there[1], bias=there[2])
    for parameter in (p for module in (proj, norm, head) for p in module.parameters()):
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0, generator=made)
    return [module.requires_grad_(False).to(to) for module in (proj, norm, head)]


def tail_by(runner, token, attended, modules):
    """What recover_pose does after its attention."""
    modules = [copy.deepcopy(module).to(runner.device) for module in modules]

    def run(token, attended, backend):
        proj, norm, head = modules
        vectors = norm.weight, norm.bias, head.weight, head.bias
        return dispatch("recover_tail", attended, backend)(token, attended, proj, *vectors, norm.eps)

    return runner(run, token, attended)


def tail_exactly(token, attended, modules):
    proj, norm, head = modules
    return head(norm(token + proj(attended)))


@pytest.mark.parametrize("runner", runners("recover_tail"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "F", "C", "outputs", "there"), TAILS)
def test_tail_within_bound(R, F, C, outputs, there, dtype, runner):
    token, attended = torch.randn(F, C).to(dtype), torch.randn(R, F, C).to(dtype)
    modules = tail_of(C, outputs, there, dtype)
    doubled = [copy.deepcopy(module).double() for module in modules]
    ours = tail_by(runner, token, attended, modules)
    same = tail_exactly(token, attended, modules)
    assert_within(ours, tail_exactly(token.double(), attended.double(), doubled), same, C)


@pytest.mark.parametrize("runner", runners("recover_tail"))
@pytest.mark.parametrize("C", [24, 200])
def test_tail_of_channels_far_from_zero(C, runner):
    """A mean 1000 times the deviation cancels nowhere but in the deviations: the error is that of y itself."""
    token, attended = torch.randn(9, C) + 1e3, torch.randn(2, 9, C)
    modules = tail_of(C, 3, (True, True, True, True), torch.float32)
    doubled = [copy.deepcopy(module).double() for module in modules]
    exact = tail_exactly(token.double(), attended.double(), doubled)
    assert_within(tail_by(runner, token, attended, modules), exact, tail_exactly(token, attended, modules), C)


@pytest.mark.parametrize("runner", runners("recover_tail"))
@pytest.mark.parametrize("C", [24, 72, 200])
def test_tail_of_equal_channels_is_that_of_no_deviation(C, runner):
    """What rounding takes from their mean is no deviation, which a small eps would make large."""
    token, attended = 12.345678 * 10.0 ** torch.arange(9)[:, None].expand(9, C), torch.zeros(2, 9, C)
    modules = tail_of(C, 5, (False, True, True, True), torch.float32)
    modules[1].eps = 1e-6
    doubled = [copy.deepcopy(module).double() for module in modules]
    exact = tail_exactly(token.double(), attended.double(), doubled)
    ours = tail_by(runner, token, attended, modules)
    assert_within(ours, exact, tail_exactly(token, attended, modules), C)
    assert torch.equal(tail_by(runner, token, attended[:1], modules), ours[:1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf in the interpreter
@pytest.mark.parametrize("runner", runners("recover_tail"))
def test_tail_keeps_rows_apart_and_reads_any_strides(runner):
    token, attended = torch.randn(20, 9).mT[:, ::2], torch.randn(3, 40, 9).mT[..., ::4]
    modules = tail_of(10, 3, (True, True, True, True), torch.float32)
    doubled = [copy.deepcopy(module).double() for module in modules]
    exact = tail_exactly(token.double(), attended.double(), doubled)
    assert_within(tail_by(runner, token, attended, modules), exact, tail_exactly(token, attended, modules), 10)
    dense = attended.contiguous()
    expected = tail_by(runner, token, dense, modules)
    dense[1, 4, 7], dense[2, 0, 0] = float("nan"), float("inf")
    ours = tail_by(runner, token, dense, modules)
    assert ours[1, 4].isnan().all()
    assert ours[2, 0].isnan().all()
    ours[1, 4], ours[2, 0] = expected[1, 4], expected[2, 0]
    assert torch.equal(ours, expected)


def test_fused_tail_refuses_gradients():
    C, kept = 8, torch.randn(17, 3, 8)
    modules = nn.Linear(C, C), nn.LayerNorm(C), nn.Linear(C, 3)
    with pytest.raises(RuntimeError, match="inference"):
        h2ot.recover_pose(torch.zeros(9, C), torch.zeros(9, C), kept, kept, *modules, 2)


def as_is(layers, token, x):
    return token, x


def with_gradients(layers, token, x):
    layers[0].requires_grad_(True)
    torch.set_grad_enabled(True)
    return token, x


def of_doubles(layers, token, x):
    for layer in layers:
        layer.double()
    return token.double(), x.double()


def with_a_hook(layers, token, x):
    layers[1].register_forward_hook(lambda module, given, made: made)
    return token, x


def of_two_widths(layers, token, x):
    layers[0] = nn.Linear(16, 8).requires_grad_(False)
    return torch.randn(1, 5, 16), x


def of_no_tokens(layers, token, x):
    return token, x[:0]


@pytest.mark.parametrize(
    ("change", "calls"),
    [(as_is, 1), (with_gradients, 0), (of_doubles, 0), (with_a_hook, 0), (of_two_widths, 0), (of_no_tokens, 0)],
)
def test_projects_in_one_launch_only_what_fits_together(monkeypatch, change, calls):
    """By a backend that can: made up here, so that this is seen without one."""
    made = []

    def together(token, x, query, query_bias, key, key_bias, value, value_bias):
        made.append((token.shape, x.shape))
        linear = nn.functional.linear
        return linear(token, query, query_bias), linear(x, torch.cat((key, value)), torch.cat((key_bias, value_bias)))

    monkeypatch.setitem(project.__globals__, "dispatch", lambda *given: SimpleNamespace(project=together))
    layers = [nn.Linear(8, 8).requires_grad_(False) for _ in range(3)]
    with torch.no_grad():
        token, x = change(layers, torch.randn(1, 5, 8), torch.randn(2, 3, 8))
        results = project(token, x, *layers)
    assert made == [((5, 8), (6, 8))] * calls
    for layer, given, result in zip(layers, (token, x, x), results, strict=True):
        torch.testing.assert_close(result, layer(given))


FITS_TOGETHER = """
import torch
from h2ot_kernels.recover_pose import _fits_together
{}
layers = [torch.nn.Linear(8, 8).requires_grad_(False) for _ in range(3)]
with torch.no_grad():
    print(_fits_together(torch.randn(1, 5, 8), torch.randn(2, 3, 8), layers))
"""


@pytest.mark.parametrize(
    ("setting", "fits"),
    [
        ("torch.set_float32_matmul_precision('high')", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", False),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", False),
        ("torch.backends.fp32_precision = 'tf32'", False),
        ("torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'", True),
        ("torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.fp32_precision = 'ieee'", True),
    ],
)
def test_products_of_tf32_are_left_to_pytorch(setting, fits):
    """Said by either of torch's two ways; in a process of its own, for what was said stays."""
    command = [sys.executable, "-c", FITS_TOGETHER.format(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{fits}\n", done.stderr
