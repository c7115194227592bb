"""Integers of the host as tensors: made without a copy that waits for a GPU, and kept for the graphs that read them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import h2ot_kernels as h2ot
from h2ot_kernels import checks, constants

META = torch.device("meta")


@pytest.fixture(autouse=True)
def nothing_made_before(monkeypatch):
    monkeypatch.setattr(constants, "_MADE", {})


class Copies(TorchFunctionMode):
    """Functions through which values of the host come to a device, and wait for it."""

    COPYING = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.to, torch.Tensor.copy_)

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.COPYING:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("values", [[], [7], [4, 4, 4], [0, 3, 6, 9, 12], [5, 1, 1, 9, 200, 3, 2, 1, 1]])
def test_stretches_are_the_values(values):
    parts = [constants._even(*part, torch.device("cpu")) for part in constants._stretches(values)]
    assert [value for part in parts for value in part.tolist()] == values
    assert all(part.dtype == torch.int64 for part in parts)
    made = constants.integers(values, META)
    assert (made.shape, made.dtype, made.device) == ((len(values),), torch.int64, META)


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor])
def test_a_copy_is_seen(make):
    with Copies() as copies:
        make([1, 2], device="meta")
    assert copies.seen


@pytest.mark.parametrize("keep", [3, [3, 5], (0, 2, 7, 8)])
def test_frames_to_keep_are_not_copied(keep, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as in a graph: nothing is taken from before
    with Copies() as copies:
        kept = checks.kept(keep, 2, 9, 4, META)
    assert kept.device == META
    assert not copies.seen


def test_lengths_are_not_copied():
    x = torch.empty(4, 9, 3, device="meta")
    with Copies() as copies:
        mask = checks.validity(x, None, [9, 3, 3, 0])
    assert mask.shape == (4, 9)
    assert not copies.seen
    for runs in ([2, 9, 0], (2, 9, 0)):
        assert checks.validity(torch.empty(3, 9), None, runs).sum(1).tolist() == [2, 9, 0]


@pytest.mark.parametrize("pruner", ["cluster", "scores", "sampler"])
def test_an_hourglass_makes_its_kept_frames_once(pruner, monkeypatch):
    hourglass = h2ot.Hourglass(27, {1: 9}, pruner, keep=[0, 13, 20])
    x, scores = torch.randn(2, 27, 4), torch.randn(2, 27)
    first = hourglass.prune(1, x, scores=scores)[1]
    assert len(constants._MADE) == 1

    def refused(*given, **named):
        raise AssertionError("made anew")

    monkeypatch.setattr(torch, "tensor", refused)
    monkeypatch.setattr(constants, "integers", refused)
    assert torch.equal(hourglass.prune(1, x, scores=scores)[1][0], first[0])


def test_samples_are_made_where_the_device_stands_now():
    assert h2ot.prune_sample(11, 4).device.type == "cpu"
    with META:
        assert h2ot.prune_sample(11, 4).device == META
        assert h2ot.prune_sample(12, 4).device == META
    assert h2ot.prune_sample(12, 4).tolist() == [[0, 3, 7, 11]]
    assert h2ot.prune_sample(11, 4).tolist() == [[0, 3, 6, 10]]
    torch.set_default_device("meta")
    try:
        assert h2ot.prune_sample(11, 4).device == META
    finally:
        torch.set_default_device(None)
    assert h2ot.prune_sample(11, 4, device="meta").device == META


def test_an_unindexed_device_is_asked_for_each_time(monkeypatch):
    current = [torch.device("cuda", 0)]
    monkeypatch.setattr(torch, "empty", lambda size, device: type("Empty", (), {"device": current[0]}))
    assert constants.resolved("cuda") == torch.device("cuda", 0)
    current[0] = torch.device("cuda", 1)
    assert constants.resolved(torch.device("cuda")) == torch.device("cuda", 1)
    assert constants.resolved(torch.device("cuda", 0)) == torch.device("cuda", 0)


def test_a_result_is_the_callers_own():
    h2ot.prune_sample(11, 4).fill_(-1)
    assert h2ot.prune_sample(11, 4).tolist() == [[0, 3, 6, 10]]
    with torch.inference_mode():
        h2ot.prune_sample(15, 4)
    assert not constants.shared((0, 4, 9, 14), torch.device("cpu")).is_inference()


def test_what_was_made_stays_and_no_more_than_so_many():
    cpu = torch.device("cpu")
    first = constants.shared((0, 1), cpu)
    for value in range(2 * constants.MOST):
        assert constants.shared((value, value), cpu).tolist() == [[value, value]]
    assert constants.shared((0, 1), cpu) is first
    assert len(constants._MADE) == constants.MOST


def test_a_capture_reads_what_is_there_and_leaves_nothing(monkeypatch):
    """What a capture makes is in the memory of its graph, and holds its values after a replay only."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(constants, "integers", lambda values, device: torch.tensor(values))
    assert constants.shared((0, 5), device).tolist() == [[0, 5]]
    assert not constants._MADE
    warm = constants._MADE[device, (0, 5)] = torch.tensor([[0, 5]])
    assert constants.shared((0, 5), device) is warm


def test_transforms_and_modes_leave_nothing():
    torch.func.functionalize(lambda x: x + h2ot.prune_sample(11, 4))(torch.zeros(1, 4))
    with FakeTensorMode():
        h2ot.select_tokens(torch.zeros(2, 11), 4, keep=[1, 5, 9])
    assert not constants._MADE
    compiled = torch.compile(lambda x: h2ot.select_tokens(x, 4, keep=[1, 5, 9]), backend="eager", fullgraph=True)
    x = torch.randn(2, 11)
    assert torch.equal(compiled(x), h2ot.select_tokens(x, 4, keep=[1, 5, 9]))
