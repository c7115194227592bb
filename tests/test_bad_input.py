"""Wrong input: one table of (call, exception, message); the same in eager mode, for fakes and under torch.compile."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

import h2ot_kernels as h2ot
import h2ot_kernels.onnx

from .public import functions
from .runners import DEVICE
from .test_ftp_pose import BAD as FTP_POSE
from .test_hosts import BAD as HOSTS
from .test_hourglass import BAD as HOURGLASS
from .test_nn import BAD as MODULES

X = torch.randn(2, 9, 4)
INDEX = torch.tensor([[0, 4, 8]])
KEPT = torch.randn(2, 3, 4)
LEAF = torch.randn(2, 3, 4, requires_grad=True)
POSE, HEADS = torch.randn(2, 9, 3, 2), torch.randn(2, 1, 9, 4)
KEEP, PARENT = torch.tensor([0, 9]), torch.full((2, 9), 9)
LONG = torch.zeros(1, 1, 1).expand(1, 2**31, 1)  # one number in memory
LINEAR, NORM, HEAD = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
WIDE, DOUBLE, ELSEWHERE = nn.Linear(4, 8), nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta")


def tail(proj, token=None, value=None):
    token, value = X[0] if token is None else token, KEPT if value is None else value
    with torch.no_grad():
        return h2ot.recover_pose(token, X[0], KEPT, value, proj, NORM, HEAD, 2, num_joints=1)


BAD = {
    "score rank": (lambda: h2ot.score_tokens(X[0]), ValueError, r"x: got shape \[9, 4\], wanted \[B, N, C\]"),
    "score type": (lambda: h2ot.score_tokens([1.0]), TypeError, "x: got list"),
    "score dtype": (lambda: h2ot.score_tokens(X.long()), TypeError, "x: got dtype int64, wanted float32"),
    "no tokens": (lambda: h2ot.score_tokens(X[:, :0]), ValueError, "x: got shape .* at least one token"),
    "no channels": (lambda: h2ot.score_tokens(X[..., :0]), ValueError, "x: got shape .* channel"),
    "too many tokens": (lambda: h2ot.score_tokens(LONG), ValueError, "x: got 2147483648 .* wanted at most 2147483647"),
    "too many to label": (lambda: h2ot.assign_clusters(LONG, INDEX[:, :1]), ValueError, "x: got 2147483648 tokens"),
    "too many to merge": (lambda: h2ot.merge_tokens(LONG, INDEX, 1), ValueError, "x: got 2147483648 tokens"),
    "k 0": (lambda: h2ot.score_tokens(X, 0), ValueError, "k: got 0, wanted 1 to 9"),
    "k above N": (lambda: h2ot.score_tokens(X, 10), ValueError, "k: got 10, wanted 1 to 9"),
    "k type": (lambda: h2ot.score_tokens(X, 2.0), TypeError, "k: got float, wanted an integer"),
    "k bool": (lambda: h2ot.score_tokens(X, True), TypeError, "k: got bool"),
    "mask shape": (lambda: h2ot.score_tokens(X, mask=torch.ones(2, 8) > 0), ValueError, r"mask: got shape \[2, 8\]"),
    "mask dtype": (lambda: h2ot.score_tokens(X, mask=torch.ones(2, 9)), TypeError, "mask: got dtype float32"),
    "lengths shape": (lambda: h2ot.score_tokens(X, lengths=torch.tensor([3])), ValueError, "lengths: got shape"),
    "noise shape": (lambda: h2ot.score_tokens(X, noise=torch.rand(9)), ValueError, "noise: got shape"),
    "K above N": (lambda: h2ot.prune_cluster(X, 10), ValueError, "num_tokens: got 10, wanted 1 to 9"),
    "K 0": (lambda: h2ot.prune_cluster(X, 0), ValueError, "num_tokens: got 0"),
    "metric": (lambda: h2ot.score_tokens(X, metric="l1"), ValueError, "metric: got 'l1'"),
    "density": (lambda: h2ot.score_tokens(X, density="box"), ValueError, "density: got 'box'"),
    "no cutoff": (
        lambda: h2ot.score_tokens(X, density="gaussian"),
        TypeError,
        "cutoff: got NoneType, wanted a positive number",
    ),
    "cutoff without gaussian": (lambda: h2ot.prune_cluster(X, 3, cutoff=0.1), ValueError, "cutoff: got 0.1"),
    "cutoff 0": (lambda: h2ot.score_tokens(X, density="gaussian", cutoff=0.0), ValueError, "cutoff: got 0.0"),
    "scale": (lambda: h2ot.score_tokens(X, scale=-1.0), ValueError, "scale: got -1.0, wanted a positive number"),
    "scale type": (lambda: h2ot.score_tokens(X, scale="C"), TypeError, "scale: got str"),
    "exclude_self": (lambda: h2ot.score_tokens(X, exclude_self=1), TypeError, "exclude_self: got int, wanted a bool"),
    "k without self": (
        lambda: h2ot.score_tokens(X, 9, exclude_self=True),
        ValueError,
        r"k: got 9, wanted 1 to 8 \(the number of other tokens\)",
    ),
    "counts length": (lambda: h2ot.prune_cluster(X, [3]), ValueError, "num_tokens: got 1 numbers, wanted .* 2"),
    "counts value": (lambda: h2ot.prune_cluster(X, [3, 10]), ValueError, "num_tokens: got 10, wanted 0 to 9"),
    "counts type": (lambda: h2ot.select_tokens(X[..., 0], [3, 1.5]), TypeError, "num_tokens: got float"),
    "counts dtype": (lambda: h2ot.prune_cluster(X, torch.ones(2)), TypeError, "num_tokens: got dtype float32"),
    "counts below keep": (lambda: h2ot.prune_cluster(X, [3, 1], keep=[1, 2]), ValueError, "keep: got 2 tokens"),
    "clusters K": (lambda: h2ot.cluster_tokens(X, 10), ValueError, "num_tokens: got 10, wanted 1 to 9"),
    "clusters keep": (lambda: h2ot.cluster_tokens(X, 3, keep=9), IndexError, "keep: got 9, wanted 0 to 8"),
    "clusters keep tensor": (
        lambda: h2ot.cluster_tokens(X, 3, keep=KEEP),
        IndexError,
        "select_tokens: keep holds a value outside its range",
    ),
    "label metric": (lambda: h2ot.assign_clusters(X, INDEX, metric=2), ValueError, "metric: got 2"),
    "parent shape": (
        lambda: h2ot.assign_clusters(X, INDEX, parent=torch.zeros(2, 8).long()),
        ValueError,
        "parent: got shape",
    ),
    "parent dtype": (lambda: h2ot.assign_clusters(X, INDEX, parent=torch.zeros(2, 9)), TypeError, "parent: got dtype"),
    "parent outside": (
        lambda: h2ot.assign_clusters(X, INDEX, parent=PARENT),
        IndexError,
        "assign_clusters: parent holds a value outside its range",
    ),
    "index outside, parent": (
        lambda: h2ot.assign_clusters(X, INDEX + 1, parent=PARENT),
        IndexError,
        "assign_clusters: index holds a value outside its range",
    ),
    "variant elsewhere": (
        lambda: h2ot.score_tokens(X, exclude_self=True, backend="cuda"),
        RuntimeError,
        "score_variant cannot run on cpu",
    ),
    "no kernel": (
        lambda: h2ot.assign_clusters(X, INDEX, parent=torch.zeros(2, 9).long(), backend="triton"),
        RuntimeError,
        "assign_by_parent has no triton kernel|assign_by_parent cannot run on cpu",
    ),
    "keep outside": (lambda: h2ot.prune_cluster(X, 3, keep=9), IndexError, "keep: got 9, wanted 0 to 8"),
    "keep negative": (lambda: h2ot.select_tokens(X[..., 0], 3, keep=[-1]), IndexError, "keep: got -1"),
    "keep too many": (lambda: h2ot.select_tokens(X[..., 0], 2, keep=[1, 2, 3]), ValueError, "keep: got 3 tokens"),
    "keep tensor outside": (
        lambda: h2ot.select_tokens(X[..., 0], 3, keep=KEEP),
        IndexError,
        "select_tokens: keep holds a value outside its range",
    ),
    "keep tensor too many": (
        lambda: h2ot.select_tokens(X[..., 0], 1, keep=torch.tensor([0, 1])),
        IndexError,
        "select_tokens: keep names more tokens than num_tokens",
    ),
    "cluster keep": (lambda: h2ot.prune_cluster(X, 3, keep=KEEP), IndexError, "select_tokens: keep holds"),
    "motion keep": (lambda: h2ot.prune_motion(POSE, 3, keep=KEEP), IndexError, "select_tokens: keep holds"),
    "attention keep": (
        lambda: h2ot.prune_attention(HEADS, HEADS, 3, keep=KEEP),
        IndexError,
        "select_tokens: keep holds",
    ),
    "keep type": (lambda: h2ot.select_tokens(X[..., 0], 3, keep="centre"), TypeError, "keep: got str"),
    "score of rank 3": (lambda: h2ot.select_tokens(X, 3), ValueError, "score: got shape"),
    "sample K": (lambda: h2ot.prune_sample(9, 10), ValueError, "num_tokens: got 10"),
    "sample keep": (lambda: h2ot.prune_sample(9, 3, keep=9), IndexError, "keep: got 9"),
    "pose rank": (lambda: h2ot.prune_motion(X, 3), ValueError, "pose: got shape"),
    "key shape": (
        lambda: h2ot.prune_attention(X[None], X[None, :, :8], 3),
        ValueError,
        r"key: got shape \[1, 2, 8, 4\], wanted the shape of query",
    ),
    "index outside": (
        lambda: h2ot.gather_tokens(X, INDEX + 1),
        IndexError,
        "gather_tokens: index holds a value outside",
    ),
    "index dtype": (lambda: h2ot.gather_tokens(X, INDEX.int()), TypeError, "index: got dtype int32, wanted int64"),
    "index rows": (lambda: h2ot.gather_tokens(X, INDEX.expand(3, -1)), ValueError, "index: got shape"),
    "index empty": (lambda: h2ot.gather_tokens(X, INDEX[:, :0]), ValueError, "index: got shape"),
    "dim batch": (lambda: h2ot.gather_tokens(X, INDEX, dim=0), ValueError, "dim: got 0, the batch axis"),
    "dim outside": (lambda: h2ot.gather_tokens(X, INDEX, dim=3), ValueError, "dim: got 3"),
    "embed shape": (lambda: h2ot.gather_tokens(X, INDEX, X[:1]), ValueError, "pos_embed: got shape"),
    "labels shape": (lambda: h2ot.merge_tokens(X, INDEX, 3), ValueError, "labels: got shape"),
    "label outside": (
        lambda: h2ot.merge_tokens(X, torch.full((2, 9), 3), 3),
        IndexError,
        "merge_tokens: labels holds a value outside its range",
    ),
    "clusters 0": (lambda: h2ot.merge_tokens(X, torch.zeros(2, 9).long(), 0), ValueError, "num_clusters: got 0"),
    "weight shape": (
        lambda: h2ot.merge_tokens(X, torch.zeros(2, 9).long(), 3, torch.ones(9)),
        ValueError,
        "weight: got shape",
    ),
    "heads": (
        lambda: h2ot.recover_attention(X[0], KEPT, KEPT, 3),
        ValueError,
        "num_heads: got 3, wanted a divisor of C",
    ),
    "query width": (lambda: h2ot.recover_attention(X[0, :, :2], KEPT, KEPT, 1), ValueError, "query: got shape"),
    "value shape": (lambda: h2ot.recover_attention(X[0], KEPT, X, 2), ValueError, "value: got shape"),
    "mixed dtypes": (lambda: h2ot.recover_attention(X[0].double(), KEPT, KEPT, 2), TypeError, "query: got dtype"),
    "joints": (
        lambda: h2ot.recover_pose(X[0], X[0], KEPT, KEPT, LINEAR, NORM, HEAD, 2),
        (ValueError, RuntimeError),
        "num_joints: got 17|inference",
    ),
    "projected width": (lambda: tail(WIDE), ValueError, "proj: got 4 to 8 features, wanted C = 4 to 4"),
    "projection dtype": (lambda: tail(DOUBLE), TypeError, "proj.weight: got dtype torch.float64"),
    "projection elsewhere": (lambda: tail(ELSEWHERE), ValueError, "proj.weight: got device meta"),
    "not a module": (lambda: h2ot.recover_pose(X[0], X[0], KEPT, KEPT, 1, NORM, HEAD, 2), TypeError, "proj: got int"),
    "mode": (lambda: h2ot.recover_interpolate(KEPT, INDEX, 9, mode="cubic"), ValueError, "mode: got 'cubic'"),
    "align": (lambda: h2ot.recover_interpolate(KEPT, INDEX, 9, align="left"), ValueError, "align: got 'left'"),
    "frames": (lambda: h2ot.recover_interpolate(KEPT, INDEX, 2), ValueError, "num_frames: got 2, wanted 3 or more"),
    "no index": (lambda: h2ot.recover_interpolate(KEPT, None, 9), TypeError, "index: got NoneType"),
    "frame outside": (lambda: h2ot.recover_interpolate(KEPT, INDEX, 8), IndexError, "recover_interpolate: index holds"),
    "not ascending": (
        lambda: h2ot.recover_interpolate(KEPT, INDEX.flip(1), 9),
        IndexError,
        "recover_interpolate: index is not strictly ascending",
    ),
    "out type": (lambda: h2ot.gather_tokens(X, INDEX, out=[]), TypeError, "out: got list, wanted a tensor"),
    "out shape": (
        lambda: h2ot.gather_tokens(X, INDEX, out_dim=2, out=torch.empty(2, 3, 4)),
        ValueError,
        r"out: got shape \[2, 3, 4\], wanted the shape of the result = \[2, 4, 3\]",
    ),
    "out dtype": (
        lambda: h2ot.recover_attention(X[0], KEPT, KEPT, 2, out=torch.empty(2, 9, 4).double()),
        TypeError,
        "out: got dtype torch.float64, wanted torch.float32, that of value",
    ),
    "out strides": (
        lambda: h2ot.recover_interpolate(KEPT, INDEX, 9, out=torch.empty(2, 4, 9).mT),
        ValueError,
        r"out: got strides \[36, 1, 9\], wanted a contiguous tensor",
    ),
    "out elsewhere": (
        lambda: h2ot.gather_tokens(X, INDEX, out=torch.empty(2, 3, 4, device="meta")),
        ValueError,
        "out: got device meta, wanted cpu, that of x",
    ),
    "out, gradient": (
        lambda: h2ot.recover_interpolate(LEAF, INDEX, 9, out=torch.empty(2, 9, 4)),
        RuntimeError,
        "out= does not record gradients",
    ),
    "out with gradient": (
        lambda: h2ot.gather_tokens(X, INDEX, out=LEAF),
        RuntimeError,
        "out= does not record gradients",
    ),
    "out, index outside": (
        lambda: h2ot.gather_tokens(X, INDEX + 1, out=torch.empty(2, 3, 4)),
        IndexError,
        "gather_tokens: index holds a value outside",
    ),
    "device mix": (lambda: h2ot.gather_tokens(X, INDEX.to("meta")), ValueError, "index: got device meta, wanted cpu"),
    "backend": (lambda: h2ot.gather_tokens(X, INDEX, backend="fast"), ValueError, "backend: got 'fast'"),
    "backend elsewhere": (lambda: h2ot.gather_tokens(X, INDEX, backend="cuda"), RuntimeError, "tensors are on cpu"),
    "backend asked for": (lambda: h2ot.use_backend("fast").__enter__(), ValueError, "backend: got 'fast'"),
    "backend of an op": (lambda: h2ot.can_run("gather_tokens", "fast", "cpu"), ValueError, "backend: got 'fast'"),
    "op": (lambda: h2ot.explain("sort"), ValueError, "op: got 'sort', wanted one of assign_by_parent"),
    "host": (lambda: h2ot.hosts.build("mix"), ValueError, "name: got 'mix', wanted one of mixste"),
    "no host": (lambda: h2ot.hosts.count_flops(LINEAR), TypeError, "model: got Linear, wanted a host"),
    "convention": (lambda: h2ot.hosts.count_flops(LINEAR, "all"), ValueError, "convention: got 'all'"),
    "checkpoint": (lambda: h2ot.hosts.load_checkpoint(LINEAR, "none.pth"), FileNotFoundError, "none.pth"),
    "blocks": (lambda: h2ot.hourglass.wrap(LINEAR, 9, {1: 3}), TypeError, "blocks: got Linear, wanted ModuleList"),
    "patched": (lambda: h2ot.dropin.patch(3), TypeError, "target: got int, wanted an nn.Module"),
    "kernels": (lambda: h2ot.dropin.patch(LINEAR, fast=True), TypeError, "patch: got fast, wanted some of cluster"),
    "hot K": (lambda: h2ot.dropin.hot.cluster_dpc_knn(X, 10, 2), ValueError, "cluster_num: got 10, wanted 1 to 9"),
    "hot x": (lambda: h2ot.dropin.hot.cluster_dpc_knn(X.long(), 3, 2), TypeError, "x: got dtype int64"),
    "tpc K": (lambda: h2ot.dropin.hot.cluster_dpc_knn_center(X, 9, 2, 4), ValueError, "cluster_num: got 9"),
    "points": (lambda: h2ot.dropin.hot.index_points(X, INDEX + 1), IndexError, "index 9 is out of bounds"),
    "tcformer K": (lambda: h2ot.dropin.tcformer.cluster_dpc_knn({"x": X}, 10), ValueError, "cluster_num: got 10"),
    "tcformer label": (
        lambda: h2ot.dropin.tcformer.merge_tokens({"x": X}, torch.full((2, 9), 3), 3),
        (IndexError, RuntimeError),
        "index 3 is out of bounds",
    ),
    "prunevid K": (lambda: h2ot.dropin.prunevid.cluster_dpc_knn(X, 10, 2), ValueError, "cluster_num: got 10"),
    "exported batch": (
        lambda: h2ot_kernels.onnx.export(LINEAR, (X[:1],), "none.onnx"),
        ValueError,
        r"inputs: got shape \[1, 9, 4\] as number 0, wanted a batch of 2 or more",
    ),
}
BAD |= {f"module: {name}": row for name, row in MODULES.items()}
BAD |= {f"hourglass: {name}": row for name, row in HOURGLASS.items()}
COMPILED = list(BAD)  # what is checked when a model is made is checked outside of what is compiled
BAD |= {f"host: {name}": row for name, row in HOSTS.items()}
BAD |= {f"FTP-Pose: {name}": row for name, row in FTP_POSE.items()}
# What only the contents of a tensor tell, which fake tensors do not have.
CONTENTS = {
    *("clusters keep tensor", "parent outside", "keep tensor outside", "keep tensor too many", "index outside"),
    *("label outside", "frame outside", "not ascending", "out, index outside", "points", "tcformer label"),
    *("index outside, parent", "cluster keep", "motion keep", "attention keep"),
    *("hourglass: index range", "hourglass: index of a pruned frame"),
}


@pytest.mark.parametrize("name", functions())
def test_every_public_function_is_in_the_table(name):
    takes_nothing = {"h2ot_kernels.env_report", "h2ot_kernels.onnx.decompositions"}
    called = {word for call, *_ in BAD.values() for word in call.__code__.co_names} | set(tail.__code__.co_names)
    assert name.rpartition(".")[2] in called or name in takes_nothing


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_eager(name, backend):
    call, error, message = BAD[name]
    with h2ot.use_backend(backend), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", BAD)
def test_fake(name, monkeypatch):
    call, error, message = BAD[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for known, x in call.__globals__.items():
            if isinstance(x, torch.Tensor):
                monkeypatch.setitem(call.__globals__, known, mode.from_tensor(x))
        if name in CONTENTS:
            found = call()  # on the shapes alone
            for x in found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]:
                assert is_fake(x) or not isinstance(x, torch.Tensor)
            return
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    call, error, message = BAD[name]
    torch._dynamo.reset()
    with pytest.raises(error, match=message):
        torch.compile(call, backend="eager")()


def test_documented_results():
    """What is not an error: an empty batch, tokens that are not finite, fewer valid tokens than K."""
    assert h2ot.prune_cluster(X[:0], 3).shape == (0, 3)
    assert h2ot.score_tokens(X[:0]).score.shape == (0, 9)
    x = X.clone()
    x[0, 2, 1] = float("nan")
    scores = h2ot.score_tokens(x)
    assert (scores.density[0, 2], scores.distance[0, 2], scores.parent[0, 2]) == (0, 0, -1)
    assert scores.score[0, 2] == float("-inf")
    assert 2 not in scores.parent[0]
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 5] = True
    assert h2ot.prune_cluster(X, 3, mask=mask).tolist() == [[0, 1, 5], [0, 1, 2]]


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_out_within_an_input_is_refused(backend):
    """In eager mode; beside the inputs, in the same memory, is fine."""
    memory = torch.zeros(400, device=DEVICE)
    x, index = memory[200:272].view(2, 9, 4).copy_(X), INDEX.to(DEVICE)
    kept = x[:, :3]  # spans 48 of x's 72 numbers
    query = memory[:36].view(9, 4).copy_(X[0])

    def at(start, *size):
        return memory[start : start + torch.Size(size).numel()].view(size)

    with h2ot.use_backend(backend):
        for start in (177, 200, 271):
            with pytest.raises(ValueError, match="out: got memory within that of x, wanted its own"):
                h2ot.gather_tokens(x, index, out=at(start, 2, 3, 4))
        with pytest.raises(ValueError, match="out: got memory within that of pos_embed"):
            h2ot.gather_tokens(x, index, at(300, 3, 4), out=at(311, 2, 3, 4))
        for start, name in ((35, "query"), (220, "value")):
            with pytest.raises(ValueError, match=f"out: got memory within that of {name}"):
                h2ot.recover_attention(query, kept, kept, 2, out=at(start, 2, 9, 4))
        with pytest.raises(ValueError, match="out: got memory within that of x"):
            h2ot.recover_interpolate(kept, index, 9, out=at(247, 2, 9, 4))
        for start in (176, 272):
            expected = h2ot.gather_tokens(x, index)
            assert torch.equal(h2ot.gather_tokens(x, index, out=at(start, 2, 3, 4)), expected)
        expected = h2ot.recover_interpolate(kept, index, 9)
        assert torch.equal(h2ot.recover_interpolate(kept, index, 9, out=at(272, 2, 9, 4)), expected)
    assert torch.equal(x.cpu(), X)


# Every operation with results that are no integers, by each input that may have a tangent.
FORWARD = {
    "score_tokens": lambda x, kept: h2ot.score_tokens(x, exclude_self=True).score,
    "score_tokens, noise": lambda x, kept: h2ot.score_tokens(X, noise=x[..., 0]).score,
    "cluster_tokens": lambda x, kept: h2ot.cluster_tokens(x, 3).score,
    "cluster_tokens, noise": lambda x, kept: h2ot.cluster_tokens(X, 3, noise=x[..., 0]).score,
    "gather_tokens": lambda x, kept: h2ot.gather_tokens(x, INDEX),
    "gather_tokens, pos_embed": lambda x, kept: h2ot.gather_tokens(X, INDEX, kept[0]),
    "merge_tokens": lambda x, kept: h2ot.merge_tokens(x, torch.zeros(2, 9).long(), 1),
    "merge_tokens, weight": lambda x, kept: h2ot.merge_tokens(X, torch.zeros(2, 9).long(), 1, x[..., 0]),
    "recover_attention": lambda x, kept: h2ot.recover_attention(X[0], KEPT, kept, 2),
    "recover_attention, query": lambda x, kept: h2ot.recover_attention(x[0], KEPT, KEPT, 2),
    "recover_pose": lambda x, kept: tail(LINEAR, value=kept),
    "recover_pose, token": lambda x, kept: tail(LINEAR, token=x[0]),
    "recover_interpolate": lambda x, kept: h2ot.recover_interpolate(kept, INDEX, 9),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_raises_instead_of_giving_zeros(name):
    of_scoring = name.startswith(("score", "cluster"))  # without gradients on every backend
    with torch.autograd.forward_ad.dual_level():
        x, kept = (torch.autograd.forward_ad.make_dual(x, torch.randn_like(x)) for x in (X, KEPT))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            FORWARD[name](x, kept)
        with h2ot.use_backend("reference"):
            if of_scoring:
                with pytest.raises(NotImplementedError, match="forward-mode"):
                    FORWARD[name](x, kept)
            else:
                assert torch.autograd.forward_ad.unpack_dual(FORWARD[name](x, kept)).tangent.any()


def test_forward_mode_raises_for_a_buffer_with_a_tangent():
    with torch.autograd.forward_ad.dual_level():
        out = torch.autograd.forward_ad.make_dual(KEPT.clone(), KEPT)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            h2ot.gather_tokens(X, INDEX, out=out)


def test_every_operation_with_results_that_are_no_integers_meets_forward_mode():
    integers = {"assign_clusters", "select_tokens", *(name for name in h2ot.__all__ if name.startswith("prune_"))}
    operations = {name for name in h2ot.__all__ if "tokens" in name or name.startswith(("recover", "assign", "prune"))}
    assert {name.partition(",")[0] for name in FORWARD} == operations - integers
