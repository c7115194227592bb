"""torch.func: vmap, grad and jvp of every operation."""

import pytest
import torch
from torch import nn

import h2ot_kernels as h2ot

INDEX = torch.tensor([[0, 4, 8], [1, 2, 3]])


def test_func_transforms():
    """Of every operation that has gradients."""
    x, labels = torch.randn(2, 9, 4), torch.randint(0, 3, (2, 9))
    calls = {
        "gather_tokens": lambda x: h2ot.gather_tokens(x, INDEX),
        "merge_tokens": lambda x: h2ot.merge_tokens(x, labels, 3),
        "recover_attention": lambda x: h2ot.recover_attention(x[0], x, x, 2),
        "recover_interpolate": lambda x: h2ot.recover_interpolate(x[:, :3], INDEX, 9),
    }
    for name, call in calls.items():
        grad = torch.func.grad(lambda x: call(x).square().sum())
        with pytest.raises(RuntimeError, match="functorch"):
            grad(x)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(call, (x,), (x,))
        leaf = x.clone().requires_grad_()
        with h2ot.use_backend("reference"):
            recorded = torch.autograd.grad(call(leaf).square().sum(), leaf)[0]
            assert torch.equal(grad(x), recorded), name
            torch.testing.assert_close(torch.func.vmap(grad)(x[None].expand(3, -1, -1, -1))[2], recorded)


def test_vmap_is_the_loop_over_samples():
    """The operators have no batching rule of their own: PyTorch calls them sample by sample, and says so."""
    x, labels = torch.randn(3, 2, 9, 4), torch.randint(0, 3, (2, 9))
    tail = [module.requires_grad_(False) for module in (nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))]
    calls = {
        "score_tokens": lambda x: h2ot.score_tokens(x).score,
        "score_variant": lambda x: h2ot.score_tokens(x, exclude_self=True).score,
        "select_tokens": lambda x: h2ot.select_tokens(x[..., 0], 3),
        "prune_cluster": lambda x: h2ot.prune_cluster(x, 3),
        "cluster_tokens": lambda x: h2ot.cluster_tokens(x, 3).labels,
        "prune_attention": lambda x: h2ot.prune_attention(x[:, None], x[:, None], 3),
        "prune_motion": lambda x: h2ot.prune_motion(x[..., None], 3),
        "gather_tokens": lambda x: h2ot.gather_tokens(x, INDEX),
        "assign_clusters": lambda x: h2ot.assign_clusters(x, INDEX),
        "merge_tokens": lambda x: h2ot.merge_tokens(x, labels, 3),
        "recover_attention": lambda x: h2ot.recover_attention(x[0], x, x, 2),
        "recover_pose": lambda x: h2ot.recover_pose(x[0], x[0], x, x, *tail, 2, num_joints=1),
        "recover_interpolate": lambda x: h2ot.recover_interpolate(x[:, :3], INDEX, 9),
        # Each sample's own index, labels, parents.
        "select_tokens, keep": lambda x: h2ot.select_tokens(x[..., 0], 3, keep=h2ot.prune_cluster(x, 1)),
        "gather_tokens, index": lambda x: h2ot.gather_tokens(x, h2ot.prune_cluster(x, 3)),
        "assign_clusters, index": lambda x: h2ot.assign_clusters(x, h2ot.prune_cluster(x, 3)),
        "assign_clusters, parent": lambda x: h2ot.assign_clusters(
            x, h2ot.prune_cluster(x, 3), parent=h2ot.score_tokens(x).parent
        ),
        "merge_tokens, labels": lambda x: h2ot.merge_tokens(x, h2ot.cluster_tokens(x, 3).labels, 3),
        "recover_interpolate, index": lambda x: h2ot.recover_interpolate(x[:, :3], h2ot.prune_cluster(x, 3), 9),
    }
    for backend in ("cpp", "reference"):
        with h2ot.use_backend(backend):
            for name, call in calls.items():
                mapped, looped = torch.func.vmap(call)(x), torch.stack([call(sample) for sample in x])
                torch.testing.assert_close(mapped, looped, rtol=0 if backend == "cpp" else 1e-5, atol=0, msg=name)


def test_gradients_of_each_sample_by_themselves():
    """vmap of grad, over what each sample keeps."""
    x = torch.randn(3, 2, 9, 4)

    def loss(x):
        return h2ot.merge_tokens(x, h2ot.cluster_tokens(x.detach(), 3).labels, 3).square().sum()

    with h2ot.use_backend("reference"):
        found = torch.func.vmap(torch.func.grad(loss))(x)
        for sample, gradient in zip(x, found, strict=True):
            torch.testing.assert_close(gradient, torch.func.grad(loss)(sample))


def test_out_is_refused_by_name_within_transforms():
    out = torch.empty(2, 3, 4)
    with pytest.raises(RuntimeError, match="out: got a call within torch.func"):
        torch.func.vmap(lambda x: h2ot.gather_tokens(x, INDEX, out=out))(torch.randn(3, 2, 9, 4))
