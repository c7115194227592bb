"""The official signatures: the float64 official formulation's results with the same seed, on padded input too."""

import inspect

import pytest
import torch

from h2ot_kernels import dropin
from python_ref import official

from .cases import generator
from .official_code import clustering, mixste, tcformer

B, N, C, K = 3, 40, 16, 12


def tokens(name):
    return torch.randn(B, N, C, generator=generator(name), dtype=torch.float64)


def padded():
    mask = torch.arange(N) < torch.tensor([[N], [25], [13]])
    return tokens("padded"), mask


def seeded(function, *arguments):
    torch.manual_seed(3)
    return function(*arguments)


def test_hot_forms_equal_the_official_ones():
    x = tokens("hot")
    for name, arguments in (("cluster_dpc_knn", (x, K, 2)), ("cluster_dpc_knn_center", (x, K, 2, 19))):
        ours, theirs = (seeded(getattr(module, name), *arguments) for module in (dropin.hot, clustering))
        assert torch.equal(ours[0], theirs[0])  # descending score
        assert torch.equal(ours[1], theirs[1])
    assert not (seeded(dropin.hot.cluster_dpc_knn_center, x, N - 1, 2, 19)[0] == 19).any()
    with pytest.raises(ValueError, match=f"cluster_num: got {N}, wanted 1 to {N - 1}"):
        dropin.hot.cluster_dpc_knn_center(x, N, 2, 19)


def test_float32_keeps_what_float64_keeps_with_the_same_noise():
    x = tokens("float32").float()
    index, _ = seeded(dropin.hot.cluster_dpc_knn, x, K, 2)
    noise = seeded(torch.rand, B, N) * 1e-6
    exact, _ = official.cluster_dpc_knn(x.double(), K, 2, noise=noise.double())
    assert torch.equal(index.sort().values, exact.sort().values)


