"""What a compiler may do to the Triton kernels that the interpreter cannot show: `python -m tests.aot_forms`.

Kernels are brought to Triton's own intermediate form, as for a GPU that need not be here, and read:
- what a kernel stores and then loads, other threads may have stored: a barrier stands between, always;
- no Python float arrives in float32: native Triton rounds it, the interpreter does not;
- sizes and strides of 1 are constants in native Triton: every kernel can be made with them.
"""

import re
import sys
from collections.abc import Iterator

_DEFINED = re.compile(r"^\s*(%[\w.]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%[\w.]+(?:#\d+)?")
_MOVES = ("tt.splat", "tt.addptr", "tt.broadcast", "tt.expand_dims", "tt.bitcast")  # the same values, or memory


def definitions(form: str) -> dict[str, tuple[str, list[str], str]]:
    """value -> (operation, operands, line) of a kernel in Triton's intermediate form; carried values: their start."""
    found = {}
    for line in form.splitlines():
        if match := _DEFINED.match(line):
            name, operation, rest = match.groups()
            found[name] = operation, _VALUE.findall(rest), line
        if "iter_args(" in line or "scf.while (" in line:
            for carried, start in re.findall(r"(%[\w.]+) = (%[\w.]+(?:#\d+)?)", line.split(" = ", 1)[-1]):
                found.setdefault(carried, ("carried", [start], line))
    return found


def source(value: str, defined: dict) -> str:
    """Where a value comes from, before it was moved about: for a pointer the argument of the kernel."""
    while value in defined and defined[value][0] in (*_MOVES, "carried"):
        value = defined[value][1][0]
    return value


def unseen_stores(form: str) -> list[str]:
    """Loads of what the kernel has stored before without a barrier between, in the order of the text."""
    defined, stored, faults = definitions(form), set(), []
    for line in form.splitlines():
        operation = re.search(r"\b(gpu\.barrier|ttg\.barrier|tt\.load|tt\.store)\b", line)
        if not operation:
            continue
        if operation[1].endswith("barrier"):
            stored.clear()
            continue
        argument = source(_VALUE.findall(line[operation.end() :])[0], defined)
        if operation[1] == "tt.store":
            stored.add(argument)
        elif argument in stored:
            faults.append(f"{argument} is stored and loaded without a barrier between")
    return faults


def forms() -> Iterator[tuple[str, str]]:
    """(kernel, form) of a launch of every kernel and dtype in tests/aot_samples.py, and with sizes of 1."""
    from h2ot_kernels.triton import common

    from . import aot, aot_samples

    with common.record() as launches:
        for call in aot_samples.calls():
            call()
    ordinary = {}
    for build in dict.fromkeys(map(aot.build_of, launches)):
        missing = tuple(name for name, kind in build.signature if kind == "constexpr")
        ordinary.setdefault((build.kernel, build.signature[0][1], missing), build)
    with common.record() as launches:
        for call in aot_samples.calls_of_ones():
            call()
    for build in dict.fromkeys((*ordinary.values(), *map(aot.build_of, launches))):
        narrow = [name for name, kind in build.signature if kind in ("fp16", "bf16", "fp32")]
        assert not narrow, f"{build.kernel}: {narrow} arrive in float32: declare them tl.float64"
        yield build.kernel, aot.form_of(90, build, "ttir")[0]


def main() -> int:
    faults, kernels = [], []
    for kernel, form in forms():
        kernels.append(kernel)
        faults += [f"{kernel}: {fault}" for fault in unseen_stores(form)]
    for fault in dict.fromkeys(faults):
        print(f"FAILED {fault}")
    print(f"{len(kernels)} forms of {len(set(kernels))} kernels, {len(faults)} faults")
    return int(bool(faults) or not kernels)


if __name__ == "__main__":
    sys.exit(main())
