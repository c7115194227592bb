"""The table of what is asked of a CPU, at tiny sizes."""

import json

import pytest
import torch

from bench import bench_large, peak, run, shapes, targets
from bench.targets import Target

from .test_bench import TINY


@pytest.fixture
def tiny(monkeypatch):
    few = {op: [sizes] for op, sizes in TINY.items()}
    few["cluster_tokens"] = [TINY["cluster_tokens"] | {"C": 256}]
    few["recover_interpolate"] = [TINY["recover_interpolate"] | {"C": C} for C in (3, 512)]
    monkeypatch.setattr(shapes, "_SIZES", few)
    monkeypatch.setattr(targets, "LONG", (300,))
    monkeypatch.setattr(targets, "CLIPS", (100, 200))
    monkeypatch.setattr(bench_large, "extra_memory", lambda name, N, kind, threads: 20_000_000)
    monkeypatch.setattr(peak, "multiply_adds", lambda threads: 1e11)


def test_a_whole_run_ends_with_the_table(tiny, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    options = ["--no-memory", "--no-peers", "--backends", "--seconds", "0.01", "--out", str(out)]
    assert run.main(options) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["op"] for row in rows if row["dtype"] == "bfloat16"] == ["recover_pose"]
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[2:] == capsys.readouterr().out.splitlines()[-len(lines) + 2 :]
    by_name = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines[4:]}
    assert by_name["extra memory, N 16384, C 128"][3:] == ["20 MB", "smooth", "passed |"]
    assert by_name["indices that are float64's, walks with a still stretch"][3] == "1"
    for what in ("recover_pose, bfloat16", "a call of the smallest size", "the same against torch.bmm(x, x.mT) alone"):
        assert float(by_name[what][3].rstrip("x us")) > 0

    out.with_suffix(".md").unlink()
    assert run.main([*options, "--ops", "prune_sample"]) == 0
    assert not out.with_suffix(".md").exists()


def test_the_worst_case_decides():
    ratios = Target("each", 6, 8, "x", {"small": 5.9, "large": 20.0})
    assert (ratios.worst, ratios.verdict) == (("small", 5.9), "missed")
    assert Target("each", 6, 8, "x", {"small": 6.0}).verdict == "passed"
    assert Target("each", 6, 8, "x", {"small": 8.5}).verdict == "goal"
    times = Target("a call", 10, 4, "us", {"gather": 3.0, "score": 11.0}, more_is_better=False)
    assert (times.worst, times.verdict) == (("score", 11.0), "missed")
    assert Target("a call", 10, 4, "us", {"gather": 3.0}, more_is_better=False).verdict == "goal"
    assert targets.table([ratios])[-1] == "| each | 6x | 8x | 5.9x | small | missed |"


def test_wrong_indices_of_many_tokens_are_not_timed(tiny, monkeypatch):
    genuine = bench_large.h2ot.score_tokens
    monkeypatch.setattr(bench_large.h2ot, "score_tokens", lambda x, k: genuine(x + 1e-3 * torch.randn_like(x), k))
    with pytest.raises(ArithmeticError, match="N 300, random: a density is off by"):
        targets._many_tokens("random", 0.01)


def test_the_peak_is_more_than_any_product_reaches():
    rate = peak.multiply_adds(1)
    assert rate == peak.multiply_adds(1) > 1e9
    x = torch.randn(64, 64)
    took = min(targets.interleave({"mm": lambda: x @ x}, seconds=0.05).values(), key=lambda timing: timing.p10).p10
    assert rate * torch.get_num_threads() > 0.8 * 2 * 64**3 / took
