"""The plug-in in a loop over the blocks of a toy transformer: every pruner, recovery and pipeline."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot

B, F, J, C, H = 2, 21, 3, 8, 2
STAGES = {1: 11, 3: 5}
CENTRE = (F - 1) // 2
PRUNERS = ("cluster", "sampler", "motion", "attention", "scores")
RECOVERIES = ("attention", "interpolation", None)
PIPELINES = ("seq2seq", "seq2frame")


class Toy(nn.Module):
    """Four blocks of temporal attention, x [B, F, J, C] in and poses [B, F, J, 3] out; the loop is a user's."""

    def __init__(self, **arguments):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(4))
        self.head = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 3))
        self.hourglass = h2ot.Hourglass(F, **{"stages": STAGES, "channels": C, "num_heads": H, **arguments})
        for parameter in self.hourglass.parameters():
            nn.init.normal_(parameter)

    def forward(self, x, pose=None, scores=None, index=None, **signals):
        kept, query, key = (), None, None
        for i, qkv in enumerate(self.qkv):
            x, kept = self.hourglass.prune(
                i, x, kept, index=index, pose=pose, scores=scores, query=query, key=key, **signals
            )
            query, key, value = qkv(x).unflatten(-1, (3, H, -1)).permute(3, 0, 2, 4, 1, 5)
            x = x + ((query @ key.mT).softmax(-1) @ value).permute(0, 3, 1, 2, 4).flatten(3)
        return self.hourglass.recover(x, kept, self.head), kept


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, F, J, C, generator=g)
    return x, torch.randn(B, F, J, 2, generator=g), torch.randn(B, F, generator=g)


def toy(**arguments):
    torch.manual_seed(5)
    return Toy(**arguments)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("recover", RECOVERIES)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_combination(pruner, recover, pipeline):
    model = toy(pruner=pruner, recover=recover, pipeline=pipeline)
    x, pose, scores = inputs()
    x.requires_grad_()
    out, kept = model(x, pose, scores)

    frames = {"seq2frame": 1, "seq2seq": STAGES[3] if recover is None else F}[pipeline]
    assert out.shape == (B, frames, J, 3)
    assert [index.shape[1] for index in kept] == list(STAGES.values())
    for index in kept:
        assert (index.diff(dim=1) > 0).all()
        assert index.min() >= 0
        assert index.max() < F
        if pipeline == "seq2frame":
            assert (index == CENTRE).any(1).all()
    for earlier, later in pairwise(kept):
        assert all(set(after.tolist()) <= set(before.tolist()) for before, after in zip(earlier, later, strict=True))

    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert x.grad.abs().sum() > 0

    with torch.no_grad():
        fused, same = model(x, pose, scores)
        again, reused = model(x, pose, scores, index=kept)
    torch.testing.assert_close(fused, out.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(again, fused)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, same, reused, strict=True))


def stage_by_stage(select):
    """The kept input frames when `select(stage, frames so far)` gives positions among them."""
    frames, kept = torch.arange(F)[None], []
    for num_tokens in STAGES.values():
        position = select(num_tokens, frames)
        rows = max(len(frames), len(position))
        frames = frames.expand(rows, -1).gather(1, position.expand(rows, -1))
        kept.append(frames)
    return kept


def at(x, frames):
    return torch.stack([sample[index] for sample, index in zip(x, frames.expand(len(x), -1), strict=True)])


def test_sampler_is_composed_over_stages():
    kept = toy()(inputs()[0])[1]
    expected = stage_by_stage(lambda K, frames: h2ot.prune_sample(frames.shape[1], K))
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_sampler_of_the_published_pyramid():
    hourglass = h2ot.Hourglass(243)
    x, kept = torch.zeros(1, 243, 4), ()
    for block in range(3):
        x, kept = hourglass.prune(block, x, kept)
    frames = kept[-1][0].tolist()
    assert frames[:6] == [0, 2, 6, 8, 12, 14]
    assert frames[-2:] == [237, 242]
    assert 121 in frames
    assert x.shape == (1, 81, 4)


