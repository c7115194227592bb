"""Mistakes that tests plant in the CPU kernels are where they are said to be, those that a run does not draw, too."""

import pytest

from . import (
    test_attention_tiles,
    test_linear_channels,
    test_linear_floats_apart,
    test_linear_halves,
    test_linear_tiles,
    test_recover_rotated_apart,
    test_score_tiles,
)
from .tiles import SOURCES

PLANTED = {
    "attention": test_attention_tiles.MISTAKES | test_attention_tiles.MISTAKES_OF_DOTS,
    "channels": test_linear_channels.MISTAKES,
    "floats": test_linear_floats_apart.MISTAKES,
    "halves": test_linear_halves.MISTAKES | test_linear_halves.MISTAKES_OF_THE_UNIT,
    "tiles": test_linear_tiles.MISTAKES,
    "rotated": test_recover_rotated_apart.MISTAKES,
    "score": test_score_tiles.MISTAKES,
}


@pytest.mark.parametrize("name", PLANTED)
def test_every_mistake_has_its_place(name):
    for file, text, _ in PLANTED[name].values():
        found = [path.read_text().count(text) for path in SOURCES if path.name == file]
        assert sum(found) == 1, f"{file}: {text!r} stands there {sum(found)} times"
