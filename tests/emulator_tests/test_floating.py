"""Float arithmetic against exact rational arithmetic, rounded by integers (exact.py)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from .exact import bf16, bits_of_bf16, rounded
from .snippets import apply, pairs

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-140), 2.0**-126, 3.4e38, -3.4e38, 1.5, 0.1]


def random_f32(count: int, seed: int, spread: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 2.0 ** rng.integers(-spread, spread, count)).astype(np.float32)


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bit by bit, but any NaN for any NaN."""
    got, expected = np.asarray(got), np.asarray(expected, got.dtype)
    bits = got.view(f"u{got.dtype.itemsize}") == expected.view(f"u{got.dtype.itemsize}")
    return bool((bits | (np.isnan(got) & np.isnan(expected))).all())


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_rounding_modes_of_float32(name: str, mode: str) -> None:
    a, b, c = (random_f32(400, seed, 20) for seed in (1, 2, 3))
    c[:100] = -(a[:100] * b[:100])  # cancellation leaves the rounding error of the product
    exact = {
        "add": lambda x, y, z: Fraction(x) + Fraction(y),
        "mul": lambda x, y, z: Fraction(x) * Fraction(y),
        "fma": lambda x, y, z: Fraction(x) * Fraction(y) + Fraction(z),
    }[name]
    operands = "%a, %b, %c" if name == "fma" else "%a, %b"
    (got,) = apply(f"{name}.{mode}.f32 %x, {operands};", [("f32", a), ("f32", b), ("f32", c)], ["f32"])
    expected = [rounded(exact(*row), "f32", mode) for row in zip(a.tolist(), b.tolist(), c.tolist())]
    assert got.tolist() == expected


