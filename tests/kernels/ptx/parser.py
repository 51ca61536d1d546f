"""PTX text to kernels: parameters, shared variables, registers, instructions."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

SIZES = {"pred": 1, "b128": 16} | {
    f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)
}
"""Bytes of each PTX type."""


class Address(NamedTuple):
    """The operand ``[base + offset]``; the base is a register, a symbol, or "" for none."""

    base: str
    offset: int


class Not(NamedTuple):
    """The operand ``!%p``."""

    register: str


Operand = str | int | float | Address | Not | tuple  # str: a register or symbol; tuple: {a, b}


class Instruction(NamedTuple):
    opcode: str  # such as ld.global.v4.b32
    operands: tuple[Operand, ...]
    predicate: str | Not | None
    line: int  # in the PTX text
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


class Variable(NamedTuple):
    """A kernel parameter or shared variable."""

    name: str
    offset: int  # bytes, in the parameters or in shared memory
    size: int


@dataclass
class Kernel:
    name: str
    params: list[Variable] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)  # symbol to address
    static_shared: int = 0  # bytes
    registers: dict[str, str] = field(default_factory=dict)  # name to type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name to index of an instruction


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:[\s.]\S*)*?\s+([\w$]+)(\[\d+\])?\s*$"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_LABEL = re.compile(r"([\w$]+):(?!:)")


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a PTX module by name."""
    comment = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    text = comment.sub(lambda match: "\n" * match.group().count("\n"), text)  # keeps the lines
    entries = list(_ENTRY.finditer(text))
    module_shared = _SHARED.findall(text[: entries[0].start()] if entries else "")
    kernels = {}
    for entry in entries:
        kernel = Kernel(entry.group(1))
        offset = 0
        for declaration in filter(str.strip, entry.group(2).split(",")):
            _, align, size, name = _parse_param(declaration)
            offset = -(-offset // align) * align
            kernel.params.append(Variable(name, offset, size))
            offset += size
        end, depth = entry.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        _parse_body(kernel, text, entry.end(), end - 1)
        body = text[entry.end() : end]
        for align, name, size in module_shared + _SHARED.findall(body):
            start = -(-kernel.static_shared // int(align)) * int(align)
            kernel.shared[name] = start  # without a size: dynamic, after the static ones
            kernel.static_shared = start + int(size or 0)
        kernels[kernel.name] = kernel
    return kernels


def _parse_param(text: str) -> tuple[str, int, int, str]:
    """Return type, alignment, size and name of a parameter."""
    align = re.search(r"\.align\s+(\d+)", text)
    kind = next(x for x in re.findall(r"\.(\w+)", text) if x in SIZES)
    name, length = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", text).groups()
    if length is None:
        return kind, SIZES[kind], SIZES[kind], name
    return kind, int(align.group(1)) if align else SIZES[kind], SIZES[kind] * int(length), name


def _parse_body(kernel: Kernel, text: str, start: int, end: int) -> None:
    scopes: list[dict[str, str]] = [{}]  # of registers: name as written to unique name
    position = start
    for statement in text[start:end].split(";"):
        stripped = statement.lstrip()
        line = text.count("\n", 0, position + len(statement) - len(stripped)) + 1
        position += len(statement) + 1
        statement = stripped.rstrip()
        while statement:
            label = _LABEL.match(statement)
            if statement[0] == "{":
                scopes.append({})
                statement = statement[1:].lstrip()
            elif statement[0] == "}":
                scopes.pop()
                statement = statement[1:].lstrip()
            elif label:
                kernel.labels[label.group(1)] = len(kernel.instructions)
                statement = statement[label.end() :].lstrip()
            elif re.match(r"\.(loc|pragma|file)\b", statement):  # no semicolon after .loc
                statement = statement.partition("\n")[2].lstrip()
            else:
                break
        if statement.startswith(".reg"):
            _declare(kernel, statement, scopes)
        elif statement and not statement.startswith("."):
            kernel.instructions.append(_instruction(statement, line, scopes))


def _declare(kernel: Kernel, statement: str, scopes: list[dict[str, str]]) -> None:
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL).groups()
    for name in (x.strip() for x in names.split(",")):
        several = re.match(r"([%\w$]+)<(\d+)>", name)
        for each in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]:
            unique = each if len(scopes) == 1 else f"{each}'{len(kernel.registers)}"
            scopes[-1][each] = unique
            kernel.registers[unique] = kind


def _instruction(statement: str, line: int, scopes: list[dict[str, str]]) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise ValueError(f"line {line}: not an instruction: {statement!r}")
    negated, guard, opcode, rest = match.groups()

    def resolve(name: str) -> str:
        return next((scope[name] for scope in reversed(scopes) if name in scope), name)

    predicate = Not(resolve(guard)) if negated else resolve(guard) if guard else None
    operands = tuple(_operand(x, resolve) for x in _split(rest))
    return Instruction(opcode, operands, predicate, line, " ".join(statement.split()))


def _split(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str, resolve) -> Operand:
    if text[0] == "{":
        return tuple(_operand(x, resolve) for x in _split(text[1:-1]))
    if text[0] == "[":
        terms = text[1:-1].replace("+-", "-").replace("-", "+-").split("+")
        offset, base = 0, ""
        for term in (x.replace(" ", "") for x in terms if x.strip()):
            number = _number(term)
            if number is None:
                base = resolve(term)
            else:
                offset += int(number)
        return Address(base, offset)
    if "|" in text:
        return tuple(resolve(x.strip()) for x in text.split("|"))
    if text[0] == "!":
        return Not(resolve(text[1:].strip()))
    number = _number(text)
    return resolve(text) if number is None else number


def _number(text: str) -> int | float | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return struct.unpack(">f", bytes.fromhex(text[2:]))[0]
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return struct.unpack(">d", bytes.fromhex(text[2:]))[0]
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0) if not re.fullmatch(r"-?0\d+", text) else int(text, 8)
    return None
