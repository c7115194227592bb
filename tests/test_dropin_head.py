"""dropin.patch on a head: LayerNorm and Linear in one pass, in inference, over tokens of any strides."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import h2ot_kernels as h2ot
from h2ot_kernels import dropin

from .compare import assert_within
from .runners import Recorder

B, F, J, C = 2, 9, 5, 36

INPUTS = {
    "contiguous": lambda: torch.randn(B, F, J, C),
    "permuted": lambda: torch.randn(B, J, F, C).permute(0, 2, 1, 3),
    "turned": lambda: torch.randn(F, J, B, C).permute(2, 0, 1, 3),
    "one row": lambda: torch.randn(C),
    "one joint": lambda: torch.randn(B, 1, F, C).permute(0, 2, 1, 3),
    "five axes": lambda: torch.randn(3, B, J, F, C).permute(1, 3, 0, 2, 4),
    "expanded": lambda: torch.randn(B, 1, J, C).expand(B, F, J, C),
    "sliced": lambda: torch.randn(B, 2 * F, J, 2 * C)[:, ::2, :, 3 : 3 + C],
    "channels apart": lambda: torch.randn(B, F, C, J).mT,
    "no rows": lambda: torch.randn(B, 0, J, C).permute(0, 2, 1, 3),
}
DENSE = ("contiguous", "permuted", "turned", "one row", "one joint", "five axes")  # read where they lie
LAYERS = {
    "official": lambda: (nn.LayerNorm(C), nn.Linear(C, 3)),
    "without biases": lambda: (nn.LayerNorm(C, bias=False, eps=1e-2), nn.Linear(C, 3, bias=False)),
    "without affine": lambda: (nn.LayerNorm(C, elementwise_affine=False), nn.Linear(C, 8)),
}


def head_of(layers="official"):
    """A head in eval mode, with weights that show a wrong channel."""
    head = nn.Sequential(*LAYERS[layers]()).eval().requires_grad_(False)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", INPUTS)
def test_one_pass_over_any_strides(name, layers):
    head, x = head_of(layers).double(), INPUTS[name]().double()
    before = head(x)
    with torch.no_grad(), dropin.patch(head), Recorder() as called:
        after = head(x)
    assert len(called.tails) == 1
    assert "aten::native_layer_norm" not in called.names
    assert called.tails[0] == x.data_ptr() or name not in DENSE
    assert after.is_contiguous()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_near_to_float64_as_unpatched(dtype):
    head, x = head_of().to(dtype), INPUTS["permuted"]().to(dtype)
    exact = copy.deepcopy(head).double()(x.double())
    before = head(x)
    with torch.no_grad(), dropin.patch(head), Recorder() as called:
        after = head(x)
    assert called.tails
    assert after.dtype == before.dtype == dtype
    assert_within(after, exact, before, C)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_gives_the_dtype_of_the_unpatched_head(dtype, half):
    head = head_of().to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = INPUTS["permuted"]().to(dtype)
    if (dtype, half) == (torch.bfloat16, torch.float16):
        x = x.to(half)
    exact = copy.deepcopy(head).double()(x.double())
    with torch.no_grad(), torch.autocast("cpu", half):
        before = head(x)
        with dropin.patch(head), Recorder() as called:
            after = head(x)
    assert bool(called.tails) == (dtype != torch.float64)
    assert after.dtype == before.dtype
    assert_within(after, exact, before, C)


def hooked(child):
    def prepare(head):
        head[child].register_forward_hook(lambda module, args, out: out + 1)

    return prepare


def forward_on_the_instance(head):
    head[1].forward = lambda x: x.sum(-1, keepdim=True)


def other_layers(head):
    head.append(nn.Tanh())


def other_norm(head):
    head[0] = nn.Identity()


# What is done to the patched head, which then must give what that head gives unpatched.
LEFT = {
    "training": lambda head: head.train(),
    "hook on the norm": hooked(0),
    "hook on the linear layer": hooked(1),
    "forward on the instance": forward_on_the_instance,
    "appended": other_layers,
    "exchanged": other_norm,
}


@pytest.mark.parametrize("change", LEFT)
def test_left_to_the_own_forward(change):
    head, x = head_of(), torch.randn(B, F, C)
    with torch.no_grad(), dropin.patch(head) as handle, Recorder() as called:
        LEFT[change](head)
        after = head(x)
        handle.unpatch()
        assert not called.tails
        assert torch.equal(after, head(x))


def test_gradients_tangents_transforms_backends_and_devices_see_the_own_forward():
    head, x = head_of(), torch.randn(B, F, C)
    before = head(x)
    with dropin.patch(head), Recorder() as called:
        assert torch.equal(head(x.requires_grad_()), before)
        with torch.no_grad(), h2ot.use_backend("reference"):
            assert torch.equal(head(x), before)
        with torch.no_grad(), forward_ad.dual_level():
            dual = head(forward_ad.make_dual(x, torch.ones_like(x)))
            assert forward_ad.unpack_dual(dual).tangent is not None
        with torch.no_grad():
            torch.testing.assert_close(torch.func.vmap(head)(x), before)
            assert copy.deepcopy(head).to("meta")(x.to("meta")).shape == before.shape
            assert not called.tails
            head(input=x)
        assert len(called.tails) == 1


def test_what_does_not_fit_is_refused_as_unpatched():
    head = head_of()
    with torch.no_grad(), dropin.patch(head):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            head(torch.randn(B, C + 1))
        with pytest.raises(RuntimeError, match="dtype"):
            head(torch.randn(B, C).double())
        head[1].bias = nn.Parameter(torch.zeros(2))
        with pytest.raises(RuntimeError, match="size"):
            head(torch.randn(B, C))


def test_compiles_to_the_graph_of_the_unpatched_head():
    head, graphs = head_of(), []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    with torch.no_grad(), dropin.patch(head):
        compiled = torch.compile(head, fullgraph=True, backend=backend)
        for joints in (J, J + 2, J + 3):  # the last two in one graph of dynamic shape
            x = torch.randn(B, joints, F, C).permute(0, 2, 1, 3)
            torch.testing.assert_close(compiled(x), head(x))
    assert len(graphs) == 2
    assert all("layer_norm" in graph[0] and "linear" in graph[1] for graph in graphs)
