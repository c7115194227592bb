"""dropin.patch on functions and methods of the clustering, in the forms that public code has."""

import abc
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from h2ot_kernels import dropin

from .official_code import clustering, tcformer
from .runners import Recorder
from .test_dropin_patch import replaced

CLUSTERED = "h2ot_kernels::cluster_tokens"


def code(function, monkeypatch, name="cluster_dpc_knn"):
    """function, under this name, in a module of code of its own."""
    module = types.ModuleType("some_code")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    own = types.FunctionType(function.__code__, globals(), name, function.__defaults__)
    own.__module__, own.__qualname__ = module.__name__, name
    setattr(module, name, own)
    return module


def prunevid(x, cluster_num, k=5, token_mask=None):
    return clustering.cluster_dpc_knn(x.float(), cluster_num, k, token_mask)[1], cluster_num


def tensor_form(x, cluster_num, k=2, token_mask=None):
    return clustering.cluster_dpc_knn(x, cluster_num, k, token_mask)[1], cluster_num


def without_mask(x, cluster_num, k=3):
    return clustering.cluster_dpc_knn(x, cluster_num, k)[1], cluster_num


def hot_with_default(x, cluster_num, k=2, token_mask=None):
    return clustering.cluster_dpc_knn(x, cluster_num, k, token_mask)


def chat_univi(token_dict, cluster_num, k=2, token_mask=None):
    return prunevid(token_dict["x"], cluster_num, k, token_mask)


def token_dicts(token_dict, cluster_num, k=2, token_mask=None):
    return tensor_form(token_dict["x"], cluster_num, k, token_mask)


def dicts_without_mask(token_dict, cluster_num, k=5):
    return tensor_form(token_dict["x"], cluster_num, k)


def token_reduction(x, cluster_num, k=5, token_mask=None):
    """Of the comparison "Which Tokens to Use?"."""
    index_down, idx_cluster = clustering.cluster_dpc_knn(x, cluster_num, k, token_mask)
    return idx_cluster, index_down


def three_values(vis_embed, number, neighbours=3):
    """Of its own names; a list."""
    index_down, idx_cluster = clustering.cluster_dpc_knn(vis_embed.float(), number, neighbours)
    return [idx_cluster, number, index_down]


def labels_only(x, cluster_num, k=5, token_mask=None):
    return clustering.cluster_dpc_knn(x, cluster_num, k, token_mask)[1]


def selected_only(x, cluster_num, k=5):
    return clustering.cluster_dpc_knn(x, cluster_num, k)[0]


FORMS = (
    prunevid,
    tensor_form,
    without_mask,
    hot_with_default,
    chat_univi,
    token_dicts,
    dicts_without_mask,
    token_reduction,
    three_values,
    labels_only,
    selected_only,
)


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_defaults_and_order_of_each_form(form, dtype, monkeypatch):
    module, x = code(form, monkeypatch), torch.randn(3, 20, 8)
    first, named = form.__code__.co_varnames[:2]
    given = {"x": x.to(dtype)} if first == "token_dict" else x.to(dtype)

    def calls():
        torch.manual_seed(5)
        both = module.cluster_dpc_knn(given, 6), module.cluster_dpc_knn(**{first: given}, **{named: 6})
        return *both, torch.get_rng_state()

    before = calls()
    with dropin.patch(module), Recorder() as called:
        after = calls()
        with pytest.raises(TypeError, match=named):
            module.cluster_dpc_knn(given)
    assert CLUSTERED in called.names
    assert_same(after, before)


@pytest.mark.parametrize("form", [token_reduction, labels_only])
def test_masked_tokens_in_each_order(form, monkeypatch):
    module, x = code(form, monkeypatch), torch.randn(2, 20, 8).double()
    mask = torch.ones(2, 20).index_fill(1, torch.tensor([4, 17]), 0.0)
    torch.manual_seed(5)
    before = module.cluster_dpc_knn(x, 6, 3, token_mask=mask)
    with dropin.patch(module), Recorder() as called:
        torch.manual_seed(5)
        assert_same(module.cluster_dpc_knn(x, 6, 3, mask), before)
    assert CLUSTERED in called.names


def with_distances(x, cluster_num, k=7):
    """HoliTom's: what comes beside the selected tokens is what these kernels never store."""
    return clustering.cluster_dpc_knn(x, cluster_num, k)[0], torch.cdist(x, x)


def without_number(x, k=5):
    return x


def test_other_results_and_parameters_are_left(monkeypatch):
    for form, reason in ((with_distances, "something else than index_down, idx_cluster"), (without_number, "(x, k=5)")):
        module = code(form, monkeypatch)
        original = module.cluster_dpc_knn
        with pytest.raises(ValueError, match="nothing in it could be replaced") as error:
            dropin.patch(module)
        assert reason in str(error.value)
        assert module.cluster_dpc_knn is original


