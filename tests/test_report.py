"""The report: pictures and tables from rows, one self-contained page; what feeds it: peers, memory, sweeps, hosts."""

import base64
import functools
import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch

from h2ot_kernels import hosts
from h2ot_kernels.comparison import Verdict
from h2ot_kernels.timing import Machine

from .test_bench import TINY

for needed in ("jinja2", "matplotlib", "rich", "onnxruntime"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")
from bench import bench_kept, bench_onnx, compare, figures, memory, peers, report, run, shapes  # noqa: E402
from bench.rows import case_name, read_rows  # noqa: E402

RESULTS = Path(report.__file__).parent / "results"
COMMITTED = sorted(path for path in RESULTS.glob("*/*.jsonl") if path.parent.name != "reliability")
ENVIRONMENT = {"device": "a machine", "threads": 1, "torch": "2.13.0", "date": "2026-01-02T03:04:05+00:00"}


def timing(seconds):
    return {"p10": seconds, "p50": seconds, "p90": seconds, "p99": 2 * seconds, "first": 3 * seconds, "calls": 9}


def operation_row(B=1, N=243, C=256, K=81, right=True):
    """Our time grows with N, the official one with N^2, both with B and C."""
    verdict = {"agreement_official": 0.75, "agreement_ours": 1.0, "error": 0, "bound": 0}
    seconds = {"official": 1e-9 * B * C * N * N, "ours": 1e-8 * B * C * N, "peer (stage 1 only)": 1e-3}
    return ENVIRONMENT | {
        "op": "prune_cluster",
        "shape": {"B": B, "N": N, "C": C, "K": K, "k": 2},
        "kind": "smooth",
        "verdict": verdict,
        "is_right": right,
        "timings": {rival: timing(value) for rival, value in seconds.items()} if right else {},
        "floor": 1e-6 if right else None,
        "speed_up": seconds["official"] / seconds["ours"] if right else None,
        "share_of_peak": 0.5 if right else None,
        "peak_bytes": {"official": 4 * N * N, "ours": 100 * N} if right else {},
    }


def every_row():
    rows = [operation_row(N=N) for N in (128, 256, 512)]
    rows += [
        operation_row(**{axis: size})
        for axis, sizes in (("B", (2, 4)), ("C", (64, 512)), ("K", (9, 27)))
        for size in sizes
    ]
    rows.append(operation_row(N=300, right=False))
    for K, rate in ((27, 300.0), (81, 200.0)):
        row = {"op": "host", "shape": {"B": 1, "F": 243, "K": K}, "kind": "h2ot_mixste", "tokens": [243, 121, K]}
        rows.append(
            ENVIRONMENT | row | {"gflops": K / 2, "timings": {"ours": timing(243 / rate)}, "frames_per_second": rate}
        )
    loss = {"pruner": "sampler", "unit": "mm", "mean": {"27": 9.0, "81": 1.0}}
    rows.append(ENVIRONMENT | {"op": "recovery", "shape": {"F": 243}, "kind": "walk", "pruners": [loss]})
    rates = {"pytorch": 100.0, "onnx float32": 90.0, "onnx int8": 170.0}
    edge = {"op": "onnx_host", "shape": {"B": 1, "F": 243}, "kind": "h2ot_mixste", "tokens": [243, 121, 81]}
    edge |= {"deviation": {"onnx float32": 1e-6, "onnx int8": 0.02}, "frames_per_second": rates, "timings": {}}
    large = {"op": "cluster_tokens", "shape": {"B": 1, "N": 8192, "C": 8, "K": 9, "k": 5}, "kind": "smooth"}
    large |= {"timings": {"ours": timing(0.125)}, "extra_bytes": {"ours": 4e6, "official": 1.3e9}}
    patch = {"op": "dropin_hot_mixste", "shape": {"B": 1, "F": 243, "C": 512}, "is_right": True, "error": 4e-7}
    patch |= {"timings": {"unpatched": timing(1.5), "patched": timing(1.0)}, "speed_up": 1.5}
    images = {"op": "ftp_pose", "shape": {"B": 1}, "kind": "small epsilon 0.5 prune_at 0", "kept_per_frame": 96}
    images |= {"flops": 17e9, "peak_bytes": 2e7, "timings": {"ours": timing(0.25)}, "speed_up": 2.5}
    return [*rows, *(ENVIRONMENT | more for more in (patch, images, edge, large))]


def model_row(whose, seconds):
    """As bench_hosts writes it."""
    case = {"model": "hot_mixste", "whose": whose, "dtype": "bfloat16", "mode": "inference", "batch": 4}
    rate = {"seconds": seconds, "frames_per_second": 243 / seconds, "over_official": 1.5, "over_official_float32": None}
    return ENVIRONMENT | case | rate | {"deviation": 0.5}


def test_the_page_holds_everything_and_needs_nothing(tmp_path):
    rows = json.loads(json.dumps(every_row()))
    text = report.write(rows, tmp_path).read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {f"1-{stem}.png" for stem in figures.FIGURES}
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert {base64.b64decode(data) for data in pictures} == {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert text.count("<img") == len(figures.FIGURES)
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|<script|url\(""", text)
    assert 'name="viewport"' in text
    assert "<td>125.000</td><td>4.0</td><td>-</td><td>1300.0</td>" in text
    assert "<td>1500.000</td><td>1000.000</td><td>1.50x</td><td>4.0e-07</td>" in text
    assert "<td>96</td><td>17.0</td><td>250.000</td><td>2.50x</td><td>20.0</td>" in text
    for shown in ("peer (stage 1 only)", "WRONG", "h2ot_mixste", "1.0e-06", "24.30x", "measured 2026-01-02"):
        assert shown in text, shown


def test_a_gpu_has_calls_replays_and_shares_of_the_floor(tmp_path):
    row = operation_row() | {"device": "a GPU", "checked": "everything"}
    row["timings"] |= {
        "official, graph": timing(8e-4),
        "ours, graph": timing(2e-4),
        "ours, graph, cold L2": timing(4e-4),
    }
    row |= {"shares_of_floor": {"ours": 0.11, "ours, cold L2": 0.12, "ours, graph": 0.5, "ours, graph, cold L2": 0.25}}
    model = model_row("ours", 0.2) | {"device": "a GPU", "graph_seconds": 0.125, "over_official_graph": 1.25}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(found) + "\n" for found in (row, model, operation_row())))
    text = report.write(read_rows(file), tmp_path).read_text()
    assert text.count("Official over ours, on a GPU") == 1
    assert "<td>11 % / 50 % / 25 %</td>" in text
    assert "<td>4.00x</td>" in text
    assert "<td>125.00</td><td>1.25x</td>" in text


def test_a_phone_shows_it(tmp_path):
    """360 pixels: tables scroll inside their own box, and type in pictures is no smaller than six of them."""
    text = report.write(every_row(), tmp_path).read_text()
    assert 'content="width=device-width, initial-scale=1"' in text
    assert text.count("<table>") == text.count('<div class="scroll"><table>') > 0
    assert ".scroll { overflow-x: auto; }" in text
    assert "img { max-width: 100%; height: auto; }" in text
    assert not re.search(r"[ {]width: *\d", text)
    long_names = [row | {"kind": "smooth " + "x" * 30} for row in every_row() if row["op"] == "prune_cluster"]
    for rows in (every_row(), long_names):
        report.write(rows, tmp_path)
        for path in tmp_path.glob("*.png"):
            wide = int.from_bytes(path.read_bytes()[16:20], "big")  # of the header
            assert wide * 72 / 150 * 6 / 7 <= 360, path.name


def test_every_committed_row_is_shown(tmp_path):
    """In a table, or as an error of recovery in the curves that need it."""
    for path in COMMITTED:
        rows = read_rows(path)
        shown = sum(
            len(found["lines"]) for make in report.TABLES if (found := make(rows)) and make is not report.gpu_table
        )
        others = [row for row in rows if row["op"] == "recovery" or (row["op"] == "model" and row["whose"] != "ours")]
        assert shown == len(rows) - len(others), path


def test_machines_are_kept_apart_and_the_last_row_of_a_case_counts():
    first, second = operation_row(), operation_row()
    other = operation_row() | {"threads": 2}
    second["date"] = "2026-05-05T00:00:00+00:00"
    found = report.by_machine([first, other, second])
    assert [list(rows) for rows in found.values()] == [[second], [other]]


def test_every_committed_row_can_be_read():
    read = [row for path in RESULTS.glob("cpu*/*.jsonl") for row in read_rows(path)]
    assert {"cluster_tokens", "model", "ftp_pose", "onnx_host", "host"} <= {row["op"] for row in read}
    assert all(case_name(row) and isinstance(row.get("timings", {}), dict) for row in report.latest(read))


def test_slopes_are_the_exponents():
    rows = [operation_row(N=N) for N in (512, 128, 256, 1024)]
    shown = figures.series([*rows, operation_row(B=4)], "N")
    assert [row["shape"]["N"] for row in shown] == [128, 256, 512, 1024]
    for rival, exponent in (("official", 2.0), ("ours", 1.0)):
        times = [row["timings"][rival]["p50"] for row in shown]
        assert figures.slope([row["shape"]["N"] for row in shown], times) == pytest.approx(exponent)
    assert figures.series(rows, "B") == []
    assert all(draw([operation_row(right=False)]) is None for _, draw in figures.FIGURES.values())


def test_scaling_is_log_log_with_its_slopes_said():
    sizes = [{size: value for size, value in case.sizes.items() if size != "k"} for case in shapes.sweep("cuda")]
    drawn = figures.scaling([operation_row(**given) for given in sizes]).axes
    assert {axes.get_xlabel() for axes in drawn if axes.get_visible()} == set("NBCK")
    for axes in drawn:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert all(": slope " in text.get_text() for text in axes.get_legend().get_texts())


def test_the_command_alone_measures_this_machine_and_shows_everything(tmp_path, monkeypatch, capsys):
    """At tiny sizes; what is exported is a row that is made up (test_onnx.py exports)."""
    small = {"num_frames": 27, "channels": 16, "depth": 4, "num_heads": 2}
    middle = {"B": 2, "N": 27, "C": 16, "K": 9, "k": 2}
    grid = {"N": (20, 40), "B": (1, 4), "C": (8, 32), "K": (5, 13)}
    swept = [middle, *(middle | {size: value} for size, values in grid.items() for value in values)]
    kept, row, onnx = bench_kept.measure, bench_kept.recovery_row, every_row()[-2]
    monkeypatch.setattr(shapes, "_SIZES", {op: [sizes] for op, sizes in TINY.items()})
    monkeypatch.setattr(run, "sweep", lambda device: [shapes.Case("prune_cluster", "smooth", sizes) for sizes in swept])
    monkeypatch.setattr(run, "Machine", lambda device: Machine(device, seconds=0.01))
    monkeypatch.setattr(memory, "peak_bytes", lambda case, rival, *known: 100 * case.sizes.get("N", 1))
    monkeypatch.setattr(
        bench_kept, "measure", lambda names, _, **given: kept(names, [9, 13], **given | {"overrides": small})
    )
    monkeypatch.setattr(bench_kept, "recovery_row", lambda _: row([9, 13], 27))
    monkeypatch.setattr(bench_onnx, "measure", lambda name, **given: onnx | {"kind": name, "is_right": True})
    monkeypatch.setattr(hosts, "count_flops", lambda model: 10**9)
    monkeypatch.setattr(report, "measure", functools.partial(report.measure, seconds=0.002))
    assert report.main(["--out", str(tmp_path)]) == 0, capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {f"1-{stem}.png" for stem in figures.FIGURES}
    page = (tmp_path / "report.html").read_text()
    for title in ("Operations", "Whole hosts, batch 1", "onnxruntime on the CPU; deviation"):
        assert f"<h3>{title}" in page
    assert all(f"<td>{op} " in page for op in TINY)


def test_the_command_reads_files(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(operation_row()) + "\n")
    assert report.main(["--rows", str(rows), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").exists()
    for content, message in (
        ("{]", "rows.jsonl:1 is not JSON"),
        ("[1]", "wanted an object with op, shape, device"),
        ('{"op": "sort", "device": "a", "threads": 1, "torch": "2"}', "wanted an object with shape, date"),
        ('{"model": "mixste"}', "rows.jsonl:1: got '{\"model\": \"mixste\"}', wanted 'mode' among its names, too"),
        (b"\xff", "rows.jsonl is not text"),
        ("", "without rows"),
    ):
        rows.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(SystemExit):
            report.main(["--rows", str(rows), "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["--rows", str(rows), "--out", str(rows / "folder")])
    assert "--out: " in capsys.readouterr().err


def test_hosts_beside_the_official_formulation(tmp_path, capsys):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("".join(json.dumps(model_row(*given)) + "\n" for given in (("official", 0.3), ("ours", 0.2))))
    b.write_text(json.dumps(model_row("ours", 0.1)) + "\n")
    assert report.main(["--rows", str(a), "--out", str(tmp_path)]) == 0
    cells = ("hot_mixste", "inference", "bfloat16", "4", "200.0", "1215", "1.50x", "-", "-", "-", "5.0e-01")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in (tmp_path / "report.html").read_text()
    assert run.main(["--compare", str(a), str(b)]) == 0
    assert "2.00" in capsys.readouterr().out


def test_two_files_compared(tmp_path, capsys):
    before, after = operation_row(), operation_row()
    after["timings"]["ours"]["p50"] /= 4
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    for path, row in ((a, before), (b, after), (c, operation_row(N=99) | {"threads": 8})):
        path.write_text(json.dumps(row) + "\n")
    assert run.main(["--compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "4.00" in shown
    assert "different circumstances" not in shown
    ratios = {change["rival"]: change["ratio"] for change in compare.changes([before], [after])}
    assert ratios == {"official": 1.0, "ours": 4.0, "peer (stage 1 only)": 1.0}
    assert run.main(["--compare", str(a), str(c)]) == 1
    assert "no case in common" in capsys.readouterr().out.replace("\n", "")
    c.write_text('{"op": "sort"}')
    with pytest.raises(SystemExit):
        run.main(["--compare", str(a), str(c)])
    assert "c.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_committed_file_is_compared(path, capsys):
    assert run.main(["--compare", str(path), str(path)]) == 0
    assert "1.00" in capsys.readouterr().out


def test_the_sweep_varies_one_size_at_a_time():
    cases = shapes.sweep("cuda")
    middle = {"B": 1, "N": 243, "C": 256, "K": 81, "k": 2}
    assert all(sum(case.sizes[size] != middle[size] for size in middle) <= 1 for case in cases)
    assert len({str(case) for case in cases}) == len(cases)
    rows = [operation_row(**{size: value for size, value in case.sizes.items() if size != "k"}) for case in cases]
    assert all(len(figures.series(rows, axis)) >= 4 for axis in "NBCK")


def test_the_sweep_varies_the_threads_of_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes.os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert shapes.thread_counts() == [1, 2, 4, 6]
    monkeypatch.setattr(shapes.os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert shapes.thread_counts() == []
    monkeypatch.setattr(shapes, "thread_counts", lambda: [1, 2])
    every = shapes.sweep("cpu")
    assert every[:-2] == shapes.sweep("cuda")
    assert [(case.sizes["B"], case.threads) for case in every[-2:]] == [(16, 1), (16, 2)]

    tiny = [shapes.Case("prune_cluster", "smooth", TINY["prune_cluster"], threads=count) for count in (0, 1, 2)]
    seen, threads, out = [], torch.get_num_threads(), tmp_path / "rows.jsonl"
    genuine = run.build
    monkeypatch.setattr(run, "sweep", lambda device: tiny)
    monkeypatch.setattr(run, "build", lambda *given: seen.append(torch.get_num_threads()) or genuine(*given))
    assert run.main(["--sweep", "--no-memory", "--no-peers", "--seconds", "0.01", "--out", str(out)]) == 0
    assert (seen, torch.get_num_threads()) == ([threads, 1, 2], threads)
    rows = read_rows(out)
    assert [row["shape"].get("threads") for row in rows] == [None, 1, 2]
    assert {row["threads"] for row in rows} == {threads}
    assert [row["shape"]["threads"] for row in figures.series(rows, "threads")] == [1, 2]
    assert [axes.get_xlabel() for axes in figures.scaling(rows).axes if axes.get_visible()] == ["threads"]


@pytest.mark.skipif(memory.why_not(torch.device("cpu")) is not None, reason="peak memory on a CPU needs Linux's /proc")
def test_peak_memory_is_that_of_a_process_of_its_own():
    case = shapes.Case("prune_cluster", "random", {"B": 1, "N": 1500, "C": 8, "K": 9, "k": 2})
    official = memory.peak_bytes(case, "official", torch.device("cpu"))
    assert official > 2 * 4 * 1500**2  # at least two matrices of distances at a time


class Shifted:
    """A peer whose neighbours are wrong by a constant."""

    def __init__(self, shift):
        self.shift = shift

    def __call__(self, x, k):
        squares = torch.cdist(x, x).square().sort(-1).values[..., :k]
        return lambda: squares + self.shift


def test_peers_are_labelled_checked_and_reported_absent(monkeypatch):
    comparison = shapes.build(shapes.Case("prune_cluster", "random", TINY["prune_cluster"]), "cpu")
    made = [peers.Peer(name, "torch", "torch", ("cpu",), Shifted(shift)) for name, shift in (("good", 0), ("bad", 1))]
    made.append(peers.Peer("far", "no-such-package", "no_such_module", ("cpu",), Shifted(0)))
    made.append(peers.Peer("gpu", "torch", "torch", ("cuda",), Shifted(0)))
    made.append(peers.Peer("other", "torch", "torch", ("cpu",), nearest=Shifted(0)))
    monkeypatch.setattr(peers, "PEERS", tuple(made))
    ready, absent = peers.rivals(comparison, torch.device("cpu"))
    assert list(ready) == ["good (stage 1 only)"]
    assert absent == {
        "bad (stage 1 only)": "wrong, not timed",
        "far (stage 1 only)": "no-such-package is not installed",
        "gpu (stage 1 only)": "runs on cuda only",
    }


@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if "cpu" in peer.devices], ids=lambda peer: peer.name)
def test_installed_peers_are_right(peer):
    reason = peer.why_not(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    for op in ("score_tokens", "assign_clusters") if peer.nearest else ("score_tokens",):
        comparison = shapes.build(shapes.Case(op, "random", TINY[op]), "cpu")
        ready, _ = peers.rivals(comparison, torch.device("cpu"))
        assert any(label.startswith(peer.name) for label in ready), op


def test_other_backends_are_checked_before_they_are_timed(monkeypatch):
    comparison = shapes.build(shapes.Case("gather_tokens", "random", TINY["gather_tokens"]), "cpu")
    device = torch.device("cpu")
    found, unfit, wrong = run.other_backends(comparison, device, ("cpp", "cuda", "reference"))
    assert (list(found), unfit, wrong) == (["reference"], {}, 0)
    assert torch.equal(found["reference"](), comparison.ours())
    object.__setattr__(comparison, "check", lambda: Verdict(1, 1, 1, 0))
    assert run.other_backends(comparison, device, ("reference",)) == ({}, {}, 1)


def test_stages_of_a_host_end_at_the_tokens_asked_for():
    assert bench_kept.stages("hot_mixste", 243, 27) == {3: 27}
    assert bench_kept.stages("h2ot_mixste", 243, 27) == {1: 81, 2: 27}
    row = bench_kept.recovery_row([27, 81, 500], 243)
    sampler = next(pruner for pruner in row["pruners"] if pruner["pruner"] == "sampler")
    assert list(sampler["mean"]) == [27, 81]
    assert 0 < sampler["mean"][81] < sampler["mean"][27]


def test_hosts_are_checked_and_timed():
    small = {"num_frames": 27, "channels": 16, "depth": 3, "num_heads": 2}
    rows = bench_kept.measure(["mixste", "h2ot_mixste"], [9], seconds=0.01, device="cpu", overrides=small)
    assert [row["tokens"] for row in rows] == [[27], [27, 16, 9]]
    assert all(row["is_right"] and row["frames_per_second"] > 0 for row in rows)
    assert rows[0]["gflops"] > rows[1]["gflops"] > 0


def test_only_known_messages_of_an_export_are_dropped():
    def passes(name, message):
        return bool(logging.getLogger(name).filter(logging.makeLogRecord({"msg": message})))

    for name, start in bench_onnx.KNOWN_MESSAGES:
        with bench_onnx.without_known_messages():
            assert not passes(name, f"{start}, and so on")
            assert passes(name, f"wrong, not {start}")
        assert passes(name, start)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with bench_onnx.without_known_messages():
            for message in ("`isinstance(treespec, LeafSpec)` is deprecated, use another", "another"):
                warnings.warn(message, FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["another"]


def test_deviation_of_a_quantised_graph():
    wanted = [torch.tensor([[2.0, -4.0]]), torch.tensor([[0, 1, 2, 3]])]
    found = [torch.tensor([[2.0, -3.0]]), torch.tensor([[0, 1, 2, 5]])]
    assert bench_onnx.deviation(found, wanted) == (0.25, 0.75)
    assert bench_onnx.deviation(wanted[:1], wanted[:1]) == (0.0, 1.0)
