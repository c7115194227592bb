"""The modules: what they keep and recover is what the functions say; layouts, gradients, wrong input."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import h2ot_kernels as h2ot
from h2ot_kernels import nn as pruning

B, F, J, C, K = 2, 12, 3, 8, 5
X = torch.randn(B, F, J, C, generator=torch.Generator().manual_seed(1))
POSE = torch.randn(B, F, J, 2, generator=torch.Generator().manual_seed(2))
QUERY, KEY = torch.randn(2, B, J, 2, F, 4, generator=torch.Generator().manual_seed(3))
SCORES = torch.randn(B, F, generator=torch.Generator().manual_seed(4))

PRUNERS = {
    "cluster": (pruning.TokenPruningCluster(K, k=3), {}, lambda **keep: h2ot.prune_cluster(X, K, 3, **keep)),
    "sampler": (pruning.TokenPruningSampler(K), {}, lambda **keep: h2ot.prune_sample(F, K, **keep)),
    "motion": (pruning.TokenPruningMotion(K), {"pose": POSE}, lambda **keep: h2ot.prune_motion(POSE, K, **keep)),
    "attention": (
        pruning.TokenPruningAttention(K),
        {"query": QUERY, "key": KEY},
        lambda **keep: h2ot.prune_attention(QUERY, KEY, K, **keep),
    ),
    "scores": (pruning.TokenPruningScores(K), {"scores": SCORES}, lambda **keep: h2ot.select_tokens(SCORES, K, **keep)),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_pruning_is_selection_and_gather(name):
    module, signals, select = PRUNERS[name]
    x = X.clone().requires_grad_()
    embed = nn.Parameter(torch.randn(1, K, C))
    kept, index = module(x, pos_embed=embed, **signals)
    assert torch.equal(index, select())
    assert torch.equal(kept, X[torch.arange(B)[:, None], index.expand(B, -1)] + embed[:, :, None])
    kept.sum().backward()
    taken = torch.zeros(B, F).scatter_(1, index.expand(B, -1), 1.0)
    assert torch.equal(x.grad, taken[:, :, None, None].expand_as(x))
    assert torch.equal(embed.grad, torch.full_like(embed, B * J))

    _, index = module(X, keep=7, **signals)
    assert (index == 7).any(1).all()
    assert torch.equal(index, select(keep=7))
    assert not list(module.parameters())
    assert f"num_tokens={K}" in repr(module)


@pytest.mark.parametrize("name", PRUNERS)
def test_pruning_of_other_layouts(name):
    module, signals, _ = PRUNERS[name]
    expected, index = module(X, **signals)
    k = {"k": 3} if name == "cluster" else {}

    frames_third = type(module)(K, frame_dim=2, **k)
    kept, same = frames_third(X.transpose(1, 2), **signals)
    assert torch.equal(same, index)
    assert torch.equal(kept, expected.transpose(1, 2))

    joint_rows = type(module)(K, num_joints=J, **k)
    if name == "attention":
        signals = {name: heads.flatten(0, 1) for name, heads in signals.items()}
    kept, same = joint_rows(X.transpose(1, 2).flatten(0, 1), **signals)
    assert torch.equal(same, index)
    assert torch.equal(kept.unflatten(0, (B, J)), expected.transpose(1, 2))


def test_sampler_traced_on_shapes_first_is_right_afterwards():
    module = pruning.TokenPruningSampler(6)
    with FakeTensorMode():
        assert module(torch.zeros(1, 29, 4))[1].shape == (1, 6)
    assert module(torch.zeros(1, 29, 4))[1].tolist() == [[0, 5, 11, 16, 22, 28]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cluster_draws_noise_from_a_generator_as_the_official_code_does(dtype):
    """In the tokens' dtype. Of tokens that are equally far apart it alone decides."""
    x = torch.eye(F, dtype=dtype).expand(B, F, F)
    noise = torch.rand(B, F, generator=torch.Generator().manual_seed(7), dtype=dtype) * 1e-6
    drawn = pruning.TokenPruningCluster(K).select(x, noise=torch.Generator().manual_seed(7))
    assert torch.equal(drawn, h2ot.prune_cluster(x, K, noise=noise))
    assert not torch.equal(drawn, h2ot.prune_cluster(x, K, noise=noise.flip(1)))


def test_cluster_leaves_masked_frames_out():
    mask = torch.arange(F).expand(B, F) >= 4
    assert pruning.TokenPruningCluster(K).select(X, mask=mask).min() >= 4
    assert pruning.TokenPruningScores(K).select(X, scores=SCORES, mask=mask).min() >= 4


