"""The documentation: what the docstring of every public operation says, and that the page is made from it."""

import inspect
import re
import shlex
import zipfile
from pathlib import Path

import pytest

import h2ot_kernels as h2ot
import h2ot_kernels.onnx

from . import wheel_gate
from .public import functions

ROOT = Path(__file__).resolve().parents[1]
NOT_OPERATIONS = {"can_run", "env_report", "explain", "use_backend"}
OPERATIONS = [name for name in h2ot.__all__ if inspect.isfunction(getattr(h2ot, name)) and name not in NOT_OPERATIONS]


FORMULA = re.compile(r"\b(density|index|labels|out|pose|score)(_\w|\[[^\]]*\])? = [^=]*?(\(|\[|/|\|)")
# What takes tensors beside the operations says the same, or whose words hold for it, too.
WITH_TENSORS = [name for name in functions() if ".dropin." in name and not name.endswith("patch")]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_says_shapes_errors_cost_and_source(name):
    function = getattr(h2ot, name)
    text = inspect.getdoc(function)
    for wanted in ("Raises", "Cost", "Source", "int64|float", ">>> "):
        assert re.search(wanted, text), wanted
    described = text.split(">>>")[0]
    assert "[B" in described or "[1, K]" in described
    assert FORMULA.search(described), "no equation"
    assert re.search(r"float32|(any|one) float dtype|Arguments as in|int or a list|as in `", described), "no dtype"
    missing = [
        parameter
        for parameter in inspect.signature(function).parameters
        if parameter != "backend" and parameter not in described and "Arguments as in" not in described
    ]
    assert not missing


@pytest.mark.parametrize("name", functions())
def test_every_public_function_has_an_example_and_says_what_it_raises(name):
    """Examples run in test_build.py, and in test_onnx.py."""
    text = inspect.getdoc(functions()[name])
    assert re.search(r"^>>> (?!import|from)", text, re.M)
    assert "Raises " in text


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_a_drop_in_function_says_shapes_dtypes_cost_and_source(name):
    text = inspect.getdoc(functions()[name]).split(">>>")[0]
    assert "[B, N" in text
    for wanted in ("dtype", "[Cc]ost", "[Ss]ource"):
        assert re.search(wanted, text), wanted


def test_every_public_class_is_documented():
    assert all(inspect.getdoc(getattr(h2ot, name)) for name in h2ot.__all__)


def test_every_test_that_a_promise_names_is_there():
    promises = (ROOT / "RELIABILITY.md").read_text()
    named = re.findall(r"`[^`]*?\b(test_\w+\.py)(?:::(test_\w+))?", promises)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), (file, test)
    for command in re.findall(r"`\./dev (\w+)`", promises):
        assert f"\n  {command}) " in (ROOT / "dev").read_text() or f"\n  {command})\n" in (ROOT / "dev").read_text()


def test_the_documentation_is_made_from_docstrings(tmp_path):
    pdoc = pytest.importorskip("pdoc")
    given = re.search(r"-m pdoc -o docs (.*?) ;;", (ROOT / "dev").read_text(), re.S).group(1)
    pages = pdoc.extract.walk_specs(shlex.split(given.replace("\\\n", "")))
    assert {name.rpartition(".")[0] for name in functions()} <= set(pages)
    pdoc.pdoc("h2ot_kernels.onnx", "h2ot_kernels.score", output_directory=tmp_path)
    page = (tmp_path / "h2ot_kernels" / "score.html").read_text()
    assert "Density, distance to the next denser token" in page
    assert "decompositions" in (tmp_path / "h2ot_kernels" / "onnx.html").read_text()


def test_the_wheel_gate_sees_what_is_missing_or_left_over(tmp_path):
    packages = [path for name in ("h2ot_kernels", "python_ref") for path in (wheel_gate.ROOT / name).rglob("*.py")]
    libraries = sorted(wheel_gate.LIBRARIES)
    names = [str(path.relative_to(wheel_gate.ROOT)) for path in packages] + libraries
    wheel = tmp_path / "h2ot_kernels.whl"

    def packed(contents):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in contents:
                archive.writestr(name, "")
        return wheel_gate.faults(wheel)

    assert packed([*names, "h2ot_kernels-1.dist-info/METADATA"]) == []
    assert packed([*names, "h2ot_kernels/deleted.py"]) == ["should not be there: h2ot_kernels/deleted.py"]
    assert packed(names[:-1]) == [f"missing: {libraries[-1]}"]
    assert packed(names[1:]) == [f"missing: {names[0]}"]
