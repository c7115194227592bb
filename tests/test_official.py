"""The hosts against what was recorded from the official models: names, shapes, order, kept frames, outputs.

Weights, input and noise are given by formula, in the recordings' own README.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from h2ot_kernels import hosts

RECORDED = Path(__file__).resolve().parents[2] / "shared" / "official"
MODELS = ("mixste", "hot_mixste", "tpc_mixste")


@pytest.fixture(scope="module")
def state_shapes():
    path = RECORDED / "state_dicts.json"
    if not path.exists():
        pytest.skip(f"the recordings of the official models are not on this machine: {path}")
    return json.loads(path.read_text())


def formula_weights(shapes):
    """The state_dict that the recordings were made with, in float64."""
    state = {}
    for p, (name, shape) in enumerate(shapes.items()):
        j = torch.arange(math.prod(shape), dtype=torch.float64) % 9973
        v = torch.sin(0.7548776662466927 * j + 1.3 * p + 0.5).reshape(shape)
        if len(shape) == 1:
            state[name] = 1 + 0.1 * v if name.endswith("weight") else 0.02 * v
        elif "embed" in name or "token" in name:
            state[name] = 0.1 * v
        else:
            state[name] = v * math.sqrt(2 / math.prod(shape[1:]))
    return state


def formula_input(frames, joints, channels):
    f, j, c = (torch.arange(n, dtype=torch.float64) for n in (frames, joints, channels))
    f, j = f[:, None, None], j[:, None]
    slow = 0.5 * torch.sin(0.031 * f * (1 + j % 5) + 0.7 * j + 1.3 * c)
    return (slow + 0.1 * torch.sin(0.17 * f + j))[None]


def formula_noise(frames):
    return 1e-6 * (0.6180339887498949 * torch.arange(1, frames + 1, dtype=torch.float64)).frac()[None]


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_order(state_shapes, name):
    with torch.device("meta"):
        model = hosts.build(name)
    ours = [(entry, list(value.shape)) for entry, value in model.state_dict().items()]
    assert ours == list(state_shapes[name].items())


@pytest.mark.parametrize("name", MODELS)
def test_recorded_frames_and_outputs(state_shapes, name):
    recorded = np.load(RECORDED / f"{name}.npz")
    expected = torch.from_numpy(recorded["output"]).double()
    scale = expected.abs().max()
    with torch.device("meta"):
        model = hosts.build(name)
    model.load_state_dict(formula_weights(state_shapes[name]), strict=True, assign=True)
    model.eval()
    x = formula_input(*model.in_shape)
    with torch.inference_mode():
        pose, index = model(x, noise=formula_noise(x.shape[1]), return_index=True)
        if "index" in recorded:
            assert index.tolist() == recorded["index"].tolist()
        assert pose.shape == expected.shape
        assert (pose - expected).abs().max() <= 1e-6 * scale

        pose, _ = model.float()(x.float(), index if len(index) else None, return_index=True)
        assert (pose.double() - expected).abs().max() <= 1e-3 * scale
