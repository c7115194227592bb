"""Every operation as a comparison: official formulation, ours, float64 oracle and counted work. bench uses them too.

The oracle of a comparison is computed at its first check and kept: each backend is checked against the same one.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import h2ot_kernels as h2ot
import python_ref
from python_ref import official

from ..comparison import Comparison, Verdict, same_index, same_labels, same_values, within
from .keypoints import Clip, cut_windows
from .recoveries import recover_attention, recover_interpolate, recover_pose

WINDOW = 243
NEIGHBOURS = 2


def motion_tokens(pose: Tensor, channels: int, seed: int = 0) -> Tensor:
    """pose [..., D] -> [..., C] float32: a fixed random two-layer map, standing in for a trained embedding.

    Frames that are close in pose are close in tokens, equal poses give equal tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    size = pose.shape[-1]
    first = torch.randn(size, 64, generator=generator) / size**0.5
    second = torch.randn(64, channels, generator=generator) / 8
    return torch.tanh(pose.float().cpu() @ first * 3) @ second


def joint_tokens(pose: Tensor, channels: int) -> Tensor:
    """pose [B, F, J, 2] -> [B, F, J, C]: `motion_tokens` per joint plus an embedding of the joint."""
    generator = torch.Generator().manual_seed(1)
    return motion_tokens(pose, channels) + torch.randn(pose.shape[2], channels, generator=generator) * 0.02


def demo_comparisons(clip: Clip, device: torch.device, *, channels: int = 512, kept: int = 81) -> list[Comparison]:
    """The table of the demo: the first window of the clip, B 1, the sizes of MixSTE."""
    window = torch.from_numpy(cut_windows(clip.normalised, WINDOW)[:1])
    pose = window.to(device)
    frames = joint_tokens(window, channels).to(device)
    rows = frames.transpose(1, 2).flatten(0, 1).contiguous()
    tokens = python_ref.pool_joints(frames)
    index = python_ref.prune_cluster(tokens, kept, NEIGHBOURS)
    three = cut_windows(clip.normalised if clip.joints_3d is None else clip.joints_3d, WINDOW)[:1]
    poses = (
        torch.from_numpy(three).float().to(device).gather(1, index[..., None, None].expand(-1, -1, *three.shape[2:]))
    )
    kept_rows = official.gather_frames(rows, index, clip.num_joints)
    return [
        score_tokens(tokens),
        prune_cluster(tokens, kept),
        prune_step(rows, clip.num_joints, kept),
        gather_tokens(rows, index, clip.num_joints),
        assign_clusters(tokens, index),
        merge_tokens(tokens, index),
        recover_attention(kept_rows, WINDOW, clip.num_joints),
        recover_pose(kept_rows, WINDOW, clip.num_joints),
        recover_interpolate(poses, index, WINDOW),
        prune_sample(WINDOW, kept, device),
        prune_motion(pose, kept),
        prune_attention(frames, kept),
    ]


def _noise(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(*x.shape[:2], generator=generator) * 1e-6).to(x.device)


ENDS = "first and last sample"  # what `_ends` leaves


def _ends(x: Tensor | None) -> Tensor | None:
    """The first and the last sample of a batch: enough for the slow oracle, as no sample may influence another."""
    return x if x is None or x.shape[0] <= 2 else x[[0, -1]]


def _pairs_work(x: Tensor) -> dict[str, int]:
    """Each pair of tokens once, one FMA per channel; the tokens read once."""
    B, N, C = x.shape
    return {"flops": B * N * (N - 1) * C, "num_bytes": x.nbytes}


