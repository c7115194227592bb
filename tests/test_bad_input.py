"""Wrong input: one table (bad_calls.py); the same in eager mode, for fakes and under torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

import h2ot_kernels as h2ot

from .bad_calls import BAD, COMPILED, CONTENTS, INDEX, KEPT, LINEAR, X, tail
from .public import functions
from .runners import DEVICE


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
        torch.compile(call, backend="eager", dynamic=False)()  # whatever sizes were compiled before


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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("name", "made"),
    {
        "sparse_coo": X.to_sparse(),
        "_mkldnn": X.to_mkldnn(),
        "nested": torch.nested.nested_tensor([X[0], X[1, :7]], layout=torch.jagged),
    }.items(),
)
def test_what_is_not_dense_is_refused(name, made, backend):
    message = f"x: got a tensor of layout {name}, wanted a dense one"
    with h2ot.use_backend(backend):
        for call in (lambda: h2ot.prune_cluster(made, 3), lambda: h2ot.gather_tokens(made, INDEX)):
            with pytest.raises(TypeError, match=message):
                call()


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_out_within_an_input_is_refused(backend):
    """In eager mode; beside the inputs, in the same memory, is fine."""
    memory = torch.zeros(440, device=DEVICE)
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
        for start, name in ((35, "query"), (220, "value"), (359, "key")):
            with pytest.raises(ValueError, match=f"out: got memory within that of {name}"):
                h2ot.recover_attention(query, at(360, 2, 3, 4), kept, 2, out=at(start, 2, 9, 4))
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
