"""Hosts whose layers are hooked, wrapped (LoRA) or subclassed: in inference as in training, as the official model."""

import pytest
import torch
from torch import nn

from h2ot_kernels import hosts
from h2ot_kernels.linear import Linear

from .host_cases import NAMES, assert_near, inputs, official, poses, small

TINY = {"num_frames": 18, "channels": 32, "num_heads": 4}
BASES = {
    "mixste": {"depth": 2},
    "motionbert": {"depth": 2, "representation": 48},
    "mhformer": {"hidden": 48, "encoder_depth": 1},
    "motionagformer": {"depth": 2, "representation": 48},
}
FTP = {"image_size": (64, 48), "channels": 32, "depth": 2, "num_heads": 2, "head_channels": 16, "prune_at": 1}
EACH_LAYER = ("hot_mixste", "hot_motionbert", "mhformer", "hot_motionagformer", "ftp_pose")  # of every host


def tiny(name):
    """A host of random parameters in eval mode, and what it is called with: the same frames are kept in every call."""
    torch.manual_seed(5)
    size = FTP if name == "ftp_pose" else TINY | BASES[name.rsplit("_", 1)[-1]]
    if name.partition("_")[0] in ("hot", "tpc"):
        size = size | {"stages": {1: 9}}
    elif name.startswith("h2ot"):
        size = size | {"stages": {0: 12, 1: 9}}
    model = hosts.build(name, **size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = [torch.randn(1, *model.in_shape)]
    if "stages" in size:
        given.append(model(*given, return_index=True)[1])
    return model, given


def of_each_kind(model, *kinds):
    """(name, module), the first one of those whose names differ in the number of a block only."""
    found = {}
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if not part.isdigit()]
        last = parts[-1:] in (["head"], ["regression"])  # of these each part is another
        if name and isinstance(module, kinds):
            found.setdefault(name if last else ".".join(parts), (name, module))
    return list(found.values())


def both_ways(model, given):
    with_gradients = poses(model(*given))
    with torch.no_grad():
        return with_gradients.detach(), poses(model(*given))


def changed(y):
    """y, its channels turned round."""
    if isinstance(y, (tuple, list)):
        return type(y)(map(changed, y))
    return None if y is None else 1.5 * y.flip(-1)


@pytest.mark.parametrize("name", hosts.HOSTS)
def test_what_a_hook_gives_counts(name):
    """On every module, with gradients and without; and it is called as often."""
    model, given = tiny(name)
    plain = both_ways(model, given)
    assert_near(plain[1], plain[0], 1e-4)
    heard, calls = 0, []
    for where, module in of_each_kind(model, nn.Module):
        calls.clear()
        handle = module.register_forward_hook(lambda module, args, y: (calls.append(0), changed(y))[1])
        with_gradients, without = both_ways(model, given)
        handle.remove()
        error = (without - with_gradients).abs().max() / with_gradients.abs().max()
        assert error < 1e-4, f"{where}: {error:.3g}"
        assert len(calls) % 2 == 0, where
        if calls:
            assert (with_gradients - plain[0]).abs().max() > 1e-3 * plain[0].abs().max(), where
            heard += 1
    assert heard > 20


