"""dropin.patch on the variants that public code has, and under what users do to a patched model."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from h2ot_kernels import dropin
from h2ot_kernels.dropin.clusters import distance_dtype
from h2ot_kernels.linear import Linear

from .official_code import clustering, mixste, tcformer
from .runners import Recorder
from .test_dropin_patch import C, F, H, J, assert_agree, hot_mixste, replaced, run


def plain(dtype=torch.float32, **options):
    return mixste.Attention(C, H, qkv_bias=True, **options).to(dtype).eval()


def agrees(module, *x, **kwargs):
    """module gives the same patched as unpatched, with the same random numbers; returns the handle."""
    model = nn.ModuleList([module, nn.Linear(C, C)])

    def call():
        torch.manual_seed(3)
        return module(*x, **kwargs)

    before = call()
    with dropin.patch(model) as handle:
        assert_agree([call()], [before], 1e-9 if before.dtype == torch.float64 else 1e-4)
    return handle


class AttentionOfFrames(mixste.Attention):
    """MotionAGFormer's, of x [B, F, J, C]."""

    def __init__(self, mode):
        super().__init__(C, H)
        self.mode = mode

    def forward(self, x):
        parts = [x.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4) for x in self.qkv(x).chunk(3, -1)]
        q, k, v = (x.transpose(2, 3) for x in parts) if self.mode == "temporal" else parts
        x = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)) @ v
        x = x.transpose(2, 3) if self.mode == "temporal" else x
        return self.proj_drop(self.proj(x.permute(0, 2, 3, 1, 4).flatten(3)))


@pytest.mark.parametrize("mode", ["spatial", "temporal"])
def test_attention_over_four_axes(mode):
    attention, x = AttentionOfFrames(mode).double(), torch.randn(2, F, J, C).double().requires_grad_()
    before = torch.autograd.grad(attention(x).square().sum(), x)
    with dropin.patch(attention) as handle, Recorder() as called:
        assert_agree(torch.autograd.grad(attention(x).square().sum(), x), before, 1e-9)
    assert {"attention", "linear"} <= replaced(handle)
    assert "h2ot_kernels::recover_attention" in called.names
    assert "aten::_softmax" not in called.names


class CrossAttentionOfAsMany(mixste.Cross_Attention):
    """MHFormer's: keys of the queries' number."""

    def forward(self, x_1, x_2, x_3):
        assert x_1.shape == x_2.shape == x_3.shape
        return super().forward(x_1, x_2, x_3)


def test_cross_attention_of_as_many_keys():
    streams = torch.randn(3, 2, F, C).double()
    assert "cross_attention" in replaced(agrees(CrossAttentionOfAsMany(C, H).double(), *streams))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_noise_has_the_dtype_of_official_distances(dtype, autocast):
    x = torch.randn(2, 30, 8, dtype=dtype)  # from 26 tokens on `torch.cdist` takes bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert distance_dtype(x) == torch.cdist(x, x).dtype


def test_index_points_takes_what_indexing_takes():
    points = torch.randn(2, 9, 3)
    for idx in (
        torch.tensor([[0, -1], [-9, 3]]),
        torch.tensor([[4, 2], [1, 1]], dtype=torch.int32),
        torch.ones(2, 0).int(),
    ):
        assert torch.equal(dropin.hot.index_points(points, idx), clustering.index_points(points, idx))
    assert dropin.hot.index_points(points, torch.ones(2, 0).long()).shape == (2, 0, 3)
    idx = torch.tensor([[4, 2], [1, 1]])
    with forward_ad.dual_level(), torch.no_grad():
        tangent = dropin.hot.index_points(forward_ad.make_dual(points, points + 1), idx)
        assert torch.equal(forward_ad.unpack_dual(tangent).tangent, clustering.index_points(points + 1, idx))


class Mine(tcformer.CTM):
    """A user's subclass, in a module that does not hold the clustering."""


def test_the_functions_of_a_base_class_are_replaced():
    original = tcformer.merge_tokens
    with dropin.patch(Mine(0.4, C)) as handle:
        assert tcformer.merge_tokens is not original
    assert {"cluster", "merge", "gather"} <= replaced(handle)


def test_dropout_of_an_eval_model_whose_dropout_is_active():
    x = torch.randn(2, 6, C).double()
    modules = plain(attn_drop=0.3), plain(proj_drop=0.3), mixste.Mlp(C, 2 * C, drop=0.3).eval()
    for module in modules:
        for child in module.double().modules():
            child.train(isinstance(child, nn.Dropout))
        with torch.no_grad():
            agrees(module, x)


class OwnDropout(mixste.Attention):
    rate = 0.4

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(*heads, dropout_p=rate)
        return self.proj(x.transpose(1, 2).flatten(2))


def test_dropout_that_is_no_module_is_kept_in_training():
    attention, x = OwnDropout(C, H).double(), torch.randn(2, 6, C).double()
    assert "attention" in replaced(agrees(attention.train(), x))
    with Recorder() as called:
        assert "attention" in replaced(agrees(attention.eval(), x))
    assert "h2ot_kernels::recover_attention" in called.names


def test_a_dropout_that_the_own_forward_does_not_call_is_not_called():
    attention, x = OwnDropout(C, H, proj_drop=0.3).double(), torch.randn(2, 6, C).double()
    attention.rate = 0.0
    assert "attention" in replaced(agrees(attention.train(), x))
    attention.eval().proj_drop.train()
    with torch.no_grad(), dropin.patch(attention):
        assert_agree([attention(x)], [attention(x)], 0)


class Remembers(mixste.Attention):
    def __init__(self):
        super().__init__(C, H)
        self.shapes = []

    def forward(self, x):
        self.shapes.append(x.shape)
        return super().forward(x)


