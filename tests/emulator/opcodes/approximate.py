"""Division, roots and the functions of the special function unit: ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh.

PTX ISA, "Floating Point Instructions". The .approx forms are computed in float64 and rounded once to float32: at most
half an ulp from the truth, where hardware errs by the bound the PTX ISA documents. So a test of a kernel must allow
that bound, and a launch with ``approx_ulp`` perturbs every approximate result, deterministically, by up to so many
ulp (never beyond the bound).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Unsupported
from ..formats import DTYPES, Array, bf16_to_f32, f32_to_bf16, flush, halves, pack
from ..parser import Instruction
from .floating import on_format, saturate
from .registry import Operation, known_modifiers, opcode, simple

if TYPE_CHECKING:
    from ..lanes import Lanes

# Documented error, in ulp of the result (2^-23 of it). lg2, sin and cos are bounded absolutely; see `_perturb`.
BOUND = {
    "ex2": 2.0,
    "rcp": 1.0,
    "rsqrt": 2.0,
    "sqrt": 2.0,
    "div": 2.0,
    "lg2": 2.0,
    "sin": 2.0,
    "cos": 2.0,
    "tanh": 4096.0,
}
ABSOLUTE = {"lg2": 2.0**-22.6, "sin": 2.0**-20.9, "cos": 2.0**-20.9}

EXACT: dict[str, Callable[..., Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "div": np.divide,
}


def _perturb(name: str, value: Array, ulp: float, inputs: tuple[Array, ...]) -> Array:
    """A number in [-1, 1] that depends on the inputs' bits alone, times the permitted error."""
    bits = np.uint32(0x9E3779B9)
    for argument in inputs:
        bits = (np.asarray(argument, np.float32).view(np.uint32) ^ bits) * np.uint32(0x85EBCA6B)
        bits = bits ^ (bits >> np.uint32(13))
    step = np.asarray(bits).astype(np.float64) / 2.0**31 - 1.0
    scale = min(ulp, BOUND[name]) * 2.0**-23
    moved = value * (1.0 + scale * step) if name not in ABSOLUTE else value + min(scale, ABSOLUTE[name]) * step
    return np.where(np.isfinite(value), moved, value)


def approximate(name: str, ftz: bool) -> Callable[..., Array]:
    exact = EXACT[name]

    def function(lanes: Lanes, mask: Array | None, *values: Array) -> Array:
        if ftz:
            values = tuple(flush(value) for value in values)
        result = exact(*(np.asarray(value).astype(np.float64) for value in values))
        if lanes.machine.approx_ulp:
            result = _perturb(name, result, lanes.machine.approx_ulp, values)
        result = np.asarray(result).astype(np.float32)
        return flush(result) if ftz else result

    return function


@opcode("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", types=("f32",))
def special_function(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "approx", "ftz", "rn")
    target, source = instruction.operands
    if instruction.has("approx"):
        function = approximate(instruction.name, instruction.has("ftz"))
        return Operation(function, ((target, "f32"),), ((source, "f32"),), needs_lanes=True)
    if instruction.name not in ("rcp", "sqrt"):
        raise Unsupported(f"{instruction}: only rcp and sqrt have exact forms")
    exact = on_format(EXACT[instruction.name], "f32", modifiers=instruction.modifiers)
    return simple(instruction, exact, "f32")


@opcode("rcp", "rsqrt", "sqrt", types=("f64",))
def double_function(instruction: Instruction) -> Operation:
    """rcp.approx.ftz.f64 and rsqrt.approx.f64 are starting values good to 20 bits: any better value is as good."""
    known_modifiers(instruction, "approx", "ftz", "rn")
    return simple(instruction, EXACT[instruction.name], "f64")


@opcode("ex2", "tanh", types=("f16", "bf16", "f16x2", "bf16x2"))
def half_function(instruction: Instruction) -> Operation:
    """Rounded once from float32; the documented error (2^-9.9 for f16, 2^-7 for bf16 ex2) is not modelled."""
    known_modifiers(instruction, "approx", "ftz")
    ptx_type = instruction.type
    scalar = ptx_type.removesuffix("x2")
    exact = EXACT[instruction.name]

    def one(bits: Array) -> Array:
        if scalar == "bf16":
            return f32_to_bf16(exact(bf16_to_f32(bits).astype(np.float64)).astype(np.float32))
        return exact(bits.view(np.float16).astype(np.float64)).astype(np.float16).view(np.uint16)

    if ptx_type == scalar:
        return simple(instruction, lambda a: one(a.view(np.uint16)).view(DTYPES[scalar]), ptx_type)
    return simple(instruction, lambda a: pack(*(one(half) for half in halves(a))), ptx_type)


@opcode("div", types=("f32",))
def divide(instruction: Instruction) -> Operation:
    """.rn is IEEE; .full and .approx err by up to 2 ulp on hardware (.approx beyond |b| = 2^126 is not modelled)."""
    known_modifiers(instruction, "approx", "full", "ftz", "rn", "sat")
    target, a, b = instruction.operands
    if instruction.has("rn"):
        return simple(instruction, on_format(np.divide, "f32", modifiers=instruction.modifiers), "f32")
    quotient = approximate("div", instruction.has("ftz"))
    if instruction.has("sat"):
        unsaturated = quotient

        def quotient(lanes: Lanes, mask: Array | None, *values: Array) -> Array:
            return saturate(unsaturated(lanes, mask, *values))

    return Operation(quotient, ((target, "f32"),), ((a, "f32"), (b, "f32")), needs_lanes=True)


@opcode("div", types=("f64",))
def divide_double(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "rn")
    return simple(instruction, np.divide, "f64")
