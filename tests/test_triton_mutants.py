"""Planted mistakes in the Triton kernels: each fails the test that is named beside it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .sample import planted_share, seed_of_run

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


# Forks of one process that has imported what all need: the project itself each takes from a folder of its own.
FORKS = """
import json, os, sys

import numpy, pytest, torch, triton.language

def run(folder, tests):
    output = os.open(os.path.join(folder, "output"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    code = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *tests])
    sys.stdout.flush()
    os._exit(code)

running, codes, wanted = {}, {}, json.load(sys.stdin)
while wanted or running:
    if wanted and len(running) < 2:
        folder, tests = wanted.pop()
        child = os.fork()
        if child == 0:
            run(folder, tests)
        running[child] = folder
    else:
        child, status = os.wait()
        codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
print(json.dumps(codes))
"""


def passed(wanted: list[tuple[Path, list[str]]], folder: Path) -> dict[Path, bool]:
    """Whether the tests pass on the package in each folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    given = json.dumps([(str(where), tests) for where, tests in wanted])
    environment |= {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", FORKS], cwd=folder, env=environment, input=given, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0
    codes = {Path(where): code for where, code in json.loads(done.stdout).items()}
    for where, code in codes.items():
        assert code in (0, 1), (where / "output").read_text()  # anything else: the tests did not run
    return {where: code == 0 for where, code in codes.items()}


def scratch(folder: Path) -> Path:
    for name in ("h2ot_kernels", "python_ref", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "demo", "simt"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def source(file: str) -> Path:
    return Path("h2ot_kernels") / "triton" / file


def planted(file: str, text: str, replacement: str, folder: Path) -> Path:
    path = scratch(folder) / source(file)
    path.write_text(path.read_text().replace(text, replacement))
    return folder


def test_planted_mutants_are_caught(tmp_path, record_property):
    for file, text, _, _ in MUTANTS.values():
        count = (ROOT / source(file)).read_text().count(text)
        assert count == 1, f"{file}: {text!r} stands there {count} times"
    seed = seed_of_run()
    chosen = MUTANTS if seed is None else planted_share(MUTANTS, seed)
    record_property("count", f"{len(chosen)} of {len(MUTANTS)} mistakes planted in the Triton kernels")
    as_it_is = scratch(tmp_path / "as_it_is")
    folders = {
        planted(*mistake, tmp_path / name.replace(" ", "_")): (name, test) for name, (*mistake, test) in chosen.items()
    }
    tests = sorted({test for _, test in folders.values()})
    found = passed([*((folder, [test]) for folder, (_, test) in folders.items()), (as_it_is, tests)], tmp_path)
    assert found.pop(as_it_is), (as_it_is / "output").read_text()
    assert not [folders[folder][0] for folder, survived in found.items() if survived]
    assert set(found) == set(folders)
