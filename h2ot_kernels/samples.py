"""Whether parameters still hold what something was made of."""

import torch
from torch import Tensor, nn

from .backend import why_no_cpp

PLACES, NEIGHBOURS = 64, 16  # elements of a tensor that are looked at: so many, beside each other, at so many places

if why_no_cpp() is None:
    from ._C import Samples as _Samples
else:
    _Samples = None


class Samples:
    """Elements of each of some strided tensors, spread over rows and columns, as they are now.

    >>> import torch
    >>> from h2ot_kernels.samples import Samples
    >>> weight = torch.zeros(300, 300)
    >>> samples = Samples([weight])
    >>> before = samples.same()
    >>> weight[:] = 1
    >>> before, samples.same()
    (True, False)
    """

    def __init__(self, tensors: list[Tensor]):
        self.parts = [_sample(tensor) for tensor in tensors]  # these keep the memory
        if _Samples is not None and all(map(_is_plain, tensors)):
            self.same = _Samples([_described(part) for part in self.parts]).same  # a call of PyTorch's takes 10 us
        else:
            self.copies = [part.clone() for part in self.parts]

    def same(self) -> bool:
        """Whether none of them has changed."""
        return all(torch.equal(*pair) for pair in zip(self.parts, self.copies, strict=True))


def _sample(tensor: Tensor) -> Tensor:
    """[places, neighbours] of a dense tensor's memory, else all; the step meets every column of up to 1024.

    Each place is a page, which takes 100 ns to be found: hence few of them, and in each as many elements as a line has.
    """
    tensor, elements = tensor.detach(), tensor.numel()
    if not _is_dense(tensor):
        return tensor
    if elements < PLACES * NEIGHBOURS:
        return tensor.as_strided((1, elements), (elements, 1))
    step = (elements // PLACES // NEIGHBOURS + 1) * NEIGHBOURS
    return tensor.as_strided(((elements - NEIGHBOURS) // step + 1, NEIGHBOURS), (step, 1))


def _is_dense(tensor: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and _is_dense(tensor)


def _described(part: Tensor) -> tuple[int, int, int, int]:
    """As `_C.Samples` wants it, in bytes."""
    (places, neighbours), size = part.shape, part.element_size()
    return part.data_ptr(), places, part.stride(0) * size, neighbours * size
