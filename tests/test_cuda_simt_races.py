"""The CUDA source on the CPU, its memory watched (tests/simt/watch.h): no two threads touch a place in no order, and
nothing is read that nobody has written, or before the launch before has ended. Every barrier that stands there is
needed: without it, this is not so.
"""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from . import simt
from .cases import TokenCase
from .simt.gather import Move
from .simt.planted import build_planted, without
from .simt.select import Choice
from .test_cuda_simt import CASES, HALVES, PLANS, allows, call_of, name_of, needs_simulator
from .test_cuda_simt_cluster import CASES as LABEL_CASES
from .test_cuda_simt_cluster import PLATEAUS, WAYS
from .test_cuda_simt_cluster import allows as allows_way
from .test_cuda_simt_cluster import call_of as labelling_of
from .test_cuda_simt_cluster import hunted as hunted_labels
from .test_cuda_simt_cluster import name_of as name_of_way
from .test_cuda_simt_gather import LAYOUTS, some_index
from .test_cuda_simt_groups import HUNTED as HUNTED_GROUPS
from .test_cuda_simt_groups import PLANS as GROUP_PLANS
from .test_cuda_simt_select import drawn, kept_counts

pytestmark = needs_simulator

GROUPS = (*simt.WATCHED, "-DSIMT_GROUPS")
SOURCES = {path.name: path.read_text() for path in sorted((simt.ROOT / "csrc" / "cuda").glob("*.cu*"))}
del SOURCES["device.cuh"]  # where orders are defined
LARGE = TokenCase("random", B=1, N=140, C=100, k=5, K=40, masked=True, dtype=torch.bfloat16)
LONG = TokenCase("random", B=1, N=131, C=300, K=40, dtype=torch.float16)  # more lines than there is room for


