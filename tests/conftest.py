"""Where there is no GPU, Triton kernels run in Triton's interpreter; this must be said before they are imported.
With H2OT_KERNELS_PTX=90 their PTX for that architecture runs instead (tests/ptx).

One process per core tests with one thread each; what depends on the number of threads sets it.
"""

import functools
import gc
import os
import random
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if "H2OT_KERNELS_PTX" in os.environ:
    from . import ptx

    ptx.install(int(os.environ["H2OT_KERNELS_PTX"]))
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from h2ot_kernels import _C

# What tests/test_fuzz.py draws: the same inputs in every run (few as PTX, for each is compiled, and by the run's seed,
# unless nothing is left out), or (--hypothesis-profile=nightly) new and many more.
_TIMELESS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}
_FAST = 6 if "H2OT_KERNELS_PTX" in os.environ and os.environ.get("H2OT_KERNELS_SEED") != "all" else 20
settings.register_profile("fast", max_examples=_FAST, derandomize=True, **_TIMELESS)
settings.register_profile("nightly", max_examples=2000, **_TIMELESS)
settings.load_profile("fast")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="nothing is left out (tests/sample.py)")


def pytest_configure(config):
    """What this run and its workers draw, before they start. What is asked for by name is wanted whole."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        os.environ["H2OT_KERNELS_SEED"] = "all"
    os.environ.setdefault("H2OT_KERNELS_SEED", str(random.randrange(10**6)))


def _left_out(items: list) -> list:
    """Nothing where Triton is native."""
    from . import sample

    seed = sample.seed_of_run()
    if seed is None or torch.cuda.is_available():
        return []
    return sample.left_out(items, "H2OT_KERNELS_PTX" in os.environ, seed, _proven())


@functools.cache
def _proven() -> tuple[str, ...]:
    from . import unchanged

    return tuple(name for name in (unchanged.CUDA, unchanged.TRITON) if unchanged.is_unchanged(name))


# Each file is one worker's: those that take longest come first, so that none of them is the last. ptx_barriers and fuzz
# are long under ./dev ptx.
LONG = ("ptx_barriers", "fuzz", "cuda_simt", "cuda_simt_halves", "cuda_simt_cluster", "cuda_simt_races",
        "cuda_simt_groups", "score", "recover_attention", "cuda_simt_pairs", "triton_mutants", "demo", "triton_score",
        "bad_input", "cluster", "hosts", "triton_forms", "onnx", "bench", "cuda_simt_gather", "cuda_simt_select",
        "build", "determinism", "concurrency")  # fmt: skip


def _place(item) -> int:
    stem = item.path.stem.removeprefix("test_")
    return LONG.index(stem) if stem in LONG else len(LONG)


def pytest_report_header(config):
    from .runners import DEVICE, available

    return [f"device: {DEVICE}, torch {torch.__version__}, CPU capability: {_C.capability()}", *available()]


def pytest_collection_modifyitems(config, items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_place)
    if out := set(_left_out(items)):
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=list(out))
    if torch.cuda.is_available():
        return
    native = [item for item in items if item.get_closest_marker("gpu")]
    if native:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=native)


def pytest_collection_finish(session):
    """What is there stays there: the collector passes over it, not again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    """What was left out; and what tests counted: how often the kept tokens are right, nothing excluded."""
    from .sample import AS_PTX, INTERPRETED, NOTE, seed_of_run

    if (seed := seed_of_run()) is not None and not torch.cuda.is_available():
        terminalreporter.write_line(NOTE.format(AS_PTX if "H2OT_KERNELS_PTX" in os.environ else INTERPRETED))
        proven = f"unchanged since it was proven, so a share runs: {', '.join(map(repr, _proven())) or 'nothing'}"
        terminalreporter.write_line(f"{proven}; drawn by H2OT_KERNELS_SEED={seed}")
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "count" and report.when == "call":
                terminalreporter.write_line(value)


@pytest.fixture(params=_C.runnable_capabilities().split(","))
def capability(request):
    """Each instruction set of this machine; the next test starts with the first again."""
    _C.set_capability(request.param)
    return request.param


@pytest.fixture
def drawn_mistakes(request, record_property):
    """Takes mistakes in the CUDA source, gives those of this run (tests/sample.py), and has their number printed."""
    from . import sample, unchanged
    from .simt import planted

    def draw(mistakes: dict) -> dict:
        planted.check_places(mistakes)
        seed = sample.seed_of_run()
        if seed is None:
            return mistakes
        share = sample.PLANTED * (sample.UNCHANGED if unchanged.CUDA in _proven() else 1)
        chosen = sample.planted_share(mistakes, seed, share)
        record_property("count", f"{request.node.nodeid}: {len(chosen)} of {len(mistakes)} mistakes planted")
        return chosen

    return draw


@pytest.fixture
def inference():
    with torch.no_grad():
        yield


@pytest.fixture
def no_tiles(monkeypatch):
    """recover_pose in rotated channels by the vector units on a CPU with a tile unit, too."""
    monkeypatch.setattr("h2ot_kernels.recover_rotated.tiles_run", lambda: False)


@pytest.fixture(autouse=True)
def _same_start(request):
    torch.manual_seed(0)
    before = _C.capability()
    yield
    _C.set_capability(before)
    if torch.cuda.is_initialized():
        _leave_a_lost_device(request.node.nodeid)


def _leave_a_lost_device(test):
    """After an illegal access every later call of this process fails: it ends here, blaming the test that did it."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{test} left the device unusable: {error}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)  # xdist counts the test as failed and starts another worker
        pytest.exit(f"{test} left the device unusable: {error}", returncode=70)
