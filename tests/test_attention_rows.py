"""How many rows torch's fused attention gets at once (h2ot_kernels/attention.py): what a GPU refuses, a CPU takes."""

import pytest
import torch

from h2ot_kernels import attention


def gradients(call, *inputs):
    """The result, and the gradients of its squares' sum."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = call(*leaves)
    return result, *torch.autograd.grad(result.square().sum(), leaves)


@pytest.mark.parametrize("most", [1, 4, 10, 11])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_in_parts_are_the_same_rows(most, shared, monkeypatch):
    query, key, value = torch.randn(3, 10, 7, 24, dtype=torch.float64)
    query = query[:1] if shared else query

    def attended(query, key, value):
        return attention.attend_by_torch(query, key, value, 4, 0.3)

    whole = gradients(attended, query, key, value)
    monkeypatch.setattr(attention, "MOST_ROWS", most)
    for part, expected in zip(gradients(attended, query, key, value), whole, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(("samples", "dim"), [(3, 2), (1, 1)])
def test_one_product_in_parts_is_the_same(samples, dim, monkeypatch):
    qkv = torch.randn(samples, 6, 5, 24, dtype=torch.float64)

    def attended(qkv):
        return attention.attend_packed(qkv, 2, dim)[0]

    whole = gradients(attended, qkv)
    monkeypatch.setattr(attention, "MOST_ROWS", 4)
    for part, expected in zip(gradients(attended, qkv), whole, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(
    ("dtype", "gradient", "shape", "rows"),
    [
        (torch.bfloat16, False, (8, 17, 64), 65535),
        (torch.float32, True, (8, 17, 64), 65535),
        (torch.bfloat16, True, (8, 17, 64), 2**31 // (8 * 128 * 64)),
        (torch.float16, True, (136, 243, 64), 2**31 // (136 * 256 * 64)),
        (torch.bfloat16, True, (16, 128, 16), 2**31 // (16 * 128 * 32)),
        (torch.bfloat16, True, (1, 1, 8), 65535),
        (torch.bfloat16, True, (1, 0, 8), 65535),
        (torch.bfloat16, True, (2**20, 129, 33), 1),
    ],
)
def test_what_is_taken_at_once(dtype, gradient, shape, rows):
    query = torch.empty(1, *shape, dtype=dtype, device="meta")
    with torch.set_grad_enabled(gradient):
        assert attention._rows_at_once(query) == rows
