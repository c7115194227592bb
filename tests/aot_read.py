"""What the compile-only gate reads off a kernel's PTX and what ptxas says of it. Its code is in the ledger's keys."""

import re

_RESULT = re.compile(r"^\s*([a-z][\w.]*)\s+(%rd\d+), ([^;]+);", re.MULTILINE)
_UPPER = re.compile(r"mov\.b64\s+\{\s*(?:_|tmp)\s*,\s*%r\d+\s*\},\s*(%rd\d+)")


def registers_and_spills(log: str) -> tuple[int, int]:
    registers, spills = (
        sum(map(int, re.findall(rf"(\d+) {name}", log))) for name in ("registers", "bytes spill stores")
    )
    assert registers, f"ptxas said nothing of registers: {log}"
    return registers, spills


def products(ptx: str) -> str:
    """The matrix instructions: kind and number."""
    kinds = [("wgmma", r"wgmma\.mma_async"), ("tcgen05", r"tcgen05\.mma"), ("mma", r"\bmma\.sync")]
    counts = [f"{name} {len(re.findall(pattern, ptx))}" for name, pattern in kinds if re.search(pattern, ptx)]
    return " ".join(counts) or "-"


def widest_load(ptx: str) -> int:
    """Bytes of the widest global load or asynchronous copy of one thread."""
    widths = [0]
    for vector, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        widths.append(int(vector or 1) * int(bits) // 8)
    widths += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)[,;]", ptx)]
    return max(widths)


def _stays(name: str, operands: list[str]) -> bool:
    """Whether a result of 64 bits has nothing in its upper half."""
    if name == "and.b64":
        return operands[1].isdigit() and int(operands[1]) < 2**32
    return name in ("cvt.u64.u32", "cvt.u64.u16")


def overruns(ptx: str) -> list[str]:
    """Pairs of 32 bits, computed in one register, whose lower part may run over into the upper, which is then used.

    LLVM shifts a lane that nobody reads by too much, and beside it one that is read (h2ot_kernels/triton/common.py:
    modulo). What may stand in the lower half of such a sum is what cannot leave it.
    """
    defined = {}
    for name, to, operands in _RESULT.findall(ptx):
        defined[to] = name, [part.strip() for part in operands.split(",")]
    faults = []
    for pair in _UPPER.findall(ptx):
        name, parts = defined.get(pair, ("", []))
        if name not in ("or.b64", "add.s64", "xor.b64"):
            continue
        for upper, lower in (parts, parts[::-1]):
            how, shift = defined.get(upper, ("", []))
            if how == "shl.b64" and int(shift[1]) >= 32 and not _stays(*defined.get(lower, ("", []))):
                faults.append(f"{lower} may run over into {upper} in {pair}, a pair")
    return faults
