"""What the compile-only gate says of one kernel on one architecture, and which rows it takes from another architecture.

sm_87 and sm_89 are given the PTX of sm_86, and ptxas has always made of it what it makes for sm_86: registers, spills,
shared memory. So `./dev aot` assembles a share of their rows, drawn by a seed that it prints, and says of the others
whose they are; `--all` (`./dev reliability`) assembles every row. Wherever both are assembled they must agree.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Shared memory of one thread block in KiB, by compute capability.
ARCHITECTURES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
LIKE = {87: 86, 89: 86}
SHARE = 6  # one in so many of the rows of LIKE is assembled


@dataclass(frozen=True)
class Row:
    kernel: str
    configuration: str
    arch: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    products: str = "-"
    load_bytes: int = 0
    error: str = ""
    taken_from: int = 0  # the architecture whose row stands for this one, which was not assembled

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} bytes"
        if self.shared > ARCHITECTURES[self.arch] * 1024:
            return f"needs {self.shared} bytes of shared memory"
        return ""

    def __str__(self) -> str:
        numbers = f"{self.registers:4} regs {self.spills:4} spill {self.shared:7} smem "
        numbers += f"{self.products:14} ld {self.load_bytes:2} B"
        if self.taken_from:
            numbers = f"{f'as sm_{self.taken_from}, not assembled':{len(numbers)}}"
        return f"{self.kernel:28} sm_{self.arch:<4} {numbers}  {self.configuration}  {self.problem}".rstrip()


def not_assembled(count: int, architectures: Sequence[int], seed: int) -> list[set[int]]:
    """For each of `count` builds the architectures that take the row of another one, which is wanted, too."""
    alike = [arch for arch in architectures if LIKE.get(arch) in architectures]
    pairs = [(build, arch) for build in range(count) for arch in alike]
    drawn = set(random.Random(seed).sample(pairs, -(-len(pairs) // SHARE)))
    return [{arch for arch in alike if (build, arch) not in drawn} for build in range(count)]


def compared(rows: list[Row]) -> list[Row]:
    """The rows of one build; those that must agree with another architecture's and do not have an error."""
    by_arch, result = {row.arch: row for row in rows}, []
    for row in rows:
        other = by_arch.get(LIKE.get(row.arch))
        if other and not (row.taken_from or row.error or other.error) and replace(other, arch=row.arch) != row:
            row = replace(row, error=f"is not as sm_{other.arch}: see LIKE in tests/aot_rows.py")
        result.append(row)
    return result