def attention_module():
    module = pruning.TokenRecoveringAttention(C, num_heads=2).double()
    token = nn.Parameter(torch.randn(1, F, C, dtype=torch.float64))
    return module, token, torch.randn(B, K, J, C, dtype=torch.float64)


def test_attention_recovery_has_the_official_parameters():
    names = [name for name, _ in pruning.TokenRecoveringAttention(C, 2).named_parameters()]
    layers = ("linear_q", "linear_k", "linear_v", "proj")
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    without = dict(pruning.TokenRecoveringAttention(C, 2, qkv_bias=False).named_parameters())
    assert "linear_q.bias" not in without
    assert "proj.bias" in without


def test_attention_recovery_equals_the_formulation_that_repeats_the_token():
    module, token, x = attention_module()
    recovered = module(token, x)
    assert recovered.shape == (B, F, J, C)
    rows = x.transpose(1, 2).flatten(0, 1)
    query, key, value = (
        layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2)
        for layer, tokens in (
            (module.linear_q, token.expand(B * J, -1, -1)),
            (module.linear_k, rows),
            (module.linear_v, rows),
        )
    )
    weights = (query @ key.mT * (C // 2) ** -0.5).softmax(-1)
    expected = token + module.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(recovered, expected.unflatten(0, (B, J)).transpose(1, 2), rtol=1e-12, atol=1e-12)

    parameters = (token, *module.parameters())
    cotangent = torch.randn_like(recovered)
    ours = torch.autograd.grad((recovered * cotangent).sum(), parameters)
    theirs = torch.autograd.grad((expected.unflatten(0, (B, J)).transpose(1, 2) * cotangent).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frame_dim", [1, 2])
def test_attention_recovery_with_the_head_fused(frame_dim):
    module, token, x = attention_module()
    x = x.movedim(1, frame_dim)
    head = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 3)).double()
    plain = module(token, x, frame_dim=frame_dim, head=head)
    with torch.no_grad():
        fused = module(token, x, frame_dim=frame_dim, head=head)
    assert plain.requires_grad
    assert not fused.requires_grad
    assert plain.shape == (B, *((J, F) if frame_dim == 2 else (F, J)), 3)
    torch.testing.assert_close(fused, plain.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain, head(module(token, x, frame_dim=frame_dim)), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("align", ["index", "uniform"])
def test_interpolation_is_the_function(mode, align):
    index = torch.tensor([[0, 2, 5, 7, 11], [1, 3, 4, 8, 9]])
    module = pruning.TokenRecoveringInterpolation(F, mode=mode, align=align)
    kept = X[:, :K]
    expected = h2ot.recover_interpolate(kept, index, F, mode=mode, align=align)
    assert torch.equal(module(kept, index), expected)
    assert torch.equal(module(kept.transpose(1, 2), index, frame_dim=2), expected.transpose(1, 2))
    rows = kept.transpose(1, 2).flatten(0, 1)
    assert torch.equal(module(rows, index).unflatten(0, (B, J)).transpose(1, 2), expected)
    assert repr(align) in repr(module)


BAD = {  # rows of the table in bad_calls.py
    "num_tokens": (lambda: pruning.TokenPruningCluster(0), ValueError, "num_tokens: got 0, wanted 1"),
    "too many": (lambda: pruning.TokenPruningCluster(F + 1)(X), ValueError, "num_tokens: got 13, wanted 1 to 12"),
    "k": (lambda: pruning.TokenPruningCluster(2, k=0), ValueError, "k: got 0"),
    "frame_dim": (lambda: pruning.TokenPruningSampler(2, frame_dim=0), ValueError, "frame_dim: got 0, wanted 1"),
    "num_joints": (lambda: pruning.TokenPruningSampler(2, num_joints=1.5), TypeError, "num_joints: got float"),
    "base class": (lambda: pruning.TokenPruning(2)(X), NotImplementedError, "TokenPruning does not say"),
    "heads": (lambda: pruning.TokenRecoveringAttention(8, 3), ValueError, "num_heads: got 3, wanted a divisor"),
    "mode": (lambda: pruning.TokenRecoveringInterpolation(9, mode="cubic"), ValueError, "mode: got 'cubic'"),
    "align": (lambda: pruning.TokenRecoveringInterpolation(9, align="left"), ValueError, "align: got 'left'"),
    "other frames, scores": (
        lambda: pruning.TokenPruningScores(3)(X, scores=SCORES[:, :5]),
        ValueError,
        r"scores: got shape \[2, 5\], wanted 12 frames on axis 1",
    ),
    "other frames, pose": (
        lambda: pruning.TokenPruningMotion(3)(X, pose=POSE[:, :5]),
        ValueError,
        r"pose: got shape \[2, 5, 3, 2\], wanted 12 frames on axis 1",
    ),
    "other frames, query": (
        lambda: pruning.TokenPruningAttention(3)(X, query=QUERY[..., :5, :], key=KEY[..., :5, :]),
        ValueError,
        r"query: got shape \[2, 3, 2, 5, 4\], wanted 12 frames on axis -2",
    ),
    "x type": (lambda: pruning.TokenPruningSampler(3)([X]), TypeError, "x: got list, wanted a tensor"),
    "x axes": (
        lambda: pruning.TokenPruningSampler(3, frame_dim=3)(X[..., 0]),
        ValueError,
        r"x: got shape \[2, 12, 3\], wanted its frames on axis 3",
    ),
    "x rows": (
        lambda: pruning.TokenPruningCluster(3, num_joints=5)(X[..., 0]),
        ValueError,
        r"x: got shape \[2, 12, 3\], wanted 5 rows a sample on axis 0",
    ),
    "index type": (
        lambda: pruning.TokenRecoveringInterpolation(F)(X[:, :3], [0, 4, 8]),
        TypeError,
        r"index: got list, wanted a tensor \[B, K\] or \[1, K\]",
    ),
    "rows": (
        lambda: pruning.TokenRecoveringInterpolation(F)(X[:, :2], torch.zeros(3, 2, dtype=torch.int64)),
        ValueError,
        r"index: got shape \[3, 2\]",
    ),
}


@pytest.mark.parametrize("hooked", ["head", "norm", "linear", "proj"])
def test_hooks_on_a_fused_tail_are_called(hooked):
    recover, seen = pruning.TokenRecoveringAttention(16, 2).eval(), []
    head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    modules = {"head": head, "norm": head[0], "linear": head[1], "proj": recover.proj}
    with torch.no_grad():
        expected = recover(torch.zeros(1, 9, 16), tokens := torch.randn(2, 4, 16), head=head)
        handle = modules[hooked].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
        torch.testing.assert_close(recover(torch.zeros(1, 9, 16), tokens, head=head), expected)
        handle.remove()
    assert seen == [3 if hooked in ("head", "linear") else 16]


@pytest.mark.parametrize("what", ["alone", "hooked", "autocast", "recorded"])
def test_a_recovery_adds_its_token_to_what_nobody_else_has(what):
    recover, seen = pruning.TokenRecoveringAttention(16, 2).eval(), []
    if what == "hooked":
        recover.proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    token, tokens = torch.randn(1, 9, 16), torch.randn(6, 4, 16)
    before = token.clone()
    with torch.set_grad_enabled(what == "recorded"), torch.autocast("cpu", enabled=what == "autocast"):
        recovered = recover(token, tokens)
    attended = h2ot.recover_attention(recover.linear_q(token), recover.linear_k(tokens), recover.linear_v(tokens), 2)
    expected, atol = token + recover.proj(attended), 0.05 if what == "autocast" else 1e-5
    torch.testing.assert_close(recovered, expected, atol=atol, rtol=0)
    assert torch.equal(token, before)
    if what == "hooked":
        torch.testing.assert_close(seen[0], expected - token)


class InMillimetres(nn.Sequential):
    def forward(self, x):
        return 1000 * super().forward(x)


class Updated(nn.Module):
    """A layer with a low-rank update beside it, as adapters have."""

    def __init__(self, base):
        super().__init__()
        self.base, self.update = base, nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.base(x) + self.update(x)


@pytest.mark.parametrize("what", ["head", "proj"])
def test_a_tail_with_a_forward_of_its_own_runs_it(what):
    recover, layers = pruning.TokenRecoveringAttention(16, 2).eval(), (nn.LayerNorm(16), nn.Linear(16, 3))
    head = InMillimetres(*layers) if what == "head" else nn.Sequential(*layers)
    if what == "proj":
        recover.proj = Updated(recover.proj)
    token, tokens = torch.zeros(1, 9, 16), torch.randn(2, 4, 16)
    with torch.no_grad():
        fused = recover(token, tokens, head=head)
    torch.testing.assert_close(fused, recover(token, tokens, head=head).detach())
