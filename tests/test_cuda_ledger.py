"""What the CUDA gate compiles again, and what it says of the rest."""

import json
import shutil
import subprocess

import pytest

from . import cuda_gate, cuda_ledger
from .cuda_gate import ARCHITECTURES, Compiled

ROWS = {"pool": {"80": 20, "90": 24}, "select": {"80": 32, "90": 32}}


@pytest.fixture
def ledger(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_ledger, "LEDGER", tmp_path / "there" / "cuda.json")
    return cuda_ledger.LEDGER


def test_what_was_written_is_read_under_its_own_key_only(ledger):
    assert cuda_ledger.read("a") == {}
    cuda_ledger.write("a", ROWS)
    assert cuda_ledger.read("a") == ROWS
    assert cuda_ledger.read("b") == {}


def test_one_architecture_is_drawn_and_all_of_them_in_time():
    draws = [cuda_ledger.drawn(ARCHITECTURES, seed) for seed in range(40)]
    assert {len(drawn) for drawn in draws} == {1}
    assert {architecture for drawn in draws for architecture in drawn} == set(ARCHITECTURES)
    assert cuda_ledger.drawn(ARCHITECTURES, 3) == draws[3]


def test_other_registers_and_kernels_that_come_or_go_are_seen():
    compiled = {"pool": {"90": 25}, "new": {"90": 8}}
    assert cuda_ledger.differences(ROWS, {"pool": {"90": 24}, "select": {"90": 32}}, [90]) == []
    said = cuda_ledger.differences(ROWS, compiled, [90])
    assert [line.split(": ")[1] for line in said] == ["new", "pool", "select"]
    assert "pool: 25 registers, recorded by the same key: 24" in said[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="the key has nvcc's version: nvcc is not on the PATH")
def test_the_key_changes_with_a_source_and_with_what_is_asked(monkeypatch, tmp_path):
    assert cuda_ledger.key(1) == cuda_ledger.key(1) != cuda_ledger.key(2)
    before = cuda_ledger.key(1)
    shutil.copytree(cuda_ledger.ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu", "amx"))
    monkeypatch.setattr(cuda_ledger, "ROOT", tmp_path)
    assert cuda_ledger.key(1) == before
    for name, matters in (("cuda_registration.cpp", False), ("launch.h", True), ("cuda/score.cu", True)):
        with (tmp_path / "csrc" / name).open("a") as file:
            file.write("\n")
        assert (cuda_ledger.key(1) != before) == matters
        before = cuda_ledger.key(1)


@pytest.mark.parametrize(("arguments", "recorded", "chosen", "code"), [
    ([], None, ARCHITECTURES, 0),
    ([], 24, cuda_ledger.drawn(ARCHITECTURES, 5), 0),
    ([], 25, cuda_ledger.drawn(ARCHITECTURES, 5), 1),
    (["--all"], 25, ARCHITECTURES, 0),
    (["--arch", "90"], 25, [90], 0),
    (["--record"], 25, ARCHITECTURES, 0),
])  # fmt: skip
def test_what_the_gate_compiles(arguments, recorded, chosen, code, ledger, monkeypatch, capsys):
    asked = []

    def compiled_by(architectures, cuobjdump):
        asked.extend(architectures)
        kernel = {"pool": {"registers": 24}}
        return [Compiled(architecture, 1.0, kernel) for architecture in architectures], []

    monkeypatch.setattr(cuda_gate, "compiled_by", compiled_by)
    monkeypatch.setattr(cuda_gate, "dynamic_shared", dict)
    monkeypatch.setattr(cuda_ledger, "key", lambda *asked: "a")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("sys.argv", ["cuda_gate", "--seed", "5", *arguments])
    if recorded is not None:
        cuda_ledger.write("a", {"pool": {str(architecture): recorded for architecture in ARCHITECTURES}})
    assert cuda_gate.main() == code
    said = capsys.readouterr().out
    assert asked == list(chosen)
    assert ("as recorded: nothing has changed" in said) == (recorded is not None and not arguments)
    assert ("recorded by the same key: 25" in said) == (code == 1)
    if arguments == ["--record"]:
        assert set(json.loads(ledger.read_text())["registers"]["pool"].values()) == {24}
    elif len(chosen) == len(ARCHITECTURES):
        assert "STALE" in said


def test_the_gate_says_when_there_is_no_compiler(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr("sys.argv", ["cuda_gate"])
    assert cuda_gate.main() == 0
    assert "not run, nvcc is not on the PATH" in capsys.readouterr().out
