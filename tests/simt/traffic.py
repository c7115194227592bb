"""What the simulated kernels' accesses take of shared memory and of tensors, by place in the source (traffic.cpp).

`python -m tests.simt.traffic` prints it for the calls of tests/test_cuda_simt_traffic.py.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import WATCHED, build, run

SPACES = ("tensors", "shared")
DOES = ("read", "write", "update", "copy")


@dataclass(frozen=True)
class Line:
    """A place's accesses: wavefronts of shared memory or sectors of 32 bytes, and the fewest they could be."""

    kernel: str
    place: str
    space: str
    does: str
    bytes: int
    cost: int
    least: int


def _names(driver: Path, places: list[str]) -> dict[str, tuple[str, str]]:
    """Place in the program -> (function, file:line of csrc/cuda)."""
    lines = subprocess.run(
        ["addr2line", "-f", "-C", "-i", "-a", "-e", driver, *places], capture_output=True, text=True, check=True
    ).stdout
    names = {}
    for part in re.split(r"^0x", lines, flags=re.MULTILINE)[1:]:
        address, *found = part.splitlines()
        files = [line.split("/")[-1].split(" ")[0] for line in found[1::2] if "/csrc/cuda/" in line]
        place = next((file for file in files if not file.startswith("device.cuh")), "the simulator")
        names[f"{int(address, 16):x}"] = (found[0], place)
    return names


def count(calls: list, driver: str = "driver", program: Path | None = None) -> list[Line]:
    """What all launches of the calls take, one line per kernel, place and width, in the driver's program."""
    program = program or build(WATCHED, name=driver, watcher="traffic")
    with tempfile.TemporaryDirectory() as folder:
        done = run(calls, program, Path(folder), timeout=600)
    if done.returncode or any(call.error for call in calls):
        raise RuntimeError(f"the simulator failed: {done.stderr[-2000:]}")
    rows = [line.split() for line in done.stdout.splitlines()]
    names = _names(program, sorted({place for row in rows for place in row[:2]}))
    lines = []
    for kernel, place, is_shared, does, *numbers in rows:
        name = re.sub(r"^void |h2ot::cuda::|\(anonymous namespace\)::", "", names[kernel][0]).split("(")[0]
        where = names[place][1] if place != "0" else "rows of matrices"
        lines.append(Line(name, where, SPACES[int(is_shared)], DOES[int(does)], *map(int, numbers)))
    return lines


def by_kernel(lines: list[Line]) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, space) -> (cost, least)."""
    sums = {}
    for line in lines:
        cost, least = sums.get((line.kernel, line.space), (0, 0))
        sums[line.kernel, line.space] = (cost + line.cost, least + line.least)
    return sums


def kernels_of(source: str) -> set[str]:
    """The names of the kernels that CUDA source defines."""
    return set(re.findall(r"__global__[^{;]*?\b(\w+)\([^()]*\) \{", source))


def main() -> None:
    from tests.test_cuda_simt_traffic import CALLS

    for name, (driver, make) in CALLS.items():
        lines = count([make()], driver)
        print(f"{name}: cost, least, kernel; the places that could take less")
        for (kernel, space), (cost, least) in by_kernel(lines).items():
            print(f"  {cost:9} {least:9} {'wavefronts' if space == 'shared' else 'sectors'}, {kernel}")
            own = [line for line in lines if (line.kernel, line.space) == (kernel, space)]
            for line in sorted(own, key=lambda line: line.least - line.cost)[:4]:
                if line.cost > 1.03 * line.least:
                    print(f"  {line.cost:9} {line.least:9}   {line.place}: {line.does} {line.bytes} bytes")


if __name__ == "__main__":
    main()
