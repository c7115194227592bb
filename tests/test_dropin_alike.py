"""Modules of a known structure whose forwards do more, in some inputs only: a patch leaves them, or runs their own."""

import enum

import pytest
import torch
from torch import nn

from h2ot_kernels import dropin
from h2ot_kernels.dropin.functions import function_for
from h2ot_kernels.dropin.trial import NotRecognised

from .official_code import clustering, mixste
from .test_dropin_patch import C, H, replaced
from .test_dropin_trial import Masked, agrees, left


class Padded(Masked):
    """Tokens that are all zeros are padding."""

    def forward(self, x):
        self.padding = (x == 0).all(-1)
        try:
            return super().forward(x)
        finally:
            del self.padding

    def mask(self, scores):
        return scores.masked_fill(self.padding[..., None, None, :], -1e9)


class Clamped(Masked):
    def mask(self, scores):
        return scores.clamp(-10, 10)


class Cleaned(Masked):
    def forward(self, x):
        return super().forward(x.nan_to_num(0))


def made(kind, x):
    """Inputs that show it."""
    if kind is Padded:
        x[0, 4:] = 0
    if kind is Cleaned:
        x[1, 2] = torch.nan
    return 40 * x if kind is Clamped else x


@pytest.mark.parametrize("kind", [Padded, Clamped, Cleaned])
def test_attention_that_some_inputs_show(kind):
    attention, x = kind().double().eval(), made(kind, torch.randn(2, 9, C).double())
    with torch.no_grad():
        own = attention(x)
        with dropin.patch(attention) as handle:
            assert left(handle, "attention")
            torch.testing.assert_close(attention(x), own, equal_nan=True)


class ClampedMlp(mixste.Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)).clamp(-6, 6))


def test_an_mlp_that_clamps():
    handle, _ = agrees(ClampedMlp(C, 2 * C).double().eval(), 30 * torch.randn(2, 9, C).double())
    assert left(handle, "mlp")


class Store:
    def __init__(self):
        self.maps = {"spatial": [[]]}


class Kind(enum.Enum):
    SPATIAL = [1]  # noqa: RUF012


class Stores(Masked):
    def mask(self, scores):
        self.store.maps["spatial"][0].append(scores)
        return scores


def test_records_of_a_forward_are_seen_and_not_touched():
    attention = Stores(store=Store(), kind=Kind.SPATIAL).eval()
    with dropin.patch(attention) as handle:
        assert "its forward stores store" in handle.report()
        assert attention.store.maps == {"spatial": [[]]}
        attention(torch.randn(2, 5, C))
        assert len(attention.store.maps["spatial"][0]) == 1
    assert attention.kind is Kind.SPATIAL
    assert Kind.SPATIAL.value == [1]


class DropPath(nn.Module):
    """As timm's: no dropout of torch's, and no attribute `p`."""

    drop_prob = 0.5

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1)) >= self.drop_prob
        return x * kept / (1 - self.drop_prob)


class WithDropPath(mixste.Block):
    def __init__(self):
        super().__init__(C, H, 2.0)
        self.drop_path = DropPath()

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@pytest.mark.parametrize(
    "change", [lambda block: block.drop_path.train(), lambda block: setattr(block, "drop_path", nn.Tanh())]
)
def test_a_drop_path_that_is_active_or_another_runs(change):
    block, x = WithDropPath().double().eval(), torch.randn(8, 6, C).double()

    def run():
        torch.manual_seed(0)
        with torch.no_grad():
            return block(x)

    with dropin.patch(block) as handle:
        assert "block" in replaced(handle)
        change(block)
        patched = run()
    torch.testing.assert_close(patched, run(), rtol=1e-9, atol=1e-9)


def test_a_scale_that_learns_gets_its_gradient():
    attention = Masked().train()
    with dropin.patch(attention) as handle:
        assert "attention" in replaced(handle)
        del attention.scale
        attention.scale = nn.Parameter(torch.tensor(0.25))
        attention(torch.randn(2, 5, C)).sum().backward()
    assert attention.scale.grad is not None


def clusters_of(change):
    """Official clustering of what `change` makes of its arguments."""

    def cluster_dpc_knn(x, cluster_num, k, token_mask=None):
        return clustering.cluster_dpc_knn(*change(x, cluster_num, k), token_mask)

    return cluster_dpc_knn


def test_clustering_that_more_tokens_show():
    function_for(clusters_of(lambda x, cluster_num, k: (x, cluster_num, k)))
    for change in (
        lambda x, cluster_num, k: (x, cluster_num, min(k, 5)),
        lambda x, cluster_num, k: (x * x.shape[-1] ** 0.5 / 2, cluster_num, k),
        lambda x, cluster_num, k: (x + 9 * (x == 0).all(-1, keepdim=True), cluster_num, k),
    ):
        with pytest.raises(NotRecognised):
            function_for(clusters_of(change))
