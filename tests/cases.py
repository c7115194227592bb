"""The one list of shapes and inputs that every backend is held to."""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import python_ref

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class TokenCase:
    """Tokens [B, N, C], or [B, N, J, C] for J > 0, of one kind; k neighbours, K kept, and what else is passed."""

    kind: str
    B: int = 2
    N: int = 27
    C: int = 16
    J: int = 0
    k: int = 2
    K: int = 9
    dtype: torch.dtype = torch.float32
    masked: bool = False
    ragged: bool = False
    noisy: bool = False
    keep: int | None = None
    options: tuple[tuple[str, object], ...] = ()  # of score_tokens

    def __str__(self) -> str:
        flags = [name for name in ("masked", "ragged", "noisy") if getattr(self, name)]
        flags += [f"{name}={value}" for name, value in self.options]
        joints = f"x{self.J}" if self.J else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.kind, f"{self.B}x{self.N}{joints}x{self.C}", f"k{self.k}K{self.K}", dtype, *flags])

    @property
    def large(self) -> bool:
        """Too large for Triton's interpreter (0.4 ms per program)."""
        return self.N > 130 or self.C > 128

    def tokens(self) -> Tensor:
        shape = (self.B, self.N, self.J, self.C) if self.J else (self.B, self.N, self.C)
        return _KINDS[self.kind](shape, generator(str(self))).to(self.dtype)

    def arguments(self) -> dict:
        """mask, lengths, noise and options for score_tokens and prune_cluster."""
        g = generator(str(self))
        given = dict(self.options)
        if self.masked:
            given["mask"] = torch.rand(self.B, self.N, generator=g) > 0.3
        if self.ragged:
            given["lengths"] = torch.randint(0, self.N + 1, (self.B,), generator=g)
        if self.noisy:
            given["noise"] = torch.rand(self.B, self.N, generator=g) * 1e-6
        return given


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def _random(shape, g):
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _smooth(shape, g):
    """Motion-like: a few slow sines per channel."""
    t = torch.arange(shape[1], dtype=torch.float64)
    total = torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        rate, phase, gain = (torch.rand(shape[:1] + shape[2:], generator=g, dtype=torch.float64) for _ in range(3))
        angle = rate[:, None] * 0.1 * t.reshape(-1, *[1] * (len(shape) - 2)) + phase[:, None] * 2 * math.pi
        total += gain[:, None] * torch.sin(angle)
    return total


def _still(shape, g):
    """Motion with a still third, whose frames differ by 1e-5."""
    x = _smooth(shape, g)
    third = shape[1] // 3
    x[:, third : 2 * third] = x[:, third : third + 1] + 1e-5 * _random(x[:, third : 2 * third].shape, g)
    return x


def _slow(shape, g):
    """Motion with a slow third, by steps of 1e-5."""
    x = _smooth(shape, g)
    third = shape[1] // 3
    steps = 1e-5 * _random(x[:, third : 2 * third].shape, g)
    x[:, third : 2 * third] = x[:, third : third + 1] + steps.cumsum(1)
    return x


