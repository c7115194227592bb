"""Wrong values in an index, labels or keep: the same words on every backend, whatever the order of samples."""

import pytest
import torch

import h2ot_kernels as h2ot

from .bad_calls import BAD, CONTENTS, X
from .test_determinism import threads


@pytest.mark.parametrize("name", sorted(CONTENTS))
def test_contents_are_refused_in_the_same_words(name):
    call, error, _ = BAD[name]
    words = set()
    for backend in ("cpp", "reference"):
        with h2ot.use_backend(backend), pytest.raises(error) as raised:
            call()
        words.add(str(raised.value))
    assert len(words) == 1


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("op", [h2ot.prune_cluster, h2ot.cluster_tokens])
def test_what_is_wrong_with_keep_depends_on_no_order_of_samples(op, backend):
    keep = torch.tensor([[-1, 0], [0, 1]])
    for inner in (1, 2):
        for rows in (keep, keep.flip(0)):
            with threads(inner), pytest.raises(IndexError, match="keep holds a value outside its range"):
                op(X, 1, keep=rows, backend=backend)