class LoRA(nn.Module):
    """A layer with an update of low rank beside it, which knows x alone."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.A = nn.Linear(layer.in_features, 2, bias=False)
        self.B = nn.Linear(2, layer.out_features, bias=False)
        nn.init.normal_(self.A.weight, std=0.5)
        nn.init.normal_(self.B.weight, std=0.5)

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs) + self.B(self.A(x))


def exchanged(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@pytest.mark.parametrize("name", EACH_LAYER)
def test_an_update_beside_a_layer_is_one_of_its_weight(name):
    model, given = tiny(name)
    plain, _ = both_ways(model, given)
    for where, layer in of_each_kind(model, nn.Linear):
        wrapper, before = LoRA(layer), layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.add_(wrapper.B.weight @ wrapper.A.weight)
        merged, _ = both_ways(model, given)
        layer.weight.data.copy_(before)
        exchanged(model, where, wrapper)
        for result in both_ways(model, given):
            error = (result - merged).abs().max() / merged.abs().max()
            assert error < 1e-4, f"{where}: {error:.3g}"
        exchanged(model, where, layer)
        assert (merged - plain).abs().max() > 1e-3 * plain.abs().max(), where


@pytest.mark.parametrize("kind", ["subclass", "instance"])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("mixste", "STEblocks.0.attn.qkv"),
        ("mhformer", "Transformer_hypothesis.CHI_blocks.0.attn_2.linear_q"),
        ("mhformer", "Transformer_hypothesis.SHR_blocks.1.attn_3.proj"),
        ("motionbert", "blocks_ts.0.mlp_t.fc1"),
        ("motionbert", "ts_attn.1"),
        ("motionagformer", "layers.0.att_temporal.mlp.fc2"),
    ],
)
def test_a_forward_of_ones_own_is_called_with_x_alone(name, where, kind):
    model, given = tiny(name)
    layer, seen = model.get_submodule(where), []

    class Doubled(type(layer)):
        def forward(self, x):
            seen.append(x)
            return 2 * super().forward(x)

    merged = type(layer)(layer.in_features, layer.out_features, bias=layer.bias is not None).eval()
    merged.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})
    exchanged(model, where, merged)
    expected, _ = both_ways(model, given)
    exchanged(model, where, layer)
    if kind == "subclass":
        layer.__class__ = Doubled
    else:
        layer.forward = lambda x, own=layer.forward: (seen.append(x), 2 * own(x))[1]
    for result in both_ways(model, given):
        assert_near(result, expected, 1e-4)
    assert len(seen) == 2
    assert all(x.shape[-1] == layer.in_features for x in seen)


@pytest.mark.parametrize("name", [name for name in EACH_LAYER if name in NAMES])
def test_hooks_see_what_they_see_in_the_official_model(name):
    """The inputs and outputs of every layer with a weight: the same numbers, in whatever order the tokens lie."""
    model, (x, noise) = small(name).eval(), inputs(name)
    index = model(x, noise=noise, return_index=True)[1]
    index = index if len(index) else None
    partner, seen = official(name, model), {}

    def watch(of, whose):
        return lambda layer, args, y: seen.setdefault(of, {}).setdefault(whose, []).append((args[0], y))

    for whose, watched in (("official", partner), ("ours", model)):
        for of, layer in watched.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d)):
                layer.register_forward_hook(watch(of, whose))
    with torch.no_grad():
        partner(x, index=index)
        model.float()(x.float(), index=index)
    assert len(seen) > 20
    for of, calls in seen.items():
        assert len(calls["ours"]) == len(calls["official"]) == 1, of
        for ours, theirs in zip(calls["ours"][0], calls["official"][0], strict=True):
            numbers = ours.flatten().sort().values
            expected = theirs.flatten().sort().values
            assert len(expected) % len(numbers) == 0, of  # the recovery token is repeated there
            assert_near(numbers, expected[:: len(expected) // len(numbers)], 1e-4)


def test_a_layer_is_nobodys_but_ours_in_the_usual_case(monkeypatch):
    """So that what is fused stays so: a whole host of small channels makes no call in turn."""
    turns = []
    monkeypatch.setattr("h2ot_kernels.linear.in_turn", lambda *args, **given: turns.append(args))
    for name in hosts.HOSTS:
        model, given = tiny(name)
        both_ways(model, given)
        model.train()(*given)
    assert not turns
    layer = Linear(32, 32)
    handle = nn.modules.module.register_module_forward_hook(lambda *call: None)
    try:
        hosts.blocks.project(layer, torch.zeros(1, 32), 0.0)
    finally:
        handle.remove()
    assert len(turns) == 1


class OnlyProducts(torch.Tensor):
    """A weight as tools for quantization make them: a subclass that `functional.linear` takes, and nothing else."""

    @staticmethod
    def __new__(cls, weight):
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made.weight = weight
        return made

    def __tensor_flatten__(self):
        return ["weight"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return OnlyProducts(inner["weight"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            return func(args[0], args[1].weight, *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default), func
        return cls(func(args[0].weight))


@torch.no_grad()
@pytest.mark.parametrize("name", EACH_LAYER)
def test_weights_of_a_subclass_need_know_products_only(name):
    model, given = tiny(name)
    expected = poses(model(*given))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(OnlyProducts(layer.weight.detach()), requires_grad=False)
    assert_near(poses(model(*given)), expected, 1e-4)
