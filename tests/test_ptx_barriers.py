"""tests/ptx notices races: nearly every barrier in the compiled Triton kernels that is taken away is a fault."""

import collections

import pytest
import torch

import h2ot_kernels as h2ot

from . import ptx
from .runners import PTX

pytestmark = pytest.mark.skipif(PTX is None, reason="for the PTX of the kernels: ./dev ptx")


def results() -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(1, 96, 48, generator=made).cumsum(1), torch.randn(2, 33, 64, generator=made)
    query, heads = torch.randn(1, 96, 64, generator=made), torch.randn(2, 2, 40, 16, generator=made)
    with h2ot.use_backend("triton"):
        index, labels, _ = h2ot.cluster_tokens(x, 33)
        attended = h2ot.recover_attention(query, tokens, tokens.flip(1), 4)
        kept = h2ot.prune_attention(heads, heads.flip(2), 9)
        return [index, labels, h2ot.prune_cluster(x, 33), *h2ot.score_tokens(x, 5), attended, kept]


def test_a_removed_barrier_is_seen(monkeypatch, record_property):
    programs, run = {}, ptx.run

    def recorded(program, *launch):
        programs[id(program)] = program
        run(program, *launch)

    monkeypatch.setattr(ptx, "run", recorded)
    expected = results()
    barrier, nothing = ptx.operation("bar.sync"), ptx.operation("cp.async.commit_group")
    seen = collections.Counter()
    for program in list(programs.values()):
        for at in (program.instructions[:, 0] == barrier).nonzero()[0]:
            program.instructions[at, 0] = nothing
            try:
                same = all(map(torch.equal, results(), expected))
                seen["without effect" if same else "wrong"] += 1
            except ptx.Fault:
                seen["seen"] += 1
            finally:
                program.instructions[at, 0] = barrier
    record_property("count", f"barriers removed from PTX: {dict(seen)}")
    assert seen["seen"] > 0.9 * seen.total() > 100
    assert not seen["wrong"]