def check(calls, folder, flags=simt.WATCHED, name="driver"):
    done = simt.run(calls, simt.build(flags, name=name), folder, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(call.error == 0 for call in calls)


def scores(plan) -> list[simt.Call]:
    """Every case under half of the plans."""
    cases = [case for n, case in enumerate(CASES) if n % 2 == PLANS.index(plan) % 2 and allows(plan, case)]
    return [call_of(case, plan=plan, seed=n, samples=(1, 65535)[n % 2]) for n, case in enumerate(cases)]


@pytest.mark.parametrize("plan", PLANS[1:], ids=name_of)  # the counted plans are among them, or below
def test_scores(plan, tmp_path):
    check(scores(plan), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_tiles(dtype, tmp_path):
    """Of differences, which few multiprocessors take, and of products."""
    cases = [
        TokenCase("still", B=1, N=150, C=70, K=80, dtype=dtype),
        TokenCase("nonfinite", B=1, N=140, C=33, k=5, K=40, dtype=dtype, masked=True),
    ]
    calls = [call_of(case, plan=("stored", "direct"), multiprocessors=1) for case in cases]
    if dtype == torch.float32:
        calls += [call_of(case, plan=(search, "products"), side=128) for case in cases for search in simt.SEARCHES]
    check(calls, tmp_path)


@pytest.mark.parametrize("plan", GROUP_PLANS, ids=name_of)
def test_products_by_warpgroups(plan, tmp_path):
    large = [call_of(case, plan=plan, side=side) for case in (LARGE, LONG) for side in (64, 128) if allows(plan, case)]
    check([*scores(plan)[::2], *large], tmp_path, GROUPS)


@pytest.mark.parametrize(
    "case", [TokenCase("alike", B=1, N=700, C=64, K=90), TokenCase("slow", B=1, N=600, C=40, K=90)]
)
def test_lists_that_prove_little(case, tmp_path):
    plans = itertools.product(("streamed",), ("direct", "products"))
    check([call_of(case, plan=plan, seed=seed) for seed, plan in enumerate(plans)], tmp_path)


@pytest.mark.parametrize("way", WAYS, ids=name_of_way)
def test_labels(way, tmp_path):
    given, plan = way
    cases = [case for n, case in enumerate(LABEL_CASES) if n % 2 == WAYS.index(way) % 2 and allows_way(way, case)]
    calls = [
        labelling_of(case, given, plan=plan, seed=n, multiprocessors=n % 2 * 131 + 1) for n, case in enumerate(cases)
    ]
    if given and plan is not None and plan[1] != "exact_products":
        calls += [replace(call, plan=plan, side=side) for call in PLATEAUS for side in (64, 128)]
    check(calls, tmp_path, name="cluster_driver")


def test_selection(tmp_path):
    choices = [
        choice for N in (1, 33, 257, 600, 5000) for K in kept_counts(N)[::2] for choice in drawn(2, N, K, N + K)
    ]  # fmt: skip
    choices.append(Choice(torch.randn(2, 40), 3, keep=torch.tensor([[0, 1, 2, 39]])))  # one more than are selected
    check(choices, tmp_path, name="select_driver")


def gathered(dtype) -> list[Move]:
    moves = []
    for shape, dim, out_dim, rows, K in LAYOUTS:
        x, index = torch.randn(shape).to(dtype), some_index(rows, shape[dim], K)
        moves.append(Move(x, index, dim=dim, out_dim=out_dim))
        if out_dim < len(shape) - 1:
            embed = torch.randn(K, shape[-1 - (dim == len(shape) - 1)])
            moves.append(Move(x, index, embed, dim=dim, out_dim=out_dim))
        kept = x.narrow(dim, 0, K).contiguous()
        moves.append(Move(kept, index, dim=dim, out_dim=out_dim, num_frames=shape[dim]))
    return moves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_gathering(dtype, tmp_path):
    check(gathered(dtype), tmp_path, name="gather_driver")


# All that orders what threads do, where a kernel says it.
ORDERS = re.compile(
    r"\b(?:__syncthreads|__syncwarp|__threadfence|meet|follow_previous|publish_copies"
    r"|wait_for_copies<[^<>]*>|wait_for_products)\((?:part)?\);"
)
FAULTS = (
    "in no order",
    "nobody has written",
    "a copy on its way",
    "wait for the launch before",
    "under way",
    "not published",
)
# Calls that need them all, those that need most of them first.
ORDERED = [
    call_of(TokenCase("equidistant", B=1, N=65, k=5), plan=("stored", "direct")),
    call_of(TokenCase("smooth", dtype=torch.bfloat16), plan=("stored", "exact_products")),
    call_of(TokenCase("random", B=1, N=140, C=100, K=40), plan=("streamed", "products"), side=128),
    call_of(TokenCase("alike", B=1, N=600, C=64, K=100), plan=("streamed", "direct")),
    call_of(TokenCase("equidistant", B=1, N=48, C=24), plan=("streamed", "direct")),
    call_of(TokenCase("still", B=1, N=300, C=64, k=5, K=100), plan=("stored", "direct")),
    call_of(TokenCase("duplicates", N=30, k=1, K=29, keep=3), plan=("stored", "direct")),
]


@dataclass(frozen=True)
class Program:
    """A driver, and the sources whose orders its calls need."""

    name: str
    flags: tuple[str, ...]
    files: tuple[str, ...]
    orders: re.Pattern
    calls: list


def programs() -> list[Program]:
    labels = tuple(name for name in SOURCES if name.startswith("cluster"))
    moves = ("gather.cu",)
    others = tuple(name for name in SOURCES if name not in labels + moves)
    groups = re.compile(r"\b(?:publish_copies|wait_for_products)\((?:part)?\);")
    rest = re.compile(f"(?!{groups.pattern}){ORDERS.pattern}")
    return [
        Program("driver", simt.WATCHED, others, rest, ORDERED),
        Program("driver", GROUPS, others, groups, [call_of(case, **how) for case, how in HUNTED_GROUPS]),
        Program("gather_driver", simt.WATCHED, moves, ORDERS, gathered(torch.float32)),
        Program("cluster_driver", simt.WATCHED, labels, ORDERS, hunted_labels()),
    ]


def test_every_order_is_needed(tmp_path, drawn_mistakes, record_property):
    counted = tried = 0
    for program in programs():
        mistakes = {
            f"{file}:{place}": (file, *change)
            for file in program.files
            for place, change in without(program.orders, SOURCES[file]).items()
        }
        counted += len(mistakes)
        mistakes = drawn_mistakes(mistakes)
        tried += len(mistakes)
        driver = build_planted(mistakes, tmp_path, program.flags, program.name)
        order = list(range(len(program.calls)))

        def is_seen(mistake: int, program=program, driver=driver, order=order) -> bool:
            for at in list(order):
                call = replace(program.calls[at])
                said = simt.run([call], driver, tmp_path, mistake=mistake).stderr
                if any(fault in said for fault in FAULTS):
                    order.remove(at)  # what showed the last one is asked first
                    order.insert(0, at)
                    return True
            return False

        with ThreadPoolExecutor(2) as pool:
            seen = list(pool.map(is_seen, range(1, len(mistakes) + 1)))
        assert not [place for place, was_seen in zip(mistakes, seen, strict=True) if not was_seen]
    record_property("count", f"barriers, fences and waits left out of the CUDA source, one by one: {tried} seen")
    assert counted == sum(len(ORDERS.findall(re.sub("//.*", "", source))) for source in SOURCES.values())
