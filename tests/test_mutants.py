"""tests/mutants.py: every file of the mutants has tests, and every explanation is of its places in the sources."""

import functools

import pytest

from . import mutant_runs, mutants
from .mutant_reasons import EQUIVALENT, PLACES


@functools.cache
def made() -> list[mutants.Mutant]:
    return [mutant for language in mutants.FILES for mutant in mutants.all_mutants(language)]


@pytest.mark.parametrize("language", mutants.FILES)
def test_every_file_has_its_tests(language):
    files = {mutant.file for mutant in made() if mutant.language == language}
    assert len(files) > 3
    for file in files:
        for test in mutant_runs.TREES[language].tests(file):
            assert (mutants.ROOT / test).is_file(), (file, test)


@pytest.mark.parametrize(("file", "before", "after"), EQUIVALENT)
def test_an_explanation_is_of_its_places(file, before, after):
    """Else it would excuse another one: of a line that stands twice, or that is no longer there."""
    source = (mutants.ROOT / file).read_text()
    lines = [line.strip() for line in source.splitlines()]
    wanted = before.split("\n")
    places = sum(lines[i : i + len(wanted)] == wanted for i in range(len(lines)))
    assert places == PLACES.get((file, before, after), 1)
    assert any(
        mutant.shown(source) == (wanted[0], after) and mutant.explanation(source)
        for mutant in made()
        if mutant.file == file
    )
