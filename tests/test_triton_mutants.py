"""Planted mistakes in the Triton kernels: each fails the test that is named beside it."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCORE = "tests/test_triton_score.py"
STREAMED = f"{SCORE}::test_streaming_equals_the_oracle"
STORED = "tests/test_score.py::test_scores_equal_the_oracle"
# what is wrong: (file, text, replacement, the test that sees it)
MUTANTS = {
    "a dropped mask": (
        "score.py",
        "finite &= tl.load(mask + b * mask_b + row.to(tl.int64) * mask_n, inside, 0) != 0",
        "pass",
        f"{STREAMED}[integers-2x27x16-k2K9-float32-masked-ragged]",
    ),
    "an off-by-one at a tile edge": (
        "score.py",
        "column_inside = (column < N) &",
        "column_inside = (column < N - 1) &",
        f"{STORED}[random-2x27x16-k2K9-float32-triton]",
    ),
    "a missing mean subtraction": (
        "distance.py",
        "    if CENTRE:\n        chosen = ",
        "    CENTRE: tl.constexpr = False\n    if CENTRE:\n        chosen = ",
        f"{SCORE}::test_bounds_hold_and_are_tight[40-70-offset]",
    ),
    "a Gaussian of half the pairs": (
        "score.py",
        "tl.store(terms + (b * N + column) * blocks + upper, tl.sum(steps, 0), column < N)",
        "tl.store(terms + (b * N + column) * blocks + upper, tl.sum(steps, 0) * 0, column < N)",
        f"{STORED}[integers-2x70x3-k2K9-float32-density=gaussian-cutoff=0.4-exclude_self=True-triton]",
    ),
    "swapped strides": (
        "score.py",
        "row_offset, column_offset = sample + row.to(tl.int64) * stride_n,",
        "row_offset, column_offset = sample + row.to(tl.int64) * stride_c,",
        f"{STORED}[random-2x27x16-k2K9-float32-triton]",
    ),
    "ties to the later token": (
        "select.py",
        "(other[None, :] < column[:, None])",
        "(other[None, :] > column[:, None])",
        "tests/test_select.py::test_selection_is_exact[243-81-ties-triton]",
    ),
    "blocks of channels beside each other": (
        "recover_tail.py",
        " + gap * gap * before * share",
        "",
        "tests/test_recover_attention.py::test_tail_within_bound[1-5-512-3-there3-dtype0-triton]",
    ),
    "one frame too early": (
        "recover_interpolation.py",
        "<= frame)",
        "< frame)",
        "tests/test_recover_interpolation.py::test_a_wrong_index_is_refused_or_gives_nan_where_it_counts[triton]",
    ),
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="one process per mutant is for the interpreter")


def passes(folder: Path, *tests: str) -> bool:
    """Whether the tests pass, in a process of their own, on the package in `folder`."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # anything else: the tests did not run
    return done.returncode == 0


def scratch(folder: Path) -> Path:
    for name in ("h2ot_kernels", "python_ref", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "demo", "simt"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def survives(mutant: tuple[str, str, str, str], folder: Path) -> bool:
    file, text, replacement, test = mutant
    path = scratch(folder) / "h2ot_kernels" / "triton" / file
    source = path.read_text()
    assert source.count(text) == 1, f"{file}: {text!r} stands there {source.count(text)} times"
    path.write_text(source.replace(text, replacement))
    return passes(folder, test)


def test_planted_mutants_are_caught(tmp_path):
    assert passes(scratch(tmp_path / "unchanged"), *{mutant[-1] for mutant in MUTANTS.values()})
    with ThreadPoolExecutor(2) as pool:
        alive = pool.map(lambda name: survives(MUTANTS[name], tmp_path / name.replace(" ", "_")), MUTANTS)
        assert not [name for name, survived in zip(MUTANTS, alive, strict=True) if survived]
