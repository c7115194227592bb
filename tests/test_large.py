"""Many tokens on the CPU: memory O(N k), the path chosen from sizes alone, exact rows, visible in the profiler."""

import subprocess
import sys

import pytest
import torch

import h2ot_kernels as h2ot
import python_ref
from h2ot_kernels import _C

from . import tiles
from .cases import TokenCase
from .runners import runners

MEGABYTE = 1 << 20

PEAK = """
import sys, torch
import h2ot_kernels as h2ot

def memory(name):  # in bytes: VmRSS now, VmHWM at most so far
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) << 10

N, C, k = 16384, 128, 5
x = torch.randn(1, N, C)
small = x[:, :1600]
h2ot.assign_clusters(small, h2ot.prune_cluster(small, 400, k))  # what the first call of a process needs
before = memory("VmRSS")
if sys.argv[1] == "ours":
    scores = h2ot.score_tokens(x, k)
    h2ot.merge_tokens(x, h2ot.assign_clusters(x, h2ot.select_tokens(scores.score, N // 4)), N // 4)
    h2ot.prune_cluster(x, N // 4, k)
    h2ot.score_tokens(x, density="gaussian", cutoff=0.1)
elif sys.argv[1] == "definition":
    import python_ref
    python_ref.prune_cluster(x[:, :2048], 512, k)
else:
    torch.cdist(x[:, :4096], x[:, :4096])
print(memory("VmHWM") - before)
"""


