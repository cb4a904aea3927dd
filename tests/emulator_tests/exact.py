"""Rounding by integer arithmetic: an answer that shares nothing with the emulator."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

# precision in bits, exponents of the smallest and largest normal number
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def rounded(value: Fraction, name: str, mode: str = "rn") -> float:
    """The number of a format that an exact value rounds to; overflow gives infinity or the largest, by mode."""
    precision, smallest, largest = FORMATS[name]
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    steps = value / quantum
    down = steps.numerator // steps.denominator  # towards minus infinity
    rest = steps - down
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2 == 1)
    elif mode == "rna":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and value > 0)
    else:
        up = rest != 0 and (mode == "rp" or (mode == "rz" and value < 0))
    result = (down + up) * quantum
    limit = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** largest
    if abs(result) > limit:
        towards_it = mode in ("rn", "rna") or (mode == "rp" and value > 0) or (mode == "rm" and value < 0)
        return (float("inf") if towards_it else float(limit)) * (1 if value > 0 else -1)
    return float(result)


def bf16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def bits_of_bf16(values: np.ndarray) -> np.ndarray:
    """Of values that bfloat16 holds exactly."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