def score_tokens(x: Tensor, k: int = NEIGHBOURS) -> Comparison:
    """DPC scores of x [B, N, C], checked with noise given (against the official score) and without."""
    B, N, C = x.shape
    modes = (None, _noise(x))
    oracle = functools.cache(lambda: [python_ref.score_tokens(_ends(x), k, noise=_ends(given)) for given in modes])

    def check() -> Verdict:
        theirs = official.density_peaks(_ends(x), k, noise=_ends(modes[1]))[0]
        deviations = []
        for given, truth in zip(modes, oracle(), strict=True):
            mine = h2ot.score_tokens(x, k, noise=given)
            deviations.append((_ends(mine.density * mine.distance) - truth.density * truth.distance).abs())
        # Not tied to the official formulation's error: its distances are what goes wrong there.
        bound = torch.finfo(torch.float32).eps * C**0.5 * truth.distance.max().item()
        ours = torch.cat(deviations)
        return Verdict(within((theirs - truth.score).abs(), bound), within(ours, bound), ours.max().item(), bound)

    shape = {"B": B, "N": N, "C": C, "k": k}
    return Comparison(
        "score_tokens",
        shape,
        official.density_peaks,
        (x, k),
        lambda: h2ot.score_tokens(x, k),
        check,
        checked=ENDS,
        **_pairs_work(x),
    )


def prune_cluster(x: Tensor, num_tokens: int, k: int = NEIGHBOURS) -> Comparison:
    """TPC on x [B, N, C], index only on both sides."""
    B, N, C = x.shape

    def opponent(x: Tensor, num_tokens: int, k: int, noise: Tensor | None = None) -> Tensor:
        score = official.density_peaks(x, k, noise=noise)[0]
        return torch.topk(score, num_tokens, dim=-1).indices.sort(dim=-1).values

    modes = (_noise(x), None)
    oracle = _pruned_in_each_mode(_ends(x), num_tokens, k, [_ends(given) for given in modes])

    def check() -> Verdict:
        theirs = opponent(_ends(x), num_tokens, k, _ends(modes[0]))
        ours = [_ends(h2ot.prune_cluster(x, num_tokens, k, noise=given)) for given in modes]
        return same_index(theirs, ours[0], oracle()[0], (ours[1], oracle()[1]))

    shape = {"B": B, "N": N, "C": C, "K": num_tokens, "k": k}
    return Comparison(
        "prune_cluster",
        shape,
        opponent,
        (x, num_tokens, k),
        lambda: h2ot.prune_cluster(x, num_tokens, k),
        check,
        checked=ENDS,
        **_pairs_work(x),
    )


def _pruned_in_each_mode(x: Tensor, num_tokens: int, k: int, modes: list[Tensor | None]) -> Callable[[], list[Tensor]]:
    """Gives the oracle's index for each noise (None: without), computed at the first call."""
    return functools.cache(lambda: [python_ref.prune_cluster(x, num_tokens, k, noise=noise) for noise in modes])


def cluster_tokens(x: Tensor, num_tokens: int, k: int = NEIGHBOURS) -> Comparison:
    """Selection and the labels of all tokens of x [B, N, C]: the whole of `cluster_dpc_knn`."""
    B, N, C = x.shape

    def ours() -> h2ot.TokenClusters:
        return h2ot.cluster_tokens(x, num_tokens, k)

    pruning = prune_cluster(x, num_tokens, k)
    labelled: list[tuple[Tensor, Tensor]] = []  # an index, and the oracle's labels for it

    def labels_of(index: Tensor) -> Tensor:
        if not labelled or not torch.equal(labelled[-1][0], index):
            labelled.append((index, python_ref.assign_clusters(_ends(x), index)))
        return labelled[-1][1]

    def check() -> Verdict:
        selection = pruning.check()
        index, labels, _ = map(_ends, ours())
        wrong = int((labels != labels_of(index)).sum())
        wrong += int((index != _ends(h2ot.prune_cluster(x, num_tokens, k))).sum())
        return Verdict(selection.agreement_official, selection.agreement_ours, selection.error + wrong, 0)

    return Comparison(
        "cluster_tokens",
        {"B": B, "N": N, "C": C, "K": num_tokens, "k": k},
        official.cluster_dpc_knn,
        (x, num_tokens, k),
        ours,
        check,
        checked=ENDS,
        flops=B * N * (N - 1) * C,
        num_bytes=x.nbytes,
    )