@pytest.mark.parametrize("form", ["hot", "prunevid", "tcformer"])
def test_padded_samples_are_clustered_as_if_they_were_alone(form):
    x, mask = padded()
    x = torch.where(mask[..., None], x, torch.nan)
    function = getattr(dropin, form).cluster_dpc_knn
    given = {"x": x} if form == "tcformer" else x
    out = seeded(function, given, K, 3, mask.float())
    labels = out[1] if form == "hot" else out[0]
    assert form == "hot" or out[1] == K
    noise = seeded(lambda: torch.rand(B, N, dtype=torch.float64)) * 1e-6
    for b, n in enumerate((N, 25, 13)):
        _, alone = official.cluster_dpc_knn(x[b : b + 1, :n], K, 3, noise=noise[b : b + 1, :n])
        assert torch.equal(labels[b : b + 1, :n], alone)
        assert (labels[b, n:] == -1).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_merge_equals_the_official_one(weighted):
    x = tokens("merge").requires_grad_()
    weight = torch.rand(B, N, 1, generator=generator("weight"), dtype=torch.float64).requires_grad_()
    given = tcformer.token_dict(x)
    idx_cluster, _ = tcformer.cluster_dpc_knn(given, K)
    results = []
    for module in (dropin.tcformer, tcformer):
        down = module.merge_tokens(given, idx_cluster, K, weight if weighted else None)
        _, labels = seeded(clustering.cluster_dpc_knn, down["x"], 4, 3)
        down2 = module.merge_tokens(down, labels, 4)
        loss = down2["x"].sin().sum() + down2["agg_weight"].square().sum()
        grads = torch.autograd.grad(loss, [x, weight] if weighted else [x])
        results.append((down, down2, grads))
    ours, theirs = results
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert mine.keys() == other.keys()
        assert mine["token_num"] == other["token_num"]
        assert torch.equal(mine["idx_token"], other["idx_token"])
        torch.testing.assert_close(mine["x"], other["x"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mine["agg_weight"], other["agg_weight"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-11)


def test_chat_univi_form_on_padded_input():
    x, mask = padded()
    x = torch.where(mask[..., None], x, torch.nan)
    given = {"x": x, "token_num": N, "idx_token": torch.arange(N).repeat(B, 1), "mask": mask.float()}
    given["agg_weight"] = x.new_ones(B, N, 1)
    idx_cluster, num = seeded(dropin.tcformer.cluster_dpc_knn, given, K, 3, given["mask"])
    out = dropin.tcformer.merge_tokens(given, idx_cluster, num)
    assert out["mask"] is None
    assert out["x"].isfinite().all()
    assert out["agg_weight"].isfinite().all()
    assert torch.equal(out["idx_token"] >= 0, mask)
    for b, n in enumerate((N, 25, 13)):
        alone = official.merge_tokens(x[b : b + 1, :n], idx_cluster[b : b + 1, :n], K)
        torch.testing.assert_close(out["x"][b : b + 1], alone, rtol=1e-9, atol=1e-12)
    # labels of code that gives padding a cluster: the dictionary's mask still keeps it out
    same = dropin.tcformer.merge_tokens(given, idx_cluster.clamp(min=0), num)
    assert torch.equal(same["x"], out["x"])


def test_index_points_takes_any_index():
    points = torch.randn(2, 9, 5, 3)
    for idx in (torch.tensor([[3, 3, 0], [8, 1, 2]]), torch.tensor([[[1, 2]], [[0, 0]]])):
        assert torch.equal(dropin.hot.index_points(points, idx), clustering.index_points(points, idx))
        leaf = points.clone().requires_grad_()
        dropin.hot.index_points(leaf, idx).sum().backward()
        counts = torch.stack([torch.bincount(row.flatten(), minlength=9) for row in idx]).float()
        assert torch.equal(leaf.grad[..., 0, 0], counts)


@pytest.mark.parametrize("wrong", [9, -10, -100])
def test_index_points_outside_of_points_is_an_error(wrong):
    """Not padding: -10 is the -1 of `gather_tokens` once 9 is added."""
    points, idx = torch.randn(2, 9, 5), torch.tensor([[3, -9], [0, wrong]])
    with pytest.raises(IndexError):
        clustering.index_points(points, idx)
    with pytest.raises(IndexError):
        dropin.hot.index_points(points, idx)


def test_cross_attention_has_the_official_name_and_arguments():
    theirs = inspect.signature(mixste.Cross_Attention)
    assert inspect.signature(dropin.hot.Cross_Attention).parameters.keys() == theirs.parameters.keys()
    assert dropin.hot.Cross_Attention is dropin.hot.CrossAttention


@pytest.mark.parametrize("repeated", [True, False])
def test_cross_attention_projects_a_shared_token_once(repeated):
    torch.manual_seed(0)
    ours = dropin.hot.CrossAttention(C, 4, qkv_bias=True).double().eval()
    theirs = official.CrossAttention(C, 4, qkv_bias=True).double().eval()
    theirs.load_state_dict(ours.state_dict())
    token, kept = torch.randn(1, 9, C).double(), torch.randn(5, 4, C).double()
    token = token.repeat(5, 1, 1) if repeated else torch.randn(5, 9, C).double()
    shapes = []
    ours.linear_q.register_forward_hook(lambda module, args, out: shapes.append(len(out)))
    with torch.no_grad():
        torch.testing.assert_close(ours(token, kept, kept), theirs(token, kept, kept), rtol=1e-10, atol=1e-12)
    assert shapes == [1 if repeated else 5]
    torch.testing.assert_close(ours(token, kept, kept), theirs(token, kept, kept), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="attn_drop"):
        dropin.hot.CrossAttention(C, 4, attn_drop=0.1)


def test_chat_univi_merge_is_recognised(monkeypatch):
    """Its dictionaries hold a mask and no map sizes."""

    def merge_tokens(token_dict, idx_cluster, cluster_num, token_weight=None):
        sizes = {"map_size": None, "init_grid_size": None}
        out = original(token_dict | sizes, idx_cluster, cluster_num, token_weight)
        return {name: value for name, value in out.items() if name not in sizes} | {"mask": None}

    original = tcformer.merge_tokens
    monkeypatch.setattr(tcformer, "merge_tokens", merge_tokens)
    with dropin.patch(tcformer) as handle:
        assert tcformer.merge_tokens is dropin.tcformer.merge_tokens
    assert "replaced 1 merge" in handle.report()
    assert tcformer.merge_tokens is merge_tokens
