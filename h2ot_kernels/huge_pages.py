"""Memory in huge pages, where the system has them for the asking, for what is read from beginning to end at each call.

A walk through 70 MB of packed weights finds its way through 17 000 pages of 4 KB, and in a virtual machine each takes
more than 100 ns to be found. (Large results of operators ask for them where they are made: csrc/stable.h.)
"""

import contextlib
import mmap
import os
import threading

import torch
from torch import Tensor

PAGE, LINE = 2 << 20, 64
CHUNK = 4 * PAGE  # stays until nothing that stands in it is held any more
_lock = threading.Lock()
_rest: Tensor | None = None  # of the last chunk


def in_huge_pages(x: Tensor) -> Tensor:
    """A copy of x, contiguous, beside others of its kind; x itself where there are no such pages.

    >>> import torch
    >>> from h2ot_kernels.huge_pages import in_huge_pages
    >>> in_huge_pages(torch.ones(2, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    if not (x.is_cpu and hasattr(mmap, "MADV_HUGEPAGE")) or x.numel() == 0:
        return x
    with torch.inference_mode(False), torch.no_grad():  # what a chunk is made in does not decide who may write there
        return _take(x.nbytes).view(x.dtype).view(x.shape).copy_(x)


def _take(count: int) -> Tensor:
    """[count] bytes that nobody else has, from a line on."""
    global _rest
    taken = -(-count // LINE) * LINE
    with _lock:
        if _rest is None or _rest.numel() < taken:
            _rest = _chunk(taken)
        mine, _rest = _rest[:count], _rest[taken:]
    return mine


def _chunk(fewest: int) -> Tensor:
    """Whole huge pages, at least so many bytes, CHUNK of them or more."""
    size = -(-max(fewest, CHUNK) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # holds the memory, and gives it back
    before = -whole.data_ptr() % PAGE
    with contextlib.suppress(OSError):  # a kernel without them: ordinary pages do
        memory.madvise(mmap.MADV_HUGEPAGE, before, size)
    return whole[before : before + size]


def _unlock() -> None:
    """In a forked process: a thread that holds the lock stays behind."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
