"""Scoring's search on the tile unit (AMX): its panels and tiles are exact, and no result depends on it."""

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import h2ot_kernels as h2ot

from .tiles import UNIT, alone, at, between_bands, build, fails, guarded, needs_emulation, needs_unit

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 32638
PANEL = 32


class Emulated:
    """The kernel on the emulated unit."""

    def __init__(self, folder: Path, *replaced: tuple[str, str, str]):
        self.library = build(folder, "score_tiles.cpp", *replaced, target=UNIT)
        self.library.panel_size.restype = ctypes.c_int64
        self.library.pack.restype = ctypes.c_float

    def pack(self, x, centre, scale):
        (count, C), size = x.shape, self.library.panel_size(ctypes.c_int64(x.shape[1]))
        whole, panel = guarded(size, torch.float32)
        inside, middle = alone(x), alone(centre)
        count, C = ctypes.c_int64(count), ctypes.c_int64(C)
        largest = self.library.pack(at(inside), count, at(middle), ctypes.c_float(scale), C, at(panel))
        return between_bands(whole, panel, (size,)), largest

    def distances(self, a, b, C):
        out = [torch.full((PANEL, PANEL), 7.0) for _ in range(3)]
        self.library.distances_of(at(a), at(b), ctypes.c_int64(C), *map(at, out))
        return out


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulated(tmp_path_factory.mktemp("tiles"))


