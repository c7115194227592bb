"""What CI leaves out of the tests, by rule; `--all` (`./dev reliability`), or a test's own name, runs it.

What is drawn, other things each time, is drawn by H2OT_KERNELS_SEED, which is printed.

Of the mistakes that are planted in kernels, to see that tests notice them, `./dev test` plants one in PLANTED: whether
they are noticed changes only where a kernel or its test does. Of wrong calls so many are compiled, too.

`./dev test` and `./dev ptx` both run the cases of Triton's kernels. `./dev ptx` runs what Triton compiles, and
compiling is nearly all of its time: of cases with more than LARGE products of channels the first of each form and size;
of the others the first of each form, and of all that remain one in SHARE. The interpreter (`./dev test`) takes the
first and the last case of each form. A form of a test: its dtype, flags, options, and whatever else is no size and no
kind of tokens. Tests that go through cases of their own take what `drawn` gives them.

What was proven whole and has not changed since (unchanged.py): of what the rules above leave one in UNCHANGED.
"""

import os
import random
from collections.abc import Collection, Hashable, Iterable

import torch

from . import unchanged
from .cases import TokenCase

LARGE, LARGEST = 2.5e7, 1.7e8  # B N^2 C; what is larger than the second has no path of its own
SHARE = 8
PLANTED = 3
UNCHANGED = 3
# What does not depend on how a kernel runs: ./dev test has it.
ELSEWHERE = {"test_opcheck", "test_compile_fullgraph", "test_no_kernel_leans_on_what_native_triton_does_not_promise"}
EACH_LIKE_THE_OTHER = {"test_planted_mistakes_are_seen", "test_compiled"}  # one in PLANTED
STREAMED = "test_triton_score.py"  # names no runner: all of it is Triton's
# What tests Triton's kernels beside the cases that have a runner.
TRITON_FILES = {f"test_triton_{name}.py" for name in ("score", "gather", "pairs", "forms", "tiles")}
NOTE = "Triton: {} (tests/sample.py; --all runs the others, too)"
INTERPRETED = "of cases that ./dev ptx runs, too, the first and the last of each form are interpreted"
AS_PTX = "of large cases of one form and size the first runs as PTX, of the others the first and those drawn"


def seed_of_run() -> int | None:
    """None: nothing is left out."""
    seed = os.environ.get("H2OT_KERNELS_SEED", "all")
    return None if seed == "all" else int(seed)


def _one_in(share: int, of: Iterable, seed: int) -> set:
    of = list(of)
    return set(random.Random(seed).sample(of, -(-len(of) // share)))


def planted_share(mistakes: dict, seed: int, share: int = PLANTED) -> dict:
    """One in `share` of the mistakes, in their order."""
    chosen = _one_in(share, sorted(mistakes), seed)
    return {name: mistakes[name] for name in mistakes if name in chosen}


def drawn(cases: Iterable, count: int) -> list:
    """Of a test's own cases so many under ./dev ptx, by its seed and the test's name, in their order; else all."""
    cases, seed = list(cases), seed_of_run()
    if seed is None or "H2OT_KERNELS_PTX" not in os.environ or count >= len(cases):
        return cases
    draw = random.Random(f"{seed} {os.environ.get('PYTEST_CURRENT_TEST')}")
    return [cases[n] for n in sorted(draw.sample(range(len(cases)), count))]


def _test(item) -> str:
    return item.nodeid.split("[")[0]


def _form(item) -> tuple:
    """What tells the paths of a test's case apart; numbers and kinds of tokens do not."""
    parts = [_test(item)]
    for name, value in sorted(item.callspec.params.items()):
        if isinstance(value, TokenCase):
            flags = value.masked, value.ragged, value.noisy, value.keep is None, value.J > 0, value.B > 0
            parts += [value.dtype, *flags, *value.options]
        elif name != "kind" and (value is None or isinstance(value, (bool, str, torch.dtype))):
            parts.append((name, value))
    return tuple(parts)


def _size(item) -> float:
    case = item.callspec.params.get("case")
    return case.B * case.N**2 * case.C if isinstance(case, TokenCase) else 0


def _on_triton(item) -> bool:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    runner = given.get("runner")
    return bool(given) and (runner.backend == "triton" if runner else item.path.name == STREAMED)


def left_out(items: list, as_ptx: bool, seed: int = 0, proven: Collection[str] = ()) -> list:
    """The items that the rules leave out. seed: of what is drawn; the same items and seed give the same answer. proven:
    what is unchanged, by its name there.
    """
    out = _left_out_of_triton(items, as_ptx, seed)
    alike = [item for item in items if _test(item).rsplit("::")[-1] in EACH_LIKE_THE_OTHER]
    out += thinned({item.nodeid: [item] for item in alike}, seed, PLANTED)
    gone = set(out)
    left = [item for item in items if item not in gone]
    if unchanged.TRITON in proven:
        of_triton = [item for item in left if as_ptx or _on_triton(item) or item.path.name in TRITON_FILES]
        out += thinned({item.nodeid: [item] for item in of_triton}, seed)
    if unchanged.CUDA in proven:
        runs = {}
        for item in left:
            if item.path.name.startswith("test_cuda_simt"):
                runs.setdefault(_run(item), []).append(item)
        out += thinned(runs, seed)
    return out


def _left_out_of_triton(items: list, as_ptx: bool, seed: int) -> list:
    large, forms, out = {}, {}, []
    for item in items:
        if as_ptx and item.name in ELSEWHERE:
            out.append(item)
        elif not _on_triton(item):
            continue
        elif not as_ptx or _size(item) <= LARGE:
            forms.setdefault(_form(item), []).append(item)
        elif _size(item) > LARGEST:
            out.append(item)
        else:
            case = item.callspec.params["case"]
            large.setdefault((*_form(item), case.N, case.C, case.k), []).append(item)
    for same in large.values():
        out += same[1:]
    if not as_ptx:
        return out + [item for same in forms.values() for item in same[1:-1]]
    others = [item for same in forms.values() for item in same[1:]]
    taken = _one_in(SHARE, others, seed)
    return out + [item for item in others if item not in taken]


def _run(item) -> tuple:
    """What tests of the CUDA source share that differ in the case only: a driver's run under one plan."""
    given = item.callspec.params.items() if hasattr(item, "callspec") else ()
    return _test(item), *sorted((name, str(value)) for name, value in given if name != "case")


def thinned(groups: dict[Hashable, list], seed: int, share: int = UNCHANGED) -> list:
    """All but one in `share` of the groups."""
    taken = _one_in(share, groups, seed)
    return [item for group, same in groups.items() if group not in taken for item in same]
