"""PTX text as a list of instructions (PTX ISA, chapter "Syntax"). One kernel per text, as Triton writes it.

Operands are parsed once: a register is a string, a constant an int (floats as their bits), ``{a, b}`` a tuple, and
``[a + 4]`` an :class:`Address`. The only symbol is the block's shared memory, which starts at address 0.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

import numpy as np

WIDTHS = {"pred": np.bool_, "8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}


class PtxError(Exception):
    """Something that the emulator does not know, or that a GPU would refuse."""


@dataclass(frozen=True)
class Address:
    base: str | int
    offset: int = 0


Operand = str | int | Address | tuple


@dataclass(frozen=True)
class Instruction:
    """``guard``: register and whether its opposite counts. ``name`` is the opcode, ``parts`` it split at dots."""

    name: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    registers: frozenset[str]
    text: str


@dataclass
class Program:
    name: str
    threads: int
    parameters: dict[str, str] = field(default_factory=dict)  # name -> PTX type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    declared: dict[str, type] = field(default_factory=dict)  # register, or prefix of numbered registers

    def width(self, register: str) -> type:
        """The unsigned numpy type that holds a register."""
        found = self.declared.get(register) or self.declared.get(register.rstrip("0123456789") + "<")
        if found is None:
            raise PtxError(f"register {register} is not declared")
        return found

    def without(self, indices: list[int]) -> Program:
        """The program less some instructions."""
        labels = {name: at - sum(index < at for index in indices) for name, at in self.labels.items()}
        left = [each for index, each in enumerate(self.instructions) if index not in indices]
        return dataclasses.replace(self, instructions=left, labels=labels)


def parse(text: str) -> Program:
    """The kernel of ``text``.

    Raises:
        PtxError: no kernel, or a function call.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    head = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)", text, re.S)
    if head is None:
        raise PtxError("no .visible .entry with .reqntid")
    program = Program(head[1], int(head[3]))
    for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+_param_\d+)", head[2]):
        program.parameters[name] = kind
    for statement in _body(text[head.end() :]).split(";"):
        _add(program, statement)
    return program


def _body(text: str) -> str:
    """The function's braces, without the lines of debug information."""
    start = depth = text.index("{")
    for match in re.finditer(r"[{}]", text[start:]):
        depth = depth + 1 if match[0] == "{" else depth - 1
        if depth == start:
            body = text[start + 1 : start + match.start()]
            return re.sub(r"^\s*\.(loc|file|section)[^\n]*$", "", body, flags=re.M)
    raise PtxError("the kernel's braces do not close")


def _add(program: Program, statement: str) -> None:
    # Nothing but a scope of inline assembly starts with a brace.
    while match := re.match(r"[{}\s]+|(\$?\w+):", statement):
        if match[1]:
            program.labels[match[1]] = len(program.instructions)
        statement = statement[match.end() :]
    statement = statement.strip()
    if statement.startswith(".reg"):
        _, kind, names = re.split(r"\s+", statement, maxsplit=2)
        for name in names.split(","):
            program.declared[re.sub(r"<\d+>", "<", name.strip())] = WIDTHS[re.sub(r"\.[bsuf](?=\d)|\.", "", kind)]
    elif statement and not statement.startswith(".pragma"):
        program.instructions.append(_instruction(statement))


def _instruction(text: str) -> Instruction:
    text = re.sub(r"\s+", " ", text)
    match = re.fullmatch(r"(?:@(!?)(%?\w+) )?([\w.:]+)(?: (.*))?", text)
    if match is None:
        raise PtxError(f"cannot parse: {text}")
    operands = tuple(_operand(each) for each in _split(match[4] or ""))
    guard = (match[2], match[1] == "!") if match[2] else None
    registers = frozenset(re.findall(r"%\w+", text))
    return Instruction(match[3], tuple(match[3].split(".")), operands, guard, registers, text)


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    return [each.strip() for each in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if each.strip()]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(_operand(each) for each in _split(text[1:-1]))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_operand(base), int(offset or "0", 0))
    if text == "global_smem":
        return 0
    if match := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
        return int(match[1], 16)
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text
