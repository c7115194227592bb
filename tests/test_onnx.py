"""ONNX: the table of decompositions is the definition, and onnxruntime runs what is exported at any batch size.

Hosts: `./dev onnx`.
"""

import doctest

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot
import h2ot_kernels.onnx
import python_ref

from . import cases, test_torch

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

TABLE = h2ot_kernels.onnx.decompositions()
OPS = torch.ops.h2ot_kernels
NOT_FORWARD = {"scatter_tokens", "recover_attention_backward", "recover_interpolate_backward"}
# A model is exported with plain layers.
NOT_EXPORTED = {f"{kind}_{of}" for kind in ("linear", "mlp", "attend") for of in ("tiles", "halves", "floats")}
NOT_EXPORTED |= {"pack_tiles", "add_norm", "graph_update", "recover_rotated"}
SMALL = [case for case in cases.TOKEN_CASES if not case.large and case.B]


def run(path, *inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    assert session.get_inputs()[0].shape[0] == "batch"
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def test_every_forward_operator_has_a_decomposition():
    declared = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("h2ot_kernels::")
    }
    forward = {name for name in declared if not name.endswith(("_triton", "_out"))} - NOT_FORWARD - NOT_EXPORTED
    assert {op.name().removeprefix("h2ot_kernels::") for op in TABLE} == forward


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_scoring_decides_as_the_oracle(case):
    x, given = case.tokens(), case.arguments()
    valid = python_ref.score.valid_tokens(cases.oracle_tokens(x), given.get("mask"), given.get("lengths"))
    noise = None if given.get("noise") is None else given["noise"].double()
    keep = None if case.keep is None else torch.tensor([[case.keep]])
    index = TABLE[OPS.prune_cluster.default](x, case.K, case.k, keep, valid, noise)
    assert torch.equal(index, cases.oracle_index(case))
    labels = TABLE[OPS.assign_clusters.default](x, index, valid)
    assert torch.equal(labels, cases.oracle_labels(case))
    for ours, oracle in zip(
        TABLE[OPS.score_tokens.default](x, case.k, valid, noise), cases.oracle_scores(case), strict=True
    ):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=0)


def test_every_decomposition_gives_what_the_operator_gives():
    seen = set()
    for op, arguments in test_torch.samples():
        if op.default not in TABLE:
            continue
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        ours, kernel = TABLE[op.default](*arguments), op(*arguments)
        for mine, theirs in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (ours, kernel)), strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.shape == theirs.shape
        seen.add(op.default)
    assert seen == set(TABLE)


class EveryOperation(nn.Module):
    """Tokens [B, 9, 3, 8] -> the results of every forward operation, indices first."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(1, 4, 8))
        self.recover = h2ot.nn.TokenRecoveringAttention(8, 2)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
        self.token = nn.Parameter(torch.randn(1, 9, 8))

    def forward(self, x):
        heads = x.movedim(2, 1)[:, :, None]
        index = h2ot.prune_cluster(x, 4, keep=3)
        kept = h2ot.gather_tokens(x, index, self.embed)
        labels = h2ot.assign_clusters(x, index)
        merged = h2ot.merge_tokens(x[:, :, 0], labels, 4, x[..., 0, 0].square())
        pose = self.recover(self.token, kept, head=self.head)
        sampled = h2ot.prune_sample(9, 4, device=x.device)
        moved = h2ot.gather_tokens(x, sampled, dim=1, out_dim=2)
        full = [h2ot.recover_interpolate(merged, given, 9) for given in (index, sampled)]
        nearest = h2ot.recover_interpolate(merged, None, 9, mode="nearest", align="uniform")
        others = h2ot.prune_motion(x[..., :2], 4), h2ot.prune_attention(heads, heads, 4)
        score = h2ot.score_tokens(x[:, :, 0], 2)
        return index, labels, *others, score.parent, score.score, merged, pose, moved, *full, nearest


def test_every_operation_in_onnxruntime(tmp_path):
    model, path = EveryOperation(), tmp_path / "operations.onnx"
    model.frozen = nn.Dropout().eval()
    h2ot_kernels.onnx.export(model, (torch.randn(2, 9, 3, 8),), path)
    assert model.training
    assert not model.frozen.training
    model.eval()
    for B in (1, 2, 5):
        tokens = torch.randint(-2, 3, (B, 9, 3, 8)).float()  # many equal distances
        tokens[:, 5] = tokens[:, 2]
        for x in (torch.randn(B, 9, 3, 8), tokens):
            with torch.no_grad():
                expected = model(x)
            for ours, theirs in zip(run(path, x), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 2), ()])
def test_an_example_of_one_sample_is_refused(shape, tmp_path):
    with pytest.raises(ValueError, match="inputs: got shape"):
        h2ot_kernels.onnx.export(nn.Identity(), (torch.zeros(shape),), tmp_path / "no.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("inputs", "kind", "said"),
    [
        (torch.zeros(2, 3), TypeError, "inputs: got Tensor, wanted a tuple of tensors"),
        ([torch.zeros(2, 3)], TypeError, "inputs: got list, wanted a tuple of tensors"),
        ((torch.zeros(2, 3), None), TypeError, "inputs: got NoneType as number 1, wanted a tensor"),
        ((torch.zeros(2, 3), torch.zeros(3)), ValueError, "inputs: got a batch of 3 as number 1, wanted 2"),
    ],
)
def test_other_inputs_are_refused_by_name(inputs, kind, said, tmp_path):
    with pytest.raises(kind, match=said):
        h2ot_kernels.onnx.export(nn.Identity(), inputs, tmp_path / "no.onnx")


def test_docstring_examples_run():
    result = doctest.testmod(h2ot_kernels.onnx)
    assert result.attempted > 0
    assert result.failed == 0
