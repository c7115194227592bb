"""The hosts: parameters and FLOPs of the published table, equality with the official formulation, checkpoints."""

import sys

import numpy as np
import pytest
import torch

import h2ot_kernels as h2ot
from h2ot_kernels import hosts
from h2ot_kernels.attention import attend_by_torch, attend_rows, takes_one_product
from h2ot_kernels.hosts import blocks, mixste
from h2ot_kernels.hosts.blocks import Attention, Block, drop_path

from .host_cases import (
    NAMES,
    NO_DROP,
    PRUNED,
    SIZES,
    STAGES,
    B,
    F,
    J,
    assert_near,
    base_of,
    inputs,
    official,
    poses,
    small,
)

# As published: parameters (M), FLOPs (G) of Linear and Conv1d layers, and with attention.
TABLE = {
    "mixste": ("33.784", "277.25", "294.85"),
    "hot_mixste": ("35.000", "167.51", "176.18"),
    "tpc_mixste": ("33.784", "251.28", "266.85"),
    "h2ot_mixste": ("33.784", "121.23", "125.67"),
    "motionbert": ("16.002", "131.09", "142.09"),
    "hot_motionbert": ("16.348", "63.21", "66.86"),
    "mhformer": ("31.516", "14.15", "16.44"),
    "tpc_mhformer": ("31.516", "8.22", "9.16"),
    "motionagformer": ("11.724", "95.92", "128.92"),
    "hot_motionagformer": ("11.828", "60.52", "76.66"),
}


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_flops_are_those_of_the_papers(name):
    with torch.device("meta"):
        model = hosts.build(name)
    parameters, linear, total = TABLE[name]
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == parameters
    assert f"{hosts.count_flops(model) / 1e9:.2f}" == linear
    assert f"{hosts.count_flops(model, 'total') / 1e9:.2f}" == total


def test_executed_flops_leave_out_the_repeated_query():
    with torch.device("meta"):
        model, plain = hosts.build("hot_mixste"), hosts.build("mixste")
    saved = 2 * (J - 1) * 243 * 512 * 512
    for convention in ("linear", "total"):
        published, executed = (hosts.count_flops(model, convention, executed=flag) for flag in (False, True))
        assert published - executed == saved
    assert hosts.count_flops(plain, executed=True) == hosts.count_flops(plain)


def test_executed_flops_leave_out_the_dense_scaling_of_graphs():
    model = small("motionagformer")
    published, executed = (hosts.count_flops(model, "total", executed=flag) for flag in (False, True))
    depth = SIZES["motionagformer"]["depth"]
    assert published - executed == depth * 2 * 2 * (J * F**3 + F * J**3)
    assert hosts.count_flops(model) == hosts.count_flops(model, executed=True)


def test_counting_leaves_the_model_as_it_was():
    model = small("hot_mixste")
    model.head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hosts.count_flops(model, "total")
    assert model.training
    assert not any(module.training for module in model.head.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="convention: got 'all'"):
        hosts.count_flops(model, "all")