def peak(which):
    run = subprocess.run([sys.executable, "-c", PEAK, which], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_extra_memory_stays_below_32_megabytes():
    """Scores, index, labels and clusters of N 16384, C 128, k 5: 8 MB of tokens and 2 MB of clusters among it."""
    assert peak("ours") < 32 * MEGABYTE


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_the_definition_holds_one_matrix_of_distances():
    """N 2048: 32 MB of distances, and as much for each step that ranks 2^22 pairs of tokens; no more for larger N."""
    assert peak("definition") < 256 * MEGABYTE


@pytest.mark.parametrize("noise", [False, True])
def test_the_size_of_a_block_changes_no_bit_of_the_definition(monkeypatch, noise):
    x, mask = TokenCase("random", B=2, N=37, C=24).tokens(), torch.arange(74).reshape(2, 37) % 5 > 0
    options = {"mask": mask, "noise": torch.rand(2, 37) * 1e-6 if noise else None}
    variants = ({}, {"exclude_self": True}, {"density": "gaussian", "cutoff": 0.5})
    whole = [python_ref.score_tokens(x, 5, **options, **variant) for variant in variants]
    monkeypatch.setattr(python_ref.score, "IN_CACHE", 500)
    monkeypatch.setattr(python_ref.score, "PAIRS", 700)
    for variant, wanted in zip(variants, whole, strict=True):
        found = python_ref.score_tokens(x, 5, **options, **variant)
        assert all(map(torch.equal, found, wanted))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_the_measure_of_memory_sees_a_distance_matrix():
    """Negative control: the distances of a quarter of those tokens alone are 64 MB."""
    assert peak("cdist") > 60 * MEGABYTE


@pytest.mark.parametrize("capability", _C.runnable_capabilities().split(","))
def test_the_path_is_chosen_from_sizes(capability):
    _C.set_capability(capability)
    assert [_C.plan_score_cpu(N, 64)[0] for N in (1, 1536, 1537, 65536)] == ["stored", "stored", "streamed", "streamed"]
    assert [_C.plan_score_cpu(2000, 64, k)[0] for k in (1, 64, 65, 2000)] == ["streamed", "streamed", "exact", "exact"]
    assert _C.plan_score_cpu(243, 512, 243)[0] == "stored"
    for C in (16, 128, 512):
        for k in (2, 5, 32, 500):
            sizes = {N: _C.plan_score_cpu(N, C, k)[1] for N in (8192, 16384, 65536)}
            for N, scratch in sizes.items():
                # Panels, and the means of balls: an eighth of them where panels are shortest.
                assert scratch <= N * (4.5 * C + 32 * min(k + 3, 67) + 256) + 65536, (N, C, k)
            assert sizes[65536] < 8.1 * sizes[8192]
    assert _C.plan_score_cpu(4096, 64, dtype="float16")[1] > _C.plan_score_cpu(4096, 64)[1]  # a widened copy
    assert _C.plan_score_cpu(4096, 64, index_only=True)[1] < _C.plan_score_cpu(4096, 64)[1]


def in_blocks(x, k, scores, rows):
    """(m, distance, parent) of some rows of x [1, N, C] in float64, which tokens are denser being read from scores."""
    tokens = python_ref.pool_joints(x).double()
    squared = python_ref.squared_distances(tokens[:, rows], tokens)[0]
    m = squared.sort(-1).values[:, :k].sum(-1) / (k * x.shape[2])
    density, position = scores.density[0], torch.arange(x.shape[1])
    denser = density > density[rows, None]
    denser |= (density == density[rows, None]) & (position < rows[:, None])
    squared = squared.masked_fill(~denser, float("inf"))
    least = squared.amin(-1, keepdim=True)
    parent = torch.where(squared == least, position, x.shape[1]).amin(-1)
    return m, (least[:, 0] / x.shape[2]).sqrt(), parent.masked_fill(least[:, 0].isinf(), -1)


@pytest.mark.parametrize(("kind", "N", "C"), [("smooth", 16384, 24), ("random", 16384, 128), ("random", 65536, 4)])
def test_sampled_rows_equal_float64(kind, N, C):
    """Every decision of a row: its neighbours, and the nearest of the tokens that are denser."""
    x = TokenCase(kind, B=1, N=N, C=C).tokens()
    scores, rows = h2ot.score_tokens(x, 5), torch.randperm(N)[:48]
    m, distance, parent = in_blocks(x, 5, scores, rows)
    torch.testing.assert_close(scores.density[0, rows], torch.exp(-m), rtol=1e-11, atol=0)
    assert torch.equal(scores.parent[0, rows], parent)
    inside = parent >= 0
    torch.testing.assert_close(scores.distance[0, rows][inside], distance[inside], rtol=1e-11, atol=0)
    index = h2ot.prune_cluster(x, N // 4, 5)
    assert torch.equal(index, python_ref.select_tokens(scores.score, N // 4))
    every_label = h2ot.assign_clusters(x, index)
    at_once = h2ot.cluster_tokens(x, N // 4, 5)
    assert torch.equal(at_once.index, index)
    assert torch.equal(at_once.labels, every_label)
    labels = every_label[0, rows]
    centres = python_ref.squared_distances(x[:, rows].double(), x[:, index[0]].double())[0]
    own = (index == rows[:, None]).int()
    nearest = torch.where(own.any(-1), own.argmax(-1), centres.argmin(-1))
    assert torch.equal(labels, nearest)


# Two tokens, the second number 2^28: its sketch begins 2^31 floats behind the first, in memory that is never there.
HALVE = """
#include <sys/mman.h>
#include "cpu/balls.h"
namespace h2ot { bool tiles_run() { return false; } }
using namespace h2ot::portable;
int main() {
  const int64_t last = int64_t(1) << 28;
  void* memory = mmap(nullptr, (last + 1) * kPanel * 4, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 2;
  Sample<float> sample = {};
  Places<float> places = {&sample, static_cast<float*>(memory)};
  places.sketch[last * kPanel] = 1;
  Placed list[2] = {{0, int32_t(last)}, {0, 0}};
  places.halve(list, 2, 1);
  return list[0].slot != 0 || list[1].slot != int32_t(last) || list[1].key - list[0].key != 1;
}
"""


@tiles.needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="memory that is not reserved")
def test_places_beyond_32_bits(tmp_path):
    (tmp_path / "halve.cpp").write_text(HALVE)
    flags = [*tiles.FLAGS.replace("-shared", "-fPIE").split(), *tiles.VECTORS["portable"].split()]
    command = ["g++", *flags, f"-I{tiles.ROOT / 'csrc'}", "halve.cpp", "-o", "halve"]
    subprocess.run(command, cwd=tmp_path, check=True)
    code = subprocess.run([tmp_path / "halve"]).returncode
    if code == 2:
        pytest.skip("the system gives no memory that it does not have")
    assert code == 0


@pytest.mark.parametrize("runner", [p for p in runners("score_variant") if p.id in ("portable", "reference")])
def test_the_profiler_names_each_operation(runner):
    x, pose = torch.randn(1, 27, 8), torch.randn(1, 27, 3, 2)
    calls = {
        "score_tokens": lambda backend: h2ot.score_tokens(x, backend=backend),
        "score_variant": lambda backend: h2ot.score_tokens(x, exclude_self=True, backend=backend),
        "prune_cluster": lambda backend: h2ot.prune_cluster(x, 3, backend=backend),
        "prune_motion": lambda backend: h2ot.prune_motion(pose, 3, backend=backend),
        "select_tokens": lambda backend: h2ot.select_tokens(x[..., 0], 3, backend=backend),
        "gather_tokens": lambda backend: h2ot.gather_tokens(x, torch.tensor([[0, 5]]), backend=backend),
        "assign_clusters": lambda backend: h2ot.assign_clusters(x, torch.tensor([[0, 5]]), backend=backend),
        "merge_tokens": lambda backend: h2ot.merge_tokens(x, torch.zeros(1, 27).long(), 2, backend=backend),
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for call in calls.values():
            call(runner.backend)
    counts = {event.key: event.count for event in profile.key_averages()}
    end = " (reference)" if runner.backend == "reference" else ""
    assert {f"h2ot_kernels::{name}{end}" for name in calls} <= set(counts)
    assert counts[f"h2ot_kernels::score_tokens{end}"] == 1
