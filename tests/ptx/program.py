"""PTX as Triton makes it, read into the numbers that machine.cpp runs."""

import re
from dataclasses import dataclass, field

import numpy as np

SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x", "%laneid")
SHARED = "global_smem"
_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\n\)(.*?)\n\{\n(.*?)\n\}\n", re.DOTALL)
_ONE_LINE_BLOCK = re.compile(r"^\{\s*\.reg[^;]*;\s*(.*;)\s*\}$")
_PARTS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ADDRESS = re.compile(r"^\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]$")
_LABEL = re.compile(r"^(\$?\w+):$")
_STATEMENT = re.compile(r"^(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_PARAMETER = re.compile(r"\[\w+_param_(\d+)\]")
_SHARED_ACCESS = re.compile(r"^(?:ld|st)\.shared\.(?:v\d\.)?[busf](\d+)$")
_NUMBER = re.compile(r"^(?:0f([0-9A-Fa-f]{8})|0d([0-9A-Fa-f]{16})|(-?\d+|0[xX][0-9A-Fa-f]+)U?)$")


class Unknown(Exception):
    """PTX that the machine does not know; the message quotes it."""


@dataclass
class Program:
    name: str
    parameters: list[str]  # their types
    threads: int
    # Of each: operation, predicate or -1, whether it is negated, target, two offsets, number of operands, the first.
    instructions: np.ndarray = field(init=False)  # (count, 8)
    operands: np.ndarray = field(init=False)  # of all, one after the other: registers
    lines: list[str] = field(default_factory=list)  # theirs, and the lines of the source
    shared_cell: int = 16  # bytes of the smallest access to shared memory
    registers: dict[str, int] = field(default_factory=dict)
    constants: dict[int, int] = field(default_factory=dict)  # register -> what it always holds
    _known: dict[str, int] = field(default_factory=dict)  # text of an operand -> register

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def constant(self, value: int) -> int:
        index = self.register(f"={value}")
        self.constants[index] = value % 2**64
        return index

    def operand(self, text: str) -> int:
        index = self._known.get(text)
        if index is None:
            index = self._known[text] = self._new_operand(text)
        return index

    def _new_operand(self, text: str) -> int:
        if match := _NUMBER.match(text):
            single, double, whole = match.groups()
            return self.constant(int(single or double, 16) if single or double else int(whole, 0))
        if text == SHARED:
            return self.constant(0)
        if not text.startswith("%") and text not in ("_", "tmp"):
            raise Unknown(f"operand {text!r}")
        return self.register(text)


def _operands(program: Program, text: str) -> tuple[list[int], list[int]]:
    """Registers, in the order of the text, and the offsets of addresses."""
    found, offsets = [], []
    for part in _PARTS.findall(text):
        if part[0] == "[":
            match = _ADDRESS.match(part)
            if not match:
                raise Unknown(f"address {part!r}")
            found.append(program.operand(match[1]))
            offsets.append(int(match[2] or "0", 0))
        elif part[0] == "{" or "|" in part:
            found += [program.operand(name.strip()) for name in part.strip("{}").replace("|", ",").split(",")]
        else:
            found.append(program.operand(part.strip()))
    return found, offsets


def _statements(body: str):
    """(label, None, "") and (None, statement, its place in the source) in order."""
    place = ""
    for line in body.split("\n"):
        line, _, comment = line.partition("//")
        line = line.strip()
        if not line:
            continue
        if line[0] == ".":
            if line.startswith(".loc"):
                place = comment.strip()
            continue
        if line[0] == "{" and (match := _ONE_LINE_BLOCK.match(line)):
            line = match[1]
        if line[-1] == ":" and (match := _LABEL.match(line)):
            yield match[1], None, ""
            continue
        if line[-1] != ";":
            raise Unknown(f"line {line!r}")
        for statement in line[:-1].split(";"):
            if statement := statement.strip():
                yield None, statement, place


def _row(program: Program, name: str, text: str, operation) -> tuple[int, list[int], list[int], str | None]:
    """(operation, operands, offsets, label) of an instruction."""
    if name.startswith("bra"):
        return operation(name), [], [], text
    if name.startswith("mov.") and "{" in text:  # both ways: packed or taken apart
        parts = text.split("{")[1].split("}")[0].count(",") + 1
        name = f"{'unpack' if text.startswith('{') else 'pack'}{name[3:]}.v{parts}"
    if name.startswith("ld.param."):
        match = _PARAMETER.search(text)
        if not match:
            raise Unknown(f"{name} {text}")
        return (
            operation(name),
            [program.operand(text.split(",")[0].strip()), program.register(f"param {match[1]}")],
            [],
            None,
        )
    operands, offsets = _operands(program, text)
    if name.startswith("cp.async.c") and "global" in name and len(operands) == 3:
        operands.append(operands[2])  # no part of it is left out
    if len(offsets) > 2:
        raise Unknown(f"{name} {text}")
    return operation(name), operands, offsets, None


def parse(ptx: str, operation) -> Program:
    """The one kernel of `ptx`; operation(name): its number in the machine. Unknown: what is not known there."""
    entry = _ENTRY.search(ptx)
    threads = entry and re.search(r"\.reqntid (\d+)", entry[3])
    if not threads:
        raise Unknown("no kernel with .reqntid")
    program = Program(entry[1], re.findall(r"\.param \.(\w+)", entry[2]), int(threads[1]))
    rows, flat, labels, jumps = [], [], {}, []
    for label, statement, place in _statements(entry[4]):
        if label:
            labels[label] = len(rows)
            continue
        match = _STATEMENT.match(statement)
        if not match:
            raise Unknown(f"statement {statement!r}")
        negated, predicate, name, text = match.groups()
        if name[2:9] == ".shared" and (size := _SHARED_ACCESS.match(name)):
            program.shared_cell = min(program.shared_cell, int(size[1]) // 8)
        elif name.startswith("cp.async.ca"):
            program.shared_cell = min(program.shared_cell, 4)
        program.lines.append(f"{statement} ({place})")
        number, operands, offsets, target = _row(program, name, text, operation)
        if target:
            jumps.append((len(rows), target))
        offsets += [0] * (2 - len(offsets))
        guard = program.register(predicate) if predicate else -1
        rows.append([number, guard, negated == "!", 0, *offsets, len(operands), len(flat)])
        flat += operands
    for position, label in jumps:
        rows[position][3] = labels[label]
    program.instructions = np.array(rows, dtype=np.int64)
    program.operands = np.array(flat, dtype=np.int32)
    return program
