"""The ledger of the compile-only gate: what changes a key, what is compiled again, and what is a failure."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from h2ot_kernels.triton import common
from h2ot_kernels.triton.attention_scores import scores_tile

from . import aot_key, aot_ledger
from .aot_rows import ARCHITECTURES, TRAPS, Build, Row

FACTOR = tl.constexpr(3)
ROWS = [Row("kernel", "fp32 ROWS=8", arch, 40, 0, 1024, 16, "mma 16", recorded=True) for arch in ARCHITECTURES]
ENTRIES = {f"{i:016x}": [replace(row, configuration=f"fp32 ROWS={i}") for row in ROWS] for i in range(80)}
TEXT = aot_ledger.text_of(ENTRIES)


def called(x):
    return x * FACTOR


called = JITFunction(called)


def kernel(out, ROWS: tl.constexpr):
    tl.store(out, called(tl.load(out)) + ROWS)


SOURCE = JITFunction(kernel).src
BUILD = Build("kernel", "stem", (("out", "*fp32"), ("ROWS", "constexpr")), (("ROWS", 8),), (((0,), "D"),), ())


def key_of(build: Build = BUILD, source: str = SOURCE) -> str:
    function = JITFunction(kernel)
    function._unsafe_update_src(source)
    return aot_key.key(build, function)


def test_the_key_is_the_same_wherever_a_function_stands_and_whatever_is_said_of_it(monkeypatch):
    before = key_of()
    monkeypatch.setattr(called, "starting_line_number", 7)
    assert key_of(source=SOURCE.replace("):\n", "):\n    # said\n\n")) == before == key_of()


@pytest.mark.parametrize(
    "change",
    [
        {"signature": (("out", "*fp16"), ("ROWS", "constexpr"))},
        {"constants": (("ROWS", 16),)},
        {"attributes": ()},
        {"options": (("num_warps", 8),)},
        {"kernel": "other"},
    ],
)
def test_the_key_changes_with_what_a_build_is_made_of(change):
    assert key_of(replace(BUILD, **change)) != key_of()


def test_the_key_changes_with_sources_constants_versions_and_architectures(monkeypatch, tmp_path):
    keys = {key_of(), key_of(source=SOURCE.replace("+", "-"))}
    with monkeypatch.context() as patch:
        patch.setitem(kernel.__globals__, "FACTOR", tl.constexpr(5))
        keys.add(key_of())
    source = called.src
    called._unsafe_update_src(source.replace("*", "+"))
    keys.add(key_of())
    called._unsafe_update_src(source)
    with monkeypatch.context() as patch:
        patch.setattr(called, "noinline", True)
        keys.add(key_of())
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "other")
        keys.add(key_of())
    with monkeypatch.context() as patch:
        patch.setattr("triton.backends.nvidia.compiler.get_ptxas_version", lambda arch: "other")
        keys.add(key_of())
    with monkeypatch.context() as patch:
        patch.setenv("DISABLE_LLVM_OPT", "1")
        keys.add(key_of())
    with monkeypatch.context() as patch:
        patch.delitem(ARCHITECTURES, 120)
        keys.add(key_of())
    with monkeypatch.context() as patch:
        other = tmp_path / "aot_read.py"
        other.write_text("pass")
        patch.setattr(aot_key.aot_read, "__file__", str(other))
        keys.add(key_of())
    assert len(keys) == 10
    assert key_of() in keys


def test_the_ledger_is_read_as_it_was_written():
    assert aot_ledger.read(TEXT) == (ENTRIES, [])
    assert all(row.recorded for rows in aot_ledger.read(TEXT)[0].values() for row in rows)
    assert aot_ledger.read("") == ({}, [])


def test_a_share_is_compiled_again_and_the_seed_says_which():
    keys = list(ENTRIES)
    drawn = aot_ledger.drawn(keys, seed=5)
    assert drawn == aot_ledger.drawn(keys, seed=5) != aot_ledger.drawn(keys, seed=6)
    assert len(drawn) == len(keys) // aot_ledger.SHARE
    assert len(aot_ledger.drawn(keys[:3], seed=5)) == 1
    assert aot_ledger.drawn([], seed=5) == set()


@pytest.mark.parametrize(
    "change",
    [{"registers": 41}, {"spills": 8}, {"shared": 2048}, {"load_bytes": 8}, {"products": "-"}],
)
def test_a_row_that_is_not_as_recorded_fails(change):
    assert aot_ledger.compared(ROWS, ROWS) == ROWS == aot_ledger.compared(ROWS, [])
    made = [replace(row, **change) if row.arch == 90 else row for row in ROWS]
    assert [row.arch for row in aot_ledger.compared(made, ROWS) if row.problem] == [90]
    assert len(aot_ledger.compared(made[:1], ROWS)) == 1


def test_a_recorded_row_with_a_problem_fails_and_none_is_recorded():
    for change in ({"spills": 8}, {"shared": 99 * 1024 + 1}, {"load_bytes": 0}):
        bad = {"0" * 16: [replace(row, **change) for row in ROWS]}
        entries, faults = aot_ledger.read(aot_ledger.text_of(bad))
        assert not faults
        assert any(row.problem for row in entries["0" * 16])
        assert aot_ledger.renewed({}, bad, bad) == aot_ledger.renewed(bad, {}, bad) == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  80  40 0   1024", "  80  41 0   1024"),
        ("  80  40 0   1024", "  81  40 0   1024"),
        ("  80  40 0   1024 16 mma 16\n", ""),
        ("fp32 ROWS=0", "fp32 ROWS=1"),
        (f"{0:016x}", f"{99:016x}"),
    ],
)
def test_an_entry_that_was_edited_is_refused(before, after):
    assert before in TEXT
    entries, faults = aot_ledger.read(TEXT.replace(before, after, 1))
    assert entries == {key: rows for key, rows in ENTRIES.items() if key != f"{0:016x}"}
    assert faults == ["line 4: the entry of kernel is not as it was written"]


def test_what_is_no_entry_is_refused():
    for line in ("<<<<<<< HEAD", "  80 many", ""):
        entries, faults = aot_ledger.read(f"{TEXT}{line}\n")
        assert entries == ENTRIES
        assert len(faults) == 1
        assert f"line {len(TEXT.splitlines()) + 1} is neither" in faults[0]
    assert "twice" in aot_ledger.read(TEXT + TEXT)[1][0]
    assert "neither" in aot_ledger.read("\n".join(TEXT.splitlines()[4:]))[1][0]


def test_what_is_stale_is_said_and_recording_mends_it():
    keys = list(ENTRIES)
    new = "f" * 16
    wanted = [new, *keys[:-2]]
    assert aot_ledger.stale(ENTRIES, keys, keys) == ""
    assert aot_ledger.stale(ENTRIES, wanted, wanted) == "1 builds are not in it, 2 entries are of no build"
    assert aot_ledger.stale(ENTRIES, keys[:3], keys) == ""
    after = aot_ledger.renewed(ENTRIES, {new: ROWS}, wanted)
    assert list(after) == wanted
    assert aot_ledger.stale(after, wanted, wanted) == ""
    assert new not in aot_ledger.renewed(ENTRIES, {new: ROWS[:3]}, wanted)


def test_a_trap_passes_only_where_it_is_known():
    known = {"kernel": "received_once_kernel", "configuration": "fp32 QUERIES=64 KEYS=256 BLOCK=16", "arch": 100}
    assert not Row(**known).problem
    for change in (
        {"kernel": "mean_kernel"},
        {"configuration": "bf16,fp32 QUERIES=64 KEYS=256 BLOCK=16"},
        {"arch": 120},
    ):
        assert Row(**(known | change)).problem == "reads nothing: a trap in place of the kernel"


def test_nothing_launches_a_trap(monkeypatch):
    def tiles(tensor_memory):
        every = (scores_tile(F, D, torch.float32, tensor_memory) for F in range(1, 600) for D in (5, 16, 64, 200))
        return {f"fp32 QUERIES={tile['QUERIES']} KEYS={tile['KEYS']}" for tile in every}

    known = {configuration for kernel, configuration, _ in TRAPS}
    assert known <= tiles(tensor_memory=False)
    assert not known & tiles(tensor_memory=True)
    for capability, expected in (((9, 0), False), ((10, 0), True), ((10, 3), True), ((11, 0), False), ((12, 0), False)):
        common.has_tensor_memory.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert common.has_tensor_memory(torch.device("cuda", 0)) is expected
        assert not common.has_tensor_memory(torch.device("cpu"))
    common.has_tensor_memory.cache_clear()
