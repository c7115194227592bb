"""dropin.patch tries each module with its own attributes, on long sequences, in each number of axes."""

import pytest
import torch
from torch import nn

from h2ot_kernels import dropin
from h2ot_kernels.dropin.recognise import LONG, _contents, _differ
from h2ot_kernels.dropin.settings import settings_of

from .official_code import mixste
from .runners import Recorder
from .test_dropin_patch import C, H, assert_agree, hot_mixste, replaced


def agrees(model, *x):
    """model gives the same patched as unpatched; returns (the handle, the names of the operators that ran)."""
    with torch.no_grad():
        before = model(*x)
        with dropin.patch(model) as handle, Recorder() as called:
            assert_agree([model(*x)], [before], 1e-9)
    return handle, called.names


def left(handle, kernel):
    return [entry.where for entry in handle.entries if entry.kernel == kernel and not entry.is_replaced]


class GainBlock(mixste.Block):
    def __init__(self, gain):
        super().__init__(C, H, 2.0)
        self.gain = gain

    def forward(self, x):
        x = x + self.gain * self.attn(self.norm1(x))
        return x + self.gain * self.mlp(self.norm2(x))


class GainMlp(mixste.Mlp):
    def __init__(self, gain):
        super().__init__(C, 2 * C)
        self.gain = gain

    def forward(self, x):
        gain = self.gain
        while isinstance(gain, (dict, list, tuple)):
            gain = gain["gain"] if isinstance(gain, dict) else gain[0]
        return super().forward(x) * (gain() if callable(gain) else gain)


@pytest.mark.parametrize(("make", "kernel"), [(GainBlock, "block"), (GainMlp, "mlp")])
def test_each_tensor_is_tried(make, kernel):
    model = nn.Sequential(*map(make, torch.linspace(1, 0.1, 4))).double().eval()
    handle, _ = agrees(model, torch.randn(2, 9, C).double())
    assert left(handle, kernel) == ["1", "2", "3"]


def one():
    return 1.0


def tenth():
    return 0.1


