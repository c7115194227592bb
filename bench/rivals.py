"""What the pytest-benchmark files share: one case, one rival, checked once before it is timed."""

import functools

import pytest
import torch

from .shapes import STEMS, Case, build, cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=1)
def _checked(case: Case):
    with torch.inference_mode():
        comparison = build(case, DEVICE)
        return comparison, comparison.check()


def every(stem: str):
    """Parametrise a benchmark over the cases of a stem and both rivals."""
    rivals = pytest.mark.parametrize("rival", ["official", "ours"])
    return lambda function: pytest.mark.parametrize("case", cases(STEMS[stem]), ids=str)(rivals(function))


def run(benchmark, case: Case, rival: str) -> None:
    """Time one rival of a case that passed its check."""
    comparison, verdict = _checked(case)
    assert verdict.is_right, f"{case} is wrong and not timed: error {verdict.error:.3g} above {verdict.bound:.3g}"
    calls = {"ours": comparison.ours, "official": lambda: comparison.official(*comparison.arguments)}

    def call():
        result = calls[rival]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = str(case)
    with torch.inference_mode():
        benchmark(call)
