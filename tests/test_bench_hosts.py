"""The benchmark of the hosts at tiny sizes: rows of every kind, and nothing wrong is timed."""

import json

import pytest

from bench import bench_hosts
from h2ot_kernels import hosts
from h2ot_kernels.timing import Timing
from python_ref import official_mhformer

from .host_cases import SIZES


def test_hosts_are_checked_timed_and_compared(monkeypatch, tmp_path, capsys):
    for name, stages in (("mhformer", {}), ("h2ot_mhformer", {1: 13, 2: 9})):
        size = SIZES["mhformer"] | ({"stages": stages} if stages else {})
        monkeypatch.setitem(hosts.HOSTS, name, (hosts.MHFormer, hosts.HOSTS[name][1] | size))
        monkeypatch.setitem(official_mhformer.MODELS, name, official_mhformer.MODELS[name] | size)
    bench_hosts.flops.cache_clear()  # of the full sizes
    out = tmp_path / "rows.jsonl"
    arguments = ["--models", "mhformer", "h2ot_mhformer", "--batch", "2", "--dtype", "float32", "--seconds", "0"]
    assert bench_hosts.main([*arguments, "--out", str(out)]) == 0
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
        assert row["graph_seconds"] is None  # there are none on a CPU
        assert row["flops_linear"] == bench_hosts.hosts.count_flops(bench_hosts.hosts.build(row["model"]))
        assert row["frames_per_second"] == pytest.approx(2 * 27 / row["seconds"])
        assert (row["saved_bytes"] is None) == (row["mode"] == "inference")
        assert ("of_baseline" in row) == (row["model"] == "h2ot_mhformer")
        if row["whose"] == "official":
            assert row["over_official_float32"] == 1
    pruned = next(row for row in rows if "of_baseline" in row and row["mode"] == "training")["of_baseline"]
    assert pruned["flops_total"] < 1
    assert pruned["saved_bytes"] < 1

    right = hosts.MHFormer.lift
    monkeypatch.setattr(hosts.MHFormer, "lift", lambda *given: (right(*given)[0] * 1.01, right(*given)[1]))
    assert bench_hosts.main([*arguments, "--mode", "inference", "--out", str(out)]) == 1
    assert "not timed" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == len(rows)
    bench_hosts.flops.cache_clear()


def test_replays_are_set_beside_replays():
    seconds = {("a", whose, "float32"): value for whose, value in (("official", 6.0), ("ours", 3.0))}
    seconds |= {("a", "official", "float32", "graph"): 4.0, ("a", "ours", "float32", "graph"): 1.0}
    timings = {key: Timing(value, value, value, value, None, 3) for key, value in seconds.items()}
    row = bench_hosts.numbers(timings, ("a", "ours", "float32"), 8)
    assert (row["over_official"], row["over_official_graph"], row["graph_frames_per_second"]) == (2.0, 4.0, 8.0)
    del timings["a", "official", "float32", "graph"]  # it could not be captured
    assert bench_hosts.numbers(timings, ("a", "ours", "float32"), 8)["over_official_graph"] is None
