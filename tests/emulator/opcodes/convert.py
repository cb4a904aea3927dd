"""Conversions.

PTX ISA, "Data Movement and Conversion Instructions: cvt" with its tables of rounding modes, and `cvta`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..errors import Unsupported
from ..formats import (
    DTYPES,
    Array,
    bf16_to_f32,
    f32_to_bf16,
    f32_to_bf16_toward_zero,
    f64_to_f32_odd,
    flush,
    halves,
    is_integer,
    pack,
)
from ..parser import Instruction
from .floating import directed, saturate
from .registry import Operation, known_modifiers, opcode

TO_INTEGRAL: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOAT8 = {"e4m3x2": (torch.float8_e4m3fn, 448.0), "e5m2x2": (torch.float8_e5m2, 57344.0)}
SHARED_WINDOW = np.uint64(1 << 62)
LOCAL_WINDOW = np.uint64(1 << 61)


def _value(bits: Array, ptx_type: str) -> Array:
    return bf16_to_f32(bits) if ptx_type == "bf16" else np.asarray(bits)


def to_float(value: Array, ptx_type: str, rounding: str) -> Array:
    """A float32 or float64 value in another format, as register contents."""
    if ptx_type == "bf16":
        if value.dtype == np.float64:
            value = f64_to_f32_odd(value)
        value = value.astype(np.float32)
        return f32_to_bf16_toward_zero(value) if rounding == "rz" else f32_to_bf16(value)
    dtype = DTYPES[ptx_type]
    if rounding == "rn" or dtype.itemsize >= value.dtype.itemsize:
        return value.astype(dtype)
    return directed(value.astype(np.float64), rounding, dtype)


def to_integer(value: Array, ptx_type: str, rounding: str) -> Array:
    """Rounded to an integer, clamped to the range; NaN becomes 0."""
    dtype = DTYPES[ptx_type]
    limits = np.iinfo(dtype)
    whole = TO_INTEGRAL[rounding](np.asarray(value).astype(np.float64))
    low, high = whole <= float(limits.min), whole >= float(limits.max)
    inside = np.where(low | high | np.isnan(whole), 0.0, whole)
    wide = inside.astype(np.uint64 if dtype == np.uint64 else np.int64).astype(dtype)
    return np.where(low, dtype.type(limits.min), np.where(high, dtype.type(limits.max), wide))


def integer_to_integer(target: str, source: str, saturated: bool) -> Callable[[Array], Array]:
    dtype = DTYPES[target]
    if not saturated:
        return lambda a: a.astype(dtype)
    limits, have = np.iinfo(dtype), np.iinfo(DTYPES[source])
    low, high = max(limits.min, have.min), min(limits.max, have.max)
    return lambda a: np.clip(a, DTYPES[source].type(low), DTYPES[source].type(high)).astype(dtype)


def from_integer(target: str, source: str, rounding: str) -> Callable[[Array], Array]:
    wide = np.iinfo(DTYPES[source]).bits == 64
    if rounding == "rn" and target != "bf16":
        return lambda a: a.astype(DTYPES[target])
    if wide:
        raise Unsupported(
            f"cvt.{rounding}.{target}.{source}: 64-bit integers only round to nearest in f16, f32 and f64"
        )
    return lambda a: to_float(a.astype(np.float64), target, rounding)


def _rounding(instruction: Instruction, names: tuple[str, ...], default: str) -> str:
    return next((name for name in names if instruction.has(name)), default)


@opcode("cvt")
def convert(instruction: Instruction) -> Operation | None:
    types = [modifier for modifier in instruction.modifiers if modifier in DTYPES]
    if len(types) != 2:
        raise Unsupported(f"{instruction}: expected two types")
    target, source = types
    result, *arguments = instruction.operands
    function = _packed(instruction, target, source) if target.endswith("x2") or target == "tf32" else None
    if function is None:
        known_modifiers(instruction, *TO_INTEGRAL, "rn", "rz", "rm", "rp", "ftz", "sat")
        function = _scalar(instruction, target, source)
    return Operation(function, ((result, target),), tuple((argument, source) for argument in arguments))


def _scalar(instruction: Instruction, target: str, source: str) -> Callable[[Array], Array]:
    integral = _rounding(instruction, tuple(TO_INTEGRAL), "")
    rounding = _rounding(instruction, ("rn", "rz", "rm", "rp"), "rn")
    saturated, flushed = instruction.has("sat"), instruction.has("ftz")
    if target == "bf16" and rounding not in ("rn", "rz"):
        raise Unsupported(f"{instruction}: bf16 rounds by .rn or .rz here")
    if is_integer(target) and is_integer(source):
        return integer_to_integer(target, source, saturated)
    if is_integer(target):
        if not integral:
            raise Unsupported(f"{instruction}: a float becomes an integer by .rni, .rzi, .rmi or .rpi")
        before = flush if flushed and source == "f32" else (lambda value: value)
        return lambda a: to_integer(before(_value(a, source)), target, integral)
    if is_integer(source):
        return from_integer(target, source, rounding)

    def float_to_float(a: Array) -> Array:
        value = _value(a, source)
        if flushed and source == "f32":
            value = flush(value)
        if integral:
            value = TO_INTEGRAL[integral](value)
        if saturated:
            value = saturate(value)
        converted = to_float(value, target, rounding)
        return flush(converted) if flushed and target == "f32" else converted

    return float_to_float


def _to_float8(value: Array, ptx_type: str) -> Array:
    """Round to nearest even, clamped to the largest finite value (.satfinite, the only form PTX has)."""
    dtype, largest = FLOAT8[ptx_type]
    clipped = np.clip(np.atleast_1d(np.asarray(value, np.float32)), -largest, largest)
    encoded = torch.from_numpy(np.ascontiguousarray(clipped)).to(dtype).view(torch.uint8).numpy()
    return encoded.astype(np.uint16).reshape(np.shape(value))


def _from_float8(bits: Array, ptx_type: str) -> Array:
    dtype, _ = FLOAT8[ptx_type]
    encoded = np.ascontiguousarray(np.atleast_1d(np.asarray(bits).astype(np.uint8)))
    return torch.from_numpy(encoded).view(dtype).float().numpy().reshape(np.shape(bits))


def _packed(instruction: Instruction, target: str, source: str) -> Callable[..., Array]:
    """Two values at once; of two operands the first becomes the upper half."""
    known_modifiers(instruction, "rn", "rz", "rna", "relu", "satfinite")
    rounding = _rounding(instruction, ("rn", "rz", "rna"), "rn")
    relu = instruction.has("relu")

    def prepared(value: Array) -> Array:
        return np.where(value < 0, np.float32(0), value) if relu else value

    if target in FLOAT8 and source in ("f32", "f16x2", "bf16x2"):

        def encode(*values: Array) -> Array:
            if source == "f32":
                high, low = values
            else:
                parts = halves(values[0])
                low, high = (
                    (bf16_to_f32(p) if source[0] == "b" else p.view(np.float16)).astype(np.float32) for p in parts
                )
            return _to_float8(prepared(low), target) | (_to_float8(prepared(high), target) << np.uint16(8))

        return encode
    if target == "f16x2" and source in FLOAT8:
        return lambda a: pack(
            *(
                _from_float8(x, source).astype(np.float16).view(np.uint16)
                for x in (a & np.uint16(0xFF), a >> np.uint16(8))
            )
        )
    if target in ("f16x2", "bf16x2") and source == "f32":
        if instruction.has("satfinite"):
            raise Unsupported(f"{instruction}: .satfinite is not implemented")
        scalar = target[:-2]

        def both(high: Array, low: Array) -> Array:
            low, high = (
                to_float(prepared(np.asarray(value)), scalar, rounding).view(np.uint16) for value in (low, high)
            )
            return pack(low, high)

        return both
    if target == "tf32" and source == "f32" and rounding in ("rna", "rn"):

        def tf32(a: Array) -> Array:
            bits = np.asarray(a).view(np.uint32)
            tie = (
                np.uint32(0x1000) if rounding == "rna" else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
            )
            return np.where(np.isfinite(a), (bits + tie) & np.uint32(0xFFFFE000), bits)

        return tf32
    raise Unsupported(f"{instruction}: this conversion is not implemented")


@opcode("cvta")
def convert_address(instruction: Instruction) -> Operation:
    """Generic addresses: shared and local memory are windows far above every global allocation."""
    known_modifiers(instruction, "to", "global", "shared", "local", "const", "param", "shared::cta")
    window = np.uint64(0)
    if instruction.has("shared", "shared::cta"):
        window = SHARED_WINDOW
    elif instruction.has("local"):
        window = LOCAL_WINDOW
    ptx_type = instruction.type
    (target, source) = instruction.operands
    sign = -1 if instruction.has("to") else 1

    def function(a: Array) -> Array:
        wide = a.astype(np.uint64)
        return (wide + window if sign > 0 else wide - window).astype(DTYPES[ptx_type])

    return Operation(function, ((target, ptx_type),), ((source, ptx_type),))
