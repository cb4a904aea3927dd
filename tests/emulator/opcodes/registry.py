"""What an instruction does, as a function of typed NumPy arrays.

A handler is registered for an opcode, for the types it serves, and turns an instruction into an `Operation`: which
operands are read and written as which types, and a function in between. The function sees all lanes at once and knows
nothing of registers or guards. With ``needs_lanes`` it is also given the lanes that run and the guard (a bool array,
or None for all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import Unsupported
from ..formats import DTYPES
from ..parser import Instruction, Operand, Vector

Typed = tuple[Operand, str]


@dataclass(frozen=True)
class Operation:
    function: Callable[..., Any]
    results: tuple[Typed, ...]
    arguments: tuple[Typed, ...]
    needs_lanes: bool = False


Handler = Callable[[Instruction], "Operation | None"]
HANDLERS: dict[tuple[str, str | None], Handler] = {}

INTEGERS = tuple(f"{letter}{bits}" for letter in "bus" for bits in (8, 16, 32, 64))
FLOATS = ("f16", "bf16", "f32", "f64")


def opcode(*names: str, types: Iterable[str] | None = None) -> Callable[[Handler], Handler]:
    """Register a handler; None as the result of a handler means that the instruction has no effect here."""

    def register(handler: Handler) -> Handler:
        for name in names:
            for ptx_type in types if types is not None else (None,):
                assert (name, ptx_type) not in HANDLERS, (name, ptx_type)
                HANDLERS[name, ptx_type] = handler
        return handler

    return register


def decode(instruction: Instruction) -> Operation | None:
    """The operation of an instruction; `Unsupported` names the opcode and the line where there is none."""
    if instruction.error:
        raise Unsupported(f"{instruction}: {instruction.error}")
    handler = HANDLERS.get((instruction.name, None))
    if handler is None:
        types = [modifier for modifier in instruction.modifiers if modifier in DTYPES]
        handler = HANDLERS.get((instruction.name, types[-1])) if types else None
    if handler is None:
        raise Unsupported(
            f"{instruction}: opcode `{'.'.join((instruction.name, *instruction.modifiers))}` is not implemented"
        )
    try:
        return handler(instruction)
    except Unsupported as error:
        raise error if str(error).startswith("line ") else Unsupported(f"{instruction}: {error}") from None


def simple(instruction: Instruction, function: Callable[..., Any], *types: str, result: str | None = None) -> Operation:
    """The first operand is the result, the others are arguments of the given types (one type: all of it)."""
    target, *arguments = instruction.operands
    argument_types = types if len(types) == len(arguments) else types * len(arguments)
    if len(argument_types) != len(arguments):
        raise Unsupported(f"{instruction}: {len(arguments)} operands, expected {len(types)}")
    return Operation(function, ((target, result or types[0]),), tuple(zip(arguments, argument_types)))


def known_modifiers(instruction: Instruction, *names: str) -> None:
    """A modifier that the handler does not know would change the result: refuse it."""
    for modifier in instruction.modifiers:
        if modifier not in DTYPES and modifier not in names:
            raise Unsupported(f"{instruction}: modifier .{modifier} is not implemented")


def elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)
