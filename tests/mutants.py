"""`./dev mutants`: small mistakes by rule, each in a scratch copy, and whether the tests notice.

Rules: comparisons, plus or minus one, dropped masks and conditions, swapped strides, removed barriers. Languages: the
C++ CPU kernels (portable), the CUDA source (run by tests/simt), the Triton kernels (interpreted), the Python stems.
A sample of --sample mutants is drawn by a printed --seed, as many of each language; what does not compile is drawn
again. Every mutant meets only the tests of its file. Exit code 1: fewer than 90 % are killed, survivors that
mutant_reasons.py explains not counted. --again: the mutants of the results file that have no explanation there.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import functools
import io
import itertools
import json
import os
import random
import re
import sys
import threading
import time
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from . import mutant_runs
from .mutant_reasons import EQUIVALENT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "reliability" / "mutants.jsonl"
COMPARED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
FILES = {
    "cpp": ["csrc/cpu/*.cpp", "csrc/cpu/*.h", "csrc/registration.cpp", "csrc/recover_registration.cpp"],
    "cuda": [f"csrc/cuda/{name}" for name in ("score*", "select*", "cluster*", "device.cuh", "warp.cuh")],
    "triton": ["h2ot_kernels/triton/*.py"],
    "python": [
        *[f"{package}/{stem}.py" for package in ("h2ot_kernels", "python_ref") for stem in mutant_runs.PYTHON_STEMS],
        "h2ot_kernels/recover_tail.py",
    ],
}
# Lines on which a change alters speed or a message, not a result.
SPEED = re.compile(
    r"prefetch|grain|unroll|flops|static_assert|raise |error\b|unlikely|template|pragma|kMaxDims|<k[A-Z]\w* - 1"
    r"|credit|stops\(|kFew|kWorth|may_open|nearby(?!\.)"
)
# A minimum or maximum: at equality both sides of the choice are the same.
MINIMUM = re.compile(r"([\w.\[\]]+) [<>] ([\w.\[\]<>]+) \? \1 : \2(?![\w.(\[])")


def can_matter(line: str, replacement: str) -> bool:
    return not (SPEED.search(line) or (replacement in ("<=", ">=") and MINIMUM.search(line)))


@dataclasses.dataclass(frozen=True)
class Mutant:
    language: str
    file: str
    line: int  # from 1
    start: int
    end: int
    text: str
    rule: str

    def apply(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        old = lines[self.line - 1]
        lines[self.line - 1] = old[: self.start] + self.text + old[self.end :]
        return "".join(lines)

    def shown(self, source: str) -> tuple[str, str]:
        """The line before and after."""
        return tuple(text.splitlines()[self.line - 1].strip() for text in (source, self.apply(source)))

    def explanation(self, source: str) -> str | None:
        """Of its line or, where that stands more than once, of its line and the next."""
        before, after = self.shown(source)
        below = "".join(source.splitlines()[self.line : self.line + 1]).strip()
        return EQUIVALENT.get((self.file, before, after)) or EQUIVALENT.get((self.file, f"{before}\n{below}", after))


def python_sites(source: str) -> Iterator[tuple[int, int, int, str, str]]:
    """(line, start, end, replacement, rule) in code, never in strings or comments."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    swapped = {"and": "or", "or": "and", "&": "|", "&=": "|="}
    for token, after in itertools.pairwise(tokens):
        (line, start), (_, end) = token.start, token.end
        if token.type == tokenize.OP and token.string in COMPARED:
            yield line, start, end, COMPARED[token.string], "comparison"
        elif token.string in swapped and token.type in (tokenize.OP, tokenize.NAME):
            yield line, start, end, swapped[token.string], "mask"
        elif token.string in "+-" and token.type == tokenize.OP and after.string == "1":
            yield line, start, after.end[1], f"{token.string} {2 if token.string == '+' else 0}", "plus or minus one"
        elif token.type == tokenize.NAME and token.string in ("stride_n", "stride_c"):
            yield line, start, end, "stride_c" if token.string == "stride_n" else "stride_n", "stride"
        elif token.type == tokenize.NAME and token.string == "debug_barrier" and after.string == "(":
            yield line, token.line.index("tl."), after.end[1] + 1, "pass", "barrier"


_CPP = [
    (re.compile(r"(?<= )(<=|>=|==|!=|<|>)(?= )"), lambda found: COMPARED[found], "comparison"),
    (re.compile(r"(?<= )(&&|\|\|)(?= )"), lambda found: "||" if found == "&&" else "&&", "mask"),
    (re.compile(r"\+ 1\b(?!\.)"), lambda found: "+ 2", "plus or minus one"),
    (re.compile(r"- 1\b(?!\.)"), lambda found: "- 0", "plus or minus one"),
    (re.compile(r"(?<=stride_)[bn]\b"), lambda found: "n" if found == "b" else "b", "stride"),
    (re.compile(r"(?<=\.stride\()[01](?=\))"), lambda found: str(1 - int(found)), "stride"),
    (re.compile(r"__sync(?:threads|warp)\(\);"), lambda found: ";", "barrier"),
]
_OTHER_ISA = re.compile(r"#\s*if.*__(AVX|aarch64|ARM|SSE)")


def cpp_sites(source: str) -> Iterator[tuple[int, int, int, str, str]]:
    """The same for C++ as clang-format writes it; not in preprocessor lines, nor where another CPU is meant."""
    elsewhere = 0
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("#"):
            if elsewhere or _OTHER_ISA.match(line):
                elsewhere += bool(re.match(r"#\s*if", line)) - bool(re.match(r"#\s*endif", line))
            continue
        if elsewhere:
            continue
        code = re.sub(r'"[^"]*"', lambda text: '"' * len(text.group()), line.split("//")[0])
        for pattern, replace, rule in _CPP:
            for found in pattern.finditer(code):
                yield number, found.start(), found.end(), replace(found.group()), rule


