"""Conversions: every rounding mode and saturation, against exact rounding, Python integers and torch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from .exact import bf16, rounded
from .snippets import NUMPY, apply
from .test_floating import random_f32
from .test_integer import edges, wrap

ROUND = {"rni": lambda x: round(x), "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
CROOKED = [
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    -2.5,
    0.49999997,
    -0.49999997,
    1e9,
    -1e9,
    3e9,
    -3e9,
    1e19,
    -1e19,
    3.5e38,
    127.5,
    -128.5,
]
CROOKED = [
    *CROOKED,
    255.5,
    32767.5,
    65535.5,
    2147483520.0,
    4294967040.0,
    9.2e18,
    1.8e19,
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
]


@pytest.mark.parametrize("mode", list(ROUND))
@pytest.mark.parametrize("target", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
def test_float_to_integer(source: str, target: str, mode: str) -> None:
    """Rounded, clamped to the range, NaN to 0."""
    with np.errstate(over="ignore"):
        values = np.array(CROOKED).astype(NUMPY[source])
    bits = int(target[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if target[0] == "s" else (0, 2**bits - 1)
    expected = []
    for value in values.tolist():
        if math.isnan(value):
            expected.append(0)
        elif math.isinf(value):
            expected.append(high if value > 0 else low)
        else:
            expected.append(min(max(ROUND[mode](value), low), high))
    store = target if bits > 8 else f"{target[0]}16"
    (got,) = apply(f"cvt.{mode}.{target}.{source} %x, %a;", [(source, values)], [store])
    assert got.tolist() == expected


# What is left out is refused by the emulator (test_refusals.py).
TO_FLOAT = [
    (source, target, mode)
    for source in ("s16", "u16", "s32", "u32", "s64", "u64")
    for target in ("f16", "f32", "f64", "bf16")
    for mode in ("rn", "rz", "rm", "rp")
    if (mode == "rn" or not source.endswith("64"))
    and (target != "bf16" or (mode in ("rn", "rz") and source[1:] != "64"))
]


@pytest.mark.parametrize(("source", "target", "mode"), TO_FLOAT)
def test_integer_to_float(source: str, target: str, mode: str) -> None:
    values = np.array([*edges(source), 2049, 2051, 4095, 257, 16385], NUMPY[source])
    (got,) = apply(f"cvt.{mode}.{target}.{source} %x, %a;", [(source, values)], [target])
    back = bf16(got) if target == "bf16" else got
    assert back.tolist() == [rounded(Fraction(x), target, mode) for x in values.tolist()]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("source", "target"), [("f32", "f16"), ("f64", "f32"), ("f64", "f16")])
def test_narrowing(source: str, target: str, mode: str) -> None:
    """With results that are subnormal, that overflow, and ties."""
    values = np.concatenate([random_f32(300, 3, 25), random_f32(100, 4, 1) * np.float32(2.0**-24)]).astype(
        NUMPY[source]
    )
    values = np.append(values, np.array([2049.0, 2051.0, 65504.0, 65519.9, 65520.0, -65520.0], NUMPY[source]))
    if source == "f64":
        values = values * (1 + 2.0**-30)
        values = np.append(values, [2.0**-150, 2.0**-149 * 1.5, 3.5e38, -3.5e38])
    (got,) = apply(f"cvt.{mode}.{target}.{source} %x, %a;", [(source, values)], [target])
    assert got.astype(np.float64).tolist() == [rounded(Fraction(x), target, mode) for x in values.tolist()]


def test_bf16_narrowing_equals_torch_and_exact_arithmetic() -> None:
    values = np.concatenate(
        [random_f32(500, 6, 100), np.array([2.0**-133, 2.0**-134, 1 + 2.0**-8, 1 + 3 * 2.0**-8], np.float32)]
    )
    (got,) = apply("cvt.rn.bf16.f32 %x, %a;", [("f32", values)], ["u16"])
    assert (got.view(np.int16) == torch.from_numpy(values).bfloat16().view(torch.int16).numpy()).all()
    assert bf16(got).tolist() == [rounded(Fraction(x), "bf16") for x in values.tolist()]
    (nan,) = apply("cvt.rn.bf16.f32 %x, %a;", [("f32", np.array([np.nan], np.float32))], ["u16"])
    assert nan[0] == 0x7FFF  # the canonical NaN, not infinity
    (wide,) = apply("cvt.f32.bf16 %x, %a;", [("u16", got)], ["f32"])
    assert (wide == bf16(got)).all()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        tuple(pair.split())
        for pair in ("s32 s8", "s32 u8", "u32 s16", "s64 s32", "s64 u32", "u64 u32", "s16 s64", "s8 s32", "u8 u64")
    ],
)
def test_integers_wrap_or_saturate(source: str, target: str) -> None:
    values = np.array(edges(source), NUMPY[source])
    bits = int(target[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if target[0] == "s" else (0, 2**bits - 1)
    store = target if bits > 8 else f"{target[0]}16"
    code = f"cvt.{target}.{source} %x, %a; cvt.sat.{target}.{source} %y, %a;"
    plain, clamped = apply(code, [(source, values)], [store, store])
    assert plain.tolist() == [wrap(x, target) for x in values.tolist()]
    assert clamped.tolist() == [min(max(x, low), high) for x in values.tolist()]


def test_rounding_to_integral_floats() -> None:
    values = np.array([x for x in CROOKED if abs(x) < 3e38], np.float32)
    for mode, function in ROUND.items():
        (got,) = apply(f"cvt.{mode}.f32.f32 %x, %a;", [("f32", values)], ["f32"])
        assert got.tolist() == [float(function(x)) for x in values.tolist()]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)])
def test_float8(name: str, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    (got,) = apply(f"cvt.rn.f16x2.{name} %x, %a;", [("u16", every.numpy().astype(np.uint16) * 0x0101)], ["b32"])
    expected = every.view(dtype).half().numpy()
    halves = got.view(np.float16).reshape(-1, 2)
    for column in halves.T:
        assert ((column == expected) | (np.isnan(column) & np.isnan(expected))).all()
    values = torch.linspace(-300, 300, 1000)
    (back,) = apply(f"cvt.rn.satfinite.{name}.f32 %x, %a, %a;", [("f32", values.numpy())], ["u16"])
    assert (back == values.to(dtype).view(torch.uint8).numpy().astype(np.uint16) * 0x0101).all()
    (clamped,) = apply(f"cvt.rn.satfinite.{name}.f32 %x, %a, %a;", [("f32", np.float32([1e9, -1e9]))], ["u16"])
    largest = torch.finfo(dtype).max
    assert torch.from_numpy(clamped.astype(np.uint8)).view(dtype).float().tolist() == [largest, -largest]


def test_tf32_rounds_ties_away() -> None:
    values = np.array([1 + 2.0**-11, 1 + 2.0**-10 + 2.0**-11, -(1 + 2.0**-11), 1 + 2.0**-12], np.float32)
    (got,) = apply("cvt.rna.tf32.f32 %x, %a;", [("f32", values)], ["f32"])
    assert got.tolist() == [1 + 2.0**-10, 1 + 2.0**-9, -(1 + 2.0**-10), 1.0]
