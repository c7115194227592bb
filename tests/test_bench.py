"""The benchmarks at tiny sizes: rows are written, what is wrong is not timed, timing is what it says."""

import dataclasses
import importlib
import json

import pytest
import torch

import python_ref
from bench import acceptance, bench_dropin, bench_large, rivals, run, shapes
from bench.rows import case_row, environment_row
from h2ot_kernels.comparison import Comparison, Verdict, compare, same_index, same_labels, same_values
from h2ot_kernels.timing import Machine, interleave

TINY = {
    "score_tokens": {"B": 3, "N": 27, "C": 32, "K": 9, "k": 2},
    "prune_cluster": {"B": 3, "N": 27, "C": 32, "K": 9, "k": 2},
    "cluster_tokens": {"B": 3, "N": 27, "C": 32, "K": 9, "k": 5},
    "prune_step": {"B": 2, "F": 27, "C": 32, "K": 9},
    "prune_sample": {"F": 27, "K": 9},
    "prune_motion": {"B": 2, "F": 27, "K": 9},
    "prune_attention": {"B": 2, "F": 27, "C": 32, "K": 9},
    "gather_tokens": {"B": 2, "F": 27, "C": 32, "K": 9},
    "gather_and_embed": {"B": 2, "F": 27, "C": 32, "K": 9},
    "assign_clusters": {"B": 2, "N": 27, "C": 32, "K": 9, "k": 2},
    "merge_tokens": {"B": 2, "N": 27, "C": 32, "K": 9, "k": 2},
    "recover_attention": {"B": 2, "F": 27, "C": 32, "K": 9},
    "recover_pose": {"B": 2, "F": 27, "C": 32, "K": 9},
    "recover_interpolate": {"B": 2, "F": 27, "C": 3, "K": 9},
}


def measure(case, machine, **options):
    return compare(shapes.build(case, machine.device), machine, seconds=0.01, **options)


@pytest.fixture(scope="module")
def machine():
    machine = Machine("cpu", seconds=0.01)
    machine.products = {"torch.mm": 1e11}
    return machine


def test_every_operation_has_shapes_and_a_stem():
    assert set(TINY) == set(shapes.all_ops())
    for op in shapes.all_ops():
        assert len(shapes.cases([op], quick=True)) == 1
        assert len({str(case) for case in shapes.cases([op])}) == len(shapes.cases([op]))
    with pytest.raises(ValueError, match="'sort', wanted some of score_tokens"):
        shapes.cases(["sort"])


@pytest.mark.parametrize("op", TINY)
@pytest.mark.parametrize("kind", ["smooth", "random"])
def test_every_operation_is_right_and_timed(machine, op, kind):
    case = shapes.Case(op, kind, TINY[op])
    result = measure(case, machine)
    assert result.verdict.is_right, result.verdict
    assert result.verdict.agreement_ours >= result.verdict.agreement_official
    assert set(result.timings) == {"official", "ours"}
    row = json.loads(json.dumps(case_row(case, result, machine, environment_row("cpu")), allow_nan=False))
    assert row["op"] == op
    assert row["timings"]["ours"]["p10"] <= row["timings"]["ours"]["p50"] <= row["timings"]["ours"]["p99"]
    assert row["speed_up"] == pytest.approx(row["timings"]["official"]["p50"] / row["timings"]["ours"]["p50"])
    assert (row["share_of_peak"] is None) == (op == "prune_sample")
    assert list(row["shares_of_floor"].values()) == ([] if op == "prune_sample" else [row["share_of_peak"]])
    assert row["best_flops"] == row["best_float32_flops"]  # a CPU's floor is that of float32
    assert row["launch_seconds"] == row["replay_seconds"] == 0
    assert row["torch"] == torch.__version__


def test_the_command_appends_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "_SIZES", {op: [sizes] for op, sizes in TINY.items()})
    out = tmp_path / "results" / "cpu.jsonl"
    arguments = [
        "--ops",
        "gather_tokens",
        "recover_interpolate",
        "--quick",
        "--seconds",
        "0.01",
        "--no-memory",
        "--out",
        str(out),
    ]
    assert run.main(arguments) == 0
    assert run.main(arguments) == 0
    assert [json.loads(line)["op"] for line in out.read_text().splitlines()] == arguments[1:3] * 2
    shown = capsys.readouterr().out
    assert "2 of 2 cases right" in shown
    assert "peak memory: not asked for" in shown


