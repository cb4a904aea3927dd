"""Moves, selection and comparison.

PTX ISA, "Data Movement and Conversion Instructions: mov", "Comparison and Selection Instructions: set, setp, selp,
slct", "Half Precision Comparison Instructions".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import Unsupported
from ..formats import DTYPES, Array, bf16_to_f32, flush, halves, pack
from ..parser import Instruction, Symbol, Vector
from .registry import FLOATS, INTEGERS, Operation, elements, known_modifiers, opcode

BYTES_128 = np.dtype("c16")


def join(parts: tuple[Array, ...], dtype: np.dtype) -> Array:
    """Elements side by side, the first in the lowest bits; 16 bytes and more become complex128."""
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts))
    joined = np.empty((*shape, len(parts)), parts[0].dtype)
    for i, part in enumerate(parts):
        joined[..., i] = part
    return joined.view(dtype)[..., 0]


def split(value: Array, count: int) -> tuple[Array, ...]:
    value = np.asarray(value)
    width = value.dtype.itemsize // count
    parts = np.ascontiguousarray(value[..., None]).view(f"u{width}")
    return tuple(np.ascontiguousarray(parts[..., i]) for i in range(count))


@opcode("mov")
def move(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    target, source = instruction.operands
    ptx_type = instruction.type
    size = DTYPES[ptx_type].itemsize
    if isinstance(target, Vector):
        count = len(target.elements)
        part = f"b{size * 8 // count}"
        return Operation(
            lambda a: split(a, count), tuple((element, part) for element in target.elements), ((source, ptx_type),)
        )
    if isinstance(source, Vector):
        part = f"b{size * 8 // len(source.elements)}"
        dtype = DTYPES[ptx_type]
        return Operation(
            lambda *parts: join(parts, dtype),
            ((target, ptx_type),),
            tuple((element, part) for element in source.elements),
        )
    if isinstance(source, Symbol):
        ptx_type = f"b{size * 8}"
    return Operation(lambda a: a, ((target, ptx_type),), ((source, ptx_type),))


@opcode("selp")
def select(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    target, a, b, predicate = instruction.operands
    ptx_type = f"b{DTYPES[instruction.type].itemsize * 8}"
    if any(getattr(operand, "float_bits", 0) for operand in (a, b)):
        ptx_type = instruction.type
    return Operation(
        lambda a, b, predicate: np.where(predicate, a, b),
        ((target, ptx_type),),
        ((a, ptx_type), (b, ptx_type), (predicate, "pred")),
    )


@opcode("slct")
def select_by_sign(instruction: Instruction) -> Operation:
    """slct.dtype.{s32,f32} d, a, b, c: a where c >= 0 (-0 counts as 0, NaN does not)."""
    known_modifiers(instruction, "ftz")
    value_type, sign_type = (modifier for modifier in instruction.modifiers if modifier in DTYPES)
    target, a, b, c = instruction.operands
    return Operation(
        lambda a, b, c: np.where(c >= 0, a, b),
        ((target, value_type),),
        ((a, value_type), (b, value_type), (c, sign_type)),
    )


ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMPARISONS = (*ORDERED, *UNSIGNED_NAMES, *(f"{name}u" for name in ORDERED), "num", "nan")
COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def comparison(name: str, is_float: bool) -> Callable[[Array, Array], Array]:
    """The plain names are false where an operand is NaN, those with a u are true there."""
    if not is_float:
        return ORDERED[UNSIGNED_NAMES.get(name, name)]
    if name in ("num", "nan"):
        unordered: Callable[[Array, Array], Array] = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
        return unordered if name == "nan" else (lambda a, b: ~unordered(a, b))
    if name == "ne":
        return lambda a, b: np.less(a, b) | np.greater(a, b)
    if name in ORDERED:
        return ORDERED[name]
    if name == "neu":
        return np.not_equal
    negated = {"equ": "ne", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}[name]
    opposite = comparison(negated, True)
    return lambda a, b: ~opposite(a, b)


def _compare(instruction: Instruction, ptx_type: str) -> Callable[[Array, Array], Array]:
    name = next(modifier for modifier in instruction.modifiers if modifier in COMPARISONS)
    function = comparison(name, ptx_type in FLOATS)
    if ptx_type == "bf16":
        return lambda a, b: function(bf16_to_f32(a), bf16_to_f32(b))
    if instruction.has("ftz") and ptx_type == "f32":
        return lambda a, b: function(flush(a), flush(b))
    return function


@opcode("setp", types=(*INTEGERS, *FLOATS))
def set_predicate(instruction: Instruction) -> Operation:
    """setp.cmp{.bool}.type p{|q}, a, b{, c}: p = (a cmp b) bool c, q = !(a cmp b) bool c."""
    known_modifiers(instruction, *COMPARISONS, *COMBINE, "ftz")
    target, a, b, *rest = instruction.operands
    ptx_type = instruction.type
    compare = _compare(instruction, ptx_type)
    results = elements(target)
    combine = next((COMBINE[name] for name in COMBINE if instruction.has(name)), None)
    if combine is None and len(results) == 1:
        function: Callable[..., object] = compare
    else:

        def function(a: Array, b: Array, *c: Array) -> object:
            holds = compare(a, b)
            answers = (holds, ~holds)
            if combine is not None:
                answers = tuple(combine(answer, c[0]) for answer in answers)
            return answers if len(results) == 2 else answers[0]

    arguments = ((a, ptx_type), (b, ptx_type), *((operand, "pred") for operand in rest))
    return Operation(function, tuple((result, "pred") for result in results), arguments)


@opcode("setp", types=("f16x2", "bf16x2"))
def set_predicate_packed(instruction: Instruction) -> Operation:
    """One predicate for each half, the lower first."""
    known_modifiers(instruction, *COMPARISONS, "ftz")
    target, a, b = instruction.operands
    scalar = instruction.type[:-2]
    compare = _compare(instruction, scalar)
    dtype = DTYPES[scalar]

    def function(a: Array, b: Array) -> tuple[Array, ...]:
        return tuple(compare(x.view(dtype), y.view(dtype)) for x, y in zip(halves(a), halves(b)))

    results = tuple((result, "pred") for result in elements(target))
    if len(results) != 2:
        raise Unsupported(f"{instruction}: expected two predicates")
    return Operation(function, results, ((a, instruction.type), (b, instruction.type)))


@opcode("set")
def set_value(instruction: Instruction) -> Operation:
    """set.cmp{.bool}.dtype.stype: all ones or zero, for f32 and halves 1.0 or 0."""
    known_modifiers(instruction, *COMPARISONS, *COMBINE, "ftz")
    result_type, source_type = (modifier for modifier in instruction.modifiers if modifier in DTYPES)
    target, a, b, *rest = instruction.operands
    combine = next((COMBINE[name] for name in COMBINE if instruction.has(name)), None)
    true = {
        "f32": np.float32(1),
        "f16": np.float16(1),
        "bf16": np.uint16(0x3F80),
        "f16x2": 0x3C00,
        "bf16x2": 0x3F80,
    }.get(result_type, np.array(-1, f"i{DTYPES[result_type].itemsize}").view(DTYPES[result_type])[()])
    scalar = source_type.removesuffix("x2")
    compare = _compare(instruction, scalar)

    def function(a: Array, b: Array, *c: Array) -> Array:
        if scalar != source_type:
            ones = np.uint16(true) if result_type.endswith("x2") else np.uint16(0xFFFF)
            pairs = zip(halves(a), halves(b))
            return pack(
                *(
                    np.where(compare(x.view(DTYPES[scalar]), y.view(DTYPES[scalar])), ones, np.uint16(0))
                    for x, y in pairs
                )
            )
        holds = compare(a, b)
        if combine is not None:
            holds = combine(holds, c[0])
        return np.where(holds, true, true.dtype.type(0))

    arguments = ((a, source_type), (b, source_type), *((operand, "pred") for operand in rest))
    return Operation(function, ((target, result_type),), arguments)
