"""An eager call runs a Triton kernel, or records an operator's gradient, before the dispatcher is asked; whoever
watches operators still sees the operator.
"""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ExecutionTraceObserver
from torch.utils.flop_counter import FlopCounterMode

import h2ot_kernels as h2ot
from h2ot_kernels import backend

from .runners import DEVICE, Recorder

OPS = torch.ops.h2ot_kernels
INDEX = torch.tensor([[0, 4, 8], [1, 2, 3]], device=DEVICE)
LABELS = torch.tensor([[0, 1, 2] * 3, [2, -1, 0] * 3], device=DEVICE)


def rand(*shape, grad=False):
    return torch.randn(*shape, device=DEVICE).requires_grad_(grad)


# name: (what `implement` was given, its operator, its arguments: tensors that may require a gradient come first)
CALLS = {
    "gather_tokens": lambda: (rand(2, 9, 4), INDEX, rand(3, 4), 1, 1),
    "merge_tokens": lambda: (rand(2, 9, 4), LABELS, 3, None),
    "recover_interpolate": lambda: (rand(2, 3, 4), INDEX, 9, False),
    "recover_attention": lambda: (rand(1, 7, 4), rand(2, 9, 4), rand(2, 9, 4), 1, 0.5),
    "score_tokens": lambda: (rand(2, 9, 4), 2, None, None),
    "prune_cluster": lambda: (rand(2, 9, 4), 3, 2, None, None, None),
}
DIFFERENTIABLE = ("gather_tokens", "merge_tokens", "recover_interpolate", "recover_attention")
_HAS_TRITON, _WHY_NOT = backend.can_run("gather_tokens", "triton", DEVICE)
needs_triton = pytest.mark.skipif(not _HAS_TRITON, reason=_WHY_NOT)
TRITON = [pytest.param(name, "triton", marks=needs_triton, id=f"{name}-triton") for name in CALLS]
DIRECT = [*TRITON, *((name, "cpp") for name in DIFFERENTIABLE)]  # what has no gradient in C++ is its operator
BY = [pytest.param("triton", marks=needs_triton), "cpp"]
RECORDED = [*TRITON[: len(DIFFERENTIABLE)], *DIRECT[len(TRITON) :]]


def named(name, by):
    return f"{name}_triton" if by == "triton" else name


def parts(name, by="triton"):
    if by == "cpp" and DEVICE != "cpu":
        pytest.skip("the arguments are on a GPU")
    return backend._implementations[name][by], getattr(OPS, named(name, by)).default, CALLS[name]()