def test_motion_is_measured_between_the_frames_still_there():
    x, pose, _ = inputs()
    kept = toy(pruner="motion")(x, pose)[1]
    expected = stage_by_stage(lambda K, frames: h2ot.prune_motion(at(pose, frames), K))
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_own_scores_of_all_frames_or_of_those_still_there():
    x, _, scores = inputs()
    kept = toy(pruner="scores")(x, scores=scores)[1]
    expected = stage_by_stage(lambda K, frames: h2ot.select_tokens(at(scores, frames), K))
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))

    hourglass = h2ot.Hourglass(F, STAGES, "scores")
    x, one = hourglass.prune(1, x, scores=scores)
    _, both = hourglass.prune(3, x, one, scores=at(scores, one[0]))
    assert torch.equal(both[1], kept[1])


def test_cluster_clusters_the_tokens_still_there_with_the_noise_of_their_frames():
    x, _, _ = inputs()
    noise = torch.rand(B, F) * 1e-6
    mask = torch.arange(F).expand(B, F) < F - 2
    hourglass = h2ot.Hourglass(F, STAGES, "cluster", k=3)
    kept, tokens = (), x
    for block in STAGES:
        before = at(noise, kept[-1]) if kept else noise
        valid = at(mask, kept[-1]) if kept else mask
        expected = h2ot.prune_cluster(tokens, STAGES[block], 3, noise=before, mask=valid)
        frames = at(kept[-1], expected) if kept else expected
        tokens, kept = hourglass.prune(block, tokens, kept, noise=noise, mask=mask)
        assert torch.equal(kept[-1], frames)
    assert torch.equal(tokens, at(x, kept[-1]))
    assert kept[-1].max() < F - 2


def test_attention_reads_the_block_before_the_cut():
    x, _, _ = inputs()
    model = toy(pruner="attention", stages={1: 7})
    query, key, _ = model.qkv[0](x).unflatten(-1, (3, H, -1)).permute(3, 0, 2, 4, 1, 5)
    expected = h2ot.prune_attention(query, key, 7)
    assert torch.equal(model(x)[1][0], expected)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize(("keep", "frames"), [(3, [3]), ([0, 3, 20], [0, 3, 20]), ("centre", [CENTRE])])
def test_kept_frames_are_kept_in_every_stage(pruner, keep, frames):
    x, pose, scores = inputs()
    _, kept = toy(pruner=pruner, keep=keep, recover=None)(x, pose, scores)
    assert all((index == frame).any(1).all() for index in kept for frame in frames)


def test_interpolation_passes_through_the_kept_poses():
    x, pose, scores = inputs()
    arguments = {"pruner": "motion", "keep": "centre"}
    full, kept = toy(recover="interpolation", **arguments)(x, pose, scores)
    sparse, _ = toy(recover=None, **arguments)(x, pose, scores)
    centre, _ = toy(recover="interpolation", pipeline="seq2frame", **arguments)(x, pose, scores)
    assert torch.equal(at(full, kept[-1]), sparse)
    torch.testing.assert_close(full, h2ot.recover_interpolate(sparse, kept[-1], F))
    torch.testing.assert_close(centre, full[:, CENTRE : CENTRE + 1])


def test_attention_recovery_of_the_centre_alone():
    x, pose, _ = inputs()
    arguments = {"pruner": "motion", "keep": "centre", "recover": "attention"}
    full, _ = toy(**arguments)(x, pose)
    centre, _ = toy(pipeline="seq2frame", **arguments)(x, pose)
    torch.testing.assert_close(centre, full[:, CENTRE : CENTRE + 1])


def test_the_model_may_own_token_and_attention():
    x, pose, _ = inputs()
    owner = toy(pruner="motion", recover="attention")
    bare = h2ot.Hourglass(F, STAGES, "motion", "attention")
    assert not list(bare.parameters())
    tokens, kept = bare.prune(1, x, pose=pose)
    tokens, kept = bare.prune(3, tokens, kept, pose=pose)
    own = {"x_token": owner.hourglass.x_token, "cross_attention": owner.hourglass.cross_attention}
    assert torch.equal(bare.recover(tokens, kept, **own), owner.hourglass.recover(tokens, kept))
    with pytest.raises(ValueError, match="x_token, cross_attention: got None"):
        bare.recover(tokens, kept)


