"""Mistakes in the CUDA source, all in one program: the body of every function that is to have some stands there once as
it is, and once for each mistake. SIMT_MISTAKE, its number from 1 on, chooses when the program runs.
"""

import bisect
import itertools
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import ROOT, build

_SKIPPED = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])'", re.DOTALL)
_SCOPE = re.compile(r'\s*(?:template\s*<[^{]*>\s*)?(?:(?:inline )?namespace|struct|class|union|enum|extern "C")\b')


def bodies(source: str) -> list[tuple[int, int]]:
    """Where the functions' bodies are, braces included."""
    plain = _SKIPPED.sub(lambda match: " " * len(match[0]), source)
    plain = re.sub(r"^#[^\n]*", lambda match: " " * len(match[0]), plain, flags=re.MULTILINE)
    found, depth, head, at = [], 0, 0, 0
    for match in re.finditer(r"[{};]", plain):
        if depth:
            depth += {"{": 1, "}": -1, ";": 0}[match[0]]
            if depth == 0:
                found.append((at, match.end()))
        elif match[0] == "{" and not _SCOPE.match(plain[head : match.start()]):
            depth, at = 1, match.start()
        head = match.end()
    return found


def check_places(mistakes: dict[str, tuple[str, str, str]]) -> None:
    """AssertionError: a mistake, name -> (file, text, replacement), whose text is not there just once any more."""
    for name, (file, text, _) in mistakes.items():
        count = (ROOT / "csrc" / "cuda" / file).read_text().count(text)
        assert count == 1, f"{name}: {text!r} stands in {file} {count} times"


def planted(source: str, mistakes: dict[int, tuple[str, str]]) -> str:
    """The source with those mistakes, number -> (text, replacement), beside it."""
    own = {}
    for number, (text, replacement) in mistakes.items():
        assert source.count(text) == 1, f"{text!r}: found {source.count(text)} times"
        start = source.index(text)
        body = next(((a, b) for a, b in bodies(source) if a < start and start + len(text) <= b), None)
        assert body, f"{text!r} is in no function"
        wrong = source[body[0] : start] + replacement + source[start + len(text) : body[1]]
        own.setdefault(body, []).append(f"if (simt::planted_mistake == {number}) {wrong} else ")
    for (start, end), wrong in sorted(own.items(), reverse=True):
        source = f"{source[:start]}{{ {''.join(wrong)}{source[start:end]} }}{source[end:]}"
    return f'#include "planted.h"\n{source}'


def without(orders: re.Pattern, source: str) -> dict[str, tuple[str, str]]:
    """Mistakes of a source, by name: what orders threads is left out at one place, whose text is that around it."""
    found, inside = {}, bodies(source)
    ends = [0, *(match.end() for match in re.finditer("\n", source))]
    for match in orders.finditer(_SKIPPED.sub(lambda skipped: " " * len(skipped[0]), source)):
        n = bisect.bisect(ends, match.start()) - 1
        for before, after in sorted(itertools.product(range(6), range(6)), key=sum):
            start, end = ends[max(n - before, 0)], ends[n + after + 1]
            text = source[start:end]
            if source.count(text) == 1 and any(a < start and end <= b for a, b in inside):
                found[f"{n + 1}: no {match[0]}"] = (
                    text,
                    f"{source[start : match.start()]}{{}}{source[match.end() : end]}",
                )
                break
        else:
            raise ValueError(f"line {n + 1}: nothing around {match[0]} tells it from others")
    return found


def build_planted(mistakes: dict, folder: Path, flags, name: str = "driver") -> Path:
    """A driver with the mistakes, name -> (file, text, replacement), numbered in this order from 1 on."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu"))
    numbered = list(enumerate(mistakes.values(), 1))
    for file in {file for file, _, _ in mistakes.values()}:
        path = folder / "csrc" / "cuda" / file
        own = {number: rest for number, (other, *rest) in numbered if other == file}
        path.write_text(planted(path.read_text(), own))
    return build(flags, folder / "csrc", folder, name)


def survivors(mistakes: dict, cases: list, is_right: Callable[[Any, int], bool]) -> list[str]:
    """The mistakes that no case shows: is_right(case, number), 0 for none. Those that take least are asked first, of
    the quick half what showed the last one before the others.
    """
    took = []
    for case in cases:
        start = time.perf_counter()
        assert is_right(case, 0), f"without a mistake: {case}"
        took.append(time.perf_counter() - start)
    order = sorted(range(len(cases)), key=took.__getitem__)
    quick = set(order[: len(order) // 2])

    def survives(number: int) -> bool:
        for at in list(order):
            if not is_right(cases[at], number):
                if at in quick:
                    order[:] = [at, *(other for other in order if other != at)]
                return False
        return True

    with ThreadPoolExecutor(2) as pool:
        alive = list(pool.map(survives, range(1, len(mistakes) + 1)))
    return [name for name, survived in zip(mistakes, alive, strict=True) if survived]
