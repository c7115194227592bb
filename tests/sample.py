"""What `./dev test` and `./dev ptx` leave out of the tests, by rule; `--all` (`./dev reliability`) runs it.

Of the mistakes that are planted in the CUDA source, to see that tests notice them, `./dev test` plants one in three,
drawn by a seed that it prints: whether they are noticed changes only where a kernel or its test does.

Both run the cases of Triton's kernels. `./dev ptx` runs what Triton compiles, and compiling is nearly all of its time:
of cases with more than LARGE products of channels the first of each form and size; of the others the first of each
form, and of all that remain a share, drawn by a seed that it prints, other cases each time. The interpreter
(`./dev test`) takes the first and the last case of each form. A form of a test: its dtype, flags, options, and whatever
else is no size and no kind of tokens. Tests that go through cases of their own take what `drawn` gives them.
"""

import math
import os
import random
from collections.abc import Iterable

import torch

from .cases import TokenCase

LARGE, LARGEST = 2.5e7, 1.7e8  # B N^2 C; what is larger than the second has no path of its own
SHARE = 8  # one in so many of those that remain
PLANTED = 3  # one in so many mistakes
SEED = os.environ.get("H2OT_KERNELS_PTX_SEED")  # of ./dev ptx without --all
# What does not depend on how a kernel runs: ./dev test has it.
ELSEWHERE = {"test_opcheck", "test_compile_fullgraph", "test_no_kernel_leans_on_what_native_triton_does_not_promise"}
STREAMED = "test_triton_score.py"  # names no runner: all of it is Triton's
NOTE = "Triton: {} (tests/sample.py; --all runs the others, too)"
INTERPRETED = "of cases that ./dev ptx runs, too, the first and the last of each form are interpreted"
AS_PTX = "of large cases of one form and size the first runs as PTX, of the others the first and those drawn"


def planted_share(mistakes: dict, seed: int) -> dict:
    """One in PLANTED of the mistakes, in their order."""
    chosen = random.Random(seed).sample(sorted(mistakes), -(-len(mistakes) // PLANTED))
    return {name: mistakes[name] for name in mistakes if name in chosen}


def drawn(cases: Iterable, count: int) -> list:
    """Of a test's own cases so many under ./dev ptx, by its seed and the test's name, in their order; else all."""
    cases = list(cases)
    if SEED is None or count >= len(cases):
        return cases
    draw = random.Random(f"{SEED} {os.environ.get('PYTEST_CURRENT_TEST')}")
    return [cases[n] for n in sorted(draw.sample(range(len(cases)), count))]


def _form(item) -> tuple:
    """What tells the paths of a test's case apart; numbers and kinds of tokens do not."""
    parts = [item.nodeid.split("[")[0]]
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


def left_out(items: list, as_ptx: bool, seed: int = 0) -> list:
    """The items that the rule leaves out. seed: of what is drawn; the same items and seed give the same answer."""
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
    taken = set(random.Random(seed).sample(others, math.ceil(len(others) / SHARE)))
    return out + [item for item in others if item not in taken]