def ties() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Products that lie exactly between two float32, and addends that decide the rounding from far below."""
    rng = np.random.default_rng(5)
    a = (1 + rng.integers(1, 2**12, 300) * 2.0**-12).astype(np.float32)
    b = (1 + (2 * rng.integers(1, 2**11, 300) + 1) * 2.0**-12).astype(np.float32)
    c = (rng.choice([-1, 1], 300) * 2.0 ** rng.integers(-80, -40, 300)).astype(np.float32)
    return a, b, c


def test_fma_is_rounded_once() -> None:
    """In float64 these sums round to the tie, and a second rounding then goes to even: wrong for half of them."""
    a, b, c = ties()
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    (got,) = apply("fma.rn.f32 %x, %a, %b, %c;", [("f32", a), ("f32", b), ("f32", c)], ["f32"])
    expected = [
        rounded(Fraction(x) * Fraction(y) + Fraction(z), "f32") for x, y, z in zip(*(v.tolist() for v in (a, b, c)))
    ]
    assert got.tolist() == expected
    assert (got != twice).sum() > 10  # the case is there


def test_fma_with_subnormal_results() -> None:
    a, b = random_f32(300, 7, 3), (random_f32(300, 8, 3).astype(np.float64) * 2.0**-140).astype(np.float32)
    c = (random_f32(300, 9, 3).astype(np.float64) * 2.0**-138).astype(np.float32)
    (got,) = apply("fma.rn.f32 %x, %a, %b, %c;", [("f32", a), ("f32", b), ("f32", c)], ["f32"])
    rows = zip(a.tolist(), b.tolist(), c.tolist())
    assert got.tolist() == [rounded(Fraction(x) * Fraction(y) + Fraction(z), "f32") for x, y, z in rows]


def test_fma_of_float64() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 200))
    c = -(a * b) + rng.standard_normal(200) * 1e-17
    (got,) = apply("fma.rn.f64 %x, %a, %b, %c;", [("f64", a), ("f64", b), ("f64", c)], ["f64"])
    rows = zip(a.tolist(), b.tolist(), c.tolist())
    assert got.tolist() == [rounded(Fraction(x) * Fraction(y) + Fraction(z), "f64") for x, y, z in rows]


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_fma_of_halves(name: str) -> None:
    """bf16 with an addend 2^-60 below a tie: float64 cannot hold the sum."""
    rng = np.random.default_rng(11)
    values = rng.standard_normal((3, 500)).astype(np.float32)
    if name == "bf16":
        values[2, :200] *= np.float32(2.0**-60)
        values[1, :200] = 1.5
    bits = (bits_of_bf16 if name == "bf16" else lambda x: x.astype(np.float16).view(np.uint16))(values)
    numbers = (bf16 if name == "bf16" else lambda x: x.view(np.float16).astype(np.float32))(bits)
    a, b, c = bits
    (got,) = apply(f"fma.rn.{name} %x, %a, %b, %c;", [("u16", a), ("u16", b), ("u16", c)], ["u16"])
    (packed,) = apply(
        "mov.b32 %r10, {%a, %a}; mov.b32 %r11, {%b, %b}; mov.b32 %r12, {%c, %c};"
        f"fma.rn.{name}x2 %x, %r10, %r11, %r12;",
        [("u16", a), ("u16", b), ("u16", c)],
        ["b32"],
    )
    expected = [rounded(Fraction(x) * Fraction(y) + Fraction(z), name) for x, y, z in zip(*numbers.tolist())]
    back = bf16(got) if name == "bf16" else got.view(np.float16)
    assert back.tolist() == expected
    assert (packed == (got.astype(np.uint32) | got.astype(np.uint32) << 16)).all()


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@pytest.mark.parametrize("ptx_type", ["f16", "bf16"])
def test_arithmetic_of_halves_equals_torch(name: str, ptx_type: str) -> None:
    dtype = torch.float16 if ptx_type == "f16" else torch.bfloat16
    a, b = (torch.randn(1000).mul(4).to(dtype) for _ in range(2))
    expected = {"add": a + b, "sub": a - b, "mul": a * b}[name].view(torch.int16).numpy()
    inputs = [("u16", value.view(torch.int16).numpy()) for value in (a, b)]
    (got,) = apply(f"{name}.{ptx_type} %x, %a, %b;", inputs, ["s16"])
    assert (got == expected).all()


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("suffix", ["", ".NaN"])
def test_minimum_and_maximum(name: str, suffix: str) -> None:
    """A NaN loses, with .NaN it wins; -0 is less than +0."""
    a, b = pairs(SPECIAL, "f4")
    (got,) = apply(f"{name}{suffix}.f32 %x, %a, %b;", [("f32", a), ("f32", b)], ["f32"])
    pick = min if name == "min" else max
    for x, y, z in zip(a, b, got):
        if np.isnan(x) or np.isnan(y):
            survivor = x if np.isnan(y) else y
            assert np.isnan(z) if suffix or np.isnan(survivor) else z == survivor
        else:
            expected = pick((x, y), key=lambda v: (v, not np.signbit(v)))
            assert z == expected and np.signbit(z) == np.signbit(expected)


def test_flush_to_zero_is_only_where_the_opcode_says() -> None:
    tiny = np.float32(2.0**-130)
    a, b = np.array([tiny, -tiny, 2.0**-126, 1.0], np.float32), np.array([0.0, -0.0, -(2.0**-127), tiny], np.float32)
    plain, flushed = apply("add.f32 %x, %a, %b; add.ftz.f32 %y, %a, %b;", [("f32", a), ("f32", b)], ["f32", "f32"])
    assert plain.tolist() == [tiny, -tiny, 2.0**-127, 1.0]
    assert flushed.tolist() == [0.0, -0.0, 2.0**-126, 1.0] and np.signbit(flushed[1])
    product, zero = apply(
        "mul.f32 %x, %a, %a; mul.ftz.f32 %y, %a, %a;", [("f32", np.float32([2.0**-70]))], ["f32", "f32"]
    )
    assert product[0] == 2.0**-140 and zero[0] == 0


def test_saturation() -> None:
    a = np.array([-1.0, -0.0, 0.25, 1.0, 7.0, np.inf, -np.inf, np.nan], np.float32)
    (got,) = apply("add.sat.f32 %x, %a, 0f00000000;", [("f32", a)], ["f32"])
    assert got.tolist() == [0, 0, 0.25, 1, 1, 1, 0, 0] and not np.signbit(got).any()


def test_neg_abs_and_copysign_keep_all_other_bits() -> None:
    a, b = pairs([*SPECIAL[:6], *SPECIAL[7:]], "f4")
    negated, absolute = apply("neg.f32 %x, %a; abs.f32 %y, %a;", [("f32", a)], ["u32", "u32"])
    (copied,) = apply("copysign.f32 %x, %a, %b;", [("f32", a), ("f32", b)], ["u32"])
    bits, other = a.view(np.uint32), b.view(np.uint32)
    assert (negated == bits ^ 0x80000000).all() and (absolute == bits & 0x7FFFFFFF).all()
    assert (copied == (bits & 0x80000000 | other & 0x7FFFFFFF)).all()  # the sign of a, the rest of b


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons_with_nan(name: str) -> None:
    a, b = pairs(SPECIAL, "f4")
    code = f"setp.{name}.f32 %p1|%p2, %a, %b; selp.u32 %x, 1, 0, %p1; selp.u32 %y, 1, 0, %p2;"
    got, opposite = apply(code, [("f32", a), ("f32", b)], ["u32", "u32"])
    holds = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    unordered = np.isnan(a) | np.isnan(b)
    expected = {"num": ~unordered, "nan": unordered}.get(name)
    if expected is None:
        expected = (holds[name[:2]] | unordered) if name.endswith("u") else (holds[name[:2]] & ~unordered)
    assert (got == expected).all() and (opposite == ~expected).all()


@pytest.mark.parametrize("name", ["rn", "rz"])
def test_packed_conversions_put_the_first_operand_into_the_upper_half(name: str) -> None:
    a, b = random_f32(200, 1, 10), random_f32(200, 2, 10)
    code = f"cvt.{name}.bf16x2.f32 %x, %a, %b; cvt.{name}.f16x2.f32 %y, %a, %b;"
    brain, half = apply(code, [("f32", a), ("f32", b)], ["b32", "b32"])
    for got, kind in ((brain, "bf16"), (half, "f16")):
        for values, bits in ((a, got >> 16), (b, got & 0xFFFF)):
            back = bf16(bits) if kind == "bf16" else bits.astype(np.uint16).view(np.float16)
            assert back.tolist() == [rounded(Fraction(x), kind, name) for x in values.tolist()]


def test_packed_arithmetic_equals_each_half() -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((300, 2)).astype(np.float16) for _ in range(2))
    inputs = [("b32", value.view(np.uint32)[:, 0]) for value in (a, b)]
    total, least = apply("add.rn.f16x2 %x, %a, %b; min.f16x2 %y, %a, %b;", inputs, ["b32", "b32"])
    assert same(total.view(np.float16).reshape(-1, 2), a + b)
    assert same(least.view(np.float16).reshape(-1, 2), np.minimum(a, b))


def test_select_by_sign_and_testp() -> None:
    c = np.array([1.0, -1.0, 0.0, -0.0, np.nan, np.inf], np.float32)
    (got,) = apply("slct.u32.f32 %x, 7, 9, %a;", [("f32", c)], ["u32"])
    assert got.tolist() == [7, 9, 7, 7, 9, 7]
    (normal,) = apply(
        "testp.normal.f32 %p1, %a; selp.u32 %x, 1, 0, %p1;", [("f32", np.array(SPECIAL, np.float32))], ["u32"]
    )
    assert normal.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
