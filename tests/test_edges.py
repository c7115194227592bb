"""Values at the edge of what is allowed: none of something, numbers of other libraries, products out of range."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot

from .host_cases import small
from .runners import DEVICE


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_no_samples(backend):
    given, none = {"backend": backend}, torch.zeros(0, 3, dtype=torch.int64)
    assert h2ot.gather_tokens(torch.zeros(0, 9, 4), none, **given).shape == (0, 3, 4)
    assert h2ot.select_tokens(torch.zeros(0, 9), 3, keep=none[:, :2], **given).shape == (0, 3)
    assert h2ot.prune_cluster(torch.zeros(0, 9, 4), 3, keep=none[:, :2], **given).shape == (0, 3)
    assert h2ot.score_tokens(torch.zeros(0, 9, 4), lengths=[], **given).score.shape == (0, 9)


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_poses_without_joints_do_not_move(backend):
    pose = torch.zeros(2, 9, 0, 2, device=DEVICE)
    assert h2ot.prune_motion(pose, 3, keep=4, backend=backend).tolist() == [[0, 1, 4]] * 2


def test_lengths_that_are_no_integers():
    for lengths in ([1.5, 2], [True, 2]):
        with pytest.raises(TypeError, match="lengths: got a list with (float|bool), wanted integers"):
            h2ot.score_tokens(torch.zeros(2, 9, 4), lengths=lengths)
    with pytest.raises(TypeError, match="lengths: got int, wanted a tensor"):
        h2ot.score_tokens(torch.zeros(2, 9, 4), lengths=3)


def test_scale_and_cutoff_together():
    x = torch.zeros(1, 4, 3)
    for scale, cutoff in ((1e-100, 1e-70), (1e100, 1e70)):
        with pytest.raises(ValueError, match=r"scale \* cutoff: got 1e[-+]170, wanted a positive number"):
            h2ot.score_tokens(x, density="gaussian", scale=scale, cutoff=cutoff)
    density = h2ot.score_tokens(x, density="gaussian", scale=1e-100, cutoff=1e-50).density
    assert density.tolist() == [[4.0] * 4]


def test_numbers_of_numpy():
    x = torch.randn(2, 9, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = h2ot.score_tokens(x, scale=np.float32(2))
    assert torch.equal(scores.score, h2ot.score_tokens(x, scale=2.0).score)
    lengths = h2ot.score_tokens(x, lengths=np.array([9, 4])).score
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(lengths, h2ot.score_tokens(x, lengths=torch.tensor([9, 4], dtype=dtype)).score)


@pytest.mark.parametrize("keep", [range(1, 2), (1,), [np.int64(1)], np.array([1]), np.int64(1), torch.tensor([1])])
def test_sampled_frames_to_keep(keep):
    assert h2ot.prune_sample(9, 3, keep=keep).tolist() == [[1, 4, 8]]


def test_a_pose_without_keys():
    token, linear = torch.zeros(9, 8), nn.Linear(8, 8)
    with torch.no_grad(), pytest.raises(TypeError, match="key: got NoneType, wanted a tensor"):
        h2ot.recover_pose(token, token, None, None, linear, nn.LayerNorm(8), nn.Linear(8, 3), 2)


def test_wrapped_blocks_that_recover_by_attention_need_channels():
    blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    with pytest.raises(ValueError, match="channels: got None, wanted those of x"):
        h2ot.hourglass.wrap(blocks, 27, stages={1: 9}, recover="attention")
    model = h2ot.hourglass.wrap(blocks, 27, stages={1: 9}, recover="attention", channels=8)
    assert model(torch.randn(1, 27, 8)).shape == (1, 27, 8)


@pytest.mark.parametrize("name", ["hot_mixste", "h2ot_motionbert"])
def test_an_index_for_half_the_batch(name):
    """Twice the batch, as mirrored samples behind their own would make it."""
    model = small(name).float().eval()
    x = torch.randn(2, *model.in_shape)
    with torch.no_grad():
        expected, index = model(x, return_index=True)
        first = index[0] if isinstance(index, tuple) else index
        if first.shape[0] == 1:
            index = tuple(frames.expand(2, -1) for frames in index)
        torch.testing.assert_close(model(x, index), expected)
        with pytest.raises(ValueError, match=r"index: got shape \[2, \d+\], wanted \[1, \d+\] or a row for each of 4"):
            model(torch.cat([x, x.flip(1)]), index)


def test_rows_of_joints_share_the_index_of_their_sample():
    x, index = torch.randn(6, 9, 4), torch.tensor([[0, 4, 8], [1, 2, 7]])
    expected = h2ot.gather_tokens(x, index)
    assert torch.equal(h2ot.Hourglass(9, {0: 3}, num_joints=3).prune(0, x, index=index)[0], expected)
    with pytest.raises(ValueError, match="a row for each of 6 samples"):
        h2ot.Hourglass(9, {0: 3}).prune(0, x, index=index)
