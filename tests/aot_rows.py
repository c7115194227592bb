"""What the compile-only gate says of one kernel on one architecture."""

from dataclasses import dataclass, field

# Shared memory of one thread block in KiB, by compute capability.
ARCHITECTURES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
# What Triton 3.6 cannot make and nothing launches there: `attention_scores.scores_tile`, devices with tensor memory.
TRAPS = {("received_once_kernel", "fp32 QUERIES=64 KEYS=256", 100)}


@dataclass(frozen=True)
class Build:
    """What decides the machine code of one launch: types, alignments and ones of the arguments, and the constants."""

    kernel: str
    stem: str
    signature: tuple
    constants: tuple
    attributes: tuple
    options: tuple

    def __str__(self) -> str:
        types = [kind[1:] for name, kind in self.signature if isinstance(kind, str) and kind.startswith("*")]
        named = [f"{name}={value}" for name, value in (*self.constants, *self.options) if isinstance(name, str)]
        return f"{','.join(dict.fromkeys(types))} {' '.join(named)}"


@dataclass(frozen=True)
class Row:
    kernel: str
    configuration: str
    arch: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    load_bytes: int = 0
    products: str = "-"
    error: str = ""
    recorded: bool = field(default=False, compare=False)  # it comes from the ledger

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} bytes"
        tiles = " ".join(self.configuration.split()[:3])
        if self.load_bytes == 0 and (self.kernel, tiles, self.arch) not in TRAPS:
            return "reads nothing: a trap in place of the kernel"
        if self.shared > ARCHITECTURES[self.arch] * 1024:
            return f"needs {self.shared} bytes of shared memory"
        return ""

    @property
    def numbers(self) -> str:
        sizes = f"{self.registers:4} regs {self.spills:4} spill {self.shared:7} smem"
        return f"{sizes} {self.products:14} ld {self.load_bytes:2} B"

    def __str__(self) -> str:
        made = "recorded" if self.recorded else "compiled"
        return (
            f"{self.kernel:28} sm_{self.arch:<4} {self.numbers}  {made}  {self.configuration}  {self.problem}".rstrip()
        )
