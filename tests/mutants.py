"""`./dev mutants`: small mistakes by rule, each in a scratch copy, and whether the tests notice.

Rules: comparisons, plus or minus one, dropped masks and conditions, swapped strides, removed barriers. Languages: the
C++ CPU kernels (portable), the CUDA source (run by tests/simt), the Triton kernels (interpreted), the Python stems.
A sample of --sample mutants is drawn by a printed --seed, as many of each language; what does not compile is drawn
again. Every mutant meets only the tests of its file. Exit code 1: fewer than 90 % are killed, survivors that
EQUIVALENT explains not counted.
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
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

from . import mutant_runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "reliability" / "mutants.jsonl"
COMPARED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
FILES = {
    "cpp": ["csrc/cpu/*.cpp", "csrc/cpu/*.h", "csrc/registration.cpp"],
    "cuda": [f"csrc/cuda/{name}" for name in ("score*", "select*", "cluster*", "device.cuh", "warp.cuh")],
    "triton": ["h2ot_kernels/triton/*.py"],
    "python": [f"{package}/{stem}.py" for package in ("h2ot_kernels", "python_ref") for stem in mutant_runs.STEMS],
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


# (file, line, replacement): why no test can tell.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "csrc/cpu/recover_interpolation.cpp",
        "const int64_t s = tile * kTile, count = (tile + 1 < tiles ? s + kTile : a.S) - s;",
        "const int64_t s = tile * kTile, count = (tile + 2 < tiles ? s + kTile : a.S) - s;",
    ): "the last tile but one takes what is left over, too; the last writes the same there",
    (
        "csrc/cpu/select.cpp",
        "if (c < L) {",
        "if (c <= L) {",
    ): "with nothing left over no lane is counted",
    (
        "csrc/cpu/pack.h",
        "if (!(radius > 0x1p-80 && wanted > 0x1p-100 && wanted < 0x1p100)) return;",
        "if (!(radius > 0x1p-80 && wanted > 0x1p-100 || wanted < 0x1p100)) return;",
    ): "the limits only choose between two searches with the same result",
    (
        "csrc/cpu/cluster.cpp",
        "for (int64_t at = 0; at < stride; at += kPanel) {",
        "for (int64_t at = 0; at <= stride; at += kPanel) {",
    ): "the first panel once more: the same distances in the same places",
    (
        "csrc/cuda/score_stream.cuh",
        "if (count < room || value < shared.low[r][room - 1]) {",
        "if (count <= room || value < shared.low[r][room - 1]) {",
    ): "behind the last of a full list nothing is written",
    (
        "csrc/cpu/pack.h",
        "if (!(radius > 0x1p-80 && wanted > 0x1p-100 && wanted < 0x1p100)) return;",
        "if (!(radius >= 0x1p-80 && wanted > 0x1p-100 && wanted < 0x1p100)) return;",
    ): "the limits only choose between two searches with the same result",
    (
        "h2ot_kernels/triton/recover_interpolation.py",
        "inside = (row < rows)[:, None] & (column < S)[None, :]",
        "inside = (row <= rows)[:, None] & (column < S)[None, :]",
    ): "the row after the last is clamped to the last, and writes what the last writes",
    (
        "csrc/cpu/recover_interpolation.cpp",
        "for (int64_t t = from; t < to; t += kLanes<E>) {",
        "for (int64_t t = from; t <= to; t += kLanes<E>) {",
    ): "a vector more, which the next interval overwrites and the arrays have room for",
    (
        "csrc/cpu/recover_interpolation.cpp",
        "const bool few = a.S < kLanes<E>;",
        "const bool few = a.S <= kLanes<E>;",
    ): "a whole vector of channels comes out the same from both forms",
    (
        "csrc/cpu/recover_interpolation.cpp",
        "for (; past >= step; past -= step) plan.first[++before] = t;",
        "for (; past > step; past -= step) plan.first[++before] = t;",
    ): "a frame that is a kept one is kept by weight 1 instead of weight 0",
    (
        "csrc/cpu/recover_attention.cpp",
        "panels((a.F + kPanel<E> - 1) / kPanel<E>),",
        "panels((a.F + kPanel<E> - 0) / kPanel<E>),",
    ): "perhaps a panel of queries more, all of it padding",
    (
        "csrc/cpu/score.cpp",
        "if (streamed.open[i] && state.near_count[i] < 0) state.set_nearest_exactly(i, room.list);",
        "if (streamed.open[i] || state.near_count[i] < 0) state.set_nearest_exactly(i, room.list);",
    ): "rows that are proven are decided again, the same",
    (
        "csrc/cpu/score_stored.h",
        "for (int64_t i = 0, j = 0; i < sample.n && j < K; i++) {",
        "for (int64_t i = 0, j = 0; i < sample.n && j <= K; i++) {",
    ): "with nothing left in index, the body leaves every token out",
    (
        "csrc/cuda/score_rows.cuh",
        "row.scan(nullptr, lane, [&](int, int j, A, A bound, double) { "
        "reached += j < row.N && pattern(bound) <= middle; });",
        "row.scan(nullptr, lane, [&](int, int j, A, A bound, double) { "
        "reached += j < row.N && pattern(bound) < middle; });",
    ): "a limit one step higher: more candidates, the same nearest",
    (
        "csrc/cuda/score_tiles.cuh",
        "A value[kRows][kColumns + 1];",
        "A value[kRows][kColumns + 2];",
    ): "another padding between rows of shared memory",
    (
        "csrc/cuda/score_stream.cuh",
        "if (count < room || value < shared.low[r][room - 1]) {",
        "if (count < room || value <= shared.low[r][room - 1]) {",
    ): "an equal one of a later column finds no place in a full list",
    (
        "h2ot_kernels/triton/score_large.py",
        "side = 16 if double else 32 if gaussian or B * N < 8192 or (slots > 8 and not half) else 64",
        "side = 16 if double else 32 if gaussian or B * N <= 8192 or (slots > 8 and not half) else 64",
    ): "another tile, the same results",
    (
        "csrc/cuda/score_stream.cuh",
        "if (wants_largest && lane == 0) {",
        "if (wants_largest && lane != 0) {",
    ): "31 lanes write what one would",
    (
        "python_ref/cluster.py",
        "labels = index.new_full((index.shape[0], N + 1), -1)",
        "labels = index.new_full((index.shape[0], N + 2), -1)",
    ): "a column more of those that are cut off again",
    (
        "python_ref/cluster.py",
        "labels = torch.where(own >= 0, own, labels)",
        "labels = torch.where(own > 0, own, labels)",
    ): "the first selected token is nearest to itself, and the lowest wins a tie",
    (
        "h2ot_kernels/triton/score.py",
        'active = (least < float("inf")) & ((floor < best) | ((floor == best) & (candidate < parent)))',
        'active = (least < float("inf")) & ((floor < best) | ((floor == best) & (candidate <= parent)))',
    ): "a candidate that is the parent already",
    (
        "h2ot_kernels/triton/common.py",
        "if first.is_cuda and first.get_device() != torch.cuda.current_device():",
        "if first.is_cuda and first.get_device() == torch.cuda.current_device():",
    ): "where to launch for another GPU: a machine with two can tell",
    (
        "h2ot_kernels/triton/gather.py",
        "columns = next((width for width in (4, 16, 64) if inner <= width), 256)",
        "columns = next((width for width in (4, 16, 64) if inner < width), 256)",
    ): "blocks of another width, the rest of which is masked",
    (
        "h2ot_kernels/triton/recover_interpolation.py",
        "end = tl.where(position == K - 1, F, ((right * span) // tl.maximum(K - 1, 1)) + 1)",
        "end = tl.where(position == K - 1, F, ((right * span) // tl.maximum(K - 1, 1)) + 2)",
    ): "a frame more, whose share is 0",
    (
        "h2ot_kernels/triton/select.py",
        "kept = (ranks(keys, key, column, N, CHUNK) < K) & (column < N)",
        "kept = (ranks(keys, key, column, N, CHUNK) < K) & (column <= N)",
    ): "what stands behind the last token ranks behind all",
    (
        "csrc/cpu/distance.h",
        "for (int64_t begin = 0; begin < C; begin += kChunk) {",
        "for (int64_t begin = 0; begin <= C; begin += kChunk) {",
    ): "one chunk more, of no channels: nothing is added",
    (
        "csrc/cpu/score_streamed.h",
        "if (proven < state->wanted) return false;",
        "if (proven <= state->wanted) return false;",
    ): "rows that are proven are decided again, the same",
    (
        "csrc/cpu/lists.h",
        "for (; at > 0 && (value < values[at - 1] || (value == values[at - 1] && from < slots[at - 1])); at--) {",
        "for (; at > 0 && (value < values[at - 1] || (value == values[at - 1] && from <= slots[at - 1])); at--) {",
    ): "no slot is offered twice to a list",
    (
        "csrc/cuda/cluster_label.cuh",
        "n[u] = j[u] >= 0 && norm ? norm[j[u]] : A(0);",
        "n[u] = j[u] > 0 && norm ? norm[j[u]] : A(0);",
    ): "at a near-tie a quarter of the bound (108 units, most of them for the cutting off of an mma) is left for the "
    "first token; what is seen of rounding is a tenth",
    (
        "csrc/cuda/select.cu",
        "__syncthreads();",
        ";",
    ): "every thread reads the keys that it wrote; the contract of write_index is wider than its reads",
    (
        "csrc/cuda/select.cuh",
        "if (keep.M > 0) {",
        "if (keep.M >= 0) {",
    ): "with nothing to keep nothing is wrong",
    (
        "csrc/cuda/score_stored.cuh",
        "if (lane == 0) shared.wanted[warp] = 0;",
        "if (lane != 0) shared.wanted[warp] = 0;",
    ): "31 lanes write what one would",
    (
        "csrc/cuda/score_stream.cuh",
        "if (token[e] >= 0 && !(list.full() && least_of(low[e]) > list.worst())) return token[e++];",
        "if (token[e] >= 0 && !(list.full() && least_of(low[e]) >= list.worst())) return token[e++];",
    ): "bounds above zero are below the distance; those of zero come in the order of tokens",
    (
        "h2ot_kernels/triton/recover_tail.py",
        "row_at = tl.minimum(row, rows - 1) * attended_r",
        "row_at = tl.minimum(row, rows - 0) * attended_r",
    ): "behind the last row stands proj_weight's first, and what it gives is not stored",
}


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
    reason = EQUIVALENT.get((mutant.file, before, after))
    result = "killed" if outcome else "explained" if reason else "survived"
    place = {"language": mutant.language, "file": mutant.file, "line": mutant.line, "rule": mutant.rule}
    row = {**place, "before": before, "after": after, "result": result, "by": outcome or reason}
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def hunt_share(mutants: list[Mutant], tree: mutant_runs.Tree, share: int) -> list[dict]:
    """The first `share` of the mutants that compile; each is printed as its fate is known."""
    rows = []
    for mutant in mutants:
        if len(rows) == share:
            break
        if row := hunt(mutant, tree):
            rows.append(row)
            print(f"{row['result']:9} {row['seconds']:5}s {row['file']}:{row['line']} {row['after']}", flush=True)
    return rows


def once_more(row: dict) -> dict:
    """The row of a survivor after its explanation or its test was written."""
    line = (ROOT / row["file"]).read_text().splitlines()[row["line"] - 1]
    if line.strip() != row["before"]:
        sys.exit(f"mutants: {row['file']}:{row['line']} is no longer {row['before']}")
    start = line.index(row["before"])
    place = row["language"], row["file"], row["line"], start, start + len(row["before"])
    mutant = Mutant(*place, row["after"], row["rule"])
    return hunt(mutant, tree_of(row["language"])) or row


@functools.cache
def tree_of(language: str) -> mutant_runs.Tree:
    return mutant_runs.TREES[language]()


def write(rows: list[dict], seed: int, out: Path) -> int:
    """The results file; 1 if too few are killed."""
    counts = collections.Counter(row["result"] for row in rows)
    ratio = counts["killed"] / max(counts["killed"] + counts["survived"], 1)
    head = {"date": datetime.date.today().isoformat(), "seed": seed, "sample": len(rows), **counts}
    head |= {"killed_ratio": round(ratio, 3), **mutant_runs.versions()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    print(json.dumps(head))
    return int(ratio < 0.9)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=60)
    parser.add_argument("--languages", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="languages hunted side by side")
    parser.add_argument("--count", action="store_true", help="only say how many mutants there are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="only the survivors of --out, with the tests of today")
    given = parser.parse_args(arguments)
    if given.again:
        head, *rows = map(json.loads, given.out.read_text().splitlines())
        return write([once_more(r) if r["result"] == "survived" else r for r in rows], head["seed"], given.out)
    mutants = {language: all_mutants(language) for language in given.languages}
    sizes = ", ".join(f"{len(made)} {language}" for language, made in mutants.items())
    print(f"mutants: {sizes}; seed {given.seed}", flush=True)
    if given.count:
        return 0
    shares = [given.sample // len(mutants) + (n < given.sample % len(mutants)) for n in range(len(mutants))]
    trees = [tree_of(language) for language in mutants]
    for language, made in mutants.items():
        random.Random(f"{given.seed} {language}").shuffle(made)
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        rows = [row for found in pool.map(hunt_share, mutants.values(), trees, shares) for row in found]
    return write(rows, given.seed, given.out)


if __name__ == "__main__":
    sys.exit(main())
