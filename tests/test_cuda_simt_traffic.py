"""What the CUDA kernels' accesses take, counted on the CPU (tests/simt/traffic.cpp): shared memory without bank
conflicts, tensors in whole sectors, but for what is named here with its reason.
"""

import functools
import shutil

import pytest
import torch

from . import simt
from .cases import TokenCase
from .simt import traffic
from .simt.gather import Move
from .simt.select import Choice
from .test_cuda_simt import call_of, needs_simulator
from .test_cuda_simt_cluster import call_of as labelling_of
from .test_cuda_simt_races import SOURCES

pytestmark = needs_simulator

FEWEST = 1.05  # how often the fewest; what a case's edges and lanes that skip an access leave
# (kernels that begin so, space) -> how often the fewest, where that is not it.
ALLOWED = {
    # Sums of fragments: stored tiles, read by columns, too, are written two for one; others as pairs, of which g++
    # announces the halves apart.
    ("stored_products_kernel", "shared"): 1.15,
    ("stream_products_kernel", "shared"): 1.1,
    ("centre_kernel<ProductTile", "shared"): 1.1,
    # Lists of five numbers, rows of candidates: they begin anywhere in a sector.
    ("stream_products_kernel", "tensors"): 1.25,
    ("centre_kernel", "tensors"): 1.15,
    ("label_listed_kernel", "tensors"): 1.1,
    # Rows of the matrix are cut off at the diagonal: few tiles have none.
    ("stored_products_kernel", "tensors"): 1.15,
    # A row of the matrix is read at the centres.
    ("label_stored_kernel", "tensors"): 1.6,
}
INDEX = torch.arange(60)[None, ::3].contiguous()


def scoring(dtype=torch.float32, kind="random", N=243, C=64, K=81, **options) -> simt.Call:
    return call_of(TokenCase(kind, B=1, N=N, C=C, K=K, dtype=dtype), **options)


def labelling(given: bool, N=243, K=81, **options):
    return labelling_of(TokenCase("random", B=1, N=N, C=64, K=K), given, **options)


def many(dtype=torch.float32, distance="products", kind="smooth") -> simt.Call:
    return scoring(dtype, kind, N=600, K=200, plan=("streamed", distance))


CALLS = {
    "hot": ("driver", lambda: scoring(C=512)),
    "large tiles": ("driver", lambda: scoring(plan=("stored", "direct"), multiprocessors=1)),
    "float64": ("driver", lambda: scoring(torch.float64)),
    "products": ("driver", lambda: scoring(N=351, K=117, C=160, plan=("stored", "products"), side=128)),
    "few products": ("driver", lambda: scoring(plan=("stored", "products"), side=64)),
    "one product": ("driver", lambda: scoring(torch.bfloat16, N=351, C=320, K=117)),
    "many": ("driver", lambda: many(distance="direct")),
    "many, products": ("driver", many),
    "many, one product": ("driver", lambda: many(torch.bfloat16, "exact_products", "random")),
    "labels": ("cluster_driver", lambda: labelling(False)),
    "many labels": ("cluster_driver", lambda: labelling(False, 600, 200, plan=("streamed", "products"))),
    "given centres": ("cluster_driver", lambda: labelling(True, plan=("stored", "direct"))),
    "given centres, products": ("cluster_driver", lambda: labelling(True, plan=("stored", "products"))),
    "gather": ("gather_driver", lambda: Move(torch.randn(1, 60, 17, 64), INDEX, dim=1, out_dim=2)),
    "embed": ("gather_driver", lambda: Move(torch.randn(1, 17, 60, 64), INDEX, torch.randn(20, 64), dim=2, out_dim=2)),
    "scatter": ("gather_driver", lambda: Move(torch.randn(1, 17, 20, 64), INDEX, dim=2, out_dim=2, num_frames=60)),
    "select": ("select_driver", lambda: Choice(torch.randn(1, 1000), 81)),
}


@functools.cache
def counted(name: str) -> list[traffic.Line]:
    driver, make = CALLS[name]
    return traffic.count([make()], driver)


def more_than_allowed(lines: list[traffic.Line]) -> dict[tuple[str, str], float]:
    """Kernels and spaces that take more than they may: how often the fewest."""
    found = {}
    for (kernel, space), (cost, least) in traffic.by_kernel(lines).items():
        limits = [limit for (start, where), limit in ALLOWED.items() if kernel.startswith(start) and space == where]
        # A few accesses of one lane each say nothing.
        if cost > least * max([FEWEST, *limits]) and cost - least > 32:
            found[kernel, space] = cost / least
    return found


@pytest.mark.parametrize("name", CALLS)
def test_next_to_nothing_is_carried_twice(name):
    assert counted(name)
    assert more_than_allowed(counted(name)) == {}


def test_every_kernel_is_counted():
    kernels = {line.kernel.split("<")[0] for name in CALLS for line in counted(name)}
    assert kernels == traffic.kernels_of("".join(SOURCES.values()))


def test_conflicts_are_seen(tmp_path):
    """Each where it is made, and nowhere else."""
    shutil.copytree(simt.ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu"))
    tiles = tmp_path / "csrc" / "cuda" / "score_tiles.cuh"
    source = tiles.read_text()
    for text, wrong in (
        ("return (v ^ (token / (8 / kVectors) & (kVectors - 1))) * kVector;", "return (v ^ (token & 0)) * kVector;"),
        ("matrix[i * job.matrix_pitch + j] = shared.tile.value[r][c];", "matrix[j * job.matrix_pitch + i] = 0;"),
    ):
        assert source.count(text) == 1
        source = source.replace(text, wrong)
    tiles.write_text(source)
    program = simt.build(("-O0", *simt.WATCHED[1:]), tmp_path / "csrc", tmp_path, watcher="traffic")
    found = more_than_allowed(traffic.count([scoring(C=512)], program=program))
    places = sorted((kernel.split("<")[0], space) for kernel, space in found)
    assert places == [("stored_kernel", "shared"), ("stored_kernel", "tensors")]
