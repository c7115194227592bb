"""Where the recovery tail in rotated channels is not taken, and what is refused with an error."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import h2ot_kernels as h2ot
from h2ot_kernels.linear import Linear
from h2ot_kernels.recover_rotated import takes

from .test_recover_rotated import Tail

pytestmark = pytest.mark.usefixtures("inference", "no_tiles")
OP = torch.ops.h2ot_kernels.recover_rotated


def test_what_is_kept_in_inference_mode_serves_outside_of_it():
    tail, token, kept = Tail(64).requires_grad_(False), torch.randn(9, 64), torch.randn(2, 3, 64)
    given = token, token, kept, kept, tail.proj, tail.norm, tail.head, 2
    with torch.inference_mode():
        expected = h2ot.recover_pose(*given, num_joints=1)
    with torch.enable_grad():
        assert torch.equal(h2ot.recover_pose(*given, num_joints=1), expected)


class Own(Linear):
    pass


def of_doubles(tail, token, attended):
    tail.double()
    return token.double(), attended.double()


def with_plain_layer(tail, token, attended):
    tail.proj = nn.Linear(64, 64)


def with_own_layer(tail, token, attended):
    tail.proj = Own(64, 64)


def with_training(tail, token, attended):
    tail.train()


def with_hook(tail, token, attended):
    tail.proj.register_forward_hook(lambda *args: None)


def with_forward(tail, token, attended):
    tail.proj.forward = lambda x: x


def with_parametrization(tail, token, attended):
    parametrize.register_parametrization(tail.proj, "weight", nn.Identity())


def with_gradients(tail, token, attended):
    torch.set_grad_enabled(True)


def with_inference_token(tail, token, attended):
    with torch.inference_mode():
        return token + 1, attended


def without_rows(tail, token, attended):
    return token, attended[:0]


def of_double_norm(tail, token, attended):
    tail.norm.double()


@pytest.mark.parametrize(
    "change",
    [of_doubles, with_plain_layer, with_own_layer, with_training, with_hook, with_forward, with_parametrization,
     with_gradients, with_inference_token, without_rows, of_double_norm],
)  # fmt: skip
def test_takes_refuses(change):
    tail, token, attended = Tail(64), torch.randn(9, 64), torch.randn(2, 9, 64)
    assert takes((token, attended), tail.proj, *tail.vectors())
    token, attended = change(tail, token, attended) or (token, attended)
    assert not takes((token, attended), tail.proj, *tail.vectors())


def test_takes_refuses_where_somebody_looks():
    tail, token, attended = Tail(64), torch.randn(9, 64), torch.randn(2, 9, 64)

    def taken(x):
        return takes((token, x), tail.proj, *tail.vectors())

    with torch.autocast("cpu"):
        assert not taken(attended)
    with forward_ad.dual_level():
        assert not taken(attended)
    with h2ot.use_backend("reference"):
        assert not taken(attended)
    with FakeTensorMode():
        assert not taken(torch.empty(2, 9, 64))
    seen = []
    torch.func.vmap(lambda x: (seen.append(taken(x)), x)[1])(attended)
    assert seen == [False]
    compiled = torch.compile(lambda x: x + 1 if taken(x) else x, fullgraph=True, backend="eager")
    assert torch.equal(compiled(attended), attended)


def operands(R=2, F=9, C=40, M=3, K=4):
    width = -(-C // 32) * 32
    depths = sum(C - c for c in range(0, C, 32))
    attending = *(torch.randn(size) for size in ((F, C), (R, K, C), (R, K, C))), 2, 0.5
    return [*attending, *(torch.randn(size) for size in ((F, width), (depths, 32), (M, width), (M,))), 1e-5]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[:8], "token"),
        (0, lambda x: x[0], "query"),
        (0, lambda x: x[:, :39], "query"),
        (0, lambda x: x.expand(3, -1, -1), "query"),
        (0, lambda x: x.double(), "one dtype"),
        (1, lambda x: x[0], "key"),
        (1, lambda x: x[:, :0], "key"),
        (1, lambda x: x[..., :0], "key"),
        (1, lambda x: x.bfloat16(), "one dtype"),
        (2, lambda x: x[:1], "value"),
        (2, lambda x: x[..., :39], "value"),
        (3, lambda x: 3, "num_heads"),
        (3, lambda x: 0, "num_heads"),
        (5, lambda x: x[:, :40], "token"),
        (5, lambda x: x[:8], "token"),
        (6, lambda x: x[1:], "triangle"),
        (6, lambda x: x.double(), "triangle"),
        (7, lambda x: x[:2], "head"),
        (7, lambda x: x[:, :40], "head"),
        (8, lambda x: x.double(), "float32"),
        (8, lambda x: x[None], "bias"),
    ],
)
def test_operator_refuses(place, change, message):
    given = operands()
    assert OP(*given).shape == (2, 9, 3)
    given[place] = change(given[place])
    with pytest.raises(ValueError, match=f"recover_rotated: wanted .*{message}"):
        OP(*given)


def test_operator_refuses_dtypes_that_do_not_fit():
    given = operands()
    halves = [x.bfloat16() for x in given[:3]]
    with pytest.raises(ValueError, match="recover_rotated: wanted query, key and value of bfloat16 beside"):
        OP(*halves, *given[3:])


def test_operator_has_no_gradient():
    given = operands()
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="recover_rotated has no gradient"):
        OP(*given[:2], given[2].requires_grad_(), *given[3:]).sum().backward()


def test_operator_without_rows_or_outputs():
    assert OP(*operands(R=0)).shape == (0, 9, 3)
    assert OP(*operands(F=0)).shape == (2, 0, 3)
    assert OP(*operands(M=0)).shape == (2, 9, 0)