def test_many_tokens_are_checked_and_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_large, "extra_memory", lambda name, N, kind, threads: 3 << 20)
    threads, out = torch.get_num_threads(), tmp_path / "large.jsonl"
    arguments = ["--sizes", "1700", "--seconds", "0.01", "--without-scikit-learn", "--threads", str(threads)]
    assert bench_large.main([*arguments, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["smooth", "random"]
    for row in rows:
        assert set(row["timings"]) == {"ours", "ours, index only", "official", "official, index only"}
        assert row["shape"]["K"] == 425
    assert "3.0 MB" in capsys.readouterr().out
    genuine = bench_large.h2ot.score_tokens
    monkeypatch.setattr(bench_large.h2ot, "score_tokens", lambda x, k: genuine(x + 1e-3 * torch.randn_like(x), k))
    assert bench_large.main([*arguments, "--out", str(out)]) == 1
    assert json.loads(out.read_text().splitlines()[-1])["timings"] == {}


@pytest.mark.parametrize(
    "bad",
    [
        ["--ops", "sort"],
        ["--threads", "0"],
        ["--device", "tpu"],
        ["--backends", "cpp", "fast"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--out", __file__ + "/rows.jsonl"],
        ["--compare", __file__, __file__ + "x"],
    ],
)
def test_bad_arguments(bad, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(bad)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert bad[0].strip("-") in said
    assert "Traceback" not in said


def test_what_is_wrong_is_not_timed(machine, tmp_path, monkeypatch, capsys):
    case = shapes.Case("gather_tokens", "random", TINY["gather_tokens"])
    right = shapes.build(case, "cpu")
    calls = []
    wrong = dataclasses.replace(right, check=lambda: Verdict(1.0, 0.5, 1.0, 0.0), ours=lambda: calls.append(1))
    result = compare(wrong, machine, seconds=0.01)
    assert result.timings == {}
    assert result.speed_up is None
    assert not calls
    monkeypatch.setattr(run, "build", lambda *_: wrong)
    assert run.main(["--ops", "gather_tokens", "--quick", "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.jsonl").read_text())["timings"] == {}


def test_a_wrong_implementation_is_refused(monkeypatch, tmp_path, capsys):
    """A planted mistake in a public function: by the command, and by the file for pytest-benchmark."""
    import h2ot_kernels as h2ot

    genuine, out = h2ot.gather_tokens, tmp_path / "rows.jsonl"
    monkeypatch.setattr(shapes, "_SIZES", {op: [sizes] for op, sizes in TINY.items()})
    monkeypatch.setattr(h2ot, "gather_tokens", lambda x, index, *given: genuine(x, (index + 1).clamp(max=26), *given))
    options = ["--no-memory", "--backends", "--seconds", "0.01", "--out", str(out)]
    assert run.main(["--ops", "gather_tokens", "recover_interpolate", *options]) == 1
    rows = {row["op"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert (rows["gather_tokens"]["is_right"], rows["gather_tokens"]["timings"]) == (False, {})
    assert rows["recover_interpolate"]["timings"]["ours"]["p50"] > 0
    assert "WRONG" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="is wrong and not timed"):
        rivals.run(Recorded(), shapes.Case("gather_tokens", "smooth", TINY["gather_tokens"]), "ours")


class Recorded:
    """Stands for pytest-benchmark's fixture."""

    called = 0

    def __call__(self, call):
        self.called += 1
        call()


@pytest.mark.parametrize("stem", shapes.STEMS)
def test_every_stem_has_a_file_for_pytest_benchmark(stem):
    function = getattr(importlib.import_module(f"bench.bench_{stem}"), f"test_{stem}")
    drawn = {mark.args[0]: mark.args[1] for mark in function.pytestmark}
    assert drawn == {"case": shapes.cases(shapes.STEMS[stem]), "rival": ["official", "ours"]}
    benchmark = Recorded()
    for op in shapes.STEMS[stem]:
        for rival in drawn["rival"]:
            function(benchmark, shapes.Case(op, "smooth", TINY[op]), rival)
    assert benchmark.called == 2 * len(shapes.STEMS[stem])


def test_the_oracle_of_a_case_is_computed_once(monkeypatch):
    calls = []
    genuine = python_ref.score.squared_distances

    def counted(x, y):
        calls.append((x.shape, y.shape))
        return genuine(x, y)

    monkeypatch.setattr(python_ref.score, "squared_distances", counted)
    monkeypatch.setattr(python_ref.cluster, "squared_distances", counted)
    comparison = shapes.build(shapes.Case("cluster_tokens", "smooth", TINY["cluster_tokens"]), "cpu")
    with torch.inference_mode():
        assert comparison.check() == comparison.check()
    assert len(calls) == 3  # with noise, without, labels
    assert comparison.checked == "first and last sample"


def test_a_wrong_backend_does_not_meet_its_own_oracle(monkeypatch):
    """The labels are kept for the index that they belong to: another index gets its own."""
    import h2ot_kernels as h2ot

    comparison = shapes.build(shapes.Case("cluster_tokens", "smooth", TINY["cluster_tokens"]), "cpu")
    assert comparison.check().is_right
    genuine = h2ot.cluster_tokens

    def shifted(*given):
        found = genuine(*given)
        return found._replace(labels=(found.labels + 1) % 9)

    monkeypatch.setattr(h2ot, "cluster_tokens", shifted)
    assert not comparison.check().is_right


@pytest.mark.parametrize("kind", ["smooth", "random"])
def test_what_a_gpu_is_asked_for_is_right_at_tiny_sizes(machine, kind):
    small = {"B": 3, "F": 27, "N": 60, "C": 32, "K": 9}
    wanted = {}
    for case in shapes.gpu_cases(shapes.all_ops()):
        wanted.setdefault(case.op, []).append(case)
        sizes = {name: small.get(name, size) for name, size in case.sizes.items()}
        result = measure(shapes.Case(case.op, kind, sizes, case.dtype), machine)
        assert result.verdict.is_right, (case, result.verdict)
        assert result.shape.items() >= sizes.items()
    assert {op: len(of_op) for op, of_op in wanted.items()} == {
        "prune_step": 4,
        "gather_and_embed": 2,
        "recover_pose": 4,
        "prune_cluster": 2,
    }
    assert [str(case) for case in shapes.gpu_cases(["prune_step", "recover_pose"], quick=True)] == [
        "prune_step-B4-F243-C512-K81-smooth",
        "recover_pose-B4-F243-C512-K81-smooth",
    ]
    with pytest.raises(ValueError, match="'sort'"):
        shapes.gpu_cases(["sort"])


def test_the_command_times_what_a_gpu_is_asked_for(tmp_path, monkeypatch, capsys):
    sizes = {"B": 2, "F": 27, "C": 32, "K": 9}
    few = [
        shapes.Case("prune_step", "smooth", sizes | more, dtype)
        for more, dtype in (({}, "bfloat16"), ({"J": 1}, "float32"))
    ]
    monkeypatch.setattr(shapes, "_GPU_CASES", [*few, shapes.Case("gather_and_embed", "smooth", sizes)])
    out = tmp_path / "rows.jsonl"
    options = ["--gpu-sizes", "--no-memory", "--no-peers", "--seconds", "0.01", "--out", str(out)]
    assert run.main([*options, "--ops", "prune_step", "--dtype", "float16"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["shape"]["J"], row["dtype"], row["gpu_size"]) for row in rows] == [
        (17, "bfloat16", True),
        (1, "float32", True),
    ]
    assert [row["checked"] for row in rows] == ["everything"] * 2
    shown = "\n".join(acceptance.tables(rows))
    assert "What is asked of a GPU" in shown
    assert "Other sizes" not in shown
    assert "2 of 2 cases right" in capsys.readouterr().out


def test_a_pruning_step_without_joints_is_the_official_one_with_one_joint():
    comparison = shapes.build(shapes.Case("prune_step", "smooth", {"B": 2, "F": 27, "J": 1, "C": 32, "K": 9}), "cpu")
    noise = torch.rand(2, 27) * 1e-6
    for found, wanted in zip(
        comparison.official(*comparison.arguments, noise),
        python_ref.official.prune_step(*comparison.arguments, noise),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_the_first_dtype_comes_first():
    cases = shapes.cases(["prune_sample", "gather_tokens"], quick=True, dtypes=("float32", "bfloat16"))
    assert [(case.op, case.dtype) for case in cases] == [
        ("prune_sample", "float32"),
        ("gather_tokens", "float32"),
        ("gather_tokens", "bfloat16"),
    ]


def test_verdicts():
    oracle = torch.tensor([[0, 2, 4, 6]])
    index = same_index(torch.tensor([[6, 0, 1, 4]]), torch.tensor([[0, 2, 4, 6]]), oracle)
    assert (index.agreement_official, index.agreement_ours, index.error) == (0.75, 1.0, 0)
    assert same_index(oracle, torch.tensor([[0, 2, 4, 7]]), oracle).error == 1
    assert same_index(oracle, oracle, oracle, (torch.tensor([[1, 3]]), torch.tensor([[1, 2]]))).agreement_ours == 0.5
    labels = same_labels(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 0, 2]), torch.tensor([1, 1, 0, 0]))
    assert (labels.agreement_official, labels.error, labels.is_right) == (1.0, 1, False)
    exact = torch.linspace(-1, 1, 9, dtype=torch.float64)
    assert same_values(exact.float(), exact.float(), exact, 4).is_right
    assert not same_values(exact.float(), exact.float() + 1e-4, exact, 4).is_right
    assert not same_values(exact, exact + 1e-12, exact, 4, moved=True).is_right


def test_the_compiled_official_formulation_is_a_third_rival(machine):
    case = shapes.Case("prune_motion", "smooth", TINY["prune_motion"])
    result = measure(case, machine, with_compile=True)
    assert set(result.timings) == {"official", "compile", "ours"}
    assert result.timings["compile"].first > result.timings["compile"].p50


def test_interleaving_takes_turns_and_counts_calls():
    order = []
    timings = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, min_calls=3, warm_up=2
    )
    assert order == ["a", "b"] * 2 + ["a", "b", "b", "a", "a", "b"]
    assert timings["a"].calls == timings["b"].calls == 3
    assert timings["a"].first > 0
    assert interleave({}, seconds=0) == {}
    limited = interleave({"a": lambda: None}, seconds=60, max_calls=5, warm_up=0)["a"]
    assert (limited.calls, limited.first) == (5, None)


def test_the_machine_rates_are_positive_and_the_floor_is_the_higher_bound():
    machine = Machine("cpu", seconds=0.01)
    assert machine.flops() == max(machine.products.values()) > 1e8
    copied = machine.copy_rate(1 << 20)
    assert copied > 1e7
    assert machine.copy_rate((1 << 20) - 5) == copied  # the same power of two, measured once
    assert machine.floor(0, 1 << 20) == pytest.approx((1 << 20) / copied)
    assert machine.floor(10**12, 1) == pytest.approx(10**12 / machine.flops())
    assert machine.flops(torch.bfloat16) == machine.flops()  # on a CPU
    on_a_gpu = Machine("cpu", seconds=0.01)
    on_a_gpu.device = torch.device("cuda")
    on_a_gpu.products, on_a_gpu.half_rates = {"torch.mm": 1.0}, {torch.bfloat16: 16.0}
    rates = [on_a_gpu.flops(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    assert rates == [1.0, 16.0, 1.0]


def test_a_comparison_names_the_backend_that_ran():
    case = shapes.Case("prune_sample", "smooth", TINY["prune_sample"])
    assert shapes.build(case, "cpu").backend(torch.device("cpu")) == "none"
    gather = shapes.build(shapes.Case("gather_tokens", "random", TINY["gather_tokens"]), "cpu")
    assert isinstance(gather, Comparison)
    assert gather.backend(torch.device("cpu")) in ("cpp", "reference")


def test_the_patch_is_checked_and_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_dropin, "Machine", lambda device: Machine(device, seconds=0.01))
    out = tmp_path / "rows.jsonl"
    small = ["--frames", "27", "--channels", "64", "--seconds", "0.01", "--out", str(out)]
    assert bench_dropin.main([*small, "--batch", "1", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = [(batch, dtype) for batch in (1, 2) for dtype in ("float32", "bfloat16")]
    assert [(row["shape"]["B"], row["dtype"]) for row in rows] == wanted
    for row in rows:
        assert row["is_right"]
        assert 0 < row["error"] <= row["bound"]
        assert row["speed_up"] == row["timings"]["unpatched"]["p50"] / row["timings"]["patched"]["p50"]
        assert 0 < row["linear_share"] < 1
    assert "replaced 16 attention" in capsys.readouterr().out

    monkeypatch.setattr(bench_dropin, "deviation", lambda got, wanted: 1.0)
    assert bench_dropin.main([*small, "--dtype", "float32"]) == 1
    assert "timings" not in json.loads(out.read_text().splitlines()[-1])


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fails_first(comparison, *given, **named):
        if comparison.op == "prune_sample":
            raise ArithmeticError("of this case")
        return compare(comparison, *given, **named)

    monkeypatch.setattr(run, "compare", fails_first)
    out = tmp_path / "rows.jsonl"
    options = ["--quick", "--no-memory", "--no-peers", "--backends", "--seconds", "0.01", "--out", str(out)]
    assert run.main(["--ops", "prune_sample", "prune_motion", *options]) == 1
    assert [json.loads(line)["op"] for line in out.read_text().splitlines()] == ["prune_motion"]
    said = capsys.readouterr().out
    assert "ArithmeticError: of this case" in said
    assert "1 of 2 cases right and timed" in said