def all_mutants(language: str) -> list[Mutant]:
    made = []
    for pattern in FILES[language]:
        for path in sorted(ROOT.glob(pattern)):
            source, file = path.read_text(), str(path.relative_to(ROOT))
            lines = source.splitlines()
            sites = python_sites(source) if path.suffix == ".py" else cpp_sites(source)
            made += [Mutant(language, file, *site) for site in sites if can_matter(lines[site[0] - 1], site[3])]
    return made


def hunt(mutant: Mutant, tree: mutant_runs.Tree) -> dict | None:
    """What became of one mutant; None where it does not compile."""
    source = (ROOT / mutant.file).read_text()
    before, after = mutant.shown(source)
    tree.assert_sound(mutant.file)
    began = time.monotonic()
    outcome = tree.outcome(mutant.file, mutant.apply(source))
    if outcome is None:
        return None
    reason = mutant.explanation(source)
    result = "killed" if outcome else "explained" if reason else "survived"
    place = {"language": mutant.language, "file": mutant.file, "line": mutant.line, "rule": mutant.rule}
    row = {**place, "before": before, "after": after, "result": result, "by": outcome or reason}
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def hunt_share(mutants: list[Mutant], tree: mutant_runs.Tree, share: int, found: Callable[[dict], None]) -> None:
    """The first `share` of the mutants that compile; each is told as its fate is known."""
    for mutant in mutants:
        if share == 0:
            break
        if row := hunt(mutant, tree):
            share -= 1
            found(shown(row))


def place_of(row: dict) -> int:
    """The line, from 1, that the mutant of a row changes today."""
    lines = [line.strip() for line in (ROOT / row["file"]).read_text().splitlines()]
    if lines[row["line"] - 1 : row["line"]] == [row["before"]]:
        return row["line"]
    if lines.count(row["before"]) != 1:
        sys.exit(f"mutants: {row['file']}:{row['line']} is no longer {row['before']}: draw a new sample")
    return lines.index(row["before"]) + 1


def once_more(row: dict) -> dict:
    """The row of a mutant with the tests and explanations of today."""
    number = place_of(row)
    line = (ROOT / row["file"]).read_text().splitlines()[number - 1]
    start = line.index(row["before"])
    place = row["language"], row["file"], number, start, start + len(row["before"])
    return hunt(Mutant(*place, row["after"], row["rule"]), tree_of(row["language"])) or row


def hunt_again(rows: list[dict], found: Callable[[dict], None]) -> None:
    """All rows of a language; those with an explanation are taken as they are."""
    for row in rows:
        found(row if row["result"] == "explained" else shown(once_more(row)))


def shown(row: dict) -> dict:
    print(f"{row['result']:9} {row['seconds']:5}s {row['file']}:{row['line']} {row['after']}", flush=True)
    return row


@functools.cache
def tree_of(language: str) -> mutant_runs.Tree:
    return mutant_runs.TREES[language]()


def write(rows: list[dict], seed: int, out: Path) -> dict:
    """The results file, whose first row counts the others."""
    counts = collections.Counter(row["result"] for row in rows)
    ratio = counts["killed"] / max(counts["killed"] + counts["survived"], 1)
    head = {"date": datetime.date.today().isoformat(), "seed": seed, "sample": len(rows), **counts}
    head |= {"killed_ratio": round(ratio, 3), **mutant_runs.versions()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    return head


def verdict(head: dict) -> int:
    """The exit code: 1 if too few are killed."""
    print(json.dumps(head))
    return int(head["killed_ratio"] < 0.9)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=60)
    parser.add_argument("--languages", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="languages hunted side by side")
    parser.add_argument("--count", action="store_true", help="only say how many mutants there are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="those of --out, with the tests of today")
    given = parser.parse_args(arguments)
    if given.again and (given.seed, given.sample, given.languages) != (0, 60, list(FILES)):
        parser.error("--again: it is the sample of --out; wanted no --seed, --sample or --languages beside it")
    rows, lock, order, seed = [], threading.Lock(), list(FILES), given.seed

    def found(row: dict) -> None:  # a run that is cut off leaves what it found
        with lock:
            rows.append(row)
            rows.sort(key=lambda row: order.index(row["language"]))
            if not given.again:
                write(rows, seed, given.out)

    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        if given.again:
            head, *before = map(json.loads, given.out.read_text().splitlines())
            seed = head["seed"]
            shares = [[row for row in before if row["language"] == language] for language in FILES]
            list(pool.map(hunt_again, shares, itertools.repeat(found)))
        else:
            mutants = {language: all_mutants(language) for language in given.languages}
            sizes = ", ".join(f"{len(made)} {language}" for language, made in mutants.items())
            print(f"mutants: {sizes}; seed {seed}", flush=True)
            if given.count:
                return 0
            shares = [given.sample // len(mutants) + (n < given.sample % len(mutants)) for n in range(len(mutants))]
            trees = [tree_of(language) for language in mutants]
            for language, made in mutants.items():
                random.Random(f"{seed} {language}").shuffle(made)
            list(pool.map(hunt_share, mutants.values(), trees, shares, itertools.repeat(found)))
    return verdict(write(rows, seed, given.out))


if __name__ == "__main__":
    sys.exit(main())
