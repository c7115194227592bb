"""dropin.patch: where it looks, what it says of it, and calls that official code takes."""

import sys
from collections import Counter
from types import FunctionType, ModuleType

import pytest
import torch
from torch import nn

from h2ot_kernels import dropin
from h2ot_kernels.linear import Linear

from .official_code import clustering, mixste, tcformer
from .runners import Recorder

F, J, C, H, K = 31, 5, 32, 4, 11


def seeded(function, *arguments):
    torch.manual_seed(3)
    return function(*arguments)


def model_of(cls):
    return cls(F, J, C, 3, H, K, 1, recover=True).double().eval()


@pytest.mark.parametrize("form", ["hot", "centre", "tcformer"])
def test_padding_is_labelled_as_in_official_code(form):
    """Consumers that are not replaced count by labels: -1 would be refused, or belong to the sample before."""
    x = torch.randn(3, F, C).double()
    mask = torch.rand(3, F).argsort() < torch.tensor([[F], [25], [K]])
    name, arguments = {
        "hot": ("cluster_dpc_knn", (x, K, 2, mask)),
        "centre": ("cluster_dpc_knn_center", (x, K - 1, 2, 4, mask.double())),
        "tcformer": ("cluster_dpc_knn", (tcformer.token_dict(x), K, 2, mask.long())),
    }[form]
    holder = tcformer if form == "tcformer" else clustering
    theirs = seeded(getattr(holder, name), *arguments)
    with dropin.patch(holder), Recorder() as called:
        ours = seeded(getattr(holder, name), *arguments)
    assert called.names & {"h2ot_kernels::cluster_tokens", "h2ot_kernels::assign_clusters"}
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))


def test_padding_is_selected_before_the_center():
    index_down, _ = dropin.hot.cluster_dpc_knn_center(torch.randn(1, 9, C), 8, 2, 0, torch.arange(9)[None] < 4)
    assert index_down.sort().values.tolist() == [list(range(1, 9))]


def test_a_selected_token_of_padding_has_a_cluster_of_its_own():
    x, mask = torch.randn(1, 9, C).double(), torch.arange(9)[None] < 4
    index_down, idx_cluster = dropin.hot.cluster_dpc_knn(x, 6, 2, mask, masked_label=0)
    assert idx_cluster[0, index_down[0]].tolist() == list(range(6))
    assert set(idx_cluster[0, 4:].tolist()) == {0, 4, 5}


@pytest.fixture
def app(monkeypatch):
    """A module of code whose classes come from elsewhere, as main files have it."""
    module = ModuleType("app")
    module.Model = type("Model", (mixste.MixSTE,), {"__module__": "app"})
    monkeypatch.setitem(sys.modules, "app", module)
    return module


def test_instances_made_later_bring_their_functions_along(app):
    x = torch.randn(2, F, J, 2).double()
    plain = model_of(app.Model)
    with torch.no_grad():
        before = seeded(plain, x)
    with dropin.patch(app) as handle:
        assert handle.report() == "new instances of app.Model"
        model = model_of(app.Model)
        model.load_state_dict(plain.state_dict())
        with torch.no_grad(), Recorder() as called:
            after = seeded(model, x)
    assert {"h2ot_kernels::cluster_tokens", "h2ot_kernels::recover_attention"} <= called.names
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)
    assert clustering.cluster_dpc_knn.__module__ == mixste.cluster_dpc_knn.__module__ == clustering.__name__


def test_a_layer_is_counted_once_and_each_instance_too():
    def counted(handle):
        return Counter(entry.kernel for entry in handle.entries if entry.is_replaced)

    with dropin.patch(model_of(mixste.MixSTE)) as handle:
        once = counted(handle)
        lines = handle.report().splitlines()
    functions = once["cluster"] + once["gather"]
    with dropin.patch(mixste) as handle:
        models = [model_of(mixste.MixSTE)]
        assert counted(handle) == once
        assert handle.report().splitlines()[:-1] == lines
        models.append(model_of(mixste.MixSTE))
        assert counted(handle).total() == 2 * once.total() - functions
    assert all(type(model) is mixste.MixSTE for model in models)


def test_a_module_that_no_import_knows():
    module = ModuleType("loaded_from_a_file")
    original = FunctionType(
        clustering.index_points.__code__, {"torch": torch, "__name__": module.__name__}, "index_points"
    )
    module.index_points = original
    with dropin.patch(module) as handle:
        assert module.index_points is dropin.hot.index_points
    assert module.index_points is original
    assert handle.report() == "replaced 1 gather: loaded_from_a_file.index_points"


class OfTwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)


def test_attention_with_keys_of_its_own_is_named_as_left():
    with dropin.patch(nn.Sequential(OfTwoInputs())) as handle:
        assert "left attention 0: its queries (q)" in handle.report()
        assert "replaced 3 linear" in handle.report()


def test_a_patched_model_can_be_traced():
    model, x = model_of(mixste.MixSTE), torch.randn(1, F, J, 2).double()
    with torch.no_grad(), dropin.patch(model):
        traced, other = torch.jit.trace(model, x, check_trace=False), torch.randn(1, F, J, 2).double()
        torch.testing.assert_close(seeded(traced, other), seeded(model, other))


def test_the_number_of_clusters_may_be_any_integer():
    x = torch.randn(1, F, C).double()
    wanted = seeded(dropin.hot.cluster_dpc_knn, x, K, 2)
    for number in (torch.tensor(K), torch.tensor([K]).numpy()[0]):
        assert all(map(torch.equal, seeded(dropin.hot.cluster_dpc_knn, x, number, 2), wanted))
    with pytest.raises(TypeError, match="cluster_num: got float, wanted an integer"):
        dropin.hot.cluster_dpc_knn(x, float(K), 2)