def merged_tokens(x, idx_cluster, cluster_num, token_weight=None):
    given = tcformer.token_dict(x)
    return tcformer.merge_tokens(given, idx_cluster, cluster_num, token_weight)["x"]


def merged_with_labels(x, idx_cluster, cluster_num, token_weight=None):
    return merged_tokens(x, idx_cluster, cluster_num, token_weight), idx_cluster


def merged_with_origins(x, idx_token, agg_weight, idx_cluster, cluster_num, token_weight=None):
    given = tcformer.token_dict(x) | {"idx_token": idx_token, "agg_weight": agg_weight}
    out = tcformer.merge_tokens(given, idx_cluster, cluster_num, token_weight)
    return out["x"], out["idx_token"], out["agg_weight"]


@pytest.mark.parametrize("form", [merged_tokens, merged_with_labels, merged_with_origins])
@pytest.mark.parametrize("weighted", [False, True])
def test_merging_without_dictionaries(form, weighted, monkeypatch):
    module, x = code(form, monkeypatch, "merge_tokens"), torch.randn(2, 12, 8).double().requires_grad_()
    labels, weight = torch.arange(12).remainder(5).repeat(2, 1), torch.rand(2, 12, 1).double()
    origins = (torch.arange(15).remainder(12).repeat(2, 1), torch.rand(2, 15, 1).double())
    given = x, *(origins if form is merged_with_origins else ()), labels, 5, *([weight] if weighted else [])

    def call():
        out = module.merge_tokens(*given)
        merged, *rest = out if isinstance(out, tuple) else [out]
        return merged.detach(), torch.autograd.grad(merged.square().sum(), x)[0], *rest

    before = call()
    with dropin.patch(module) as handle, Recorder() as called:
        after = call()
    assert "h2ot_kernels::merge_tokens" in called.names
    assert "merge" in replaced(handle)
    for one, other in zip(after, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def with_sizes(token_dict, idx_cluster, cluster_num, token_weight=None):
    return tcformer.merge_tokens(token_dict, idx_cluster, cluster_num, token_weight)


def dictionaries(token_dict, idx_cluster, cluster_num, token_weight=None):
    """Chat-UniVi's, which never looks at the mask."""
    sizes = {"map_size": None, "init_grid_size": None}
    out = tcformer.merge_tokens({**token_dict, **sizes}, idx_cluster, cluster_num, token_weight)
    return {name: value for name, value in out.items() if name not in sizes} | {"mask": None}


def merged_masks(token_dict, idx_cluster, cluster_num, token_weight=None):
    out = dictionaries(token_dict, idx_cluster, cluster_num, token_weight)
    if token_dict["mask"] is not None:
        sums = token_dict["mask"].new_zeros(len(idx_cluster), cluster_num)
        out["mask"] = (sums.scatter_add(1, idx_cluster, token_dict["mask"]) > 0).float()
    return out


@pytest.mark.parametrize(
    ("form", "beside", "fast"),
    [
        (with_sizes, {}, True),
        (with_sizes, {"token_score": torch.zeros(2, 12, 1)}, True),
        (with_sizes, {"mask": torch.ones(2, 12)}, False),
        (dictionaries, {"mask": None}, True),
        (dictionaries, {"mask": torch.ones(2, 12).tril(5)}, True),
        (merged_masks, {"mask": None}, True),
        (merged_masks, {"mask": torch.ones(2, 12).tril(5)}, False),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_merging_dictionaries_with_what_they_hold_beside(form, beside, fast, weighted, monkeypatch):
    """Masked tokens are merged where the official code merges them, and no name comes out that does not there."""
    module, x = code(form, monkeypatch, "merge_tokens"), torch.randn(2, 12, 8).double()
    names = ("map_size", "init_grid_size") if form is not with_sizes else ()
    given = {name: value for name, value in tcformer.token_dict(x).items() if name not in names} | beside
    labels, weight = torch.arange(12).remainder(5).repeat(2, 1), torch.rand(2, 12, 1).double()
    before = module.merge_tokens(given, labels, 5, weight if weighted else None)
    with dropin.patch(module) as handle, Recorder() as called:
        after = module.merge_tokens(given, labels, 5, weight if weighted else None)
    assert "merge" in replaced(handle)
    assert ("h2ot_kernels::merge_tokens" in called.names) == fast
    assert after.keys() == before.keys()
    for name in ("idx_token", "mask"):
        assert_same(after.get(name), before.get(name))
    for name in ("x", "agg_weight"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-12)


def test_a_trial_warns_of_nothing(recwarn):
    """It gives dictionary code a tensor first, of which `x["x"]` is deprecated in torch."""
    with dropin.patch(tcformer):
        pass
    assert not recwarn.list


class Clusters(nn.Module):
    """The clustering as methods, as vision-language models have it."""

    def __init__(self, cluster_num=6):
        super().__init__()
        self.cluster_num = cluster_num

    def index_points(self, points, idx):
        return clustering.index_points(points, idx)

    def cluster_dpc_knn(self, x, cluster_num, k=3, token_mask=None, scale=None):
        score, matrix = clustering.peaks(x, k, token_mask)
        index_down = torch.topk(score, k=cluster_num, dim=-1).indices
        idx_cluster = self.index_points(matrix, index_down).argmin(dim=1)
        idx_cluster.scatter_(1, index_down, torch.arange(cluster_num).expand_as(index_down))
        return (idx_cluster, cluster_num) if scale is None else (idx_cluster * scale, cluster_num)

    def merge_tokens(self, token_dict, idx_cluster, cluster_num, token_weight=None):
        return tcformer.merge_tokens(token_dict, idx_cluster, cluster_num, token_weight)

    def forward(self, x):
        torch.manual_seed(2)
        idx_cluster, number = self.cluster_dpc_knn(x, self.cluster_num, k=2)
        return self.merge_tokens(tcformer.token_dict(x), idx_cluster, number)["x"]


class Nearest(Clusters):
    """Exchanges what an inherited method calls."""

    def index_points(self, points, idx):
        return -super().index_points(points, idx)


class Needs(Clusters):
    def __init__(self):
        super().__init__()
        self.k = 3

    def cluster_dpc_knn(self, x, cluster_num):
        return super().cluster_dpc_knn(x, cluster_num, self.k)


class Abstract(abc.ABC):
    @abc.abstractmethod
    def build(self): ...

    def index_points(self, points, idx):
        return clustering.index_points(points, idx)


METHODS = ("cluster_dpc_knn", "index_points", "merge_tokens")


def test_methods_of_a_model():
    x = torch.randn(2, 20, 8).double()  # in float32 official selections differ where scores nearly tie
    model, own = Clusters().eval(), [vars(Clusters)[name] for name in METHODS]
    before = model(x)
    with dropin.patch(model) as handle:
        assert {"cluster", "gather", "merge"} <= replaced(handle)
        assert f"{__name__}.Clusters.cluster_dpc_knn" in handle.report()
        with Recorder() as called:
            torch.testing.assert_close(model(x), before)
        assert {CLUSTERED, "h2ot_kernels::merge_tokens"} <= called.names
        with Recorder() as called:  # further arguments, and what an instance or a subclass has exchanged
            assert model.cluster_dpc_knn(x, 6, scale=2)[0].remainder(2).eq(0).all()
            Nearest()(x)
            other = Clusters()
            other.index_points = clustering.index_points
            other.cluster_dpc_knn(x, 6)
        assert CLUSTERED not in called.names
        assert type(pickle.loads(pickle.dumps(model))) is Clusters
        with dropin.patch(model, cluster=False), Recorder() as called:  # the other patch still wants it
            model(x)
        assert CLUSTERED in called.names
    assert [vars(Clusters)[name] for name in METHODS] == own
    assert torch.equal(model(x), before)


def test_methods_of_the_classes_of_a_module_of_code(monkeypatch):
    module = types.ModuleType("some_classes")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for cls in (Clusters, Nearest, Needs, Abstract):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        setattr(module, cls.__name__, cls)
    x = torch.randn(2, 20, 8).double()
    models = Clusters(), Nearest(), Needs()
    before = [model(x) if type(model) is not Needs else model.cluster_dpc_knn(x, 4)[0].shape for model in models]
    handle = dropin.patch(module)
    for model, expected in zip(models[:2], before, strict=False):
        torch.testing.assert_close(model(x), expected)
    assert models[2].cluster_dpc_knn(x, 4)[0].shape == before[2]
    left = {entry.where: entry.reason for entry in handle.entries if not entry.is_replaced}
    assert "not (x, cluster_num, k, token_mask)" in left["some_classes.Needs.cluster_dpc_knn"]
    assert "something else" in left["some_classes.Nearest.index_points"]
    assert "abstract class" in left["some_classes.Abstract.index_points"]
    handle.unpatch()
    assert all(vars(Clusters)[name].__module__ == __name__ for name in METHODS)
    torch.testing.assert_close(models[0](x), before[0], rtol=0, atol=0)