def test_flipped_pass_keeps_the_frames_of_the_first():
    x, pose, _ = inputs()
    model = toy(pruner="motion")
    _, kept = model(x, pose)
    flipped, same = model(-x, -2 * pose.flip(1), index=kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, same, strict=True))
    assert not torch.equal(flipped, model(-x, -2 * pose.flip(1))[0])

    single = toy(pruner="motion", stages={1: 5})
    _, (index,) = single(x, pose)
    assert torch.equal(single(-x, index=index)[0], single(-x, index=(index,))[0])
    shared = index[:1]
    assert torch.equal(single(x, index=shared)[0], single(x, index=shared.expand(B, -1))[0])


def test_calls_leave_nothing_behind():
    model = toy(pruner="cluster")
    first, second = inputs(1)[0], inputs(2)[0]
    alone, interleaved = model(second)[0], []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for x in (first, second):
        interleaved.append(model(x)[0])
    assert torch.equal(interleaved[1], alone)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model(second[:1])[0].shape == (1, F, J, 3)


def test_position_embedding_is_added_to_the_kept_tokens():
    x = inputs()[0]
    embed = nn.Parameter(torch.randn(1, 7, C))
    hourglass = h2ot.Hourglass(F, {1: 7})
    pruned, (index,) = hourglass.prune(1, x, pos_embed=embed)
    assert torch.equal(pruned, at(x, index) + embed[:, :, None])


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_rows_of_joints_as_in_official_code(pruner, pipeline):
    """x as [(B J), F, C]: the same frames and poses as [B, F, J, C]."""
    x, pose, scores = inputs()
    query, key = torch.randn(2, B, J, H, F, 4)
    arguments = {"stages": {1: 7}, "pruner": pruner, "pipeline": pipeline}
    hourglass = h2ot.Hourglass(F, **arguments)
    expected, kept = hourglass.prune(1, x, pose=pose, scores=scores, query=query, key=key)
    recovered = hourglass.recover(expected, kept)

    rows = h2ot.Hourglass(F, num_joints=J, **arguments)
    signals = {"pose": pose, "scores": scores, "query": query.flatten(0, 1), "key": key.flatten(0, 1)}
    pruned, same = rows.prune(1, x.transpose(1, 2).flatten(0, 1), **signals)
    assert torch.equal(same[0], kept[0])
    assert torch.equal(pruned.unflatten(0, (B, J)).transpose(1, 2), expected)
    assert torch.equal(rows.recover(pruned, same).unflatten(0, (B, J)).transpose(1, 2), recovered)