def test_flops_do_not_depend_on_the_pruner():
    with torch.device("meta"):
        models = [hosts.build("h2ot_mixste", pruner=pruner) for pruner in ("sampler", "attention", "scores")]
    assert len({hosts.count_flops(model, "total") for model in models}) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_official_formulation_with_all_gradients(name, training):
    still = NO_DROP.get(base_of(name), {})
    model = small(name, **still).train(training)
    partner = official(name, model, **still)
    x, noise = inputs(name)
    ours, index = model(x, noise=noise, return_index=True)
    theirs = partner(x, noise=noise)
    if name.startswith("tpc"):
        assert torch.equal(index, theirs[1])
        assert (index == (F - 1) // 2).any(1).all()
    theirs = poses(theirs)
    assert_near(ours, theirs, 1e-9)

    cotangent = torch.randn_like(ours)
    (ours * cotangent).sum().backward()
    (theirs * cotangent).sum().backward()
    gradients = {name: parameter.grad for name, parameter in partner.named_parameters()}
    scale = max(grad.abs().max().item() for grad in gradients.values())
    assert all(grad.abs().max() > 0 for grad in gradients.values())
    for parameter, grad in model.named_parameters():
        assert_near(grad.grad, gradients[parameter], 1e-9, scale)

    if not training:
        with torch.inference_mode():
            assert_near(poses(model(x, noise=noise)), theirs.detach(), 1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_mhformer_of_few_frames_has_embeddings_of_its_own(training):
    """Official models of up to 27 frames; here without dropout, which is random."""
    still = NO_DROP["mhformer"]
    model = small("tpc_mhformer", embedding_dropout=0.0, **still).train(training)
    partner = official("tpc_mhformer", small("tpc_mhformer", **still), **still)
    for s in (1, 2, 3):
        conv = getattr(partner, f"embedding_{s}")
        layers = conv, torch.nn.BatchNorm1d(conv.out_channels, momentum=0.1), torch.nn.ReLU(), torch.nn.Dropout(0.0)
        setattr(partner, f"embedding_{s}", torch.nn.Sequential(*layers).double())
    partner.load_state_dict(model.state_dict())
    partner.train(training)
    x, noise = inputs("mhformer")
    assert_near(poses(model(x, noise=noise)), poses(partner(x, noise=noise)), 1e-9)
    assert_near(model.embedding_2[1].running_mean, partner.embedding_2[1].running_mean, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_alone_as_in_a_batch(name):
    model = small(name).eval()
    x, noise = inputs(name)
    together = poses(model(x, noise=noise))
    alone = torch.cat([poses(model(x[i : i + 1], noise=noise[i : i + 1])) for i in range(B)])
    assert_near(alone, together, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_precisions(name):
    model = small(name).eval()
    x, _ = inputs(name)
    exact, index = model(x, return_index=True)
    index = index if len(index) else None
    model.float()
    with torch.no_grad():
        assert_near(poses(model(x.float(), index)), exact, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_near(poses(model(x.float(), index)), exact, 0.1)
        ours = poses(model.bfloat16()(x.bfloat16(), index))
        assert ours.dtype == torch.bfloat16
        assert_near(ours, exact, 0.1)
        assert_near(poses(model.half()(x.half(), index)), exact, 0.03)


@pytest.mark.parametrize("name", PRUNED)
def test_what_comes_back(name):
    x, _ = inputs(name)
    model = small(name).eval()
    kept = list(STAGES[name].values())
    result, index = model(x, return_index=True)
    assert [frames.shape[1] for frames in (index if isinstance(index, tuple) else [index])] == kept
    assert isinstance(index, torch.Tensor) == (len(kept) == 1)
    assert result.shape == (B, kept[-1] if name.startswith("tpc") else F, J, 3)
    assert isinstance(model(x), tuple) == name.startswith("tpc")

    flipped = model(-x, index=index, return_index=True)
    assert_near(flipped[0], poses(official(name, model)(-x, index=index)), 1e-9)

    centre = small(name, pipeline="seq2frame", keep="centre").eval()(x)
    assert centre.shape == (B, 1, J, 3)
    full = small(name, keep="centre").eval()(x)
    full, index = full if isinstance(full, tuple) else (full, torch.arange(F).expand(B, F))
    assert_near(centre[:, 0], full[index == (F - 1) // 2], 1e-9)


@pytest.mark.parametrize("pruner", ["cluster", "sampler", "motion", "attention", "scores"])
@pytest.mark.parametrize("recover", ["attention", "interpolation"])
@pytest.mark.parametrize("base", SIZES)
def test_any_pruner_and_recovery(base, pruner, recover):
    if (base, recover) == ("mhformer", "attention"):
        with pytest.raises(ValueError, match="MHFormer has no recovery token"):
            small("h2ot_mhformer", recover=recover)
        return
    model = small(f"h2ot_{base}", pruner=pruner, recover=recover).eval()
    x, _ = inputs(base)
    scores = torch.randn(B, F, generator=torch.Generator().manual_seed(2))
    pose, kept = model(x, scores=scores, return_index=True)
    assert pose.shape == (B, F, J, 3)
    if pruner == "motion":
        assert torch.equal(kept[0], h2ot.prune_motion(x[..., :2], 13))
    if pruner == "scores":
        assert torch.equal(kept[0], h2ot.select_tokens(scores, 13))
    with torch.inference_mode():
        assert_near(model(x, kept), pose.detach(), 1e-9)
        assert_near(model(x, scores=scores), pose.detach(), 1e-9)


def by_rows(qkv):
    return qkv.unflatten(0, (B, -1))


def by_frames(qkv):
    return qkv.unflatten(0, (B, F)).transpose(1, 2)


@pytest.mark.parametrize(
    ("base", "layers", "layout"),
    [
        ("mixste", ["TTEblocks.1.attn.qkv"], by_rows),
        ("motionbert", ["blocks_st.1.attn_t.qkv", "blocks_ts.1.attn_t.qkv"], by_frames),
        ("mhformer", [f"Transformer_hypothesis.SHR_blocks.1.attn_{s}.qkv" for s in (1, 2, 3)], by_rows),
        ("motionagformer", ["layers.1.att_temporal.mixer.qkv"], by_frames),
    ],
)
def test_attention_pruner_reads_the_temporal_attention_before_the_cut(base, layers, layout):
    """Over all streams, joints, heads and queries; layout: what the layer gives -> [B, J or 1, F, 3C]."""
    model = small(f"h2ot_{base}", pruner="attention", stages={2: 9}, recover=None).eval()
    partner = official(f"h2ot_{base}", model, stages={2: 9}, recover=None)
    seen = []
    for layer in layers:
        partner.get_submodule(layer).register_forward_hook(lambda layer, inputs, output: seen.append(output))
    x, _ = inputs(base)
    partner(x, torch.arange(9)[None])
    qkv = torch.cat([layout(output) for output in seen], 1)
    query, key, _ = qkv.unflatten(-1, (3, 4, 8)).permute(3, 0, 1, 4, 2, 5)
    received = (query @ key.mT * 8**-0.5).softmax(-1).mean((1, 2, 3))
    assert torch.equal(model(x)[1], received.topk(9).indices.sort().values)


def test_a_stage_before_the_first_block_takes_its_frames_embeddings():
    """Equal to a model that is given only those frames."""
    index = torch.arange(0, F, 3)[None]
    pruned = small("h2ot_mixste", stages={0: 9}, recover=None).eval()
    short = small("mixste", num_frames=9).eval()
    state = pruned.state_dict()
    state["Temporal_pos_embed"] = state["Temporal_pos_embed"][:, index[0]]
    short.load_state_dict(state)
    x, _ = inputs()
    pose, same = pruned(x, index=index)
    assert torch.equal(same, index)
    assert_near(pose, short(x[:, index[0]]), 1e-12)


def test_drop_path_drops_whole_sequences():
    x = torch.ones(40, 6, 50, 4)
    dropped = drop_path(x, 0.25, dim=1)
    sequences = dropped.transpose(1, 2).flatten(0, 1)
    assert (sequences == sequences[:, :1, :1]).all()
    kept = sequences[:, 0, 0] != 0
    assert torch.equal(sequences[kept], torch.full_like(sequences[kept], 1 / 0.75))
    assert 0.70 < kept.double().mean() < 0.80

    block = Block(8, 2, 16, drop_path_rate=0.5).eval()
    x = torch.randn(2, 5, 3, 8)
    assert torch.equal(block(x, 1)[0], block(x, 1)[0])
    assert not torch.equal(block.train()(x, 1)[0], block(x, 1)[0])
    rates = [block.drop_path_rate for block in hosts.build("mixste", **SIZES["mixste"]).TTEblocks]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


def as_on_a_gpu(x, dim):
    """What `takes_one_product` says of a GPU's tensor, of one on a CPU."""
    return takes_one_product(torch.empty(x.shape, device="meta"), dim)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("takes", [takes_one_product, as_on_a_gpu])
def test_attention_along_any_axis(dim, samples, takes, monkeypatch):
    monkeypatch.setattr(blocks, "takes_one_product", takes)
    layer = Attention(8, 2).double()
    x = torch.randn(samples, 6, 5, 8, dtype=torch.float64)
    query, key, value = layer.qkv(x).unflatten(-1, (3, 2, 4)).movedim(dim, -2).unbind(-4)
    expected = ((query @ key.mT * 0.5).softmax(-1) @ value).transpose(-2, -3).flatten(-2).movedim(-2, dim)
    ours, (same_query, same_key) = layer(x, dim, residual=x)
    torch.testing.assert_close(ours, x + layer.proj(expected))
    torch.testing.assert_close(same_query, query)
    torch.testing.assert_close(same_key, key)
    alone, nothing = layer(x, dim, residual=x, with_query_key=False)
    assert torch.equal(alone, ours)
    assert nothing is None


@pytest.mark.parametrize("name", ["mixste", "hot_mixste", "h2ot_mixste", "motionbert", "mhformer", "motionagformer"])
def test_the_hosts_give_the_same_from_one_product(name, monkeypatch):
    model = small(name).eval().double()
    x = torch.randn(1, *model.in_shape, dtype=torch.float64)
    with torch.no_grad():
        before = poses(model(x))
        monkeypatch.setattr(blocks, "takes_one_product", as_on_a_gpu)
        torch.testing.assert_close(poses(model(x)), before)


@pytest.mark.parametrize("name", ["mixste", "h2ot_mixste"])
def test_a_block_costs_a_gpu_no_more_calls_than_the_official_one(name, monkeypatch):
    """Where kernels are short, the calls are the time."""
    monkeypatch.setattr(blocks, "takes_one_product", lambda x, dim: True)
    monkeypatch.setattr(blocks.Linear, "forward", blocks.Linear._plain)
    monkeypatch.setattr(mixste, "partial", lambda normed, norm, dtype: norm)  # as there
    ours, counts = small(name).eval(), {}
    for whose, model in (("official", official(name, ours)), ("ours", ours)):
        x, calls = torch.randn(1, F, J, 2, dtype=torch.float64), []
        with torch.inference_mode():
            model(x)
            sys.setprofile(lambda frame, event, argument, calls=calls: calls.append(event))
            try:
                model(x)
            finally:
                sys.setprofile(None)
        counts[whose] = {event: calls.count(event) for event in ("call", "c_call")}
    assert all(counts["ours"][event] < counts["official"][event] for event in ("call", "c_call")), counts


def test_attention_is_that_of_torch():
    query, key, value = torch.randn(3, 2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(attend_rows(query, key, value, 4), attend_by_torch(query, key, value, 4))
    fake = torch.empty(2, 7, 24, device="meta")
    assert attend_rows(fake, fake, fake, 4).shape == fake.shape


def test_compiles_without_a_break():
    torch._dynamo.reset()
    model = small("hot_mixste", depth=4).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, _ = inputs()
    with torch.no_grad():
        (ours, index), (traced, same) = model(x, return_index=True), compiled(x, return_index=True)
    assert torch.equal(index, same)
    assert_near(traced, ours, 1e-12)


def lifted(x):
    return hosts.build("mixste", **SIZES["mixste"])(x)


def test_autocast_takes_what_it_casts():
    """And says of the rest what came: float64 it leaves as it is."""
    x = torch.zeros(1, F, J, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert lifted(x.bfloat16()).shape == lifted(x.half()).shape == (1, F, J, 3)
        with pytest.raises(TypeError, match="x: got dtype torch.float64, wanted torch.float32"):
            lifted(x.double())


BAD = {  # rows of the table in bad_calls.py
    "name": (
        lambda: hosts.build("hot_transformer"),
        ValueError,
        "name: got 'hot_transformer', wanted one of mixste, hot",
    ),
    "stage": (
        lambda: hosts.build("hot_mixste", **SIZES["mixste"], stages={5: 9}),
        ValueError,
        "stages: got a stage before block 5",
    ),
    "pos_embed": (
        lambda: hosts.build("h2ot_mixste", **SIZES["mixste"], stages={1: 9, 2: 5}, pos_embed=True),
        ValueError,
        "pos_embed: needs exactly one stage, got 2",
    ),
    "no embedding": (
        lambda: hosts.build("mhformer", stages={1: 9}, pos_embed=True),
        ValueError,
        "pos_embed: got True, wanted False",
    ),
    "skeleton": (
        lambda: hosts.build("motionagformer", num_joints=16),
        ValueError,
        "joints: got the neighbours of 17 joints, wanted 16",
    ),
    "frames": (
        lambda: lifted(torch.zeros(1, 26, J, 2)),
        ValueError,
        r"x: got shape \[1, 26, 17, 2\], wanted \[B, F, J, in_channels\] = \[1, 27, 17, 2\]",
    ),
    "rank": (lambda: lifted(torch.zeros(27, J, 2)), ValueError, r"x: got shape \[27, 17, 2\]"),
    "type": (lambda: lifted(np.zeros((1, F, J, 2))), TypeError, "x: got ndarray"),
    "double": (
        lambda: lifted(torch.zeros(1, F, J, 2).double()),
        TypeError,
        "x: got dtype torch.float64, wanted torch.float32, that of Spatial_patch_to_embedding.weight",
    ),
    "half": (lambda: lifted(torch.zeros(1, F, J, 2).half()), TypeError, "x: got dtype torch.float16, wanted"),
    "device": (lambda: lifted(torch.zeros(1, F, J, 2, device="meta")), ValueError, "x: got device meta, wanted cpu"),
    "no heads": (lambda: hosts.build("mixste", num_heads=0), ValueError, "num_heads: got 0, wanted 1 or more"),
    "heads": (lambda: hosts.build("mhformer", channels=30), ValueError, "num_heads: got 8, wanted a divisor of channe"),
    "encoder heads": (lambda: hosts.build("mhformer", num_frames=28), ValueError, "encoder_heads: got 9, wanted a div"),
    "type of heads": (lambda: hosts.build("motionbert", num_heads="8"), TypeError, "num_heads: got str, wanted an int"),
}
