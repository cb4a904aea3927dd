"""Float arithmetic in f32, f64, f16 and bf16, and the packed pairs f16x2 and bf16x2.

PTX ISA, "Floating Point Instructions", "Half Precision Floating Point Instructions". Results are those of IEEE 754
with the instruction's rounding; the payload of a NaN is not modelled. A binary16 or bfloat16 operation is computed in
float32 and rounded once more, which is exact for + - * (24 >= 2 * 11 + 2 bits); fma goes through round-to-odd
(formats.py).
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable

import numpy as np

from ..errors import Unsupported
from ..formats import (
    DTYPES,
    Array,
    bf16_to_f32,
    f32_to_bf16,
    flush,
    fma_f32,
    fma_narrow,
    halves,
    pack,
    sum_odd,
)
from ..parser import Instruction
from .registry import FLOATS, Operation, known_modifiers, opcode, simple

PACKED = ("f16x2", "bf16x2")
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3
fma_f64 = np.vectorize(_libm.fma, otypes=[np.float64])


def directed(value: Array, rounding: str, dtype: np.dtype) -> Array:
    """A float64, exact or rounded to odd, in a narrower format under rz, rm or rp."""
    nearest = np.asarray(value).astype(dtype)
    wide = nearest.astype(np.float64)
    zero, infinity = dtype.type(0), dtype.type(np.inf)
    if rounding == "rz":
        return np.where(np.abs(wide) > np.abs(value), np.nextafter(nearest, zero), nearest)
    if rounding == "rm":
        return np.where(wide > value, np.nextafter(nearest, -infinity), nearest)
    return np.where(wide < value, np.nextafter(nearest, infinity), nearest)


def minimum(a: Array, b: Array) -> Array:
    """A NaN loses; -0 < +0."""
    result = np.fmin(a, b)
    zero = result == 0
    return np.where(zero & (np.signbit(a) | np.signbit(b)), -result.dtype.type(0), result) if zero.any() else result


def maximum(a: Array, b: Array) -> Array:
    result = np.fmax(a, b)
    zero = result == 0
    both_negative = np.signbit(a) & np.signbit(b)
    if not zero.any():
        return result
    return np.where(zero & ~both_negative, result.dtype.type(0), result)


def propagate_nan(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.asarray(a).dtype.type(np.nan), function(a, b))


def with_sign_of(a: Array, b: Array) -> Array:
    """copysign d, a, b: the sign of a, the magnitude of b."""
    return np.copysign(b, a)


def saturate(value: Array) -> Array:
    """.sat: clamp to [0, 1]; NaN becomes +0."""
    one = value.dtype.type(1)
    return np.where(value > 0, np.minimum(value, one), value.dtype.type(0))


BASIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "min": minimum,
    "max": maximum,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "copysign": with_sign_of,
}
ARITY = {"neg": 1, "abs": 1, "sqrt": 1, "rcp": 1, "fma": 3, "mad": 3}


def _directed_f32(name: str, rounding: str) -> Callable[..., Array]:
    exact: dict[str, Callable[..., Array]] = {
        "add": lambda a, b: sum_odd(a.astype(np.float64), b.astype(np.float64)),
        "sub": lambda a, b: sum_odd(a.astype(np.float64), -b.astype(np.float64)),
        "mul": lambda a, b: a.astype(np.float64) * b.astype(np.float64),
        "fma": lambda a, b, c: sum_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)),
    }
    function = exact[name]
    return lambda *values: directed(function(*values), rounding, np.dtype(np.float32))


def scalar_function(name: str, ptx_type: str) -> Callable[..., Array]:
    """On values: float32 for bf16, the format itself otherwise."""
    if name in ("fma", "mad"):
        return {"f32": fma_f32, "f64": fma_f64}.get(ptx_type, fma_narrow)
    return BASIC[name]


def on_format(
    function: Callable[..., Array], ptx_type: str, *, modifiers: tuple[str, ...] = ()
) -> Callable[..., Array]:
    """Wrap a function on values into one on register contents, with .ftz, .sat and .relu."""
    relu, saturated, flushed = "relu" in modifiers, "sat" in modifiers, "ftz" in modifiers

    def finish(value: Array) -> Array:
        if relu:
            value = np.where(np.isnan(value), value, np.maximum(value, value.dtype.type(0)))
        return saturate(value) if saturated else value

    if ptx_type == "bf16":
        return lambda *values: f32_to_bf16(finish(np.asarray(function(*(bf16_to_f32(value) for value in values)))))
    if ptx_type == "f16":
        if flushed:
            return lambda *values: _flush_half(finish(function(*map(_flush_half, values)).astype(np.float16)))
        return lambda *values: finish(function(*values).astype(np.float16))
    if flushed:
        return lambda *values: flush(finish(function(*(flush(value) for value in values))))
    if relu or saturated:
        return lambda *values: finish(function(*values))
    return function


def _flush_half(value: Array) -> Array:
    return np.where(np.abs(value) < np.float16(2.0**-14), np.copysign(np.float16(0), value), value)


def arithmetic(instruction: Instruction, function: Callable[..., Array], ptx_type: str) -> Operation:
    """An operation on one format, or on each half of a packed register."""
    modifiers = instruction.modifiers
    if not ptx_type.endswith("x2"):
        return simple(instruction, on_format(function, ptx_type, modifiers=modifiers), ptx_type)
    scalar = ptx_type[:-2]
    one = on_format(function, scalar, modifiers=modifiers)
    dtype = DTYPES[scalar]

    def packed(*values: Array) -> Array:
        split = [halves(value) for value in values]
        low, high = (one(*(parts[i].view(dtype) for parts in split)).view(np.uint16) for i in (0, 1))
        return pack(low, high)

    return simple(instruction, packed, ptx_type)


@opcode("add", "sub", "mul", "fma", "mad", "neg", "abs", "min", "max", types=(*FLOATS, *PACKED))
def basic(instruction: Instruction) -> Operation:
    known_modifiers(instruction, *ROUNDINGS, "ftz", "sat", "NaN", "relu")
    name, ptx_type = instruction.name, instruction.type
    if len(instruction.operands) != 1 + ARITY.get(name, 2):
        raise Unsupported(f"{instruction}: {len(instruction.operands)} operands")
    rounding = next((modifier for modifier in ROUNDINGS if instruction.has(modifier)), "rn")
    if rounding == "rn":
        function = scalar_function(name, ptx_type.removesuffix("x2"))
    elif ptx_type == "f32" and name in ("add", "sub", "mul", "fma"):
        function = _directed_f32(name, rounding)
    else:
        raise Unsupported(f"{instruction}: rounding .{rounding} is not implemented")
    if instruction.has("NaN"):
        function = propagate_nan(function)
    return arithmetic(instruction, function, ptx_type)


@opcode("copysign", types=("f32", "f64"))
def copysign(instruction: Instruction) -> Operation:
    known_modifiers(instruction)
    return simple(instruction, with_sign_of, instruction.type)


@opcode("testp", types=("f32", "f64"))
def testp(instruction: Instruction) -> Operation:
    tiny = np.finfo(DTYPES[instruction.type]).tiny
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    return simple(instruction, tests[instruction.modifiers[0]], instruction.type, result="pred")
