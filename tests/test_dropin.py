"""The official signatures: the float64 official formulation's results with the same seed, on padded input too."""

import inspect

import pytest
import torch

from h2ot_kernels import dropin
from python_ref import official

from .cases import generator
from .official_code import clustering, mixste, tcformer

B, N, C, K = 3, 40, 16, 12
X = torch.randn(2, 9, 4)
LABELS, INDEX = torch.arange(9).remainder(3).repeat(2, 1), torch.tensor([[0, 4, 8]])
BEYOND, ROW = torch.full((2, 9), 9), torch.zeros(2)


def cluster(cluster_num=3, k=2, *rest, **named):
    return dropin.hot.cluster_dpc_knn(X, cluster_num, k, *rest, **named)


def without(center):
    return dropin.hot.cluster_dpc_knn_center(X, 3, 2, center)


def merge(labels=None, cluster_num=3, weight=None, **beside):
    return dropin.tcformer.merge_tokens({"x": X} | beside, LABELS if labels is None else labels, cluster_num, weight)


# Rows of test_bad_input.py.
BAD = {
    "K": (lambda: cluster(10), ValueError, "cluster_num: got 10, wanted 1 to 9"),
    "K type": (lambda: cluster(3.0), TypeError, "cluster_num: got float, wanted an integer"),
    "K bool": (lambda: cluster(True), TypeError, "cluster_num: got bool, wanted an integer"),
    "K of several": (lambda: cluster(LABELS), TypeError, "cluster_num: got (Fake)?Tensor, wanted an int"),
    "k": (lambda: cluster(3, 10), ValueError, "k: got 10, wanted 1 to 9"),
    "x": (lambda: dropin.hot.cluster_dpc_knn(X.long(), 3, 2), TypeError, "x: got dtype int64"),
    "mask shape": (
        lambda: cluster(3, 2, torch.ones(2, 8)),
        ValueError,
        r"^token_mask: got shape \[2, 8\], wanted \[B, N\] = \[2, 9\]",
    ),
    "mask rank": (lambda: cluster(3, 2, ROW), ValueError, r"^token_mask: got shape \[2\], wanted \[B, N\]"),
    "mask type": (lambda: cluster(3, 2, [[1] * 9] * 2), TypeError, r"^token_mask: got list, wanted a tensor \[B, N\]"),
    "mask dtype": (lambda: cluster(3, 2, X[..., 0] * 1j), TypeError, "^token_mask: got dtype complex64, wanted bool"),
    "mask elsewhere": (
        lambda: cluster(3, 2, LABELS.to("meta")),
        ValueError,
        "^token_mask: got device meta, wanted cpu",
    ),
    "label of padding": (lambda: cluster(masked_label=0.0), TypeError, "masked_label: got float, wanted an integer"),
    "center": (lambda: without(9), ValueError, "center: got 9, wanted -9 to 8"),
    "center before": (lambda: without(-10), ValueError, "center: got -10, wanted -9 to 8"),
    "center bool": (lambda: without(True), TypeError, "center: got bool, wanted an integer"),
    "no center": (lambda: without(None), TypeError, "center: got NoneType, wanted an integer"),
    "centers": (lambda: without([3, 4]), TypeError, "center: got list, wanted an integer"),
    "other frames": (
        lambda: dropin.hot.cluster_dpc_knn_center(X, 9, 2, 4),
        ValueError,
        r"cluster_num: got 9, wanted 1 to 8 \(the number of other tokens\)",
    ),
    "point": (lambda: dropin.hot.index_points(X, BEYOND), IndexError, "gather_tokens: index holds a value outside"),
    "points": (lambda: dropin.hot.index_points(X, INDEX + 1), IndexError, "index 9 is out of bounds"),
    "heads": (lambda: dropin.hot.CrossAttention(10, 0), ValueError, "num_heads: got 0, wanted 1 to 10"),
    "heads divide": (lambda: dropin.hot.CrossAttention(10, 3), ValueError, "num_heads: got 3, wanted a divisor of dim"),
    "dim": (lambda: dropin.hot.CrossAttention(10.0), TypeError, "dim: got float, wanted an integer"),
    "prunevid K": (lambda: dropin.prunevid.cluster_dpc_knn(X, 10, 2), ValueError, "cluster_num: got 10"),
    "noise": (
        lambda: dropin.prunevid.cluster_dpc_knn(X, 3, noise_dtype=torch.int64),
        ValueError,
        "noise_dtype: got torch.int64, wanted one of torch.float32",
    ),
    "dictionary K": (lambda: dropin.tcformer.cluster_dpc_knn({"x": X}, 10), ValueError, "cluster_num: got 10"),
    "no dictionary": (
        lambda: dropin.tcformer.cluster_dpc_knn(X, 3),
        TypeError,
        "token_dict: got (Fake)?Tensor, wanted",
    ),
    "no x": (
        lambda: dropin.tcformer.merge_tokens({"tokens": X}, LABELS, 3),
        ValueError,
        "token_dict: got 'tokens', wanted 'x' among its keys",
    ),
    "x rank": (lambda: merge(x=X[0]), ValueError, r"x: got shape \[9, 4\], wanted \[B, N, C\]"),
    "labels shape": (lambda: merge(LABELS[:, :8]), ValueError, r"idx_cluster: got shape \[2, 8\], wanted \[B, N\]"),
    "labels dtype": (lambda: merge(LABELS.float()), TypeError, "idx_cluster: got dtype float32, wanted int64"),
    "labels type": (lambda: merge([[0] * 9] * 2), TypeError, "idx_cluster: got list, wanted a tensor"),
    "label outside": (lambda: merge(BEYOND), IndexError, "merge_tokens: labels holds a value outside its range"),
    "no clusters": (lambda: merge(cluster_num=0), ValueError, "cluster_num: got 0, wanted 1 or more"),
    "weight shape": (lambda: merge(weight=ROW), ValueError, r"token_weight: got shape \[2\], wanted \[B, N\]"),
    "weight turned": (
        lambda: merge(weight=X[..., :1].mT),
        ValueError,
        r"token_weight: .* wanted \[B, N, 1\] = \[2, 9, 1",
    ),
    "weight type": (lambda: merge(weight=1.0), TypeError, "token_weight: got float, wanted a tensor"),
    "merge mask": (lambda: merge(mask=X[..., 1:4]), ValueError, r"mask: got shape \[2, 9, 3\], wanted \[B, N, 1\]"),
    "idx_token": (lambda: merge(idx_token=LABELS[0]), ValueError, r"idx_token: got shape \[9\], wanted \[B, M\]"),
    "idx_token dtype": (lambda: merge(idx_token=X[..., 0]), TypeError, "idx_token: got dtype float32, wanted int64"),
    "idx_token outside": (lambda: merge(idx_token=BEYOND), (IndexError, RuntimeError), "index 9 is out of bounds"),
}


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


