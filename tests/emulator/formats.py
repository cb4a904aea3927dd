"""PTX types as NumPy dtypes, and the roundings that NumPy does not have.

PTX ISA, "Fundamental Types", "Packed Floating Point Data Types" and "Alternate Floating-Point Data Formats". bf16
lives in uint16, packed pairs in uint32 (the element of the lower index in the lower half), a .b128 in complex128:
NumPy copies those 16 bytes at once and never looks at them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # a NumPy array, or a NumPy scalar where all lanes hold one value

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        **{f"{letter}{bits}": f"u{bits // 8}" for letter in "bu" for bits in (8, 16, 32, 64)},
        **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
        "f16": "f2",
        "f32": "f4",
        "f64": "f8",
        "pred": "?",
        "b128": "c16",
        "bf16": "u2",
        "f16x2": "u4",
        "bf16x2": "u4",
        "u16x2": "u4",
        "s16x2": "u4",
        "tf32": "u4",
        "e4m3x2": "u2",
        "e5m2x2": "u2",
    }.items()
}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
SMALLEST_NORMAL = np.float32(2.0**-126)


def is_integer(ptx_type: str) -> bool:
    return ptx_type[0] in "bus" and ptx_type[1:].isdigit()


def is_signed(ptx_type: str) -> bool:
    return ptx_type[0] == "s"


def bf16_to_f32(bits: Array) -> Array:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array) -> Array:
    """Round to nearest even; every NaN becomes 0x7fff, the canonical NaN of PTX."""
    value = np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def f32_to_bf16_toward_zero(value: Array) -> Array:
    value = np.asarray(value, np.float32)
    return np.where(np.isnan(value), np.uint16(0x7FFF), (value.view(np.uint32) >> np.uint32(16)).astype(np.uint16))


def flush(value: Array) -> Array:
    """.ftz: a subnormal float32 becomes a zero of its sign."""
    return np.where(np.abs(value) < SMALLEST_NORMAL, np.copysign(np.float32(0), value), value)


def _to_odd(rounded_bits: Array, magnitude_too_large: Array, inexact: Array) -> Array:
    one = rounded_bits.dtype.type(1)
    truncated = rounded_bits - magnitude_too_large.astype(rounded_bits.dtype)
    return np.where(inexact, truncated | one, rounded_bits)


def f64_to_f32_odd(value: Array) -> Array:
    """Round to odd: a second rounding to 22 bits or fewer then gives what one rounding would (Boldo and Melquiond)."""
    value = np.asarray(value, np.float64)
    nearest = value.astype(np.float32)
    back = nearest.astype(np.float64)
    odd = _to_odd(nearest.view(np.uint32), np.abs(back) > np.abs(value), back != value).view(np.float32)
    return np.where(np.isfinite(value), odd, nearest)


def sum_odd(a: Array, b: Array) -> Array:
    """a + b in float64 rounded to odd; the error of the sum is exact (Knuth's TwoSum)."""
    total = np.asarray(a + b)
    part = total - a
    error = (a - (total - part)) + (b - part)
    finite = np.isfinite(total)
    inexact = (error != 0) & finite
    odd = _to_odd(total.view(np.uint64), (np.signbit(error) != np.signbit(total)) & inexact, inexact)
    return odd.view(np.float64)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c with one rounding.

    The product of two float32 is exact in float64. Rounding the sum to float64 and then to float32 errs only where
    the float64 sum lies exactly between two float32 (or is subnormal there): those lanes are few and go through
    round-to-odd.
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = product + addend
    result = total.astype(np.float32)
    doubtful = (np.asarray(total).view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    doubtful |= np.abs(total) < 2.0**-126
    if doubtful.any():
        result = np.where(doubtful, sum_odd(product, addend).astype(np.float32), result)
    return result


def fma_narrow(a: Array, b: Array, c: Array) -> Array:
    """The same for inputs of at most 11 bits, left as a float32 rounded to odd: round once more to bf16 or f16."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    return f64_to_f32_odd(sum_odd(product, np.asarray(c, np.float64)))


def halves(packed: Array) -> tuple[Array, Array]:
    """The two 16-bit elements of a packed register, lower first."""
    packed = np.asarray(packed)
    return packed.astype(np.uint16), (packed >> np.uint32(16)).astype(np.uint16)


def pack(low: Array, high: Array) -> Array:
    return np.asarray(low).astype(np.uint32) | (np.asarray(high).astype(np.uint32) << np.uint32(16))
