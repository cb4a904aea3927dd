"""Logic, shifts and bit fields.

PTX ISA, "Logic and Shift Instructions"; `bfe`, `bfi`, `popc`, `clz`, `bfind`, `brev`, `fns`, `bmsk` of "Integer
Arithmetic Instructions"; `prmt` of "Data Movement and Conversion Instructions".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Unsupported
from ..formats import DTYPES, Array, is_signed
from ..parser import Immediate, Instruction
from .registry import INTEGERS, Operation, known_modifiers, opcode, simple

LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


@opcode("and", "or", "xor", "not", types=(*INTEGERS, "pred"))
def logic(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    return simple(instruction, LOGIC[instruction.name], instruction.type)


@opcode("cnot", types=INTEGERS)
def cnot(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    dtype = DTYPES[instruction.type]
    return simple(instruction, lambda a: (a == 0).astype(dtype), instruction.type)


def _unsigned(ptx_type: str) -> str:
    return f"u{DTYPES[ptx_type].itemsize * 8}"


@opcode("lop3")
def lop3(instruction: Instruction) -> Operation:
    """Any function of three bits: bit 4a + 2b + c of the table is its value."""
    known_modifiers(instruction)
    *inputs, table = instruction.operands
    assert isinstance(table, Immediate)

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.uint32(0)
        for row in range(8):
            if table.value >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result

    return Operation(function, ((inputs[0], "u32"),), tuple((operand, "u32") for operand in inputs[1:]))


@opcode("shl", "shr", types=INTEGERS)
def shift(instruction: Instruction) -> Operation:
    """Shifts by the width or more give zeros (or copies of the sign)."""
    known_modifiers(instruction)
    ptx_type = instruction.type if instruction.name == "shr" else _unsigned(instruction.type)
    dtype = DTYPES[ptx_type]
    width = dtype.itemsize * 8

    def left(a: Array, count: Array) -> Array:
        return np.where(count >= width, dtype.type(0), a << np.minimum(count, np.uint32(width - 1)).astype(dtype))

    def right(a: Array, count: Array) -> Array:
        shifted = a >> np.minimum(count, np.uint32(width - 1)).astype(dtype)
        return shifted if dtype.kind == "i" else np.where(count >= width, dtype.type(0), shifted)

    amount = instruction.operands[2]
    if isinstance(amount, Immediate) and 0 <= amount.value < width:
        constant = dtype.type(amount.value)
        direct = np.left_shift if instruction.name == "shl" else np.right_shift
        return Operation(
            lambda a: direct(a, constant),
            ((instruction.operands[0], ptx_type),),
            ((instruction.operands[1], ptx_type),),
        )
    return simple(instruction, left if instruction.name == "shl" else right, ptx_type, "u32", result=ptx_type)


@opcode("shf", types=("b32",))
def funnel_shift(instruction: Instruction) -> Operation:
    """64 bits {b, a} shifted; .l keeps the upper word, .r the lower one. .clamp stops at 32, .wrap counts modulo 32."""
    known_modifiers(instruction, "l", "r", "wrap", "clamp")
    wrap = instruction.has("wrap")

    def function(a: Array, b: Array, count: Array) -> Array:
        count = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        return ((both << count) >> np.uint64(32) if instruction.has("l") else both >> count).astype(np.uint32)

    return simple(instruction, function, "u32")


@opcode("prmt")
def permute(instruction: Instruction) -> Operation:
    """Any four of the eight bytes {b, a}; bit 3 of a selector copies the byte's sign instead."""
    modes = {
        "f4e": lambda s: [(s + i) & 7 for i in range(4)],
        "b4e": lambda s: [(s - i) & 7 for i in range(4)],
        "rc8": lambda s: [s, s, s, s],
        "ecl": lambda s: [np.maximum(s, i) for i in range(4)],
        "ecr": lambda s: [np.minimum(s, i) for i in range(4)],
        "rc16": lambda s: [(s & 1) * 2, (s & 1) * 2 + 1] * 2,
    }
    known_modifiers(instruction, *modes)
    mode = next((name for name in modes if instruction.has(name)), None)

    def function(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        s = np.asarray(selector).astype(np.int64)
        picks = modes[mode](s & 3) if mode else [(s >> 4 * i) & 15 for i in range(4)]
        result = np.uint32(0)
        for i, pick in enumerate(picks):
            byte = ((both >> ((pick & 7) * 8).astype(np.uint64)) & np.uint64(0xFF)).astype(np.uint32)
            sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
            result = result | (np.where(pick & 8, sign, byte) << np.uint32(8 * i))
        return result

    return simple(instruction, function, "u32")


@opcode("bfe", types=INTEGERS)
def extract(instruction: Instruction) -> Operation:
    """Bits [b, b + c) of a; a signed field, even one that reaches past the top, extends its top bit."""
    known_modifiers(instruction)
    dtype = DTYPES[instruction.type]
    width = dtype.itemsize * 8
    unsigned = np.dtype(f"u{dtype.itemsize}").type
    signed = is_signed(instruction.type)

    def function(a: Array, start: Array, count: Array) -> Array:
        start = np.asarray(start) & np.uint32(0xFF)
        count = np.asarray(count) & np.uint32(0xFF)
        bits = np.asarray(a).view(unsigned)
        inside = start < width
        field = np.where(inside, bits >> np.minimum(start, width - 1).astype(unsigned), unsigned(0))
        mask = np.where(
            count >= width, ~unsigned(0), (unsigned(1) << np.minimum(count, width - 1).astype(unsigned)) - unsigned(1)
        )
        if not signed:
            return (field & mask).view(dtype)
        top = np.minimum(start + count - np.uint32(1), width - 1).astype(unsigned)
        negative = ((bits >> top) & unsigned(1)).astype(bool) & (count > 0)
        kept = np.where(count + start > width, (~unsigned(0)) >> np.minimum(start, width - 1).astype(unsigned), mask)
        kept = np.where(inside, kept, unsigned(0)) & mask
        return np.where(negative, (field & kept) | ~kept, field & kept).view(dtype)

    return simple(instruction, function, instruction.type, "u32", "u32", result=instruction.type)


@opcode("bfi", types=INTEGERS)
def insert(instruction: Instruction) -> Operation:
    """The low d bits of a in place of bits [c, c + d) of b."""
    known_modifiers(instruction)
    ptx_type = _unsigned(instruction.type)
    dtype = DTYPES[ptx_type].type
    width = DTYPES[ptx_type].itemsize * 8

    def function(a: Array, b: Array, start: Array, count: Array) -> Array:
        start, count = np.asarray(start) & np.uint32(0xFF), np.asarray(count) & np.uint32(0xFF)
        ones = np.where(count >= width, ~dtype(0), (dtype(1) << np.minimum(count, width - 1).astype(dtype)) - dtype(1))
        shift = np.minimum(start, width - 1).astype(dtype)
        mask = np.where(start >= width, dtype(0), ones << shift)
        return (b & ~mask) | ((a << shift) & mask)

    return simple(instruction, function, ptx_type, ptx_type, "u32", "u32", result=ptx_type)


def leading_zeros(a: Array) -> Array:
    """Through the exponent of a float64: exact, for it sees at most 32 bits at a time."""
    a = np.asarray(a)
    if a.dtype.itemsize == 8:
        high = leading_zeros((a >> np.uint64(32)).astype(np.uint32))
        return np.where(high < 32, high, np.uint32(32) + leading_zeros(a.astype(np.uint32)))
    return np.uint32(32) - np.frexp(a.astype(np.float64))[1].astype(np.uint32)


@opcode("popc", "clz", "brev", types=("b32", "b64"))
def count_bits(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    ptx_type = _unsigned(instruction.type)
    dtype = DTYPES[ptx_type]

    def reverse(a: Array) -> Array:
        table = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)
        swapped = table[np.ascontiguousarray(np.atleast_1d(a)).view(np.uint8)]
        return swapped.reshape(-1, dtype.itemsize)[:, ::-1].copy().view(dtype).reshape(np.shape(a))

    if instruction.name == "brev":
        return simple(instruction, reverse, ptx_type)
    function = leading_zeros if instruction.name == "clz" else lambda a: np.bitwise_count(a).astype(np.uint32)
    return simple(instruction, function, ptx_type, result="u32")


@opcode("bfind", types=("u32", "u64", "s32", "s64"))
def find_highest(instruction: Instruction) -> Operation:
    """The highest set bit (of a negative number: the highest clear one), or all ones; .shiftamt counts from the top."""
    known_modifiers(instruction, "shiftamt")
    unsigned = _unsigned(instruction.type)
    top = np.uint32(DTYPES[unsigned].itemsize * 8 - 1)

    def function(a: Array) -> Array:
        bits = np.where(a < 0, ~a, a).view(DTYPES[unsigned])
        position = top - leading_zeros(bits)
        return np.where(bits == 0, np.uint32(0xFFFFFFFF), top - position if instruction.has("shiftamt") else position)

    return simple(instruction, function, instruction.type, result="u32")


@opcode("bmsk")
def bit_mask(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "clamp", "wrap")
    if instruction.has("wrap"):
        raise Unsupported(f"{instruction}: .wrap is not implemented")

    def function(start: Array, count: Array) -> Array:
        start, count = (
            np.minimum(start, np.uint32(32)).astype(np.uint64),
            np.minimum(count, np.uint32(32)).astype(np.uint64),
        )
        return (((np.uint64(1) << count) - np.uint64(1)) << start).astype(np.uint32)

    return simple(instruction, function, "u32")