WRAPPED = {
    "list": lambda gain: [gain],
    "nested": lambda gain: {"gain": ({"gain": [gain]},)},
    "list of tensors": lambda gain: [torch.tensor(gain)],
    "function": lambda gain: one if gain == 1 else tenth,
    "lambda": lambda gain: lambda: gain,
    "tensor": torch.tensor,
    "array": lambda gain: torch.tensor(gain).numpy()[()],
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_attributes_are_compared_by_value(kind):
    model = nn.Sequential(*(GainMlp(WRAPPED[kind](gain)) for gain in (1.0, 0.1, 1.0))).double().eval()
    handle, _ = agrees(model, torch.randn(2, 9, C).double())
    assert left(handle, "mlp") == ["1"]


class Masked(mixste.Attention):
    """Attention whose weights `mask` changes."""

    def __init__(self, **attributes):
        super().__init__(C, H)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        weights = self.mask(heads[0] @ heads[1].mT * self.scale).softmax(-1)
        return self.proj((weights @ heads[2]).transpose(-2, -3).flatten(-2))

    def mask(self, scores):
        return scores


class Switched(Masked):
    def mask(self, scores):
        N = scores.shape[-1]
        return scores + torch.full((N, N), -torch.inf).triu(1) if self.flags["causal"] else scores


def test_dictionaries_are_compared_by_value():
    model = nn.Sequential(*(Switched(flags={"causal": causal}) for causal in (False, True, False)))
    handle, _ = agrees(model.double().eval(), torch.randn(2, 9, C).double())
    assert left(handle, "attention") == ["1"]


class Registered(Masked):
    def __init__(self):
        super().__init__()
        self.register_buffer("full", torch.tensor(False))

    def mask(self, scores):
        return scores if self.full else scores + torch.full_like(scores, -torch.inf).triu(1)


def test_a_switch_that_is_a_buffer():
    handle, _ = agrees(Registered().double().eval(), torch.randn(2, 9, C).double())
    assert "its buffer full of torch.bool may be a switch" in handle.report()


def test_equal_attributes_share_a_trial(monkeypatch):
    tried, forward = [], Switched.forward
    monkeypatch.setattr(Switched, "forward", lambda self, x: tried.append(x.shape) or forward(self, x))
    counts = []
    for layers in (1, 5):
        dropin.patch(nn.ModuleList(Switched(flags={"causal": False, "sizes": [1, 2]}) for _ in range(layers))).unpatch()
        counts.append(len(tried))
        tried.clear()
    assert counts[0] == counts[1] > 0


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


@pytest.mark.parametrize(("chances", "trials"), [((0.1, 0.2), 1), ((0.0, 0.2), 2), ((0.2, 1.0), 2), ((0, 0.0), 2)])
def test_blocks_that_drop_some_share_a_trial(chances, trials):
    assert len({settings_of(DropPath(chance)) for chance in chances}) == trials


class Counts(mixste.Attention):
    def __init__(self):
        super().__init__(C, H)
        self.calls = torch.zeros(())

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("inference", [False, True])
def test_what_a_forward_counts_in_a_tensor_is_seen_and_not_touched(inference):
    attention = Counts()
    with torch.inference_mode(inference), dropin.patch(attention) as handle:
        assert "its forward stores calls" in handle.report()
    assert attention.calls == 0


class Passes(nn.Identity):
    """Its calls are counted in what it holds."""

    def __init__(self, holds):
        super().__init__()
        self.holds = holds

    def forward(self, x):
        self.holds.append(len(x)) if isinstance(self.holds, list) else self.holds.add_(1)
        return x


class WithDropPath(mixste.Block):
    def __init__(self, holds):
        super().__init__(C, H, 2.0)
        self.drop_path = nn.Sequential(Passes(holds))

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@pytest.mark.parametrize("holds", [list, lambda: torch.zeros(())])
def test_what_a_part_of_it_stores_is_seen_and_not_touched(holds):
    block = WithDropPath(holds()).double().eval()
    with dropin.patch(block) as handle:
        assert "left block WithDropPath: its forward stores drop_path.0.holds" in handle.report()
        assert {"attention", "mlp"} <= replaced(handle)
    held = block.drop_path[0].holds
    assert held == [] if isinstance(held, list) else held == 0
    agrees(block, torch.randn(2, 6, C).double())
    assert len(held) == 4 if isinstance(held, list) else held == 4  # twice a call


class Window(Masked):
    def mask(self, scores):
        i = torch.arange(scores.shape[-1])
        return scores.masked_fill((i[:, None] - i).abs() > self.width, -torch.inf)


class Best(Masked):
    def mask(self, scores):
        least = scores.topk(min(self.width, scores.shape[-1]), dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -torch.inf)


@pytest.mark.parametrize("cls", [Window, Best])
@pytest.mark.parametrize("width", [16, LONG - 2])
def test_what_long_sequences_show(cls, width):
    handle, _ = agrees(cls(width=width).double().eval(), torch.randn(2, LONG, C).double())
    assert left(handle, "attention")


class AtLength(Masked):
    """Of so many tokens some are left out."""

    def mask(self, scores):
        i = torch.arange(scores.shape[-1])
        return scores.masked_fill(i[:, None] < i, -torch.inf) if len(i) == self.length else scores


class WithTable(Masked):
    """A table of positions, for the clips that it has the size of."""

    def __init__(self, frames):
        super().__init__()
        self.table = nn.Parameter(torch.randn(frames, frames))

    def mask(self, scores):
        return scores + self.table if scores.shape[-1] == len(self.table) else scores


@pytest.mark.parametrize("attention", [AtLength(length=17), AtLength(length=27), WithTable(81)])
def test_lengths_that_a_forward_may_know_are_tried(attention):
    for N in (17, 27, 81):
        handle, _ = agrees(attention.double().eval(), torch.randn(2, N, C).double())
        assert left(handle, "attention")


class Shows(Masked):
    """Its weights can be looked at, in some calls."""

    def mask(self, scores):
        if (self.training, scores.requires_grad)[self.which]:
            self.seen = scores
        return scores


def test_what_is_stored_in_training_is_stored():
    """In inference the fast form runs: nothing is stored there."""
    attention, x = Shows(which=0), torch.randn(2, 5, C)
    with dropin.patch(attention.eval()) as handle:
        assert "attention" in replaced(handle)
        attention(x)
        assert not hasattr(attention, "seen")
        attention.train()(x)
        assert attention.seen.shape == (2, H, 5, 5)


def test_what_is_stored_where_autograd_records_is_seen():
    with dropin.patch(Shows(which=1).eval()) as handle:
        assert "its forward stores seen where autograd records" in handle.report()


class Shorter(Masked):
    def mask(self, scores):
        assert scores.shape[-1] < LONG
        return scores


def test_what_cannot_be_tried_with_a_long_sequence_is_left():
    handle, _ = agrees(Shorter().double().eval(), torch.randn(2, 9, C).double())
    assert "it could not be tried: AssertionError" in handle.report()


class OverFrames(mixste.Attention):
    """x [B, N, C], or [B, F, J, C] over the frames of each joint."""

    def forward(self, x):
        if x.dim() == 3:
            return super().forward(x)
        rows = super().forward(x.transpose(1, 2).flatten(0, 1))
        return rows.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class OverAll(mixste.Attention):
    """x [B, N, C], or [B, F, J, C] over all F J tokens."""

    def forward(self, x):
        return super().forward(x.reshape(x.shape[0], -1, C)).view_as(x)


@pytest.mark.parametrize(("cls", "fast_in_both"), [(OverFrames, True), (OverAll, False)])
@pytest.mark.parametrize("in_block", [False, True])
def test_each_number_of_axes_is_tried(cls, fast_in_both, in_block):
    block = mixste.Block(C, H, 2.0)
    block.attn = cls(C, H)
    model = (Plain(block) if in_block else block.attn).double().eval()
    for size in ((2, 9, C), (2, 9, 4, C)):
        handle, names = agrees(model, torch.randn(size).double())
        assert {"attention", "block"} & replaced(handle) == ({"attention", "block"} if in_block else {"attention"})
        assert ("h2ot_kernels::recover_attention" in names) == (fast_in_both or len(size) == 3)


class Plain(nn.Module):
    """A block that takes any number of axes."""

    def __init__(self, block):
        super().__init__()
        for name, child in block.named_children():
            setattr(self, name, child)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_what_the_own_forward_refuses_is_still_refused():
    attention = mixste.Attention(C, H).eval()
    with torch.no_grad(), dropin.patch(attention) as handle:
        assert "attention" in replaced(handle)
        with pytest.raises(ValueError, match="too many values to unpack"):
            attention(torch.randn(2, 9, 4, C))


def test_an_attention_exchanged_for_one_of_other_axes():
    one, other = (Plain(mixste.Block(C, H, 2.0)).double().eval() for _ in range(2))
    one.attn, other.attn = OverFrames(C, H).double().eval(), OverAll(C, H).double().eval()
    x = torch.randn(2, 9, 4, C).double()
    with torch.no_grad(), dropin.patch([one, other]):
        one.attn = other.attn
        after = one(x)
    with torch.no_grad():
        assert_agree([after], [one(x)], 1e-9)


def test_cross_attention_of_other_axes_and_batches_is_the_originals():
    attention = mixste.Cross_Attention(C, H).double().eval()
    x, keys = torch.randn(1, 6, C).double(), torch.randn(3, 4, C).double()
    for given in ((x, keys, keys), (x, keys[None], keys[None]), (x, keys[:1], keys[:1])):
        handle, names = agrees(attention, *given)
        assert "cross_attention" in replaced(handle)
        assert ("h2ot_kernels::recover_attention" in names) == (len(given[1]) == 1 and given[1].dim() == 3)


def test_mlps_of_any_number_of_axes_are_fast():
    model = hot_mixste()[0].STEblocks[0].mlp.eval()
    for axes in range(5):
        x = torch.randn(*(3,) * axes, C)
        with torch.no_grad():
            before = model(x)
            with dropin.patch(model), Recorder() as called:
                torch.testing.assert_close(model(x), before)
        assert "aten::gelu" not in called.names


@pytest.mark.parametrize("pack", [lambda x: x, lambda x: [x], lambda x: {"x": x}])
def test_what_a_forward_stores_is_seen_where_its_place_in_memory_is_used_again(pack):
    """Of tensors that are freed and made by turns, the next mostly stands where the last one stood."""
    held = pack(torch.zeros(()))
    before = _contents(held)
    assert not _differ(before, _contents(held))
    for _ in range(20):
        held = None
        held = pack(torch.zeros(()))
        assert _differ(before, _contents(held))
