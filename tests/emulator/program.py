"""A kernel as basic blocks, each compiled once to a Python function of NumPy operations.

Inside a block a register is a local variable, held in whatever dtype it was last used as; only registers that a later
block reads go back to the register file (backward liveness). A block is straight-line code for the lanes that are
given: divergence is the executor's business, and a guard (@p) is the only mask inside a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import opcodes
from .errors import Unsupported
from .formats import DTYPES, UNSIGNED
from .opcodes.registry import Operation, decode
from .parser import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Module,
    Negated,
    Operand,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

assert opcodes  # importing the package registers every handler

BARRIERS = ("bar", "barrier")
CONVERGING = ("shfl", "vote", "redux", "match", "elect", "activemask", "ldmatrix", "stmatrix", "mma")


@dataclass
class Block:
    """``kind`` says what ends it: fall, branch, exit, barrier or trap; its function returns what that needs."""

    number: int
    instructions: list[Instruction]
    kind: str = "fall"
    taken: int = -1
    following: int = -1
    converges: bool = False
    uses: list[int] = field(default_factory=list)  # registers read before they are written
    defines: list[int] = field(default_factory=list)  # registers written and read by a later block
    counts: Counter[str] = field(default_factory=Counter)
    function: Callable[[Any, Any], Any] | None = None

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]


def _is_block_barrier(instruction: Instruction) -> bool:
    return instruction.name in BARRIERS and not instruction.has("warp")


def _ends_block(instruction: Instruction) -> bool:
    return instruction.name in ("bra", "ret", "exit", "trap") or _is_block_barrier(instruction)


def _registers(operand: Operand | None) -> list[Register]:
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, Negated):
        return [operand.register]
    if isinstance(operand, Address):
        return _registers(operand.base)
    if isinstance(operand, Vector):
        return [register for element in operand.elements for register in _registers(element)]
    return []


class Program:
    """The compiled form of one kernel; shared by all its launches."""

    def __init__(self, module: Module, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.module, self.kernel, self.symbols = module, kernel, symbols
        self.blocks = self._split()
        self._link()
        self._operations = [[self._decode(instruction) for instruction in block.instructions] for block in self.blocks]
        self._liveness()
        self.shared_granule = self._narrowest("shared", "shared::cta")
        self.global_granule = self._narrowest("global")

    def run(self, block: Block, registers: Any, lanes: Any) -> Any:
        if block.function is None:
            block.function = _Compiler(self, block, self._operations[block.number]).compile()
        return block.function(registers, lanes)

    def _split(self) -> list[Block]:
        instructions = self.kernel.instructions
        leaders = {0, *self.kernel.labels.values()}
        leaders.update(i + 1 for i, instruction in enumerate(instructions) if _ends_block(instruction))
        starts = sorted(start for start in leaders if start < len(instructions))
        self._starts = {start: number for number, start in enumerate(starts)}
        return [
            Block(number, instructions[start:end])
            for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(instructions)]))
        ]

    def _link(self) -> None:
        for block in self.blocks:
            block.following = block.number + 1
            block.converges = any(
                i.name in CONVERGING or i.name == "bar" or (i.name in BARRIERS and i.has("warp"))
                for i in block.instructions
            )
            last = block.last
            if last.name == "bra":
                block.kind = "branch"
                (label,) = last.operands
                assert isinstance(label, Symbol)
                # A label at the very end stands for the return that follows it.
                block.taken = self._starts.get(self.kernel.target(last, label.name), len(self.blocks))
            elif last.name in ("ret", "exit"):
                block.kind = "exit"
            elif last.name == "trap":
                block.kind = "trap"
            elif _is_block_barrier(last):
                block.kind = "barrier"
            for instruction in block.instructions:
                block.counts[opcode_class(instruction)] += 1

    def _decode(self, instruction: Instruction) -> Operation | Unsupported | None:
        if _ends_block(instruction):
            return None
        try:
            return decode(instruction)
        except Unsupported as error:  # raised where it is reached: code that never runs may hold anything
            return error

    def _narrowest(self, *spaces: str) -> int:
        """The narrowest access to a state space, generic ones included: the granule at which races are looked for."""
        known = {"global", "shared", "shared::cta", "local", "param", "const", "param::func", "param::entry"}
        sizes = [4]
        for instruction in self.kernel.instructions:
            if instruction.name in ("ld", "ldu", "st", "atom", "red") and (
                instruction.has(*spaces) or not instruction.has(*known)
            ):
                sizes.append(DTYPES[instruction.type].itemsize)
        return min(sizes)

    def _liveness(self) -> None:
        reads, kills, exposed = [], [], []
        for block, operations in zip(self.blocks, self._operations):
            used = written = 0
            for instruction, operation in zip(block.instructions, operations):
                inputs, outputs = _flow(instruction, operation)
                used |= _bits(inputs) & ~written
                if instruction.guard is None:
                    written |= _bits(outputs)
                else:
                    used |= _bits(outputs) & ~written
                    written |= _bits(outputs)
            reads.append(used)
            kills.append(written)
            exposed.append(used)
        live_in = list(reads)
        live_out = [0] * len(self.blocks)
        changed = True
        while changed:
            changed = False
            for block in reversed(self.blocks):
                out = 0
                for successor in self._successors(block):
                    if successor < len(self.blocks):
                        out |= live_in[successor]
                into = reads[block.number] | (out & ~kills[block.number])
                if out != live_out[block.number] or into != live_in[block.number]:
                    live_out[block.number], live_in[block.number], changed = out, into, True
        for block in self.blocks:
            block.uses = _positions(exposed[block.number])
            block.defines = _positions(kills[block.number] & live_out[block.number])

    @staticmethod
    def _successors(block: Block) -> list[int]:
        always = block.last.guard is None
        if block.kind == "branch":
            return [block.taken] if always else [block.taken, block.following]
        return [] if block.kind == "exit" and always else [block.following]


def _flow(instruction: Instruction, operation: Operation | Unsupported | None) -> tuple[list[Register], list[Register]]:
    inputs = _registers(instruction.guard)
    if isinstance(operation, Operation):
        for operand, _ in operation.arguments:
            inputs = inputs + _registers(operand)
        return inputs, [register for operand, _ in operation.results for register in _registers(operand)]
    if _is_block_barrier(instruction):
        outputs = _registers(instruction.operands[0]) if instruction.has("red") else []
        rest = instruction.operands[1:] if instruction.has("red") else instruction.operands
        return inputs + [register for operand in rest for register in _registers(operand)], outputs
    return inputs, []


def _bits(registers: list[Register]) -> int:
    mask = 0
    for register in registers:
        mask |= 1 << register.index
    return mask


def _positions(mask: int) -> list[int]:
    return [index for index, bit in enumerate(reversed(bin(mask)[2:])) if bit == "1"]


CLASSES = {
    **dict.fromkeys(("ld", "ldu", "st", "atom", "red", "cp", "prefetch", "ldmatrix", "stmatrix"), "memory"),
    **dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sin", "cos", "tanh"), "special"),
    **dict.fromkeys(("shfl", "vote", "redux", "match", "elect", "activemask", *BARRIERS), "communication"),
    **dict.fromkeys(("bra", "ret", "exit", "call", "trap"), "control"),
    **dict.fromkeys(("mov", "cvta"), "move"),
    **dict.fromkeys(("setp", "selp", "set", "slct"), "select"),
    "cvt": "convert",
    "mma": "matrix",
}


def opcode_class(instruction: Instruction) -> str:
    """memory, special, communication, control, move, select, convert, matrix, float or integer."""
    if instruction.name in CLASSES:
        return CLASSES[instruction.name]
    types = [modifier for modifier in instruction.modifiers if modifier in DTYPES]
    return "float" if types and types[-1].lstrip("b")[0] in "f" else "integer"


class _Compiler:
    """Python source for one block, from its operations."""

    def __init__(self, program: Program, block: Block, operations: list[Operation | Unsupported | None]) -> None:
        self.program, self.block, self.operations = program, block, operations
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"where": np.where}
        self.held: dict[int, dict[np.dtype, str]] = {}  # register -> dtype -> local variable
        self.constants: dict[tuple[str, bytes], str] = {}
        self.fresh = 0

    def compile(self) -> Callable[[Any, Any], Any]:
        result = "None"
        for instruction, operation in zip(self.block.instructions, self.operations):
            if _ends_block(instruction):
                result = self.terminator(instruction)
            elif isinstance(operation, Unsupported):
                self.lines.append(f"raise {self.bind(operation)}")
            elif operation is not None:
                self.emit(instruction, operation)
        for index in self.block.defines:
            if index not in self.held:
                continue  # the result of bar.red: the executor writes it
            self.lines.append(f"R[{index}] = {next(iter(self.held[index].values()))}")
        body = "\n ".join([*self.lines, f"return {result}"])
        exec(
            compile(f"def block(R, L):\n {body}", f"<{self.program.kernel.name} block {self.block.number}>", "exec"),
            self.names,
        )
        return self.names["block"]

    def bind(self, value: Any) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def new(self) -> str:
        self.fresh += 1
        return f"v{self.fresh}"

    def constant(self, value: np.generic) -> str:
        key = (value.dtype.str, value.tobytes())
        if key not in self.constants:
            self.constants[key] = self.bind(value)
        return self.constants[key]

    def emit(self, instruction: Instruction, operation: Operation) -> None:
        arguments = [self.read(operand, ptx_type) for operand, ptx_type in operation.arguments]
        guard = self.read(instruction.guard, "pred") if instruction.guard is not None else None
        if operation.needs_lanes:
            arguments = ["L", guard or "None", *arguments]
        targets = [self.new() for _ in operation.results]
        call = f"{self.bind(operation.function)}({', '.join(arguments)})"
        self.lines.append(f"{', '.join(targets)} = {call}" if targets else call)
        for name, (operand, ptx_type) in zip(targets, operation.results):
            self.write(operand, ptx_type, name, guard)

    def terminator(self, instruction: Instruction) -> str:
        guard = self.read(instruction.guard, "pred") if instruction.guard is not None else "None"
        if self.block.kind != "barrier":
            return guard
        operands = instruction.operands[1:] if instruction.has("red") else instruction.operands
        predicate = "None"
        if instruction.has("red"):
            predicate = self.read(operands[-1], "pred")
            operands = operands[:-1]
        numbers = [self.read(operand, "u32") for operand in operands]
        return f"({guard}, {', '.join(([*numbers, 'None', 'None'])[:2])}, {predicate})"

    def read(self, operand: Operand, ptx_type: str) -> str:
        if isinstance(operand, Register):
            return self.register(operand, ptx_type)
        if isinstance(operand, Negated):
            name = self.new()
            self.lines.append(f"{name} = ~{self.register(operand.register, 'pred')}")
            return name
        if isinstance(operand, Immediate):
            return self.constant(operand.constant(ptx_type))
        if isinstance(operand, Special):
            name = self.new()
            self.lines.append(f"{name} = L.special({operand.name!r}).astype({self.dtype(DTYPES[ptx_type])})")
            return name
        if isinstance(operand, Symbol):
            return self.constant(np.array(self.address_of(operand.name), np.uint64).astype(DTYPES[ptx_type])[()])
        if isinstance(operand, Address):
            return self.address(operand)
        raise Unsupported(f"operand {operand}")

    def address(self, operand: Address) -> str:
        """The base as uint64: a 32-bit register holds an offset into shared or local memory."""
        if isinstance(operand.base, Register):
            bits = DTYPES[operand.base.type].itemsize * 8
            base = self.register(operand.base, f"u{bits}")
            if bits == 64 and not operand.offset:
                return base
            name = self.new()
            offset = self.constant(np.uint64(operand.offset & (2**64 - 1)))
            wide = base if bits == 64 else f"{base}.astype({self.dtype(UNSIGNED[8])})"
            self.lines.append(f"{name} = {wide} + {offset}")
            return name
        start = operand.base.value if isinstance(operand.base, Immediate) else self.address_of(operand.base.name)
        return self.constant(np.uint64((start + operand.offset) & (2**64 - 1)))

    def address_of(self, name: str) -> int:
        kernel = self.program.kernel
        for table in (kernel.shared, kernel.local, kernel.parameters):
            if name in table:
                return table[name].offset
        if name in kernel.local_parameters:
            return 0
        if name in self.program.symbols:
            return self.program.symbols[name]
        raise Unsupported(f"symbol {name} in kernel {kernel.name}")

    def dtype(self, dtype: np.dtype) -> str:
        name = f"t_{dtype.kind}{dtype.itemsize}"
        self.names[name] = dtype
        return name

    def register(self, register: Register, ptx_type: str) -> str:
        """A local variable that holds the register as the dtype of ``ptx_type``."""
        held = self.held.setdefault(register.index, {})
        dtype = DTYPES[ptx_type]
        if dtype in held:
            return held[dtype]
        own = DTYPES[register.type]
        if not held:
            name = self.new()
            self.lines.append(f"{name} = R[{register.index}].view({self.dtype(own)})")
            held[own] = name
            if own == dtype:
                return name
        source = next((name for kind, name in held.items() if kind.itemsize == own.itemsize), "")
        name = self.new()
        if dtype.itemsize == own.itemsize:
            self.lines.append(f"{name} = {source}.view({self.dtype(dtype)})")
        elif dtype.itemsize < own.itemsize:  # the low bits of a wider register
            narrow = self.dtype(UNSIGNED[dtype.itemsize])
            unsigned = self.dtype(UNSIGNED[own.itemsize])
            self.lines.append(f"{name} = {source}.view({unsigned}).astype({narrow}).view({self.dtype(dtype)})")
        else:
            raise Unsupported(f"register {register.name} of type .{register.type} read as .{ptx_type}")
        held[dtype] = name
        return name

    def write(self, operand: Operand, ptx_type: str, value: str, guard: str | None) -> None:
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise Unsupported(f"result {operand}")
        own, dtype = DTYPES[operand.type], DTYPES[ptx_type]
        if dtype.itemsize < own.itemsize:  # a narrow load: signed types extend their sign, others fill with zeros
            signed = dtype.kind == "i"
            wide = np.dtype(f"{'i' if signed else 'u'}{own.itemsize}")
            if dtype.kind == "f":
                value = f"{value}.view({self.dtype(UNSIGNED[dtype.itemsize])})"
            value = f"{value}.astype({self.dtype(wide)})"
            dtype = wide
        elif dtype.itemsize > own.itemsize:
            raise Unsupported(f"register {operand.name} of type .{operand.type} written as .{ptx_type}")
        if guard is not None:
            old = self.register(operand, operand.type)
            if own != dtype:
                old = f"{old}.view({self.dtype(dtype)})"
            value = f"where({guard}, {value}, {old})"
        name = self.new()
        self.lines.append(f"{name} = {value}")
        self.held[operand.index] = {dtype: name}