def first_of(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def operators_called(monkeypatch):
    """The names of the operators that the dispatcher runs in Python, without a mode that would itself be seen."""
    met = []
    original = torch._ops.OpOverload.__call__

    def call(self, /, *args, **kwargs):
        met.append(self.name())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", call)
    return met


@pytest.mark.parametrize(("name", "by"), TRITON)
def test_an_eager_call_is_the_operator_without_the_dispatcher(name, by, operators_called):
    direct, op, arguments = parts(name, by)
    wanted = op(*arguments)
    operators_called.clear()
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            found = direct(*arguments)
        both = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
        for ours, theirs in zip(*both, strict=name != "merge_tokens"):  # which gives the first of the operator's two
            assert torch.equal(ours, theirs)
            assert not ours.requires_grad
    assert operators_called == []


@pytest.mark.parametrize(("name", "by"), RECORDED)
def test_gradients_are_those_of_the_operator(name, by, operators_called):
    direct, op, arguments = parts(name, by)
    tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for x in tensors:
        x.requires_grad_()
    results = []
    for function in (op, direct):
        operators_called.clear()
        out = first_of(function(*arguments))
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert by == "cpp" or f"h2ot_kernels::{named(name, by)}" not in operators_called
    assert type(first_of(direct(*arguments)).grad_fn).__name__ == f"{named(name, by)}Backward"


def negated(x):
    """x, whose memory holds -x: `conj().imag` of complex numbers gives such tensors."""
    return torch._neg_view(x.neg()) if x.is_floating_point() else x


@pytest.mark.parametrize(("name", "by"), DIRECT)
def test_memory_that_holds_the_negative(name, by):
    direct, _, arguments = parts(name, by)
    lazily = [negated(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    assert lazily[0].is_neg()
    assert torch.equal(first_of(direct(*lazily)), first_of(direct(*arguments)))
    if name not in DIFFERENTIABLE:
        return
    grads = []
    for first, *rest in (arguments, lazily):
        first = first.detach().requires_grad_()
        out = first_of(direct(first, *rest))
        grads += torch.autograd.grad(out, first, negated(torch.ones_like(out)))
    assert torch.equal(*grads)


@pytest.mark.parametrize(("name", "by"), DIRECT)
def test_zeros_without_memory(name, by):
    """PyTorch makes such tensors for derivatives that are zero; their address is null."""
    direct, _, (x, *rest) = parts(name, by)
    zeros = torch._efficientzerotensor(x.shape, device=DEVICE)
    assert zeros._is_zerotensor()
    assert torch.equal(first_of(direct(zeros, *rest)), first_of(direct(torch.zeros_like(x), *rest)))


@needs_triton
def test_out_whose_memory_holds_the_negative_is_refused():
    """Not filled with the negative of the result."""
    with pytest.raises((RuntimeError, ValueError)):
        h2ot.gather_tokens(rand(2, 9, 4), INDEX, out=negated(rand(2, 3, 4)), backend="triton")


@pytest.mark.parametrize("by", BY)
def test_second_order_gradients(by):
    x, weight = rand(2, 9, 4, grad=True), rand(2, 3, 4, grad=True)

    def function(x, weight):
        kept = parts("gather_tokens", by)[0](x, INDEX, None, 1, 1)
        return parts("recover_interpolate", by)[0](kept * weight, INDEX, 9, False)

    doubles = [v.detach().double().requires_grad_() for v in (x, weight)]
    assert torch.autograd.gradcheck(function, doubles, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, doubles, fast_mode=True)


@pytest.mark.parametrize(("name", "by"), RECORDED)
def test_batched_gradients(name, by):
    """PyTorch's own `vmap` of many gradients (`jacobian(vectorize=True)`), whose tensors look plain."""
    direct, _, (x, *rest) = parts(name, by)
    out = first_of(direct(x.requires_grad_(), *rest))
    many = rand(3, *out.shape)
    together = torch.autograd.grad(out, x, many, is_grads_batched=True, retain_graph=True)[0]
    apart = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in many]
    torch.testing.assert_close(together, torch.stack(apart))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_tensors(name):
    """Those of functionalisation have no memory of their own; a null pointer would be an argument that is not given."""
    direct, op, arguments = parts(name, "cpp")
    wanted = first_of(op(*arguments))
    for position, x in enumerate(arguments):
        if isinstance(x, torch.Tensor):
            given = [*arguments[:position], torch._to_functional_tensor(x), *arguments[position + 1 :]]
            assert torch.equal(torch._from_functional_tensor(first_of(direct(*given))), wanted)


@pytest.mark.parametrize(("name", "by"), RECORDED)
def test_no_tangent_is_lost_in_a_backward_pass(name, by):
    direct, _, (x, *rest) = parts(name, by)
    out = first_of(direct(x.requires_grad_(), *rest))
    one = torch.ones_like(out)
    with pytest.raises(NotImplementedError, match=rf"the gradient of {named(name, by)} has no forward-mode"):
        torch.func.jvp(lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True)[0], (one,), (one,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.autograd.grad((out * forward_ad.make_dual(one, one)).sum(), x)


@needs_triton
def test_what_has_no_gradient_still_says_so():
    """score_tokens is not differentiable: the operator's own answer, when a gradient is asked of it."""
    direct, op, (x, *rest) = parts("score_tokens")
    x.requires_grad_()
    for function in (op, direct):
        density = function(x, *rest)[0]
        with pytest.raises(RuntimeError, match="no autograd formula"):
            density.sum().backward()


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "by"), DIRECT)
def test_modes_and_the_profiler_see_the_operator(name, by):
    direct, _, arguments = parts(name, by)
    with Recorder() as recorder:
        direct(*arguments)
    assert f"h2ot_kernels::{named(name, by)}" in recorder.names
    with Functions() as functions:
        direct(*arguments)
    assert any(named(name, by) in seen for seen in functions.names)
    with torch.profiler.profile() as profile:
        direct(*arguments)
    assert f"h2ot_kernels::{named(name, by)}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "options", [{"tracing_mode": "real"}, {"tracing_mode": "fake"}, {"pre_dispatch": True}], ids=str
)
@pytest.mark.parametrize("by", BY)
def test_tracing_sees_the_operator(by, options):
    direct, op, (*tensors, dim, out_dim) = parts("gather_tokens", by)
    graph = make_fx(lambda *tensors: direct(*tensors, dim, out_dim), **options)(*tensors)
    assert op in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(*tensors), direct(*tensors, dim, out_dim))


