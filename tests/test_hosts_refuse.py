"""What hosts are given and would not use is refused."""

import pytest
import torch

from h2ot_kernels import hosts

from .host_cases import NAMES, inputs, small


@pytest.mark.parametrize("name", hosts.LIFTING)
def test_an_unknown_argument_is_named_beside_the_known_ones(name):
    wanted = f"dim_feat: got an argument that {name} does not have, wanted some of num_frames, .*, channels.*, pipeline"
    with pytest.raises(TypeError, match=wanted):
        hosts.build(name, channels=32, dim_feat=256)


@pytest.mark.parametrize("name", [name for name in NAMES if "_" not in name])
def test_frames_to_keep_are_refused_where_none_are_pruned(name):
    model, (x, _) = small(name).eval(), inputs(name)
    with pytest.raises(ValueError, match="index: got frames to keep, wanted None: this model prunes none"):
        model(x, torch.arange(9)[None])
    pose, index = model(x, return_index=True)
    assert torch.equal(model(x, index), pose)