@pytest.mark.parametrize(("repeated", "qk_scale"), [(True, None), (False, 0.3)])
def test_cross_attention_projects_a_shared_token_once(repeated, qk_scale):
    torch.manual_seed(0)
    ours = dropin.hot.CrossAttention(C, 4, qkv_bias=True, qk_scale=qk_scale).double().eval()
    theirs = official.CrossAttention(C, 4, qkv_bias=True).double().eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.scale = qk_scale or theirs.scale
    token, kept = torch.randn(1, 9, C).double(), torch.randn(2, 5, 4, C).double()
    token = token.repeat(5, 1, 1)
    if not repeated:
        token[1:-1] = torch.randn(3, 9, C)  # the first is the last
    shapes = []
    ours.linear_q.register_forward_hook(lambda module, args, out: shapes.append(len(out)))
    with torch.no_grad():
        torch.testing.assert_close(ours(token, *kept), theirs(token, *kept), rtol=1e-10, atol=1e-12)
    assert shapes == [1 if repeated else 5]
    torch.testing.assert_close(ours(token, *kept), theirs(token, *kept), rtol=1e-10, atol=1e-12)
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
        assert tcformer.merge_tokens is not merge_tokens
    assert "replaced 1 merge" in handle.report()
    assert tcformer.merge_tokens is merge_tokens


def test_a_refused_call_draws_no_noise():
    state = torch.get_rng_state()
    for name, (call, error, _) in BAD.items():
        with pytest.raises(error):
            call()
        assert torch.equal(torch.get_rng_state(), state), name


@pytest.mark.parametrize("center", [-1, torch.tensor(4), torch.tensor([7]).numpy()[0]])
def test_a_center_is_any_integer_that_indexing_takes(center):
    x = tokens("center")
    ours, theirs = (seeded(m.cluster_dpc_knn_center, x, K, torch.tensor(2), center) for m in (dropin.hot, clustering))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float16])
def test_one_mask_for_all_samples(dtype):
    x, mask = tokens("one mask"), (torch.arange(N) % 5 > 0)[None].to(dtype)
    ours = seeded(lambda: dropin.hot.cluster_dpc_knn(x, K, 2, mask, masked_label=0))
    assert all(map(torch.equal, ours, seeded(clustering.cluster_dpc_knn, x, K, 2, mask)))


# What official code takes beside int64 labels [B, N] and weights [B, N, 1] of the tokens' dtype.
TAKEN = {
    "int32 labels": lambda labels, weight: (labels.int(), weight),
    "uint8 labels": lambda labels, weight: (labels.byte(), weight),
    "one row of labels": lambda labels, weight: (labels[:1], weight),
    "a number of clusters in a tensor": lambda labels, weight: (labels, weight, torch.tensor(K)),
    "integer weights": lambda labels, weight: (labels, (weight * 9).long() + 1),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_merging_takes_what_the_official_code_takes(taken):
    labels = torch.arange(N).remainder(K).repeat(B, 1)
    labels, weight, *number = TAKEN[taken](
        labels, torch.rand(B, N, 1, generator=generator("taken"), dtype=torch.float64)
    )
    given = tcformer.token_dict(tokens("taken"))
    given["idx_token"] = given["idx_token"].int()
    ours, theirs = (m.merge_tokens(given, labels, *(number or [K]), weight) for m in (dropin.tcformer, tcformer))
    assert ours["token_num"] is theirs["token_num"]
    assert torch.equal(ours["idx_token"], theirs["idx_token"].long())
    bound = 1e-9 if weight.is_floating_point() else 1e-6  # official shares of integers are float32
    for name in ("x", "agg_weight"):
        assert ours[name].dtype == theirs[name].dtype
        torch.testing.assert_close(ours[name], theirs[name], rtol=bound, atol=bound)


def test_merging_takes_a_column_of_weights_for_one_sample():
    given, weight = tcformer.token_dict(tokens("column")[:1]), torch.linspace(0.1, 1, N, dtype=torch.float64)[:, None]
    labels = torch.arange(N).remainder(K)[None]
    ours, theirs = (m.merge_tokens(given, labels, K, weight)["x"] for m in (dropin.tcformer, tcformer))
    torch.testing.assert_close(ours, theirs)