def test_no_stages_is_the_plain_model():
    x = inputs()[0]
    plain = toy(stages={})
    out, kept = plain(x)
    assert kept == ()
    assert out.shape == (B, F, J, 3)
    centre, _ = toy(stages={}, pipeline="seq2frame")(x)
    torch.testing.assert_close(centre, out[:, CENTRE : CENTRE + 1])


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_compiles_without_a_break(pruner, pipeline):
    torch._dynamo.reset()
    model = toy(pruner=pruner, pipeline=pipeline, keep=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, pose, scores = inputs()
    out, kept = model(x, pose, scores)
    traced, same = compiled(x, pose, scores)
    assert all(torch.equal(a, b) for a, b in zip(kept, same, strict=True))
    torch.testing.assert_close(traced, out)
    traced.sum().backward()
    assert model.head[1].weight.grad is not None


def prune(block=1, frames=F, kept=(), pruner="sampler", stages=STAGES, **given):
    return h2ot.Hourglass(F, stages, pruner).prune(block, torch.zeros(B, frames, C), kept, **given)


FIVE = torch.arange(5)[None]
ELEVEN = torch.arange(11)[None]
BAD = {  # rows of the table in bad_calls.py
    "stages type": (lambda: h2ot.Hourglass(F, [1, 2]), TypeError, "stages: got list, wanted a mapping"),
    "stage block": (lambda: h2ot.Hourglass(F, {-1: 5}), ValueError, "stages: got -1, wanted 0"),
    "stage grows": (lambda: h2ot.Hourglass(F, {1: 5, 2: 6}), ValueError, "stages: got 6 tokens before block 2"),
    "stage above F": (lambda: h2ot.Hourglass(F), ValueError, "stages: got 121 tokens before block 1, wanted 1 to 21"),
    "stage of none": (lambda: h2ot.Hourglass(F, {1: 0}), ValueError, "stages: got 0 tokens"),
    "pruner": (lambda: h2ot.Hourglass(F, {}, "random"), ValueError, "pruner: got 'random', wanted one of 'cluster'"),
    "recover": (lambda: h2ot.Hourglass(F, {}, recover="copy"), ValueError, "recover: got 'copy'"),
    "pipeline": (lambda: h2ot.Hourglass(F, {}, pipeline="seq"), ValueError, "pipeline: got 'seq'"),
    "keep": (lambda: h2ot.Hourglass(F, {}, keep=F), ValueError, "keep: got 21, wanted 0 to 20"),
    "keep word": (lambda: h2ot.Hourglass(F, {}, keep="first"), ValueError, "keep: got 'first'"),
    "keep too many": (lambda: h2ot.Hourglass(F, {1: 2}, keep=[1, 2, 3]), ValueError, "keep: got 3 frames"),
    "k of a stage": (
        lambda: h2ot.Hourglass(F, {1: 3, 2: 1}, "cluster", k=4),
        ValueError,
        "k: got 4, wanted 1 to 3 .the frames that enter the last stage",
    ),
    "x frames": (lambda: prune(frames=20), ValueError, r"x: got shape \[2, 20, 8\], wanted 21 frames on axis 1"),
    "kept missing": (lambda: prune(3, 11), ValueError, "kept: got the indices of 0 stages, wanted 1"),
    "kept twice": (lambda: prune(1, 11, (ELEVEN,)), ValueError, "kept: got the indices of 1 stages, wanted 0"),
    "index count": (lambda: prune(index=ELEVEN), ValueError, "index: got 1 tensors, wanted one for each of 2 stages"),
    "index tokens": (
        lambda: prune(stages={1: 4}, index=FIVE),
        ValueError,
        r"index: got shape \[1, 5\], wanted \[B, 4\]",
    ),
    "index dtype": (lambda: prune(stages={1: 5}, index=FIVE.int()), TypeError, "index: got dtype int32"),
    "index range": (lambda: prune(stages={1: 5}, index=FIVE + F), IndexError, "index holds a value outside"),
    "index of a pruned frame": (
        lambda: prune(3, 11, (2 * ELEVEN,), index=(2 * ELEVEN, 2 * FIVE + 1)),
        IndexError,
        "index holds a value outside",
    ),
    "no pose": (lambda: prune(pruner="motion"), ValueError, "pose: got None, needed by pruner='motion'"),
    "no query": (lambda: prune(pruner="attention"), ValueError, "query, key: got None, needed by pruner='attention'"),
    "no scores": (lambda: prune(pruner="scores"), ValueError, "scores: got None, needed by pruner='scores'"),
    "scores shape": (lambda: prune(pruner="scores", scores=torch.zeros(F)), ValueError, "score: got shape"),
    "scores of other frames": (
        lambda: prune(pruner="scores", scores=torch.zeros(B, 5)),
        ValueError,
        r"scores: got shape \[2, 5\], wanted 21 frames on axis 1",
    ),
    "index type": (lambda: prune(stages={1: 5}, index=3), TypeError, "index: got int, wanted an int64 tensor, or one"),
    "x_token": (
        lambda: h2ot.Hourglass(F, {1: 5}, recover="attention", channels=C, num_heads=2).recover(
            torch.zeros(B, 5, C), (FIVE,), x_token=torch.zeros(1, 5, C)
        ),
        ValueError,
        r"x_token: got shape \[1, 5, 8\], wanted \[1, num_frames, C\] = \[1, 21, 8\]",
    ),
    "recover early": (
        lambda: h2ot.Hourglass(F, STAGES).recover(torch.zeros(B, 11, C), (ELEVEN,)),
        ValueError,
        "kept: got the indices of 1 stages, wanted 2",
    ),
    "recover other frames": (
        lambda: h2ot.Hourglass(F, {1: 5}).recover(torch.zeros(B, 6, C), (FIVE,)),
        ValueError,
        r"x: got shape \[2, 6, 8\], wanted 5 frames",
    ),
}
