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
from h2ot_kernels.graph import graph_update
from h2ot_kernels.hosts import motionagformer

from .test_graph import chosen as chosen_by

RECORDED = Path(__file__).resolve().parents[2] / "shared" / "official"
MODELS = (
    "mixste",
    "hot_mixste",
    "tpc_mixste",
    "motionbert",
    "hot_motionbert",
    "mhformer",
    "tpc_mhformer",
    "motionagformer",
    "hot_motionagformer",
)
# A frame is at the graph's threshold as far as float32 can tell where its product, in float64, is this near to it, as a
# share of the row's largest: ten times what the deviation of the features (1e-6 of their scale here) makes of products.
NEAR_TIE = 1e-5


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
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            state[name] = 1 + 0.1 * v
        elif name.endswith("running_mean"):
            state[name] = 0.1 * v
        elif len(shape) == 1:
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


def official_weights(name, state_shapes):
    """The host in float64, eval mode, with the formula's weights."""
    model = hosts.build(name).double().eval()
    model.load_state_dict(formula_weights(state_shapes[name]), strict=True)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_recorded_frames_and_outputs(state_shapes, name, monkeypatch):
    recorded = np.load(RECORDED / f"{name}.npz")
    expected = torch.from_numpy(recorded["output"]).double()
    scale = expected.abs().max()
    model = official_weights(name, state_shapes)
    graphs = Adjacencies(monkeypatch)
    x = formula_input(*model.in_shape)
    with torch.inference_mode():
        pose, index = model(x, noise=formula_noise(x.shape[1]), return_index=True)
        if "index" in recorded:
            assert index.tolist() == recorded["index"].tolist()
        assert pose.shape == expected.shape
        assert (pose - expected).abs().max() <= 1e-6 * scale

        graphs.inject()
        pose, _ = model.float()(x.float(), index if len(index) else None, return_index=True)
        assert (pose.double() - expected).abs().max() <= (1e-4 if graphs.found else 1e-3) * scale
    assert len(graphs.found) == (16 if "motionagformer" in name else 0)
    assert all(margin <= NEAR_TIE for margin in graphs.margins)


class Adjacencies:
    """Records the temporal adjacency of every graph of a float64 run, and injects it into a float32 run.

    margins: for each entry that the float32 run would have had otherwise, how near to the row's threshold its product
    is in float64, as a share of the largest product of the row.
    """

    def __init__(self, monkeypatch):
        self.found, self.margins, self.injected = [], [], None

        def update(x, u, v, residual, scale, norm, dim, adjacency, neighbours):
            if adjacency is None:
                adjacency = self.given(x.movedim(dim, 2), chosen_by(x, dim, neighbours), neighbours)
            return graph_update(x, u, v, residual, scale, norm, dim, adjacency, neighbours)

        monkeypatch.setattr(motionagformer, "graph_update", update)

    def given(self, rows, chosen, neighbours):
        if self.injected is None:
            self.found.append((rows, chosen))
            return chosen
        exact_rows, exact = next(self.injected)
        similarity = exact_rows @ exact_rows.mT
        threshold = similarity.topk(neighbours, dim=-1).values[..., -1:]
        margin = (similarity - threshold).abs() / similarity.abs().amax(-1, keepdim=True)
        self.margins += margin[chosen != exact].tolist()
        return exact

    def inject(self):
        self.injected = iter(self.found)
