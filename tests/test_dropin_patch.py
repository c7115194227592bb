"""dropin.patch on code as the official releases are built: the same numbers, by other kernels, and undone."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn

from h2ot_kernels import dropin
from python_ref import official

from .linear_layers import FLOAT_PRODUCTS, HALF_PRODUCTS
from .official_code import clustering, mixste, motionbert, tcformer
from .runners import Recorder

F, J, C, H, K = 31, 5, 32, 4, 11


def hot_mixste(**options):
    return mixste.MixSTE(F, J, C, 3, H, K, 1, recover=True, **options), torch.randn(2, F, J, 2)


def tpc_mixste(**options):
    return mixste.MixSTE(F, J, C, 3, H, K, 2, recover=False, **options), torch.randn(2, F, J, 2)


def hot_motionbert():
    return motionbert.DSTformer(F, J, C, 40, 3, H, K, 1), torch.randn(2, F, J, 3)


def tcformer_block():
    return tcformer.CTM(0.4, C), torch.randn(3, F, C)


MODELS = (hot_mixste, tpc_mixste, hot_motionbert, tcformer_block)
REPLACED = {
    hot_mixste: {"cluster", "gather", "cross_attention", "attention", "linear", "mlp", "block", "head"},
    tpc_mixste: {"cluster", "gather", "attention", "linear", "mlp", "block", "head"},
    hot_motionbert: {"cluster", "gather", "cross_attention", "attention", "linear", "mlp"},
    tcformer_block: {"cluster", "gather", "merge", "linear"},
}
# What each patched model must call in CPU inference (in float32), and must not call any more.
CALLED = {
    "cluster": {"h2ot_kernels::cluster_tokens"},
    "merge": {"h2ot_kernels::merge_tokens"},
    "gather": {"h2ot_kernels::gather_tokens"},
    "attention": {"h2ot_kernels::recover_attention"},
    "cross_attention": {"h2ot_kernels::recover_attention"},
    "linear": {FLOAT_PRODUCTS},
    "head": {"h2ot_kernels::recover_tail"},
}
NOT_CALLED = {"aten::cdist", "aten::_cdist_forward", "aten::_softmax", "aten::bmm", "aten::gelu"}


def run(model, x):
    torch.manual_seed(7)  # the noise of the clustering
    out = model(tcformer.token_dict(x) if isinstance(model, tcformer.CTM) else x)
    if isinstance(out, dict):
        return out["x"], out["idx_token"], out["agg_weight"]
    return out if isinstance(out, tuple) else (out,)


def assert_agree(ours, theirs, bound):
    scale = max(other.abs().max() for other in theirs if other.is_floating_point())
    for mine, other in zip(ours, theirs, strict=True):
        if not other.is_floating_point():
            assert torch.equal(mine, other)
        else:
            assert (mine - other).abs().max() <= bound * scale


def replaced(handle):
    return {entry.kernel for entry in handle.entries if entry.is_replaced}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("grad", [False, True])
def test_same_numbers_by_other_kernels_and_undone(make, dtype, bound, grad):
    model, x = make()
    model, x = model.to(dtype).eval(), x.to(dtype)
    # float32: both sides take the official selection; which frames are kept is the float64 runs' question
    with torch.set_grad_enabled(grad):
        before = run(model, x)
        with dropin.patch(model, cluster=dtype == torch.float64) as handle, Recorder() as called:
            after = run(model, x)
        again = run(model, x)
    assert_agree(after, before, bound)
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
    wanted = REPLACED[make] - ({"cluster"} if dtype == torch.float32 else set())
    assert replaced(handle) == wanted
    if not grad:
        must = set().union(*(CALLED.get(kernel, set()) for kernel in wanted))
        if make is tpc_mixste and "cluster" in wanted:  # the frame that it leaves out is scored, but not selected
            must = must - CALLED["cluster"] | {"h2ot_kernels::score_tokens", "h2ot_kernels::assign_clusters"}
        if dtype == torch.float64:
            must -= CALLED["linear"]
            fusion = {"aten::_softmax"} if make is hot_motionbert else set()  # of its two streams
            assert not called.names & NOT_CALLED - {"aten::gelu"} - fusion
        elif make is not tcformer_block:
            assert not called.names & {"aten::bmm", "aten::gelu"}
        whole = called.names & {FLOAT_PRODUCTS.replace("linear", "attend")}  # attention and its projections
        assert must <= called.names | (whole and {"h2ot_kernels::recover_attention", FLOAT_PRODUCTS})


@pytest.mark.parametrize("make", MODELS)
def test_gradients_in_training(make):
    model, x = make()
    model, x = model.double().train(), x.double().requires_grad_()

    def gradients():
        out = run(model, x)[0]
        leaves = [x, *(p for p in model.parameters())]
        return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum(), leaves)

    before = gradients()
    with dropin.patch(model) as handle:
        after = gradients()
    assert replaced(handle) == REPLACED[make]
    assert_agree(after, before, 1e-9)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))


def test_dropout_draws_the_same_numbers():
    for options in ({"drop": 0.3}, {"attn_drop": 0.3}):
        model, x = hot_mixste(**options)
        model, x = model.double().train(), x.double()
        before = run(model, x)
        with dropin.patch(model):
            assert_agree(run(model, x), before, 1e-9)


def test_patching_changes_nothing_but_the_computation():
    model, x = hot_mixste()
    model.eval()
    model.STEblocks[0].train()
    seen = []
    model.STEblocks[0].attn.proj.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    state = {name: (value.data_ptr(), value.dtype) for name, value in model.state_dict().items()}
    modes, text = [m.training for m in model.modules()], repr(model)
    random = torch.get_rng_state()
    handle = dropin.patch(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: (value.data_ptr(), value.dtype) for name, value in model.state_dict().items()} == state
    assert [m.training for m in model.modules()] == modes
    assert repr(model) == text
    assert isinstance(model.STEblocks[0].attn, mixste.Attention)
    assert not seen
    with torch.no_grad():
        run(model, x)
    assert len(seen) == 1
    handle.unpatch()
    handle.unpatch()
    assert type(model.STEblocks[0].attn) is mixste.Attention
    assert type(model.STEblocks[0].attn.qkv) is nn.Linear
    assert set(vars(model.STEblocks[0].attn.qkv)) == set(vars(nn.Linear(2, 2)))
    assert mixste.cluster_dpc_knn is clustering.cluster_dpc_knn is not dropin.hot.cluster_dpc_knn


def test_hooks_on_what_would_be_skipped_still_fire():
    model, x = hot_mixste()
    seen = []
    model.eval()
    model.TTEblocks[0].attn.attn_drop.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model.TTEblocks[1].mlp.act.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    act = model.TTEblocks[0].mlp.act
    act.forward = lambda x: seen.append("put on the instance") or nn.functional.gelu(x)
    with torch.no_grad(), dropin.patch(model):
        run(model, x)
    assert seen == [(2 * J, H, F, F), "put on the instance", (2 * J, K, 2 * C)]


def test_packed_weights_follow_the_weights():
    model, x = hot_mixste()
    model.eval()  # the frames are given: the ones that clustering keeps depend on the rounding of a CPU
    poses = functools.partial(lambda *given: (model(*given),), x, torch.arange(K).repeat(2, 1))
    with torch.no_grad(), dropin.patch(model, cluster=False):
        poses()
        for parameter in model.STEblocks[2].parameters():
            parameter.mul_(1.5)
        after = poses()
        model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
        loaded = poses()
    assert_agree(loaded, poses(), 1e-4)
    model.load_state_dict({name: value / 0.9 for name, value in model.state_dict().items()})
    assert_agree(after, poses(), 1e-4)


def test_copies_pickles_and_replicas():
    model, x = hot_mixste()
    model.double().eval()
    x = x.double()
    with torch.no_grad():
        before = run(model, x)
        with dropin.patch(model):
            twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            saved = io.BytesIO()
            torch.save(model, saved)
            replica = model.STEblocks[0].attn._replicate_for_data_parallel()
            replica.qkv = nn.Linear(C, 3 * C).double()
            tokens = torch.randn(2, J, C).double()
            assert not torch.equal(replica(tokens), model.STEblocks[0].attn(tokens))  # its own weights
        for other in (twin, loaded, torch.load(io.BytesIO(saved.getvalue()), weights_only=False)):
            assert_agree(run(other, x), before, 1e-9)
        assert type(loaded.STEblocks[0].attn) is mixste.Attention
        assert type(loaded.STEblocks[0].attn.qkv) is nn.Linear
        assert type(loaded.head) is nn.Sequential
        with Recorder() as called:
            twin.STEblocks[0].attn(tokens)
        assert "h2ot_kernels::recover_attention" in called.names
        for parameter in twin.parameters():
            parameter.zero_()
        assert_agree(run(model, x), before, 1e-9)
        assert run(twin, x)[0].abs().max() == 0
        assert_agree(run(nn.DataParallel(model), x), before, 1e-9)


def test_autocast():
    model, x = hot_mixste()
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = run(model, x)
        with dropin.patch(model, cluster=False), Recorder() as called:
            after = run(model, x)
    with torch.inference_mode():
        exact = run(model, x)
    assert after[0].dtype == before[0].dtype
    errors = [(out[0].float() - exact[0]).abs().max() for out in (after, before)]
    assert errors[0] <= 4 * errors[1]  # the factor of tests/compare.py
    assert {HALF_PRODUCTS} | CALLED["cross_attention"] | CALLED["head"] <= called.names


# Before torch 2.12 a graph stays in use when its module's class changes.
STALE = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


def test_compiles_patched_and_sees_the_patch():
    model, _ = hot_mixste()
    block, tokens = model.TTEblocks[0].double().eval(), torch.randn(2, F, C).double()
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        before = compiled(tokens)
        with dropin.patch(block):
            if STALE:
                torch._dynamo.reset()
            after = compiled(tokens)
        again = compiled(tokens)
    assert_agree([after], [before], 1e-9)
    assert torch.equal(again, before)
    assert ["h2ot_kernels.recover_attention.default" in graph for graph in graphs[:2]] == [False, True]
    assert len(graphs) == 2 + STALE  # unpatched, the first graph serves again, where it is still there


def test_a_module_object_as_target():
    (plain, x), original = hot_mixste(), clustering.cluster_dpc_knn
    with dropin.patch([mixste, clustering]) as handle:
        assert mixste.cluster_dpc_knn is clustering.cluster_dpc_knn is not original
        made, _ = hot_mixste()
        made.load_state_dict(plain.state_dict())
        assert REPLACED[hot_mixste] == replaced(handle)
        made.double().eval()
        with torch.no_grad(), Recorder() as called:
            patched = run(made, x.double())
    assert {"h2ot_kernels::recover_attention", "h2ot_kernels::cluster_tokens"} <= called.names
    assert type(made) is mixste.MixSTE
    assert type(made.STEblocks[0].attn) is mixste.Attention
    assert mixste.Attention.__init__.__qualname__ == "Attention.__init__"
    assert not hasattr(mixste.Attention.__init__, "__wrapped__")
    with torch.no_grad():
        assert_agree(patched, run(plain.double().eval(), x.double()), 1e-9)


def test_switches():
    model, x = hot_mixste()
    with dropin.patch(model, attention=False, linear=False) as handle:
        assert replaced(handle) == {"cluster", "gather", "cross_attention", "head"}
        assert type(model.STEblocks[0].attn) is mixste.Attention
        assert "replaced 1 head: head" in handle.report()
    assert "left mlp" in handle.report()  # without packed weights there is nothing to fuse with
    with pytest.raises(TypeError, match="atention"):
        dropin.patch(model, atention=False)


class StoresWeights(mixste.Attention):
    def forward(self, x):
        self.seen = x.sum()
        return super().forward(x)


class Normed(mixste.Attention):
    def forward(self, x):
        return super().forward(x).relu()


class OtherLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def overridden():
    attention = mixste.Attention(C, H)
    attention.forward = lambda x: x
    return attention


def with_norm():
    attention = mixste.Attention(C, H)
    attention.q_norm = nn.LayerNorm(C // H)
    return attention


REFUSED = [
    ("attention", lambda: mixste.Attention(C, H, comb=True), "something else"),
    ("attention", lambda: StoresWeights(C, H), "stores seen"),
    ("attention", lambda: Normed(C, H), "something else"),
    ("attention", overridden, "replaced on the instance"),
    ("attention", with_norm, "q_norm, a LayerNorm"),
    ("mlp", lambda: mixste.Mlp(C, C, act_layer=nn.ReLU), "not the exact GELU"),
    ("linear", lambda: OtherLinear(C, C), "subclass of nn.Linear"),
    ("linear", lambda: nn.Linear(C, 3), "fewer than 16 features"),
    ("head", lambda: nn.Sequential(nn.LayerNorm((J, C)), nn.Linear(C, 3)), "wanted LayerNorm(C)"),
    ("head", lambda: nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 9)), "up to 8"),
    ("head", lambda: nn.Sequential(nn.LayerNorm(C), OtherLinear(C, 3)), "got LayerNorm((32,), eps=1e-05"),
    ("head", lambda: Doubled(nn.LayerNorm(C), nn.Linear(C, 3)), "subclass of nn.Sequential"),
]


@pytest.mark.parametrize(("kernel", "make", "reason"), REFUSED)
def test_refuses_what_it_does_not_recognise(kernel, make, reason):
    module = nn.Sequential(make().eval(), nn.Linear(C, C))
    x = torch.randn(2, J, C)
    with torch.no_grad():
        before = module[0](x)
        with dropin.patch(module) as handle:
            torch.testing.assert_close(module[0](x), before)
    reasons = [entry.reason for entry in handle.entries if entry.kernel == kernel and entry.where == "0"]
    assert len(reasons) == 1
    assert reason in reasons[0]
    assert reason in handle.report()


def test_refuses_functions_of_another_kind(monkeypatch):
    def index_points(points, idx):
        return points[:, idx[0]]

    def cluster_dpc_knn(x, cluster_num):
        return x

    monkeypatch.setattr(mixste, "index_points", index_points)
    monkeypatch.setattr(mixste, "cluster_dpc_knn", cluster_dpc_knn)
    handle = dropin.patch(mixste)
    assert mixste.index_points is index_points
    assert mixste.cluster_dpc_knn is cluster_dpc_knn
    handle.unpatch()
    assert "something else" in handle.report()
    assert "its arguments are (x, cluster_num), not (x, cluster_num, k, token_mask)" in handle.report()


def test_further_optional_arguments_go_to_the_original():
    x, noise = torch.randn(1, 20, 8).double(), torch.rand(1, 20).double() * 1e-6
    before = official.cluster_dpc_knn(x, 5, 2, noise=noise)
    with dropin.patch(official, merge=False), Recorder() as called:
        after = official.cluster_dpc_knn(x, 5, 2, noise=noise)
        assert "h2ot_kernels::cluster_tokens" not in called.names
        official.cluster_dpc_knn(x, 5, 2)
    assert "h2ot_kernels::cluster_tokens" in called.names
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_nothing_to_replace_raises_with_the_reasons():
    with pytest.raises(ValueError, match="fewer than 16 features"):
        dropin.patch(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(TypeError, match="target: got int"):
        dropin.patch(3)


def test_what_others_replaced_since_is_named():
    model, _ = hot_mixste()
    handle = dropin.patch(model)
    original = clustering.index_points
    clustering.index_points = mixste.Block
    with pytest.raises(RuntimeError, match="clustering.index_points"):
        handle.unpatch()
    clustering.index_points = mixste.index_points
    assert original is dropin.hot.index_points is not mixste.index_points