def panels(C: int, counts: tuple[int, int], step: float):
    """Two panels' tokens: the second's are near the first's (some are the same), one number is the largest."""
    generator = torch.Generator().manual_seed(C)
    x = torch.randn(PANEL, C, generator=generator)
    y = x.roll(1, 0) + step * torch.randn(PANEL, C, generator=generator)
    y[:3] = x[:3]
    x[1, C // 2], y[2, C - 1] = 6, -6
    return x[: counts[0]], y[: counts[1]]


def check(kernel, C, counts=(PANEL, PANEL), step=1e-3):
    x, y = panels(C, counts, step)
    centre = 0.1 * torch.randn(C, generator=torch.Generator().manual_seed(1))
    scale = LARGEST / max((x - centre).abs().max().item(), (y - centre).abs().max().item())
    scale = torch.tensor(scale, dtype=torch.float32)
    q, r = (((tokens - centre) * scale).round().long() for tokens in (x, y))
    expected = torch.full((PANEL, PANEL), torch.inf)
    expected[: len(x), : len(y)] = (q[:, None] - r[None]).square().sum(-1).double().float()
    packed, largest = zip(*(kernel.pack(tokens, centre, scale.item()) for tokens in (x, y)), strict=True)
    assert largest == tuple(((tokens - centre) * scale).abs().max().item() for tokens in (x, y))
    out, lower, right = kernel.distances(*packed, C)
    assert torch.equal(out, expected)
    assert torch.equal(right[:, 16:], expected[:, 16:])
    assert (right[:, :16] == 7).all()
    assert (lower <= expected).all()
    assert (lower[expected.isinf()] == torch.inf).all()
    if step == 1:  # and not much less: twice both shares, digits being at most 128
        assert (lower >= 0.93 * expected - 248 * 128**2 * C)[: len(x), : len(y)].all()


SIZES = [(3, PANEL, PANEL), (64, 17, 16), (65, PANEL, 5), (128, 1, 31), (192, PANEL, PANEL), (512, 20, 32)]


@needs_emulation
@pytest.mark.parametrize(("C", "rows", "columns"), SIZES)
@pytest.mark.parametrize("step", [0, 1e-4, 1e-2, 1])
def test_distances_of_digits_are_exact(emulated, C, rows, columns, step):
    check(emulated, C, (rows, columns), step)


@needs_emulation
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("place", [(0, 0), (16, 64), (20, 99)])
def test_no_number_out_of_range_goes_unnoticed(emulated, value, place):
    x = torch.randn(21, 100, generator=torch.Generator().manual_seed(0))
    x[place] = value
    _, largest = emulated.pack(x, torch.zeros(100), LARGEST / 8)
    assert not largest <= LARGEST


SOURCE = "score_tiles.cpp"
MISTAKES = {
    "numbers past the range go unnoticed": (SOURCE, "magnitude > most ? magnitude : most", "most"),
    "digits do not carry": (SOURCE, "0x00800080u", "0x00800000u"),
    "a product is taken with the other digit": (
        SOURCE,
        "    _tile_loadd(7, left + kTile, kDepth);\n    _tile_dpbssd(4, 6, 7);",
        "    _tile_dpbssd(4, 6, 7);",
    ),
    "high digits of the last step are left out": (SOURCE, "if (s + 1 == steps) break;", "if (s + 2 >= steps) break;"),
    "the lower digits have no margin": (SOURCE, "(2 * (1 / kShare - 1) * kUp)", "(2 * kUp)"),
    "there are tokens past the last": (SOURCE, "+ of_low : __builtin_inf();", "+ of_low : 0;"),
    "nothing is past the last of the high digits": (SOURCE, " : -__builtin_inff();", " : 0;"),
    "the right half is the left one": (SOURCE, "columns + (kHalves - 1) * half_panel_size(C)", "columns"),
}


@needs_emulation
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(mistake, tmp_path):
    wrong = Emulated(tmp_path, MISTAKES[mistake])
    given = [(wrong, C, counts, step) for C, *counts in SIZES for step in (1e-2, 1)]
    assert any(fails(functools.partial(check, *one)) for one in given)


def tokens(kind: str, N: int, C: int):
    generator = torch.Generator().manual_seed(N * C)
    x = torch.randn(2, N, C, generator=generator)
    if kind == "walk":
        x = 0.05 * x.cumsum(1)
    elif kind == "duplicates":
        x[:, N // 2 :] = x[:, : N - N // 2]
    elif kind == "near duplicates":
        x[:, N // 2 :] = x[:, : N - N // 2] + 1e-6 * x[:, N // 2 :]
    elif kind == "offset":
        x = x + 1000
    elif kind == "small":
        x = 1e-30 * x
    elif kind == "large":
        x = 1e30 * x
    elif kind == "outlier":
        x[0, N // 3, C // 2] = 1e6
    elif kind == "late outlier":  # behind what the scale is taken from
        x[0, -1, C - 1] = -50
    elif kind == "not finite":
        x[0, N // 2, C // 2], x[1, -1, C - 1] = torch.nan, torch.inf
    elif kind == "nearly still":
        x = x[:, :1].repeat(1, N, 1)
        x[0, N // 2] += 1
    elif kind in ("pooled", "pooled outlier"):
        x = torch.stack([x, 0.5 * x.flip(1), x.roll(1, 1)], 2)
        x[0, N // 3, 2, 0] += 1000 if kind == "pooled outlier" else 0
    elif kind == "strided":
        x = x.repeat_interleave(2, 2)[..., ::2]
    elif kind in ("bfloat16", "float16", "float64"):
        x = x.to(getattr(torch, kind))
    return x


KINDS = ["random", "walk", "duplicates", "near duplicates", "offset", "small", "large", "outlier", "strided"]
KINDS += ["late outlier", "not finite", "nearly still", "pooled", "pooled outlier", "bfloat16", "float16", "float64"]
SHAPES = [(2, 256), (31, 192), (33, 33), (33, 192), (243, 129), (243, 193), (243, 512), (351, 1536), (600, 512)]
SHAPES += [(1600, 200)]


def results(kind: str) -> list[torch.Tensor]:
    """Everything that scoring gives for tokens of a kind, with one thread and with two."""
    every = []
    for N, C in SHAPES:
        x = tokens(kind, N, C)
        mask = torch.rand(2, N, generator=torch.Generator().manual_seed(N)) < 0.9
        mask[:, 0] = True
        for k in (2, 5) if N > 1000 else (2, 5, 16):
            k = min(k, N)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                score = h2ot.score_tokens(x, k, mask=mask)
                every += [*h2ot.cluster_tokens(x, max(1, N // 3), k), *score]
        index = h2ot.prune_sample(N, max(1, N // 3)).expand(2, -1)
        every.append(h2ot.assign_clusters(x, index))
    return every


PROGRAM = """
import sys, torch
from tests.test_score_tiles import results
torch.save(results(sys.argv[1]), sys.argv[2])
"""


@needs_unit
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_without_the_unit(kind, tmp_path):
    environment = {**os.environ, "H2OT_KERNELS_TILES": "0", "PYTHONPATH": str(ROOT)}
    file = tmp_path / "results.pt"
    subprocess.run([sys.executable, "-c", PROGRAM, kind, file], env=environment, cwd=ROOT, check=True)
    without, ours = torch.load(file), results(kind)
    assert len(without) == len(ours)
    for a, b in zip(ours, without, strict=True):
        assert torch.equal(a, b) or torch.equal(a.nan_to_num(7), b.nan_to_num(7))
