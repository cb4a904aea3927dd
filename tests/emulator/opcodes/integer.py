"""Integer arithmetic.

PTX ISA, "Integer Arithmetic Instructions". The carry flag of "Extended-Precision Integer Arithmetic Instructions" is
not implemented.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Unsupported
from ..formats import DTYPES, Array, halves, is_signed, pack
from ..parser import Instruction
from .registry import INTEGERS, Operation, known_modifiers, opcode, simple

WIDER = {8: 16, 16: 32, 32: 64}


def _width(ptx_type: str) -> int:
    return DTYPES[ptx_type].itemsize * 8


def _saturating(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def clipped(a: Array, b: Array) -> Array:
        return np.clip(function(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1).astype(np.int32)

    return clipped


@opcode("add", "sub", types=INTEGERS)
def add_sub(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "sat")
    function: Callable[..., Array] = np.add if instruction.name == "add" else np.subtract
    if instruction.has("sat"):
        function = _saturating(function)
    return simple(instruction, function, instruction.type)


def multiply_high(ptx_type: str) -> Callable[[Array, Array], Array]:
    """The upper half of the product; 64 bits from four products of 32-bit halves."""
    dtype = DTYPES[ptx_type]
    width = _width(ptx_type)
    if width < 64:
        wide = DTYPES[f"{ptx_type[0] if is_signed(ptx_type) else 'u'}{WIDER[width]}"]
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(width)).astype(dtype)

    def high(a: Array, b: Array) -> Array:
        x, y = a.view(np.uint64), b.view(np.uint64)
        half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
        x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
        middle = x1 * y0 + (x0 * y0 >> half)
        result = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
        if is_signed(ptx_type):
            result = result - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
        return result.view(dtype)

    return high


def _product(instruction: Instruction) -> tuple[Callable[[Array, Array], Array], str]:
    """The function of mul.{lo,hi,wide} and the type of its result."""
    ptx_type = instruction.type
    if instruction.has("wide"):
        wide = f"{ptx_type[0]}{WIDER[_width(ptx_type)]}"
        return lambda a, b: a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]), wide
    if instruction.has("hi"):
        return multiply_high(ptx_type), ptx_type
    return np.multiply, ptx_type


@opcode("mul", types=INTEGERS)
def mul(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "lo", "hi", "wide")
    function, result = _product(instruction)
    return simple(instruction, function, instruction.type, result=result)


@opcode("mad", types=INTEGERS)
def mad(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "lo", "hi", "wide", "sat")
    product, result = _product(instruction)
    add: Callable[[Array, Array], Array] = _saturating(np.add) if instruction.has("sat") else np.add
    types = (instruction.type, instruction.type, result)
    return simple(instruction, lambda a, b, c: add(product(a, b), c), *types, result=result)


@opcode("mul24", "mad24", types=("u32", "s32"))
def mul24(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "lo", "hi")
    dtype = DTYPES[instruction.type]
    shift, drop = np.uint32(8), dtype.type(8)

    def product(a: Array, b: Array) -> Array:
        x, y = ((v.view(np.uint32) << shift).view(dtype) >> drop for v in (a, b))
        wide = x.astype(np.int64) * y.astype(np.int64)
        return (wide >> np.int64(16) if instruction.has("hi") else wide).astype(dtype)

    if instruction.name == "mul24":
        return simple(instruction, product, instruction.type)
    return simple(instruction, lambda a, b, c: product(a, b) + c, instruction.type)


def divide(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient rounded to zero and remainder; PTX leaves division by zero unspecified, GPUs give all ones."""
    a, b = np.asarray(a), np.asarray(b)
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    quotient = np.floor_divide(a, divisor)
    remainder = a - quotient * divisor
    if a.dtype.kind == "i":
        adjust = (remainder != 0) & ((a < 0) != (divisor < 0))
        quotient = quotient + adjust.astype(a.dtype)
        remainder = a - quotient * divisor
    ones = np.array(-1, f"i{a.dtype.itemsize}").view(a.dtype)
    return np.where(zero, ones, quotient), np.where(zero, a, remainder)


@opcode("div", "rem", types=INTEGERS)
def div_rem(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    which = 0 if instruction.name == "div" else 1
    return simple(instruction, lambda a, b: divide(a, b)[which], instruction.type)


@opcode("neg", "abs", types=INTEGERS)
def neg_abs(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    return simple(instruction, np.negative if instruction.name == "neg" else np.abs, instruction.type)


@opcode("min", "max", types=(*INTEGERS, "u16x2", "s16x2"))
def min_max(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    function = np.minimum if instruction.name == "min" else np.maximum
    if not instruction.type.endswith("x2"):
        return simple(instruction, function, instruction.type)
    half = DTYPES[instruction.type[:-2]]

    def packed(a: Array, b: Array) -> Array:
        low, high = (function(x.view(half), y.view(half)).view(np.uint16) for x, y in zip(halves(a), halves(b)))
        return pack(low, high)

    return simple(instruction, packed, instruction.type)


@opcode("sad", types=INTEGERS)
def sad(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    return simple(instruction, lambda a, b, c: np.where(a < b, b - a, a - b) + c, instruction.type)


@opcode("dp4a")
def dp4a(instruction: Instruction) -> Operation:
    """.dp4a.atype.btype: four products of bytes and an accumulator."""
    first, second = instruction.modifiers

    def split(value: Array, ptx_type: str) -> list[Array]:
        kind = np.int8 if is_signed(ptx_type) else np.uint8
        return [(value >> np.uint32(8 * i)).astype(np.uint8).view(kind).astype(np.int64) for i in range(4)]

    def product(a: Array, b: Array, c: Array) -> Array:
        total = sum(x * y for x, y in zip(split(a, first), split(b, second)))
        return (total + c.astype(np.int64)).astype(np.uint32)

    accumulator = "s32" if is_signed(first) or is_signed(second) else "u32"
    return simple(instruction, product, "u32", "u32", accumulator, result="u32")


@opcode("addc", "subc", "madc")
def carry(instruction: Instruction) -> Operation:
    raise Unsupported(f"{instruction}: the carry flag is not implemented")