def test_weights_wider_than_tokens_stay_as_wide():
    given = tcformer.token_dict(torch.randn(1, 6, C).bfloat16())
    arguments = (given, torch.tensor([[0, 0, 1, 1, 2, 2]]), 3, torch.rand(1, 6, 1))
    ours, theirs = (module.merge_tokens(*arguments) for module in (dropin.tcformer, tcformer))
    assert ours["agg_weight"].dtype == theirs["agg_weight"].dtype == torch.float32
    assert ours["x"].dtype == theirs["x"].dtype == torch.bfloat16
    torch.testing.assert_close(ours["agg_weight"], theirs["agg_weight"])


class Halves(nn.Module):
    def forward(self, x):
        return x / 2


def halved(cls):
    """A subclass that gives half of what cls gives, whatever else it is called with."""

    def forward(self, x, *args, **kwargs):
        return cls.forward(self, x, *args, **kwargs) / 2

    return type(f"Halved{cls.__name__}", (cls,), {"forward": forward})


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("mlp.act", nn.ReLU()),
        ("mlp.act", nn.GELU("tanh")),
        ("mlp.drop", Halves()),
        ("attn.attn_drop", Halves()),
        ("attn.proj_drop", Halves()),
        ("mlp.fc2", nn.Linear(2 * C, C).double()),
        ("mlp.act", halved(nn.GELU)()),
        ("mlp.drop", halved(nn.Dropout)()),
        ("mlp.fc1", halved(Linear)(C, 2 * C).double()),
        ("mlp.fc2", halved(Linear)(2 * C, C).double()),
        ("attn.attn_drop", halved(nn.Identity)()),
        ("attn.attn_drop", halved(nn.Dropout)()),
        ("attn.attn_drop", nn.Softmax(-1)),
        ("attn.proj_drop", halved(nn.Dropout)()),
        ("attn.qkv", halved(nn.Linear)(C, 3 * C).double()),
        ("attn.qkv", halved(Linear)(C, 3 * C).double()),
        ("attn.proj", halved(Linear)(C, C).double()),
        ("norm1", halved(nn.LayerNorm)(C).double()),
        ("norm2", halved(nn.LayerNorm)(C).double()),
        ("norm2", nn.Identity()),
    ],
)
@pytest.mark.parametrize("which", ["block", "parts"])
def test_parts_that_are_exchanged_later_are_followed(path, part, which):
    block, x = mixste.Block(C, H, 2.0).double().eval(), torch.randn(2, 6, C).double()
    with torch.no_grad(), dropin.patch(block, block=which == "block"):
        before = block(x)
        block.set_submodule(path, part.eval())
        after = block(x)
    with torch.no_grad():
        torch.testing.assert_close(after, block(x), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(after, before)


class OwnSoftmax(mixste.Attention):
    def __init__(self, part):
        super().__init__(C, H, qkv_bias=True)
        self.normalise = part

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = self.normalise(query @ key.mT * self.scale) @ value
        return self.proj(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("part", [nn.Softmax(-2), nn.Identity(), halved(nn.Softmax)(-1)])
def test_a_softmax_that_is_exchanged_later_is_followed(part):
    attention, x = OwnSoftmax(nn.Softmax(-1)).double().eval(), torch.randn(2, 6, C).double()
    with torch.no_grad(), dropin.patch(attention) as handle:
        with Recorder() as called:
            before = attention(x)
        attention.normalise = part
        after = attention(x)
    assert "replaced 1 attention" in handle.report()
    assert "h2ot_kernels::recover_attention" in called.names
    with torch.no_grad():
        torch.testing.assert_close(after, attention(x), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(after, before)


class Records(nn.Identity):
    def forward(self, x):
        self.seen = x
        return x


RECORDED = [("attn", "attn_drop"), ("attn", "proj_drop"), ("mlp", "drop")]


@pytest.mark.parametrize(("part", "name"), RECORDED)
@pytest.mark.parametrize("later", [False, True])
def test_a_subclass_of_what_does_nothing_still_sees_what_it_saw(part, name, later):
    block, x = mixste.Block(C, H, 2.0).double().eval(), torch.randn(2, 6, C).double()
    module, recorder = block.get_submodule(part), Records()
    if not later:
        setattr(module, name, recorder)
    with torch.no_grad(), dropin.patch(block) as handle:
        if later:
            setattr(module, name, recorder)
        block(x)
        seen = recorder.__dict__.pop("seen")
    with torch.no_grad():
        block(x)
    torch.testing.assert_close(seen, recorder.seen, rtol=1e-9, atol=1e-12)
    reason = f"it holds {name}, a Records, which the fast form does not know"
    assert (reason in handle.report()) == (not later)


def hooked(layer, seen):
    layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return layer


def recording(layer, seen):
    def forward(self, x):
        seen.append(len(x))
        return nn.Linear.forward(self, x)

    layer.__class__ = type("Recording", (nn.Linear,), {"forward": forward})
    return layer


@pytest.mark.parametrize("look", [hooked, recording])
def test_who_looks_at_the_query_of_shared_rows_sees_them_all(look):
    seen, attention = [], mixste.Cross_Attention(C, H).double().eval()
    token, kept = torch.randn(1, F, C).double().expand(4, -1, -1), torch.randn(4, K, C).double()
    look(attention.linear_q, seen)
    with torch.no_grad(), dropin.patch(attention) as handle:
        seen.clear()  # of the trial
        after = attention(token, kept, kept)
    assert seen == [4]
    assert "replaced 1 cross_attention" in handle.report()
    with torch.no_grad():
        torch.testing.assert_close(after, attention(token, kept, kept), rtol=1e-9, atol=1e-12)