def _rounds(shape, g):
    """The same places visited 24 times, each round less exactly: near tokens are far in time."""
    length = -(-shape[1] // 24)
    place = _random((shape[0], length, *shape[2:]), g).repeat(1, 24, *[1] * (len(shape) - 2))[:, : shape[1]]
    error = 0.004 * 1.2 ** (torch.arange(shape[1], dtype=torch.float64) // length)
    return place + error.reshape(-1, *[1] * (len(shape) - 2)) * _random(shape, g)


def _places(shape, g, scatter=1e-3):
    """25 places, each visited again and again, at random."""
    place = _random((shape[0], 25, *shape[2:]), g)
    return place[:, torch.randint(0, 25, (shape[1],), generator=g)] + scatter * _random(shape, g)


def _clump(shape, g):
    """Tokens near one point, and one far away: all are near-duplicates beside the sample's extent."""
    x = 1e-4 * _random(shape, g)
    x[:, shape[1] // 2] += 1.0
    return x


def _alike(shape, g):
    """Runs of eight tokens near one point, for bounds of products all the same; one of them comes again, far apart."""
    x = _random(shape, g)
    run = (torch.arange(shape[1]) - 15) % 57 < 8
    x[:, run] = 1 + 1e-4 * x[:, run]
    x[:, 72::57] = x[:, 72:73]
    return x


def _equidistant(shape, g):
    """Pairs of tokens along axes of their own: all others are as far as any, but for 1e-6."""
    axis = torch.arange(shape[1]) // 2 % shape[-1]
    x = torch.eye(shape[-1], dtype=torch.float64)[axis] * (1 + 0.05 * (torch.arange(shape[1]) % 2))[:, None]
    return x.reshape(1, shape[1], *[1] * (len(shape) - 3), shape[-1]) + 1e-6 * _random(shape, g)


def _static(shape, g):
    return _random((*shape[:1], 1, *shape[2:]), g).expand(shape).contiguous()


def _duplicates(shape, g):
    """Every token stands about three times, at random places."""
    x = _random(shape, g)
    return x[:, torch.randint(0, max(shape[1] // 3, 1), (shape[1],), generator=g)]


def _integers(shape, g):
    return torch.randint(-3, 4, shape, generator=g).double()


def _nonfinite(shape, g):
    x = _random(shape, g)
    x[0, shape[1] // 2, ..., 0] = float("nan")
    x[-1, 0, ..., -1] = float("inf")
    return x


_KINDS = {
    "random": _random,
    "smooth": _smooth,
    "still": _still,
    "slow": _slow,
    "clump": _clump,
    "alike": _alike,
    "rounds": _rounds,
    "places": _places,
    "lattice": lambda shape, g: (64 * _places(shape, g, 0.03)).round(),  # the same, with ties and duplicates
    "equidistant": _equidistant,
    "static": _static,
    "zeros": lambda shape, g: torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, -0.0).double(),
    "duplicates": _duplicates,
    "integers": _integers,
    "nonfinite": _nonfinite,
    "small": lambda shape, g: _smooth(shape, g) * 1e-6,
    "large": lambda shape, g: _smooth(shape, g) * 1e6,
    "tiny": lambda shape, g: _smooth(shape, g) * 1e-30,
    "huge": lambda shape, g: _smooth(shape, g) * 1e30,
    "offset": lambda shape, g: _smooth(shape, g) + 1e4,
}

_BASE = TokenCase("random")
TOKEN_CASES = [
    *(replace(_BASE, kind=kind) for kind in _KINDS),
    *(replace(_BASE, kind=kind, noisy=True) for kind in ("random", "smooth", "still", "duplicates", "integers")),
    *(replace(_BASE, kind=kind, masked=True, ragged=True) for kind in ("random", "static", "integers", "nonfinite")),
    *(replace(_BASE, kind="smooth", dtype=dtype) for dtype in DTYPES[1:]),
    *(replace(_BASE, kind=kind, J=J) for kind, J in (("smooth", 17), ("integers", 4), ("random", 1), ("nonfinite", 3))),
    *(replace(_BASE, kind="smooth", J=5, dtype=dtype, keep=13) for dtype in DTYPES),
    *(replace(_BASE, k=k, K=K, keep=3) for k, K in ((1, 1), (5, 27), (16, 9), (27, 26))),
    *(replace(_BASE, N=N, k=1, K=1) for N in (1, 2, 5)),
    *(replace(_BASE, N=N, C=C, K=2) for N, C in ((2, 1), (5, 3), (33, 100), (64, 64), (123, 7), (65, 128), (19, 1030))),
    replace(_BASE, B=0),
    *(
        replace(_BASE, kind=kind, N=243, C=512, K=81)
        for kind in ("random", "smooth", "still", "duplicates", "integers")
    ),
    *(replace(_BASE, kind="smooth", N=243, C=512, K=81, noisy=noisy, k=k) for noisy, k in ((True, 2), (False, 5))),
    replace(_BASE, kind="smooth", N=243, C=512, K=81, J=17, keep=121, masked=True),
    replace(_BASE, kind="smooth", B=1, N=351, C=1536, K=117),
    *(replace(_BASE, kind=kind, N=400, C=512, K=40) for kind in ("smooth", "still", "places", "rounds", "huge")),
    replace(_BASE, kind="smooth", B=1, N=243, C=5120, K=81),
    *(
        replace(_BASE, kind=kind, B=1, N=1601, C=20, K=300, k=5, masked=True)
        for kind in ("random", "still", "integers")
    ),
    *(replace(_BASE, kind=kind, B=1, N=1601, C=40, K=300, noisy=True) for kind in ("smooth", "duplicates")),
    *(replace(_BASE, kind="still", B=1, N=1601, C=80, K=300, dtype=dtype) for dtype in DTYPES),
    *(replace(_BASE, kind=kind, B=1, N=100, C=64, K=33) for kind in ("still", "offset", "duplicates")),
    *(replace(_BASE, kind=kind, B=1, N=70, C=40, K=33) for kind in ("tiny", "huge")),  # three tiles, two of channels
    replace(_BASE, kind="equidistant", B=1, N=96, C=48, K=33),
    replace(_BASE, kind="alike", B=1, N=600, C=64, K=100),
    *(replace(_BASE, kind="integers", B=1, N=100, C=C, K=70) for C in (1, 2)),
    *(replace(_BASE, kind=kind, N=140, C=64, K=33, k=5, noisy=True) for kind in ("still", "clump")),
    *(replace(_BASE, kind=kind, B=1, N=1601, C=72, K=300, keep=9) for kind in ("rounds", "clump")),
    *(replace(_BASE, kind="places", B=1, N=1601, C=70, K=300, k=5, noisy=noisy) for noisy in (False, True)),
    *(replace(_BASE, kind=kind, B=1, N=1601, C=20, K=300, masked=True) for kind in ("lattice", "static")),
    replace(_BASE, kind="places", B=1, N=1601, C=33, J=3, K=9, dtype=torch.bfloat16),
    replace(_BASE, kind="places", B=2, N=1537, C=40, K=300, k=9, dtype=torch.float64),
]


def _with(case: TokenCase, **options) -> TokenCase:
    return replace(case, options=tuple(options.items()))


_GAUSSIAN = {"density": "gaussian", "cutoff": 0.4}
# What score_tokens takes beside mask, lengths and noise: alone and together, on both sides of the stored matrix.
OPTION_CASES = [
    *(
        _with(replace(_BASE, kind=kind, k=k), **options)
        for kind, k in (("random", 1), ("still", 3), ("integers", 26), ("duplicates", 2), ("nonfinite", 5))
        for options in (
            {"metric": "cosine"},
            {"exclude_self": True},
            {"scale": 0.37},
            _GAUSSIAN,
            {**_GAUSSIAN, "exclude_self": True, "scale": 2.0, "cutoff": 1.1},
        )
    ),
    *(
        _with(replace(_BASE, kind=kind, noisy=True, masked=True, ragged=True), **options)
        for kind in ("smooth", "static")
        for options in ({"exclude_self": True}, {**_GAUSSIAN, "metric": "cosine", "exclude_self": True})
    ),
    *(_with(replace(_BASE, kind=kind, N=100, C=64, K=33), **_GAUSSIAN) for kind in ("still", "clump")),
    *(_with(replace(_BASE, kind=kind, N=70, C=3), **_GAUSSIAN, exclude_self=True) for kind in ("still", "integers")),
    *(_with(replace(_BASE, J=5, dtype=dtype), metric="cosine", **_GAUSSIAN) for dtype in DTYPES),
    *(_with(replace(_BASE, kind=kind), metric="cosine") for kind in ("tiny", "huge", "offset")),
    _with(replace(_BASE, N=1, k=1, K=1), **_GAUSSIAN, exclude_self=True),
    _with(replace(_BASE, N=2, k=1, K=1), exclude_self=True),
    _with(replace(_BASE, B=0), metric="cosine", **_GAUSSIAN),
    *(
        _with(replace(_BASE, kind=kind, B=1, N=1601, C=20, K=300, k=5, masked=True), **options)
        for kind in ("still", "integers")
        for options in ({"exclude_self": True, "metric": "cosine"}, _GAUSSIAN, {"density": "gaussian", "cutoff": 0.05})
    ),
]


def oracle_tokens(x: Tensor, metric: str = "euclidean") -> Tensor:
    """What the float64 oracle scores: the pooled tokens (float32 accumulation defines them), widened."""
    return python_ref.metric_tokens(x, metric).double()


def _oracle_input(case: TokenCase) -> tuple[Tensor, dict]:
    """The oracle's tokens, and the arguments that they do not hold already."""
    given = case.arguments()
    return oracle_tokens(case.tokens(), given.pop("metric", "euclidean")), given


@functools.cache
def oracle_scores(case: TokenCase) -> python_ref.TokenScores:
    """The float64 scores of a case, computed once for all backends."""
    tokens, given = _oracle_input(case)
    return python_ref.score_tokens(tokens, case.k, **given)


@functools.cache
def oracle_index(case: TokenCase) -> Tensor:
    """The tokens that the float64 oracle keeps."""
    tokens, given = _oracle_input(case)
    valid = python_ref.score.valid_tokens(tokens, given.get("mask"), given.get("lengths"))
    return python_ref.select_tokens(oracle_scores(case).score, case.K, keep=case.keep, mask=valid)


@functools.cache
def oracle_labels(case: TokenCase, by_parent: bool = False) -> Tensor:
    """The labels of all tokens by the oracle's kept ones: the nearest, or up the oracle's chain of parents."""
    tokens, given = _oracle_input(case)
    given = {name: given.get(name) for name in ("mask", "lengths")}
    given["parent"] = oracle_scores(case).parent if by_parent else None
    return python_ref.assign_clusters(tokens, oracle_index(case), **given)


@dataclass(frozen=True)
class Clip:
    """Windows of a real clip as tokens [B, 243, C]: its normalised 2D poses through a fixed random linear map."""

    name: str

    def tokens(self, C: int = 512, window: int = 243, stride: int = 81) -> Tensor:
        with np.load(CLIPS / f"{self.name}.npz", allow_pickle=False) as clip:
            key = "keypoints_2d_norm" if "keypoints_2d_norm" in clip.files else "keypoints_2d"
            pose = torch.from_numpy(clip[key]).flatten(1)
        windows = pose.unfold(0, window, stride).transpose(1, 2)
        lift = torch.randn(pose.shape[1], C, generator=generator("lift")) / math.sqrt(pose.shape[1])
        return windows @ lift


CLIP_NAMES = ("cmu_12_01_60fps", "cmu_13_30_60fps", "cmu_14_31_60fps", "cmu_14_31_60fps_pxround")