def test_what_a_forward_appends_is_seen_and_not_touched():
    attention = Remembers()
    handle = agrees(attention, torch.randn(2, 6, C))
    assert "its forward stores shapes" in handle.report()
    assert attention.shapes == [(2, 6, C)] * 2


@pytest.mark.parametrize(
    "module", [nn.LazyLinear(C), mixste.Mlp(C, C), nn.utils.parametrizations.spectral_norm(nn.Linear(C, C))]
)
def test_layers_that_are_not_plain_linear_layers_are_left(module):
    model = nn.ModuleList([module, nn.Linear(C, C)])
    if isinstance(module, mixste.Mlp):
        module.fc2 = nn.LazyLinear(C)
    with dropin.patch(model) as handle:
        reason = next(entry.reason for entry in handle.entries if entry.where == "0")
    assert "subclass of nn.Linear" in reason or "uninitialized parameter" in reason
    assert max(map(len, handle.report().splitlines())) < 200


def data(layer):
    layer.weight.data.mul_(2)


def row(layer):
    layer.weight.data[3] = 0


def numpy(layer):
    layer.weight.detach().numpy()[:, ::2] += 1


def fused_optimizer(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()


@pytest.mark.parametrize("change", [data, row, numpy, fused_optimizer])
def test_packed_weights_follow_changes_that_autograd_does_not_see(change):
    layer, x = Linear(C, 2 * C).eval(), torch.randn(4, C)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        assert not torch.allclose(before, expected)
        torch.testing.assert_close(layer(x), expected)


def test_packed_layers_take_and_refuse_what_linear_layers_do():
    packed, x = Linear(C, 2 * C).eval(), torch.randn(4, C)
    with torch.no_grad():
        torch.testing.assert_close(packed(x.to_sparse()), packed(x))
        torch.testing.assert_close(packed(torch.nested.nested_tensor([x, x[:2]]))[1], packed(x[:2]))
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            packed(x[:, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            assert packed.double()(x.double()).dtype == torch.float64


class OwnNames(mixste.Attention):
    """What the fast form calls its settings means something else here."""

    def __init__(self):
        super().__init__(C, H)
        self.kernel, self.extra, self.trains, self.frame_dim, self.original = "conv", 3, False, 0, None


def test_attributes_may_have_the_names_of_the_fast_forms_settings():
    attention, x = OwnNames().double(), torch.randn(2, 6, C).double()
    assert "attention" in replaced(agrees(attention.train(), x))
    with dropin.patch(attention) as first, dropin.patch(attention) as second:
        assert replaced(first) == replaced(second)
    assert type(attention) is OwnNames


def test_several_patches_in_any_order():
    (one, x), (two, _) = hot_mixste(), hot_mixste()
    original, linear = mixste.cluster_dpc_knn, one.STEblocks[0].attn.qkv
    first = dropin.patch(one)
    with dropin.patch(one) as within:
        assert replaced(within) == replaced(first)
    second = dropin.patch(two)
    twin = copy.deepcopy(one)
    first.unpatch()
    assert type(linear) is nn.Linear
    assert mixste.cluster_dpc_knn is not original  # two wants it
    assert isinstance(two.STEblocks[0].attn.qkv, Linear)
    dropin.patch(twin, cluster=False, gather=False).unpatch()
    assert type(twin.STEblocks[0].attn.qkv) is nn.Linear
    second.unpatch()
    assert mixste.cluster_dpc_knn is original
    run(two, x)


def test_module_objects_patched_twice_and_undone_in_any_order():
    initialise = mixste.Attention.__init__
    first, second = dropin.patch(mixste), dropin.patch([mixste, mixste])
    made = mixste.Attention(C, H)
    first.unpatch()
    assert isinstance(made.qkv, Linear)
    assert isinstance(mixste.Attention(C, H).qkv, Linear)
    second.unpatch()
    assert type(made) is mixste.Attention
    assert type(made.qkv) is nn.Linear
    assert mixste.Attention.__init__ is initialise
    assert type(mixste.Attention(C, H).qkv) is nn.Linear


def test_a_forward_put_on_a_patched_layer_keeps_it_as_it_is():
    model, x = nn.Sequential(nn.Linear(C, C)).eval(), torch.randn(2, C)
    handle = dropin.patch(model)
    fast = model[0].forward
    model[0].forward = lambda x: 2 * fast(x)
    with torch.no_grad():
        before = model(x)
        with pytest.raises(RuntimeError, match="replaced by others since: a Linear"):
            handle.unpatch()
        assert torch.equal(model(x), before)


def test_the_random_state_of_gpus_is_left_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with dropin.patch(hot_mixste()[0]) as handle:
        assert "cluster" in replaced(handle)
    assert not seeded


def test_forward_mode_and_traces():
    block, x = mixste.Block(C, H, 2.0).double().eval(), torch.randn(2, 6, C).double()

    def tangent():
        with forward_ad.dual_level(), torch.no_grad():
            return forward_ad.unpack_dual(block(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    before = tangent()
    with dropin.patch(block):
        assert_agree([tangent()], [before], 1e-9)
        block.float()
        with torch.no_grad():
            traced = torch.jit.trace(block.mlp, x.float(), check_trace=False)
            assert_agree([traced(x.float() + 1)], [block.mlp(x.float() + 1)], 1e-5)


def test_inputs_without_elements():
    with torch.no_grad():
        for x in (torch.randn(0, 6, C), torch.randn(2, 0, C)):
            attention = plain()
            with dropin.patch(attention):
                assert attention(x).shape == x.shape
