"""hourglass.wrap: a user's own blocks, every pruner, recovery and pipeline, in training and inference."""

import numpy
import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot

from .official_code.mixste import Block

B, F, J, C, H = 2, 27, 3, 16, 2
STAGES = {1: 15, 3: 9}
PRUNERS = ("cluster", "sampler", "motion", "attention", "scores")


def encoder_layers(norm_first=True):
    layer = nn.TransformerEncoderLayer(C, H, 2 * C, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(C), enable_nested_tensor=False)


class Along(nn.Module):
    """A block over x [B, F, J, C] that attends along F."""

    def __init__(self):
        super().__init__()
        self.inner = Block(C, H, 2.0)
        self.norm1, self.attn = self.inner.norm1, self.inner.attn

    def forward(self, x):
        rows = x.transpose(1, 2)
        return self.inner(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).transpose(1, 2)


def kinds():
    yield "TransformerEncoder", encoder_layers(), torch.randn(B, F, C), {}
    yield "Sequential", nn.Sequential(*(Block(C, H, 2.0) for _ in range(4))), torch.randn(B, F, C), {}
    rows = nn.ModuleList(Block(C, H, 2.0) for _ in range(4))
    yield "rows", rows, torch.randn(B * J, F, C), {"num_joints": J}
    yield "frames", nn.ModuleList(Along() for _ in range(4)), torch.randn(B, F, J, C), {}


