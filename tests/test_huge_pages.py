"""Packed weights stand in memory of their own."""

import gc
import itertools
import mmap
import os
import signal
import weakref

import pytest
import torch

from h2ot_kernels import huge_pages
from h2ot_kernels.huge_pages import CHUNK, LINE, PAGE, in_huge_pages

needs_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages by madvise here")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(huge_pages, "_rest", None)


@needs_pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_copies_stand_beside_each_other(dtype):
    given = [torch.arange(n).to(dtype).reshape(shape) for n, shape in ((6, (2, 3)), (1, (1,)), (4000, (4, 1000)))]
    given.append(given[2].t())
    copies = [in_huge_pages(x) for x in given]
    for x, copy in zip(given, copies, strict=True):
        assert torch.equal(x, copy)
        assert copy.dtype == dtype
        assert copy.is_contiguous()
        assert copy.data_ptr() % LINE == 0
    spans = [(copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert copies[0].data_ptr() % PAGE == 0
    copies[1].fill_(7)
    assert all(torch.equal(given[i], copies[i]) for i in (0, 2, 3))


@needs_pages
def test_what_fits_no_chunk_has_one_of_its_own():
    first, large, last = (
        in_huge_pages(torch.full((size,), size % 100, dtype=torch.uint8)) for size in (5, CHUNK + 3, 7)
    )
    assert large.data_ptr() % PAGE == 0
    assert [int(x.unique()) for x in (first, large, last)] == [5, (CHUNK + 3) % 100, 7]


@needs_pages
def test_chunks_go_with_what_stands_in_them():
    x = torch.zeros(CHUNK // 2, dtype=torch.uint8)
    copies = [in_huge_pages(x) for _ in range(3)]
    chunks = [weakref.ref(copy.untyped_storage()) for copy in copies]
    memory = [copy.untyped_storage().data_ptr() for copy in copies]
    assert memory[0] == memory[1] != memory[2]
    del copies
    gc.collect()
    assert chunks[0]() is None
    assert in_huge_pages(x[:5]).untyped_storage().data_ptr() == memory[2]


@needs_pages
def test_in_any_mode():
    x = torch.ones(3)
    with torch.inference_mode():
        first = in_huge_pages(x * 2)
    second = in_huge_pages(x)
    with torch.inference_mode():
        third = in_huge_pages(x * 3)
    assert [copy.tolist() for copy in (first, second, third)] == [[2.0] * 3, [1.0] * 3, [3.0] * 3]
    assert not first.is_inference()
    assert not second.requires_grad


@needs_pages
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not():
    """A worker of a DataLoader that starts while a thread of its parent packs weights."""
    with huge_pages._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(in_huge_pages(torch.ones(3)).tolist() != [1.0] * 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_where_there_are_none(monkeypatch):
    x = torch.ones(3)
    assert in_huge_pages(x[:0]).numel() == 0
    assert in_huge_pages(x.to("meta")).is_meta
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert in_huge_pages(x) is x
