"""torch.compile of whole patched models: the numbers of the unpatched model, by the kernels, in one graph."""

import pytest
import torch

from h2ot_kernels import dropin

from .test_dropin_patch import K, assert_agree, hot_mixste, hot_motionbert, run, tcformer_block, tpc_mixste

HOT = {"cluster_tokens", "gather_tokens", "recover_attention"}
WANTED = {
    hot_mixste: HOT,
    tpc_mixste: {"score_tokens", "select_tokens", "assign_clusters", "gather_tokens", "recover_attention"},
    hot_motionbert: HOT,
    tcformer_block: {"cluster_tokens", "merge_tokens"},
}


class Graphs:
    """A backend that runs a graph as it is, and notes the names of our operators in it."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, inputs):
        targets = [str(node.target).split(".") for node in graph.graph.nodes]
        self.seen.append({target[1] for target in targets if target[0] == "h2ot_kernels"})
        return graph.forward


@pytest.mark.parametrize("make", WANTED)
def test_a_compiled_model_gives_the_numbers_of_the_unpatched_one(make):
    torch._dynamo.reset()
    model, x = make()
    model, x, graphs = model.double().eval(), x.double(), Graphs()
    batches = x, torch.cat([x, x.flip(1)]), x.repeat(3, *[1] * (x.dim() - 1))  # the last two: a graph of any batch
    with torch.no_grad():
        before = [run(model, batch) for batch in batches]
        with dropin.patch(model):
            model.compile(fullgraph=True, backend=graphs)
            after = [run(model, batch) for batch in batches]
    for ours, theirs in zip(after, before, strict=True):
        assert_agree(ours, theirs, 1e-9)
    assert len(graphs.seen) == 2
    assert all(WANTED[make] <= graph for graph in graphs.seen)


def test_compiled_under_autocast_it_is_one_graph():
    torch._dynamo.reset()
    model, x = hot_mixste()
    model, given, graphs = model.eval(), (x, torch.arange(K).repeat(2, 1)), Graphs()
    with torch.inference_mode():
        exact = model(*given)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), dropin.patch(model):
        eager = model(*given)
        model.compile(fullgraph=True, backend=graphs)
        compiled = model(*given)
    assert compiled.dtype == eager.dtype
    errors = [(out.float() - exact).abs().max() for out in (compiled, eager)]
    assert errors[0] <= 4 * errors[1]  # the factor of tests/compare.py
    assert len(graphs.seen) == 1


def test_compiled_in_training_it_gives_the_gradients_of_the_unpatched_one():
    torch._dynamo.reset()
    model, x = hot_mixste()
    model, x = model.double().train(), x.double().requires_grad_()

    def gradients():
        (out,) = run(model, x)
        return torch.autograd.grad(
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), [x, *model.parameters()]
        )

    before = gradients()
    with dropin.patch(model):
        model.compile(fullgraph=True, backend="aot_eager")
        after = gradients()
    assert_agree(after, before, 1e-9)