def prune_step(rows: Tensor, num_joints: int, num_tokens: int, k: int = NEIGHBOURS) -> Comparison:
    """Pool, score, select, gather and embed, from rows [(B J), F, C], HoT's layout; of one joint: tokens [B, F, C]."""
    F, C = rows.shape[1:]
    frames = rows if num_joints == 1 else rows.unflatten(0, (-1, num_joints)).transpose(1, 2)
    B = frames.shape[0]
    embed = _embedding(num_tokens, rows)
    modes = (_noise(frames), None)
    oracle = _pruned_in_each_mode(frames, num_tokens, k, modes)

    def of_tokens(x: Tensor, K: int, k: int, num_joints: int, embed: Tensor, noise: Tensor | None = None):
        """As MHFormer's public code prunes: no joints, so nothing is pooled or permuted."""
        index = official.cluster_dpc_knn(x, K, k, noise=noise)[0].sort(dim=-1).values
        return official.index_points(x, index) + embed, index

    opponent = of_tokens if num_joints == 1 else official.prune_step

    def ours(noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        index = h2ot.prune_cluster(frames, num_tokens, k, noise=noise)
        return h2ot.gather_tokens(rows, index, embed), index

    def check() -> Verdict:
        _, theirs = opponent(rows, num_tokens, k, num_joints, embed, modes[0])
        (_, with_noise), (kept, without) = ours(modes[0]), ours()
        truth = oracle()
        verdict = same_index(theirs, with_noise, truth[0], (without, truth[1]))
        differing = int((kept != python_ref.gather_tokens(rows, truth[1], embed)).sum())
        return Verdict(verdict.agreement_official, verdict.agreement_ours, verdict.error + differing, 0)

    shape = {"B": B, "F": F, "J": num_joints, "C": C, "K": num_tokens}
    return Comparison(
        "prune_step",
        shape,
        opponent,
        (rows, num_tokens, k, num_joints, embed),
        ours,
        check,
        kernel="prune_cluster",
        flops=B * F * (F - 1) * C,
        num_bytes=rows.nbytes + 2 * rows.nbytes * num_tokens // F,
    )


def _embedding(num_tokens: int, like: Tensor) -> Tensor:
    """[1, K, C], what is added to the kept frames."""
    C = like.shape[-1]
    return (torch.arange(num_tokens * C, device=like.device) % 7).reshape(1, num_tokens, C).to(like.dtype) * 0.01


def gather_tokens(rows: Tensor, index: Tensor, num_joints: int, *, with_embedding: bool = False) -> Comparison:
    """The kept frames of rows [(B J), F, C] at index [B, K]: data movement, exact; and an embedding, added once."""
    F, C = rows.shape[1:]
    B, K = index.shape
    embed = (_embedding(K, rows),) if with_embedding else ()

    def check() -> Verdict:
        theirs, ours = official.gather_frames(rows, index, num_joints, *embed), h2ot.gather_tokens(rows, index, *embed)
        return same_values(theirs, ours, python_ref.gather_tokens(rows, index, *embed), C, moved=True)

    shape = {"B": B, "J": num_joints, "F": F, "C": C, "K": K}
    return Comparison(
        "gather_and_embed" if with_embedding else "gather_tokens",
        shape,
        official.gather_frames,
        (rows, index, num_joints, *embed),
        lambda: h2ot.gather_tokens(rows, index, *embed),
        check,
        kernel="gather_tokens",
        num_bytes=2 * rows.nbytes * K // F + sum(x.nbytes for x in embed),
    )


def assign_labels(x: Tensor, index: Tensor) -> Tensor:
    """The official labels of x [B, N, C] given its selected tokens (the matrix of distances included)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return official.cluster_labels(torch.cdist(wide, wide) / x.shape[-1] ** 0.5, index)


def assign_clusters(x: Tensor, index: Tensor) -> Comparison:
    """The nearest selected token of each token of x [B, N, C]."""
    (B, N, C), K = x.shape, index.shape[1]
    oracle = functools.cache(lambda: python_ref.assign_clusters(_ends(x), _ends(index)))

    def check() -> Verdict:
        theirs = assign_labels(_ends(x), _ends(index))
        return same_labels(theirs, _ends(h2ot.assign_clusters(x, index)), oracle())

    shape = {"B": B, "N": N, "C": C, "K": K}
    work = {"flops": 2 * B * N * K * C, "num_bytes": x.nbytes, "checked": ENDS}
    return Comparison(
        "assign_clusters", shape, assign_labels, (x, index), lambda: h2ot.assign_clusters(x, index), check, **work
    )


def merge_tokens(x: Tensor, index: Tensor) -> Comparison:
    """The mean of each cluster of x [B, N, C]."""
    (B, N, C), K = x.shape, index.shape[1]
    labels = python_ref.assign_clusters(x, index)
    oracle = functools.cache(lambda: python_ref.merge_tokens(x.double(), labels, K))

    def check() -> Verdict:
        return same_values(official.merge_tokens(x, labels, K), h2ot.merge_tokens(x, labels, K), oracle(), C)

    shape = {"B": B, "N": N, "C": C, "K": K}
    return Comparison(
        "merge_tokens",
        shape,
        official.merge_tokens,
        (x, labels, K),
        lambda: h2ot.merge_tokens(x, labels, K),
        check,
        num_bytes=x.nbytes + x.nbytes * K // N,
    )


def prune_sample(num_frames: int, num_tokens: int, device: torch.device) -> Comparison:
    """TPS: no work, only the call."""

    def opponent(F: int, K: int) -> Tensor:
        return official.prune_sample(F, K).to(device)

    def ours() -> Tensor:
        return h2ot.prune_sample(num_frames, num_tokens, device=device)

    def check() -> Verdict:
        oracle = python_ref.prune_sample(num_frames, num_tokens, device=device)
        return same_index(opponent(num_frames, num_tokens), ours(), oracle)

    return Comparison(
        "prune_sample",
        {"F": num_frames, "K": num_tokens},
        opponent,
        (num_frames, num_tokens),
        ours,
        check,
        kernel="",
    )


def prune_motion(pose: Tensor, num_tokens: int) -> Comparison:
    """TPMo on pose [B, F, J, 2]."""
    B, F, J = pose.shape[:3]

    def check() -> Verdict:
        theirs, ours = official.prune_motion(pose, num_tokens), h2ot.prune_motion(pose, num_tokens)
        return same_index(theirs, ours, python_ref.prune_motion(pose, num_tokens))

    shape = {"B": B, "F": F, "J": J, "K": num_tokens}
    return Comparison(
        "prune_motion",
        shape,
        official.prune_motion,
        (pose, num_tokens),
        lambda: h2ot.prune_motion(pose, num_tokens),
        check,
        num_bytes=pose.nbytes,
    )


def prune_attention(frames: Tensor, num_tokens: int, num_heads: int = 8) -> Comparison:
    """TPA: query and key [B, J, H, F, D] made from frames [B, F, J, C] by fixed random maps."""
    B, F, J, C = frames.shape
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(2, C, C, generator=generator).to(frames) * (2 / C**0.5)
    query, key = (
        (frames @ weight).unflatten(-1, (num_heads, -1)).permute(0, 2, 3, 1, 4).contiguous() for weight in maps
    )

    scores = functools.cache(lambda: python_ref.attention_scores(query.double(), key.double()))

    def check() -> Verdict:
        theirs, ours = official.prune_attention(query, key, num_tokens), h2ot.prune_attention(query, key, num_tokens)
        received = scores()
        oracle = python_ref.select_tokens(received, num_tokens)
        verdict = same_index(theirs, ours, oracle)
        # Scores are float32 sums: a frame may be swapped for another whose weight is equal within the bound.
        cut = received.gather(1, oracle).amin(-1, keepdim=True)
        least = received.gather(1, ours).amin(-1, keepdim=True)
        bound = 4 * torch.finfo(torch.float32).eps * C**0.5 * cut.max().item()
        return Verdict(verdict.agreement_official, verdict.agreement_ours, (cut - least).max().item(), bound)

    shape = {"B": B, "J": J, "H": num_heads, "F": F, "D": C // num_heads, "K": num_tokens}
    return Comparison(
        "prune_attention",
        shape,
        official.prune_attention,
        (query, key, num_tokens),
        lambda: h2ot.prune_attention(query, key, num_tokens),
        check,
        flops=2 * B * J * F * F * C,
        num_bytes=2 * query.nbytes,
    )
