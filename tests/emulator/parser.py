"""PTX text to typed instructions.

PTX ISA, "Syntax" and "Kernel and Function Directives". Understood: entry points with their parameters, registers
(families such as ``%r<12>`` and single names in nested scopes, which Triton's inline assembly opens), shared, local,
global and constant variables, labels. Line tables, pragmas and debug sections are skipped.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Union

import numpy as np

from .errors import Unsupported
from .formats import DTYPES


@dataclass(frozen=True)
class Register:
    name: str
    type: str
    index: int


@dataclass(frozen=True)
class Negated:
    register: Register


@dataclass(frozen=True)
class Special:
    """%tid.x and its like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a float with their width."""

    value: int
    float_bits: int = 0

    def constant(self, ptx_type: str) -> np.generic:
        dtype = DTYPES[ptx_type]
        if ptx_type == "pred":
            return np.bool_(self.value != 0)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        if not self.float_bits:
            return np.array(self.value & ((1 << 8 * dtype.itemsize) - 1), unsigned).view(dtype)[()]
        exact = np.array(self.value, f"u{self.float_bits // 8}").view(f"f{self.float_bits // 8}")
        if dtype.itemsize * 8 == self.float_bits:
            return exact.view(dtype)[()]
        return exact.astype(f"f{dtype.itemsize}").view(dtype)[()]


@dataclass(frozen=True)
class Symbol:
    """A variable, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody wants."""


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    elements: tuple[Operand, ...]


Operand = Union[Register, Negated, Special, Immediate, Symbol, Sink, Address, Vector]  # noqa: UP007 (recursive)


@dataclass
class Instruction:
    name: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    operands: list[Operand]
    guard: Register | Negated | None
    line: int
    text: str
    scope: tuple[int, ...] = ()
    error: str = ""  # why its operands cannot be read; raised where it is reached

    @property
    def type(self) -> str:
        """The last type among the modifiers: what the instruction works on (for cvt: the source)."""
        for modifier in reversed(self.modifiers):
            if modifier in DTYPES:
                return modifier
        raise Unsupported(f"line {self.line}: `{self.text}` names no type that the emulator knows")

    def has(self, *names: str) -> bool:
        return any(name in self.modifiers for name in names)

    def __str__(self) -> str:
        return f"line {self.line} `{self.text}`"


@dataclass
class Variable:
    offset: int
    size: int


@dataclass
class Kernel:
    name: str
    parameters: dict[str, Variable] = field(default_factory=dict)
    parameter_bytes: int = 0
    registers: dict[str, Register] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[tuple[int, ...], str], int] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, Variable] = field(default_factory=dict)
    local_bytes: int = 0
    local_parameters: set[str] = field(default_factory=set)

    def target(self, instruction: Instruction, label: str) -> int:
        """Where a label of the instruction's scope, or of one around it, points."""
        scope = instruction.scope
        while True:
            if (scope, label) in self.labels:
                return self.labels[scope, label]
            if not scope:
                raise Unsupported(f"{instruction}: unknown label {label}")
            scope = scope[:-1]


@dataclass
class Module:
    kernels: dict[str, Kernel]
    variables: dict[str, tuple[str, np.ndarray]]  # .global and .const: the space and the initial bytes


