"""Official checkpoints: every layout of the file, and what is said of one that does not fit."""

import numpy as np
import pytest
import torch
from torch import nn

from h2ot_kernels import hosts

from .host_cases import NAMES, inputs, poses, small


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [None, "model", "model_pos", "state_dict"])
@pytest.mark.parametrize("name", ["hot_mixste", "hot_motionagformer"])
def test_checkpoint_round_trip(tmp_path, name, prefix, wrap):
    source, target = small(name), small(name)
    with torch.no_grad():
        for tensor in target.parameters():
            tensor.zero_()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    if wrap:
        state = {wrap: state, "epoch": 3, "lr": 1e-4, "min_loss": np.float64(40.9), "optimizer": {"state": {}}}
    torch.save(state, tmp_path / "model.pth")
    assert hosts.load_checkpoint(target, tmp_path / "model.pth") is target
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_host_made_without_memory_and_then_filled_is_whole(name, assign):
    """The state_dict fills all of it, what the host knows without one (the skeleton) too."""
    source, (x, _) = small(name).eval(), inputs(name)
    with torch.device("meta"):
        target = small(name).eval()
    if not assign:
        target.to_empty(device="cpu")
        made, state = dict(source.named_buffers()), source.state_dict()
        assert all(torch.equal(found, made[key]) for key, found in target.named_buffers() if key not in state)
    target.load_state_dict(source.state_dict(), assign=assign)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(poses(target(x)), poses(source(x)))


def test_weights_for_a_host_without_memory_are_refused(tmp_path):
    torch.save(small("h2ot_mixste").state_dict(), tmp_path / "weights.pth")
    with torch.device("meta"):
        model = small("h2ot_mixste")
    with pytest.raises(ValueError, match="on meta, wanted weights with memory"):
        hosts.load_checkpoint(model, tmp_path / "weights.pth")
    hosts.load_checkpoint(model.to_empty(device="cpu"), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "beside",
    [np.random.RandomState(1), np.random.default_rng(1).normal(size=3), np.float32(1e-4), np.int64(3)],
    ids=["generator", "array", "float32", "int64"],
)
def test_what_stands_beside_the_weights_is_passed_over(tmp_path, beside):
    """MixSTE's training saves its generator as "random_state"."""
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save({"epoch": 3, "random_state": beside, "model_pos": source.state_dict()}, tmp_path / "model.bin")
    assert torch.equal(hosts.load_checkpoint(target, tmp_path / "model.bin").weight, source.weight)


def test_weights_that_are_numpy_arrays_are_no_state_dict(tmp_path):
    torch.save({"weight": np.zeros((3, 2)), "bias": np.zeros(3)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        hosts.load_checkpoint(nn.Linear(2, 3), tmp_path / "model.pth")


def test_checkpoint_that_does_not_fit_names_every_key(tmp_path):
    state = small("hot_mixste").state_dict()
    del state["x_token"], state["head.1.bias"]
    state["cross_attention.linear_v.bias"] = torch.zeros(5)
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pth")
    target = small("hot_mixste")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit MixSTE") as caught:
        hosts.load_checkpoint(target, tmp_path / "model.pth")
    assert str(caught.value).splitlines()[1:] == [
        "  missing: x_token",
        "  missing: head.1.bias",
        "  unexpected: extra.weight",
        "  shape: cross_attention.linear_v.bias is [5], wanted [32]",
    ]
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


class NotData:
    """An object that only an unsafe load would make."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NotData(), "is not a checkpoint of plain tensors"),
        ([1, 2], "holds no state_dict"),
        ({}, "holds no state_dict"),
        ({"weight": 3}, "holds no state_dict"),
        ({0: torch.zeros(2)}, "holds no state_dict"),
        ({"model": {0: torch.zeros(2)}}, "holds no state_dict"),
        ({"weight": torch.zeros(2, 2), "module.weight": torch.zeros(2, 2)}, "holds weight twice"),
    ],
)
def test_checkpoint_without_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        hosts.load_checkpoint(nn.Linear(2, 2), tmp_path / "model.pth")


# Text, pickles that take from an empty stack, ask for what was not stored, or end within a number.
DAMAGED = (
    b"",
    b"not a checkpoint at all",
    b"hello world, this is text\n",
    b"\x80\x02a.",
    b"\x80\x02h\x07.",
    b"\x80\x02J\x01",
)


def test_checkpoint_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        hosts.load_checkpoint(nn.Linear(2, 2), tmp_path / "none.pth")
    for content in DAMAGED:
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint") as caught:
            hosts.load_checkpoint(nn.Linear(2, 2), tmp_path / "bad.pth")
        assert "\n" not in str(caught.value)


def test_of_a_checkpoint_that_holds_objects_the_reason_is_one_line_without_advice_to_trust_it(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"Unsupported global: GLOBAL torch.nn.modules.linear.Linear") as caught:
        hosts.load_checkpoint(nn.Linear(2, 2), tmp_path / "module.pth")
    said = str(caught.value)
    assert "\n" not in said
    assert "Re-running" not in said
    assert "safe_globals" not in said


def test_a_checkpoint_that_holds_itself(tmp_path):
    content = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        hosts.load_checkpoint(nn.Linear(2, 2), tmp_path / "model.pth")


@pytest.mark.parametrize("wrap", ["model_pos", "state_dict"])
def test_the_wrapper_that_holds_tensors_counts(tmp_path, wrap):
    """A configuration may be called "model", too."""
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save({"model": {"lr": 1, "state_dict": {}}, wrap: source.state_dict()}, tmp_path / "model.pth")
    assert torch.equal(hosts.load_checkpoint(target, tmp_path / "model.pth").weight, source.weight)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda x: x.to_sparse(), "tensor: weight is torch.sparse_coo, wanted plain"),
        (lambda x: x.to("meta"), "tensor: weight is without data, wanted plain"),
        (lambda x: x.to(torch.complex64), "dtype: weight is torch.complex64, wanted torch.float32"),
    ],
)
def test_weights_that_cannot_be_copied(tmp_path, kind, message):
    model = nn.Linear(2, 3)
    before = model.weight.detach().clone()
    torch.save({**model.state_dict(), "weight": kind(torch.ones(3, 2))}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        hosts.load_checkpoint(model, tmp_path / "model.pth")
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda model: (model, model.state_dict()),
            "path: got OrderedDict, wanted the name of a file; model.load",
        ),
        (lambda model: ("model.pth", model), "model: got str, wanted an nn.Module"),
        (lambda model: (model, 3), "path: got int, wanted the name of a file"),
    ],
)
def test_arguments_of_other_kinds_are_named(given, message):
    """By their kinds, in a line: not by what they hold."""
    with pytest.raises(TypeError, match=message) as caught:
        hosts.load_checkpoint(*given(small("mixste")))
    assert len(str(caught.value)) < 120
