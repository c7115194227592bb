"""The official formulation: in float64 it is python_ref with the same noise, in float32 it is the opponent."""

from pathlib import Path

import pytest
import torch

import python_ref
from python_ref import official

from .cases import TokenCase


def tokens(kind, N=60, C=32, B=3):
    return TokenCase(kind, B=B, N=N, C=C, dtype=torch.float64).tokens()


def noise(x):
    return torch.rand(*x.shape[:2], generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-6


def ascending(index):
    return index.sort(-1).values


@pytest.mark.parametrize("kind", ["random", "smooth", "still"])
@pytest.mark.parametrize("k", [2, 5])
def test_selection_and_labels_are_those_of_the_definition(kind, k):
    x = tokens(kind)
    index, labels = official.cluster_dpc_knn(x, 20, k, noise=noise(x))
    expected = python_ref.prune_cluster(x, 20, k, noise=noise(x))
    assert torch.equal(ascending(index), expected)
    # The official labels count positions in descending score order, ours in ascending index order.
    position = index.argsort(-1).argsort(-1)
    assert torch.equal(position.gather(1, labels), python_ref.assign_clusters(x, expected))


def test_scores_are_those_of_the_definition():
    x = tokens("random")
    score, density, distance, _ = official.density_peaks(x, 2, noise=noise(x))
    exact = python_ref.score_tokens(x, 2, noise=noise(x))
    torch.testing.assert_close(density, exact.density, rtol=1e-9, atol=1e-9)
    # For a densest token the official code takes the largest distance of the batch, the definition of the sample.
    inner = exact.parent >= 0
    torch.testing.assert_close(distance[inner], exact.distance[inner], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(score[inner], exact.score[inner], rtol=1e-7, atol=1e-7)


def test_masked_tokens_are_not_chosen():
    x = tokens("random")
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[1, 40:] = False
    index, _ = official.cluster_dpc_knn(x, 20, 2, mask, noise(x))
    assert torch.equal(ascending(index), python_ref.prune_cluster(x, 20, 2, mask=mask, noise=noise(x)))


def test_the_centre_is_left_to_the_caller():
    x, centre = tokens("smooth"), 29
    index, _ = official.cluster_dpc_knn_center(x, 19, 2, centre, noise=noise(x))
    assert not (index == centre).any()
    whole = ascending(torch.cat([index, torch.full((3, 1), centre)], 1))
    assert torch.equal(whole, python_ref.prune_cluster(x, 20, 2, keep=centre, noise=noise(x)))


def test_the_default_noise_is_one_draw_of_torch_rand():
    x = tokens("still")
    torch.manual_seed(5)
    by_seed, _ = official.cluster_dpc_knn(x, 20, 2)
    torch.manual_seed(5)
    given = torch.rand(3, 60, dtype=torch.float64) * 1e-6
    assert torch.equal(by_seed, official.cluster_dpc_knn(x, 20, 2, noise=given)[0])


def test_float32_keeps_fewer_of_the_right_frames():
    """What it is: cdist's product form loses near-duplicates; on well-separated tokens it is right."""
    shares = {}
    for kind in ("smooth", "still", "random"):
        x = TokenCase(kind, B=8, N=243, C=512, dtype=torch.float32).tokens()
        given = noise(x).float()
        index, _ = official.cluster_dpc_knn(x, 81, 2, noise=given)
        exact = python_ref.prune_cluster(x, 81, 2, noise=given)
        shares[kind] = (index[:, :, None] == exact[:, None, :]).any(-1).double().mean().item()
    print("share of the oracle's frames that official float32 keeps:", shares)
    assert shares["random"] > 0.99
    assert 0.4 < shares["still"] < 1
    assert 0.4 < shares["smooth"] <= 1


def test_the_prune_step_gathers_what_it_selected():
    J, K = 3, 20
    rows = tokens("smooth", B=2 * J)
    embed = torch.randn(1, K, 32, dtype=torch.float64)
    frames = rows.unflatten(0, (2, J)).transpose(1, 2)
    given = noise(frames)
    kept, index = official.prune_step(rows, K, 2, J, embed, given)
    assert torch.equal(index, python_ref.prune_cluster(frames, K, 2, noise=given))
    torch.testing.assert_close(kept, python_ref.gather_tokens(rows, index, embed), rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_merging(weighted):
    x = tokens("random")
    labels = python_ref.assign_clusters(x, python_ref.prune_cluster(x, 20))
    weight = torch.rand(3, 60, dtype=torch.float64) + 0.1 if weighted else None
    # The official sums have 1e-6 added.
    torch.testing.assert_close(
        official.merge_tokens(x, labels, 20, weight),
        python_ref.merge_tokens(x, labels, 20, weight),
        rtol=2e-5,
        atol=2e-5,
    )


def test_recovery():
    torch.manual_seed(0)
    index = python_ref.prune_cluster(tokens("smooth"), 20)
    kept, token = torch.randn(3, 20, 32, dtype=torch.float64), torch.randn(1, 60, 32, dtype=torch.float64)
    attention = official.CrossAttention(32, 8, qkv_bias=True).double()
    q, k, v = attention.linear_q(token), attention.linear_k(kept), attention.linear_v(kept)
    expected = token + attention.proj(python_ref.recover_attention(q, k, v, 8))
    torch.testing.assert_close(official.cross_attention(token, kept, attention), expected)
    torch.testing.assert_close(official.interpolate(kept, index, 60), python_ref.recover_interpolate(kept, index, 60))
    torch.testing.assert_close(
        official.interpolate_uniform(kept, 60), python_ref.recover_interpolate(kept, None, 60, align="uniform")
    )


def test_other_pruners():
    torch.manual_seed(0)
    pose = torch.randn(2, 60, 17, 2, dtype=torch.float64)
    query, key = torch.randn(2, 2, 3, 8, 60, 4, dtype=torch.float64)
    assert torch.equal(official.prune_motion(pose, 20), python_ref.prune_motion(pose, 20))
    assert torch.equal(official.prune_attention(query, key, 20), python_ref.prune_attention(query, key, 20))
    for F, K in ((243, 121), (243, 1), (9, 9)):
        expected = python_ref.prune_sample(F, K)
        assert torch.equal(official.prune_sample(F, K), expected if K > 1 else torch.zeros(1, 1, dtype=torch.int64))


def test_nothing_of_ours_is_imported():
    source = Path(official.__file__).read_text()
    assert "h2ot_kernels" not in source
    assert "from ." not in source
