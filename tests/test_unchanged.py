"""What counts as unchanged since it was proven: nothing but what decides the proof may be left out of its key."""

import json
import shutil

import pytest

from . import cuda_ledger, unchanged
from .unchanged import ARM, CUDA, ONNX, SANITIZE, TRITON


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of what the keys are of."""
    without = shutil.ignore_patterns("__pycache__", "*.so", "demo", "results")
    for name in ("csrc", "h2ot_kernels", "python_ref", "tests", "bench"):
        shutil.copytree(unchanged.ROOT / name, tmp_path / name, ignore=without)
    for name in ("CMakeLists.txt", "dev"):
        shutil.copy(unchanged.ROOT / name, tmp_path)
    monkeypatch.setattr(unchanged, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_ledger, "ROOT", tmp_path)
    monkeypatch.setattr(unchanged, "RESULT", tmp_path / "last.json")
    return tmp_path


def keys():
    return {proof: unchanged.key(proof) for proof in unchanged.TESTS}


# A file, and the proofs whose key it is in.
@pytest.mark.parametrize(("name", "wanted"), [
    ("python_ref/score.py", {CUDA, TRITON, ARM, SANITIZE, ONNX}),
    ("tests/cases.py", {CUDA, TRITON, ARM, SANITIZE}),
    ("tests/compare.py", {CUDA, TRITON, ARM, SANITIZE}),
    ("tests/conftest.py", set()),
    ("h2ot_kernels/hosts/mixste.py", {ONNX}),
    ("bench/hosts.py", {ONNX}),
    ("tests/test_score.py", {TRITON, ARM, SANITIZE}),
    ("csrc/launch.h", {CUDA, ARM, SANITIZE}),
    ("csrc/launch_cpu.h", {ARM, SANITIZE}),
    ("csrc/cuda/warp.cuh", {CUDA}),
    ("csrc/cuda/plan.cpp", {CUDA}),
    ("tests/simt/watch.cpp", {CUDA, TRITON}),
    ("tests/test_cuda_simt_races.py", {CUDA}),
    ("h2ot_kernels/triton/score.py", {TRITON}),
    ("h2ot_kernels/library.py", {TRITON, ONNX}),
    ("tests/ptx/floats.cpp", {TRITON}),
    ("csrc/cpu/simd.h", {ARM, SANITIZE}),
    ("tests/driver/driver.cpp", {ARM}),
    ("CMakeLists.txt", {ARM, SANITIZE}),
    ("tests/test_attend.py", {SANITIZE}),
    ("tests/sample.py", set()),
    ("csrc/amx/linear_tiles.cpp", {SANITIZE}),
])  # fmt: skip
def test_a_key_changes_with_what_decides_its_proof(tree, name, wanted):
    before = keys()
    with (tree / name).open("a") as file:
        file.write("\n")
    assert {proof for proof, key in keys().items() if key != before[proof]} == wanted


def test_a_proof_counts_under_its_key_and_where_it_passed(tree):
    assert not unchanged.is_unchanged(CUDA)
    for row, wanted in (
        ({"passed": True, "key": unchanged.key(CUDA)}, True),
        ({"passed": False, "key": unchanged.key(CUDA)}, False),
        ({"passed": True, "key": unchanged.key(ARM)}, False),
        ({"passed": True}, False),
    ):
        unchanged.RESULT.write_text(json.dumps({"proofs": {CUDA: row}}))
        assert unchanged.is_unchanged(CUDA) == wanted
        assert not unchanged.is_unchanged(TRITON)


def test_what_the_sanitizer_watched_on_one_cpu_says_nothing_of_another(monkeypatch):
    before = keys()
    monkeypatch.setattr(unchanged._C, "runnable_capabilities", lambda: "avx512,avx2,portable,other")
    assert {proof for proof, key in keys().items() if key != before[proof]} == {SANITIZE}
