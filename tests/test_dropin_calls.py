"""dropin.patch: arguments are the original's, by place and by name, in inference and in training; so are its copies."""

import copy
import inspect

import pytest
import torch
from torch import nn

from h2ot_kernels import dropin

from .official_code import mixste, motionbert
from .runners import Recorder
from .test_dropin_patch import C, H, assert_agree, replaced

FAST = "h2ot_kernels::recover_attention"


class Mlp(mixste.Mlp):
    def forward(self, hidden_states):
        return super().forward(hidden_states)


class Attention(mixste.Attention):
    def forward(self, hidden_states, mask=None, *, scaled: float = 1.0):
        out = super().forward(hidden_states)
        return out * scaled if mask is None else out * mask


class Cross(mixste.Cross_Attention):
    def forward(self, query, key, value=None):
        return super().forward(query, key, key if value is None else value)


class Block(mixste.Block):
    def forward(self, tokens, vis=False):
        tokens = tokens + self.attn(hidden_states=self.norm1(tokens))
        return tokens + self.mlp(hidden_states=self.norm2(tokens))


class Temporal(motionbert.Attention):
    """Another name, order and default than the official ones."""

    def forward(self, tokens, mask=None, seqlen=3):
        assert mask is None
        return super().forward(tokens, seqlen)


class Mmpose(motionbert.Attention):
    """mmpose's name of the argument."""

    def forward(self, x, seq_len=1):
        return super().forward(x, seq_len)


def block():
    made = Block(C, H, 2.0)
    made.attn, made.mlp = Attention(C, H), Mlp(C, 2 * C)
    return made


X = torch.randn(6, 5, C, generator=torch.Generator().manual_seed(0)).double()
# what makes the module, its switch, calls, and whether each is fast in inference
CALLS = [
    (lambda: Mlp(C, 2 * C), "mlp", lambda m: m(hidden_states=X), True),
    (lambda: Attention(C, H), "attention", lambda m: m(hidden_states=X), True),
    (lambda: Attention(C, H), "attention", lambda m: m(mask=None, hidden_states=X, scaled=1.0), True),
    (lambda: Attention(C, H), "attention", lambda m: m(X, None), True),
    (lambda: Attention(C, H), "attention", lambda m: m(X, X[..., :1]), False),
    (lambda: Attention(C, H), "attention", lambda m: m(X, scaled=0.5), False),
    (lambda: Cross(C, H), "cross_attention", lambda m: m(X, value=X, key=X[:, :3].repeat(1, 2, 1)[:, :5]), True),
    (lambda: Cross(C, H), "cross_attention", lambda m: m(X, X), False),
    (block, "block", lambda m: m(tokens=X), True),
    (block, "block", lambda m: m(X, vis=False), True),
    (lambda: Temporal(C, H, "temporal"), "attention", lambda m: m(X), True),
    (lambda: Temporal(C, H, "temporal"), "attention", lambda m: m(X, None, 2), True),
    (lambda: Temporal(C, H, "temporal"), "attention", lambda m: m(seqlen=6, tokens=X), True),
    (lambda: Temporal(C, H, "spatial"), "attention", lambda m: m(X, None), True),
    (lambda: motionbert.Attention(C, H, "temporal"), "attention", lambda m: m(X, 2), True),
    (lambda: motionbert.Attention(C, H, "temporal"), "attention", lambda m: m(seqlen=2, x=X), True),
    (lambda: Mmpose(C, H, "temporal"), "attention", lambda m: m(X, 2), True),
    (lambda: Mmpose(C, H, "temporal"), "attention", lambda m: m(X, seq_len=3), True),
    (lambda: Mmpose(C, H, "spatial"), "attention", lambda m: m(X, 2), True),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", range(len(CALLS)))
def test_arguments_are_bound_by_the_originals_signature(number, training):
    make, kernel, call, fast = CALLS[number]
    module = make().double().train(training)
    with torch.set_grad_enabled(training):
        before = call(module)
        with dropin.patch(module) as handle, Recorder() as called:
            assert_agree([call(module)], [before], 1e-9)
    assert kernel in replaced(handle)
    if not training and kernel != "mlp":
        assert (FAST in called.names) == fast


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_layers_take_input_by_name(training, dtype):
    layer, x = nn.Linear(C, 2 * C).to(dtype).train(training), X.to(dtype)
    with torch.set_grad_enabled(training):
        before = layer(input=x)
        with dropin.patch(layer):
            torch.testing.assert_close(layer(input=x), before)
            assert next(iter(inspect.signature(layer.forward).parameters)) == "input"


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(),
        lambda m: m(None),
        lambda m: m(x=X),
        lambda m: m(X, hidden_states=X),
        lambda m: m(X, None, None),
        lambda m: m(X, other=1),
    ],
)
def test_wrong_calls_raise_what_the_original_raises(call):
    attention = Attention(C, H).double().eval()
    with pytest.raises((TypeError, AttributeError)) as before:
        call(attention)
    with dropin.patch(attention), pytest.raises(before.type) as after:
        call(attention)
    assert str(after.value) == str(before.value)


class OwnNames(mixste.Attention):
    calls, by_name = 2.0, 0.5

    def forward(self, x):
        return super().forward(x) * (self.calls * self.by_name if self.training else 1)


def test_attributes_of_a_class_are_not_hidden():
    attention = OwnNames(C, H).double()
    before = attention(X)
    with dropin.patch(attention) as handle:
        assert_agree([attention(X)], [before], 1e-9)
    assert "its class has by_name, calls, which the fast form would hide" in handle.report()


class Copied(mixste.Mlp):
    def __deepcopy__(self, memo):
        twin = memo[id(self)] = Copied(C, 2 * C).to(self.fc1.weight.dtype)
        twin.load_state_dict(self.state_dict())
        twin.is_copied = True
        return twin


def test_a_deepcopy_of_its_own_makes_the_copy():
    model = nn.Sequential(Copied(C, 2 * C), mixste.Mlp(C, 2 * C)).double().eval()
    with torch.no_grad(), dropin.patch(model):
        twin = copy.deepcopy(model)
        assert_agree([twin(X)], [model(X)], 1e-9)
    assert twin[0].is_copied
    assert type(twin[0]) is Copied
    assert type(twin[1]) is not mixste.Mlp


@pytest.mark.parametrize("width", [2, C - 1, C + H])
def test_a_wrong_number_of_channels_is_refused_in_the_original_words(width):
    attention, x, said = mixste.Attention(C, H).eval(), torch.zeros(2, 5, width), []
    with torch.no_grad():
        for patched in (False, True):
            with pytest.raises(RuntimeError) as error, dropin.patch(attention, attention=patched, linear=patched):
                attention(x)
            said.append(str(error.value))
    assert said[0] == said[1]