@pytest.mark.parametrize("name", ["gather_tokens", "recover_interpolate", "recover_attention"])
@pytest.mark.parametrize("by", BY)
def test_tracing_before_dispatch_sees_the_operator_of_a_gradient(by, name):
    direct, _, (x, *rest) = parts(name, by)

    def gradient(x, *rest):
        return torch.autograd.grad(first_of(direct(x, *rest)).sum(), x)[0]

    x.requires_grad_()
    graph = make_fx(gradient, pre_dispatch=True)(x, *rest)
    assert torch.equal(graph(x, *rest), gradient(x, *rest))


def test_an_observer_alone_sees_the_operators(tmp_path):
    direct, _, (x, *rest) = parts("gather_tokens", "cpp")
    observer = ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    observer.start()
    direct(x.requires_grad_(), *rest).sum().backward()
    observer.stop()
    observer.unregister_callback()
    found = {node["name"] for node in json.loads((tmp_path / "trace.json").read_text())["nodes"]}
    assert {"h2ot_kernels::gather_tokens", "h2ot_kernels::scatter_tokens"} <= found


@pytest.mark.parametrize("by", BY)
def test_jit_tracing_sees_the_operator(by):
    direct, _, (x, *rest) = parts("gather_tokens", by)
    assert f"h2ot_kernels::{named('gather_tokens', by)}" in str(torch.jit.trace(lambda x: direct(x, *rest), (x,)).graph)


@pytest.mark.parametrize("by", BY)
def test_fakes_flops_and_transforms(by):
    direct, _, arguments = parts("recover_attention", by)
    with FlopCounterMode(display=False) as counter:
        direct(*arguments)
    assert counter.get_total_flops() == 4 * 2 * 7 * 9 * 4
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        assert direct(*fakes).shape == (2, 7, 4)
    x = rand(3, 2, 9, 4)
    gather = parts("gather_tokens", by)[0]
    assert torch.equal(
        torch.func.vmap(lambda x: gather(x, INDEX, None, 1, 1))(x),
        torch.stack([gather(sample, INDEX, None, 1, 1) for sample in x]),
    )


@pytest.mark.parametrize("by", BY)
def test_a_fake_outside_its_mode_meets_the_operator(by):
    direct, _, (x, *rest) = parts("gather_tokens", by)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    assert direct(mode.from_tensor(x), *rest).shape == (2, 3, 4)


@pytest.mark.parametrize("by", BY)
def test_what_a_transform_left_meets_the_operator(by):
    """A tensor of `torch.func.grad` that outlives it has no memory of its own."""
    direct, _, (x, *rest) = parts("gather_tokens", by)
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(left[0])
    assert torch.equal(direct(left[0], *rest), direct(x, *rest))
    out = direct(x, INDEX, left[0][0, :3], 1, 1)
    assert torch.equal(out, direct(x, INDEX, x[0, :3], 1, 1))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_tensors_without_memory_or_on_two_devices_are_nothing_for_the_cpus_kernel(needs_grad):
    """The operator's own answer, which is made of shapes alone: nothing is read at an address that is not the CPU's."""
    direct, _, (x, index, embed, *rest) = parts("gather_tokens", "cpp")
    for arguments in ([x.to("meta"), index.to("meta"), None], [x, index, embed.to("meta")]):
        arguments[0].requires_grad_(needs_grad)
        out = direct(*arguments, *rest)
        assert out.requires_grad == needs_grad
        assert out.shape == (2, 3, 4)


@pytest.mark.parametrize("by", BY)
def test_compiled_code_calls_the_operator(by):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    x = rand(2, 9, 4)
    op = parts("gather_tokens", by)[1]
    compiled = torch.compile(lambda x: h2ot.gather_tokens(x, INDEX, backend=by), fullgraph=True, backend=keep)
    assert torch.equal(compiled(x), h2ot.gather_tokens(x, INDEX, backend=by))
    assert op in {node.target for node in graphs[0].graph.nodes}
