"""Where there is no GPU, Triton kernels run in Triton's interpreter; this must be said before they are imported.

One process per core tests with one thread each; what depends on the number of threads sets it.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from h2ot_kernels import _C

# What tests/test_fuzz.py draws: the same inputs in every run, or (--hypothesis-profile=nightly) new and many more.
_TIMELESS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}
settings.register_profile("fast", max_examples=20, derandomize=True, **_TIMELESS)
settings.register_profile("nightly", max_examples=2000, **_TIMELESS)
settings.load_profile("fast")


def pytest_report_header(config):
    from .runners import DEVICE, available

    return [f"device: {DEVICE}, torch {torch.__version__}, CPU capability: {_C.capability()}", *available()]


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    native = [item for item in items if item.get_closest_marker("gpu")]
    if native:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=native)


def pytest_terminal_summary(terminalreporter):
    """What tests counted: how often the kept tokens are right. Nothing is excluded."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "count" and report.when == "call":
                terminalreporter.write_line(value)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    before = _C.capability()
    yield
    _C.set_capability(before)