_QUALIFIER = r"(?:\.(?:extern|visible|weak|common)\s+)*"
_ARRAY = r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$%.]+)\s*(?P<extent>\[[^=;]*\])?"
_MODULE_VARIABLE = re.compile(
    rf"(?:^|(?<=;))\s*{_QUALIFIER}\.(?P<space>global|const|shared)\s+{_ARRAY}\s*(?:=\s*(?P<value>[^;]*))?;", re.M
)
_BODY_VARIABLE = re.compile(rf"\.(?P<space>shared|local|param)\s+{_ARRAY}\s*$")
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$.]+)\s*\((?P<parameters>[^)]*)\)[^{;]*\{")
_FUNCTION = re.compile(r"\.func\b[^;{]*\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.(?!align)\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$][\w$.]*)\s*(?P<extent>\[\d+\])?"
)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_SKIPPED_LINE = re.compile(r"\.(?:loc|file|section)\b[^\n]*")
_STATEMENT = re.compile(r"(?:@(?P<guard>!?\s*[%\w$]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.S)
_REGISTERS = re.compile(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", re.S)
_INTEGER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_FLOAT = re.compile(r"0([fFdD])([0-9a-fA-F]{8}(?:[0-9a-fA-F]{8})?)")
_SPECIAL = re.compile(
    r"%(?:n?tid|n?ctaid|laneid|warpid|nwarpid|smid|nsmid|clock|clock64|clock_hi|globaltimer|lanemask_\w+|gridid|"
    r"dynamic_smem_size|total_smem_size|cluster_\w+|n?clusterid|is_explicit_cluster)(?:\.[xyz])?"
)


def _element_bytes(ptx_type: str) -> int:
    if ptx_type not in DTYPES:
        raise Unsupported(f"type .{ptx_type}")
    return DTYPES[ptx_type].itemsize


def _elements(extent: str | None) -> int:
    """[3][4] -> 12, no extent -> 1, [] -> 0."""
    total = 1
    for part in re.findall(r"\[\s*(\w*)\s*\]", extent or ""):
        total *= int(part, 0) if part else 0
    return total


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts


class _Body:
    """One pass over the text between the braces of an entry."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.families: dict[str, str] = {}  # prefix -> type
        self.scopes: list[tuple[int, dict[str, Register]]] = [(0, {})]
        self.opened = 0

    @property
    def scope(self) -> tuple[int, ...]:
        return tuple(number for number, _ in self.scopes[1:])

    def parse(self, text: str, start: int, line_starts: list[int]) -> int:
        """Up to the closing brace; returns the position after it."""
        position = start
        while True:
            while text[position].isspace():
                position += 1
            if text[position] == "{":
                self.opened += 1
                self.scopes.append((self.opened, {}))
                position += 1
            elif text[position] == "}":
                position += 1
                if len(self.scopes) == 1:
                    return position
                self.scopes.pop()
            elif text[position] == ";":
                position += 1
            elif match := _SKIPPED_LINE.match(text, position):
                position = match.end()
            elif match := _LABEL.match(text, position):
                self.kernel.labels[self.scope, match[1]] = len(self.kernel.instructions)
                position = match.end()
            else:
                end = text.index(";", position)
                self.statement(" ".join(text[position:end].split()), bisect_right(line_starts, position))
                position = end + 1

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self.declare_registers(text)
        elif match := _BODY_VARIABLE.match(text):
            self.declare_variable(match)
        elif text.startswith("."):
            if not text.startswith((".pragma", ".branchtargets", ".callprototype")):
                raise Unsupported(f"line {line}: directive `{text}`")
        else:
            match = _STATEMENT.fullmatch(text)
            if match is None:
                raise Unsupported(f"line {line}: cannot read `{text}`")
            name, *modifiers = match["opcode"].split(".")
            guard = self.operand(match["guard"].replace(" ", "")) if match["guard"] else None
            assert guard is None or isinstance(guard, (Register, Negated))
            operands, error = [], ""
            try:
                operands = [] if name == "call" else [self.operand(part) for part in _split(match["operands"])]
            except Unsupported as problem:
                error = str(problem)
            self.kernel.instructions.append(
                Instruction(name, tuple(modifiers), operands, guard, line, text, self.scope, error)
            )

    def declare_registers(self, text: str) -> None:
        match = _REGISTERS.match(text)
        assert match is not None
        ptx_type = match[1]
        _element_bytes(ptx_type)
        for name in _split(match[2]):
            family = re.fullmatch(r"([%\w$]+)<\d+>", name)
            if family:
                self.families[family[1]] = ptx_type
            else:
                self.scopes[-1][1][name] = self.register(f"{name}@{self.scope}" if self.scope else name, ptx_type)

    def declare_variable(self, match: re.Match[str]) -> None:
        if match["space"] == "param":  # a call's argument: only __assertfail and vprintf are ever called
            self.kernel.local_parameters.add(match["name"])
            return
        table, used = (
            (self.kernel.shared, self.kernel.shared_bytes)
            if match["space"] == "shared"
            else (self.kernel.local, self.kernel.local_bytes)
        )
        size = _element_bytes(match["type"])
        offset = _round_up(used, int(match["align"] or size))
        table[match["name"]] = Variable(offset, size * _elements(match["extent"]))
        if match["space"] == "shared":
            self.kernel.shared_bytes = offset + size * _elements(match["extent"])
        else:
            self.kernel.local_bytes = offset + size * _elements(match["extent"])

    def register(self, name: str, ptx_type: str) -> Register:
        if name not in self.kernel.registers:
            self.kernel.registers[name] = Register(name, ptx_type, len(self.kernel.registers))
        return self.kernel.registers[name]

    def operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self.address(text[1:-1].strip())
        if text.startswith("!"):
            inner = self.operand(text[1:])
            assert isinstance(inner, Register)
            return Negated(inner)
        if "|" in text:
            return Vector(tuple(self.operand(part.strip()) for part in text.split("|")))
        if _SPECIAL.fullmatch(text) and not self.declared(text):
            return Special(text[1:])
        if match := _FLOAT.fullmatch(text):
            return Immediate(int(match[2], 16), 32 if match[1] in "fF" else 64)
        if _INTEGER.fullmatch(text):
            return Immediate(int(text.rstrip("U"), 0))
        return self.declared(text) or Symbol(text)

    def declared(self, name: str) -> Register | None:
        for _, names in reversed(self.scopes):
            if name in names:
                return names[name]
        if name in self.kernel.registers:
            return self.kernel.registers[name]
        family = name.rstrip("0123456789")
        if family != name and family in self.families:
            return self.register(name, self.families[family])
        if name.startswith("%") and not _SPECIAL.fullmatch(name):
            raise Unsupported(f"register {name} is not declared")
        return None

    def address(self, text: str) -> Address:
        match = re.fullmatch(r"(.+?)\s*(?:([+-])\s*(-?\w+))?", text)
        assert match is not None
        base = self.operand(match[1])
        offset = int(match[3], 0) if match[3] else 0
        if not isinstance(base, (Register, Symbol, Immediate)):
            raise Unsupported(f"address [{text}]")
        return Address(base, -offset if match[2] == "-" else offset)


def _blank_comments(text: str) -> str:
    """Line numbers stay what they were."""
    text = re.sub(r"/\*.*?\*/", lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _initial_bytes(match: re.Match[str]) -> np.ndarray:
    dtype = DTYPES[match["type"]]
    count = _elements(match["extent"])
    values: list[int] = []
    for part in re.findall(r"[^\s,{}]+", match["value"] or ""):
        if float_match := _FLOAT.fullmatch(part):
            values.append(int(float_match[2], 16))
        elif _INTEGER.fullmatch(part):
            values.append(int(part.rstrip("U"), 0))
        else:
            raise Unsupported(f"initial value `{part}` of {match['name']}")
    unsigned = np.dtype(f"u{dtype.itemsize}")
    mask = (1 << 8 * dtype.itemsize) - 1
    array = np.zeros(max(count, len(values), 1), unsigned)
    array[: len(values)] = np.array([value & mask for value in values], unsigned)
    return array.view(np.uint8)


def parse(ptx: str) -> Module:
    text = _blank_comments(ptx)
    line_starts = [0] + [match.end() for match in re.finditer("\n", text)]
    module = Module({}, {})
    entries = list(_ENTRY.finditer(text))
    starts = [match.start() for match in entries] + [match.start() for match in _FUNCTION.finditer(text)]
    head = text[: min(starts)] if starts else text
    shared: list[tuple[str, int, int]] = []
    for match in _MODULE_VARIABLE.finditer(head):
        if match["space"] == "shared":
            size = _element_bytes(match["type"])
            shared.append((match["name"], int(match["align"] or size), size * _elements(match["extent"])))
        else:
            module.variables[match["name"]] = match["space"], _initial_bytes(match)
    for entry in entries:
        kernel = Kernel(entry["name"])
        for part in _split(entry["parameters"]):
            match = _PARAMETER.match(part)
            if match is None:
                raise Unsupported(f"parameter `{part}` of {kernel.name}")
            size = _element_bytes(match["type"])
            offset = _round_up(kernel.parameter_bytes, int(match["align"] or size))
            kernel.parameters[match["name"]] = Variable(offset, size * _elements(match["extent"]))
            kernel.parameter_bytes = offset + size * _elements(match["extent"])
        _Body(kernel).parse(text, entry.end(), line_starts)
        for name, align, size in sorted(shared, key=lambda item: item[2] == 0):  # dynamic memory comes last
            offset = _round_up(kernel.shared_bytes, align)
            kernel.shared[name] = Variable(offset, size)
            kernel.shared_bytes = offset + size
        module.kernels[kernel.name] = kernel
    return module
