"""Integer arithmetic, logic, shifts and bit fields against Python integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .snippets import NUMPY, apply, pairs

EDGES = (
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    63,
    64,
    100,
    255,
    256,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x12345678,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
)
WORDS = st.integers(0, 2**32 - 1)


def edges(ptx_type: str) -> list[int]:
    """Edge values of a type, as its own integers."""
    bits = int(ptx_type[1:])
    wide = [*EDGES, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0xDEADBEEFCAFEBABE]
    return sorted({wrap(value, ptx_type) for value in wide if value < 2**bits})


def wrap(value: int, ptx_type: str) -> int:
    bits = int(ptx_type[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if ptx_type[0] == "s" and value >> (bits - 1) else value


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": toward_zero,
    "rem": lambda a, b: a - toward_zero(a, b) * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("ptx_type", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", list(BINARY))
def test_arithmetic(name: str, ptx_type: str) -> None:
    a, b = pairs(edges(ptx_type), NUMPY[ptx_type])
    if name in ("div", "rem"):
        a, b = a[b != 0], b[b != 0]
    (got,) = apply(f"{name}.{ptx_type} %x, %a, %b;", [(ptx_type, a), (ptx_type, b)], [ptx_type])
    assert got.tolist() == [wrap(BINARY[name](x, y), ptx_type) for x, y in zip(a.tolist(), b.tolist())]


@pytest.mark.parametrize("ptx_type", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_upper_half_of_a_product(ptx_type: str) -> None:
    bits = int(ptx_type[1:])
    a, b = pairs(edges(ptx_type), NUMPY[ptx_type])
    (got,) = apply(f"mul.hi.{ptx_type} %x, %a, %b;", [(ptx_type, a), (ptx_type, b)], [ptx_type])
    assert got.tolist() == [wrap(x * y >> bits, ptx_type) for x, y in zip(a.tolist(), b.tolist())]


@pytest.mark.parametrize("ptx_type", ["u16", "s16", "u32", "s32"])
def test_wide_multiply_add(ptx_type: str) -> None:
    wide = f"{ptx_type[0]}{2 * int(ptx_type[1:])}"
    a, b = pairs(edges(ptx_type), NUMPY[ptx_type])
    c = np.resize(np.array(edges(wide), NUMPY[wide]), len(a))
    (got,) = apply(f"mad.wide.{ptx_type} %x, %a, %b, %c;", [(ptx_type, a), (ptx_type, b), (wide, c)], [wide])
    assert got.tolist() == [wrap(x * y + z, wide) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())]


def test_saturating_add() -> None:
    a, b = pairs(edges("s32"), "i4")
    (got,) = apply("add.sat.s32 %x, %a, %b;", [("s32", a), ("s32", b)], ["s32"])
    assert got.tolist() == [min(max(x + y, -(2**31)), 2**31 - 1) for x, y in zip(a.tolist(), b.tolist())]


@pytest.mark.parametrize("ptx_type", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_shifts_beyond_the_width(ptx_type: str) -> None:
    """PTX clamps the count; C and x86 do not."""
    bits = int(ptx_type[1:])
    a = np.repeat(np.array(edges(ptx_type), NUMPY[ptx_type]), 8)
    count = np.tile(np.array([0, 1, 5, bits - 1, bits, bits + 1, 200, 2**32 - 1], np.uint32), len(edges(ptx_type)))
    code = f"shr.{ptx_type} %x, %a, %b; shl.b{bits} %y, %a, %b;"
    right, left = apply(code, [(ptx_type, a), ("u32", count)], [ptx_type, ptx_type])
    expected = [(x >> min(n, bits), wrap(x << min(n, bits), ptx_type)) for x, n in zip(a.tolist(), count.tolist())]
    assert list(zip(right.tolist(), left.tolist())) == expected


@pytest.mark.parametrize("ptx_type", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(ptx_type: str) -> None:
    """Against the bit-by-bit definition of the PTX ISA."""
    top = int(ptx_type[1:]) - 1
    positions = [0, 1, 7, 31, 32, 60, 63, 64, 255, 256]
    a = np.resize(np.array(edges(ptx_type), NUMPY[ptx_type]), 1000)
    start = np.resize(np.repeat(np.array(positions, np.uint32), 10), 1000)
    length = np.resize(np.array([0, 1, 2, 8, 31, 32, 33, 64, 200, 257], np.uint32), 1000)

    def extract(value: int, start: int, length: int) -> int:
        start, length = start & 0xFF, length & 0xFF
        bits = value & (2 ** (top + 1) - 1)
        sign = 0 if ptx_type[0] == "u" or length == 0 else bits >> min(start + length - 1, top) & 1
        inside = range(top + 1)
        result = sum((bits >> (start + i) & 1 if i < length and start + i <= top else sign) << i for i in inside)
        return wrap(result, ptx_type)

    (got,) = apply(f"bfe.{ptx_type} %x, %a, %b, %c;", [(ptx_type, a), ("u32", start), ("u32", length)], [ptx_type])
    assert got.tolist() == [extract(*arguments) for arguments in zip(a.tolist(), start.tolist(), length.tolist())]


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 2**bits, 400, dtype=f"u{bits // 8}") for _ in range(2))
    start, length = (rng.integers(0, 70, 400).astype(np.uint32) for _ in range(2))

    def insert(a: int, b: int, start: int, length: int) -> int:
        for i in range(length):
            if start + i < bits:
                b = b & ~(1 << (start + i)) | (a >> i & 1) << (start + i)
        return b

    kind = f"b{bits}"
    (got,) = apply(f"bfi.{kind} %x, %a, %b, %c, %d;", [(kind, a), (kind, b), ("u32", start), ("u32", length)], [kind])
    assert got.tolist() == [insert(*x) for x in zip(a.tolist(), b.tolist(), start.tolist(), length.tolist())]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=40))
def test_permute_bytes_and_funnel_shift(rows: list[tuple[int, int, int]]) -> None:
    a, b, c = (np.array(column, np.uint32) for column in zip(*rows))
    code = "prmt.b32 %x, %a, %b, %c; shf.l.wrap.b32 %y, %a, %b, %c; shf.r.clamp.b32 %z, %a, %b, %c;"
    permuted, left, right = apply(code, [("b32", a), ("b32", b), ("b32", c)], ["b32", "b32", "b32"])

    def permute(low: int, high: int, selector: int) -> int:
        data = (low | high << 32).to_bytes(8, "little")
        result = 0
        for i in range(4):
            pick = selector >> 4 * i & 15
            byte = data[pick & 7]
            result |= ((0xFF if byte & 0x80 else 0) if pick & 8 else byte) << 8 * i
        return result

    assert permuted.tolist() == [permute(*row) for row in rows]
    assert left.tolist() == [((y << 32 | x) << (n & 31)) >> 32 & 0xFFFFFFFF for x, y, n in rows]
    assert right.tolist() == [(y << 32 | x) >> min(n, 32) & 0xFFFFFFFF for x, y, n in rows]


@settings(max_examples=20, deadline=None)
@given(WORDS, WORDS, WORDS, st.integers(0, 255))
def test_three_input_logic(a: int, b: int, c: int, table: int) -> None:
    inputs = [("b32", np.array([value], np.uint32)) for value in (a, b, c)]
    (got,) = apply(f"lop3.b32 %x, %a, %b, %c, {table:#x};", inputs, ["b32"])
    rows = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32)]
    assert int(got[0]) == sum((table >> row & 1) << i for i, row in enumerate(rows))


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(bits: int) -> None:
    values = np.array([v & (2**bits - 1) for v in (*EDGES, 2**63, 2**63 - 1, 2**53 - 1, 2**64 - 1)], f"u{bits // 8}")
    kind = f"b{bits}"
    ones, zeros = apply(f"popc.{kind} %x, %a; clz.{kind} %y, %a;", [(kind, values)], ["u32", "u32"])
    highest, distance = apply(f"bfind.u{bits} %x, %a; bfind.shiftamt.u{bits} %y, %a;", [(kind, values)], ["u32", "u32"])
    (mirrored,) = apply(f"brev.{kind} %x, %a;", [(kind, values)], [kind])
    listed = values.tolist()
    assert ones.tolist() == [v.bit_count() for v in listed]
    assert zeros.tolist() == [bits - v.bit_length() for v in listed]
    assert highest.tolist() == [v.bit_length() - 1 if v else 2**32 - 1 for v in listed]
    assert distance.tolist() == [bits - v.bit_length() if v else 2**32 - 1 for v in listed]
    assert mirrored.tolist() == [int(format(v, f"0{bits}b")[::-1], 2) for v in listed]


def test_highest_bit_of_negative_numbers_is_the_highest_clear_one() -> None:
    values = np.array([-1, -2, -3, -129, -(2**31), 5, 0], np.int32)
    (got,) = apply("bfind.s32 %x, %a;", [("s32", values)], ["u32"])
    assert got.tolist() == [2**32 - 1, 0, 1, 7, 30, 2, 2**32 - 1]


def test_products_of_bytes() -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(0, 2**32, 100, dtype=np.uint32) for _ in range(3))
    signed, unsigned = apply(
        "dp4a.s32.s32 %x, %a, %b, %c; dp4a.u32.u32 %y, %a, %b, %c;",
        [("u32", a), ("u32", b), ("u32", c)],
        ["s32", "u32"],
    )
    left, right = a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)
    for got, kind in ((signed, np.int8), (unsigned, np.uint8)):
        products = (left.view(kind).astype(np.int64) * right.view(kind).astype(np.int64)).sum(1)
        assert (got.view(np.uint32) == (products + c).astype(np.uint32)).all()


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_logic_of_predicates(name: str) -> None:
    a, b = pairs([0, 1], "u4")
    code = f"setp.ne.u32 %p1, %a, 0; setp.ne.u32 %p2, %b, 0; {name}.pred %p3, %p1, %p2; not.pred %p4, %p3; "
    got, negated = apply(
        code + "selp.u32 %x, 7, 9, %p3; selp.u32 %y, 7, 9, %p4;", [("u32", a), ("u32", b)], ["u32", "u32"]
    )
    expected = {"and": a & b, "or": a | b, "xor": a ^ b}[name]
    assert got.tolist() == [7 if holds else 9 for holds in expected] and (got + negated == 16).all()