def given(pruner):
    return {"motion": {"pose": torch.randn(B, F, J, 2)}, "scores": {"scores": torch.randn(B, F)}}.get(pruner, {})


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("recover", ["interpolation", "attention", None])
@pytest.mark.parametrize("pipeline", ["seq2seq", "seq2frame"])
def test_every_pruner_recovery_and_pipeline(pruner, recover, pipeline):
    for kind, blocks, x, layout in kinds():
        options = {"channels": C, "num_heads": H} if recover == "attention" else {}
        model = h2ot.hourglass.wrap(blocks, F, STAGES, pruner, recover, pipeline, **options, **layout)
        head = nn.Linear(C, 3)
        signals = given(pruner)
        model.train()
        out, kept = model(x.requires_grad_(), head=head, return_index=True, **signals)
        frames = 1 if pipeline == "seq2frame" else F if recover else 9
        assert out.shape == (x.shape[0], frames, *x.shape[2:-1], 3), kind
        assert [index.shape[1] for index in kept] == [15, 9]
        out.square().sum().backward()
        assert all(p.grad is not None for p in blocks[0].parameters()) if kind != "TransformerEncoder" else True
        model.eval()
        with torch.no_grad():
            again = model(x, head=head, index=kept, **signals)
            again = again[0] if recover is None and pipeline == "seq2seq" else again
        torch.testing.assert_close(again, out.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_first", [True, False])
def test_is_the_loop_by_hand(norm_first):
    encoder, x, head = encoder_layers(norm_first).double(), torch.randn(B, F, C).double(), nn.Linear(C, 3).double()
    model = h2ot.hourglass.wrap(encoder, F, STAGES, "cluster")
    hourglass, kept, expected = h2ot.Hourglass(F, STAGES, "cluster"), (), x
    for i, layer in enumerate(encoder.layers):
        expected, kept = hourglass.prune(i, expected, kept)
        expected = layer(expected)
    expected = hourglass.recover(encoder.norm(expected), kept, head)
    assert torch.equal(model(x, head=head), expected)
    assert {id(p) for p in model.parameters()} == {id(p) for p in encoder.parameters()}
    assert set(model.state_dict()) == {f"blocks.{name}" for name in encoder.state_dict()}


@pytest.mark.parametrize("norm_first", [True, False])
def test_attention_pruner_reads_the_weights_of_the_block_before(norm_first):
    encoder, x = encoder_layers(norm_first).double().eval(), torch.randn(B, F, C).double()
    model = h2ot.hourglass.wrap(encoder, F, {1: 9}, "attention", None)
    _, index = model(x)
    layer = encoder.layers[0]
    normed = layer.norm1(x) if norm_first else x
    _, weights = layer.self_attn(normed, normed, normed, need_weights=True)  # [B, F, F], the mean over the heads
    assert torch.equal(index, h2ot.select_tokens(weights.mean(1), 9))

    blocks = nn.ModuleList(Block(C, H, 2.0) for _ in range(2)).double().eval()
    tokens = torch.randn(B * J, F, C).double()
    model, kept = h2ot.hourglass.wrap(blocks, F, {1: 9}, "attention", None, num_joints=J), []
    for _ in range(2):
        kept.append(model(tokens)[1])
        _, weights = blocks[0].attn(blocks[0].norm1(tokens), vis=True)
        received = weights.mean((1, 2)).unflatten(0, (B, J)).mean(1)
        assert torch.equal(kept[-1], h2ot.select_tokens(received, 9))
        blocks[0].attn.qkv.register_forward_hook(lambda layer, args, y: y.flip(1))  # what the layer gives, counts
    assert not torch.equal(*kept)


def test_padding_is_neither_kept_nor_attended():
    encoder, x = encoder_layers().eval(), torch.randn(B, F, C)
    mask = torch.arange(F) < torch.tensor([[F], [20]])
    model = h2ot.hourglass.wrap(encoder, F, STAGES, "cluster", None)
    with torch.no_grad():
        out, kept = model(x, mask=mask)
        noisy, same = model(torch.where(mask[..., None], x, 9.0), mask=mask)
    assert kept[1][1].max() < 20
    assert all(torch.equal(a, b) for a, b in zip(kept, same, strict=True))
    torch.testing.assert_close(out, noisy)


def test_compiles_whole():
    model = h2ot.hourglass.wrap(nn.ModuleList(Block(C, H, 2.0) for _ in range(4)), F, STAGES, "cluster").eval()
    x = torch.randn(B, F, C)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_refuses_what_cannot_be_pruned():
    wrap = h2ot.hourglass.wrap

    class OverFrames(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(F)

    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    with pytest.raises(ValueError, match=f"block 2 has norm.weight of shape \\[{F}\\], which depends on the number"):
        wrap(nn.ModuleList([Along(), Along(), OverFrames()]), F, {1: 9})
    wrap(nn.ModuleList([OverFrames(), Along()]), F, {1: 9})  # before the cut it may
    wrap(nn.ModuleList([OverFrames(), OverFrames()]), F, {1: 9}, channels=F)
    with pytest.raises(ValueError, match="a stage before block 4, wanted blocks 0 to 3"):
        wrap(encoder_layers(), F, {4: 9})
    with pytest.raises(ValueError, match="block 0 has batch_first=False"):
        wrap(nn.ModuleList([nn.TransformerEncoderLayer(C, H)]), F, {})
    with pytest.raises(ValueError, match="none is before block 0"):
        wrap(encoder_layers(), F, {0: 9}, "attention")
    with pytest.raises(ValueError, match="query_key: got None, but block 0"):
        wrap(nn.Sequential(nn.Linear(C, C), nn.Linear(C, C)), F, {1: 9}, "attention")
    with pytest.raises(TypeError, match="blocks: got Residual with a forward of its own, which would not run"):
        wrap(Residual(nn.Linear(C, C)), F, {})
    with pytest.raises(TypeError, match="blocks: got Linear"):
        wrap(nn.Linear(C, C), F)
    asked = []

    def query_key(block, x):
        asked.append(block)
        return x[:, None], x[:, None]

    blocks = nn.Sequential(nn.Linear(C, C), nn.Linear(C, C))
    wrap(blocks, F, {1: 9}, "attention", query_key=query_key)(torch.randn(B, F, C))
    assert asked == [blocks[0]]


def test_transformer_layers_of_any_width_and_masks_of_joint_rows():
    layer = nn.TransformerEncoderLayer(9, 3, F, batch_first=True, dropout=0.0)  # 3 C and the hidden features are F
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    rows, mask = torch.randn(B * J, F, 9), torch.arange(F) < torch.tensor([[F], [20]])
    model = h2ot.hourglass.wrap(encoder, F, STAGES, "cluster", "attention", channels=9, num_heads=3, num_joints=J)
    with torch.no_grad():
        noisy = torch.where(mask.repeat_interleave(J, 0)[..., None], rows, 9.0)
        torch.testing.assert_close(model(noisy, mask=mask), model(rows, mask=mask))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


WRONG = {
    "mask of floats": ({"mask": torch.ones(B, F)}, TypeError, "mask: got dtype float32, wanted bool"),
    "mask of fewer frames": ({"mask": torch.ones(B, F - 1) > 0}, ValueError, r"mask: got shape \[2, 26\], wanted 27"),
    "mask of other samples": (
        {"mask": torch.ones(B + 1, F) > 0},
        ValueError,
        r"mask: got shape \[3, 27\], wanted a row",
    ),
    "no tensor": ({"x": [0.0]}, TypeError, "x: got list, wanted a tensor"),
    "fewer frames": ({"x": torch.randn(B, F - 1, C)}, ValueError, r"x: got shape \[2, 26, 16\], wanted 27 frames"),
    "scores of fewer frames": (
        {"scores": torch.randn(B, F - 1)},
        ValueError,
        r"scores: got shape \[2, 26\], wanted 27",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
    given, error, message = WRONG[name]
    model = h2ot.hourglass.wrap(encoder_layers(), F, STAGES, "scores")
    with pytest.raises(error, match=message):
        model(**{"x": torch.randn(B, F, C), "scores": torch.randn(B, F)} | given)


def test_wrong_blocks_and_options_are_named():
    with pytest.raises(TypeError, match="blocks: block 0 returned tuple, wanted a tensor"):
        h2ot.hourglass.wrap(nn.ModuleList([Pair(C, C), Pair(C, C)]), F, {1: 9})(torch.randn(B, F, C))
    hourglass = h2ot.Hourglass(F, {numpy.int64(1): numpy.int64(9)})
    assert hourglass.stages == {1: 9}
    with pytest.raises(TypeError, match="block: got str, wanted an integer"):
        hourglass.prune("1", torch.randn(B, F, C))
    with pytest.raises(TypeError, match="keep: got set, wanted an integer"):
        h2ot.Hourglass(F, keep={1, 2}, stages={1: 9})
    with pytest.raises(ValueError, match="channels: got -8, wanted 1 or more"):
        h2ot.Hourglass(F, {1: 9}, recover="attention", channels=-8)
