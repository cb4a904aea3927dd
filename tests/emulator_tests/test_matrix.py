"""Matrix instructions against the layouts that the PTX ISA spells out element by element, and exact products.

PTX ISA, "Warp-level Matrix Load Instruction: ldmatrix", "Matrix Fragments for mma.m16n8k4 / .m16n8k8 / .m16n8k16".
The layouts are written out here once more, one lane and one element at a time; nothing is taken from the emulator.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulator import EmulatorError

from .exact import bits_of_bf16
from .snippets import kernel, launch, tensor

Place = tuple[int, int]


def place_of_a(lane: int, i: int, depth: int, halves: bool) -> Place:
    """Row and column in A (16, depth) of element i of a lane."""
    group, member = lane >> 2, lane % 4
    if halves:
        return group + 8 * (i // 2 % 2), 2 * member + i % 2 + 8 * (i // 4)
    return group + 8 * (i % 2), member + 4 * (i // 2)


def place_of_b(lane: int, i: int, depth: int, halves: bool) -> Place:
    """Row and column in B (depth, 8)."""
    group, member = lane >> 2, lane % 4
    return (2 * member + i % 2 + 8 * (i // 2), group) if halves else (member + 4 * i, group)


def place_of_c(lane: int, i: int) -> Place:
    """Row and column in C and D (16, 8)."""
    return (lane >> 2) + 8 * (i // 2), 2 * (lane % 4) + i % 2


def registers(matrix: np.ndarray, place, count: int, ptx_type: str) -> np.ndarray:
    """uint32 (32 lanes, registers): the fragments of a matrix of small integers."""
    elements = np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)], np.float32)
    if ptx_type in ("f32", "tf32"):
        return elements.view(np.uint32)
    bits = bits_of_bf16(elements) if ptx_type == "bf16" else elements.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32)  # the element of the lower index in the lower half


def run(shape: str, types: str, fragments: list[np.ndarray], results: int) -> np.ndarray:
    """The registers of d, uint32 (32, results)."""
    given = [tensor(f) for f in fragments]
    out = torch.zeros(32 * results, dtype=torch.int32)
    body, names, at = [], [], 20
    for number, f in enumerate(fragments):
        width = f.shape[1]
        body.append(f"mad.wide.u32 %d20, %r0, {4 * width}, %d{number};")
        body += [f"ld.global.u32 %r{at + i}, [%d20+{4 * i}];" for i in range(width)]
        names.append("{" + ", ".join(f"%r{at + i}" for i in range(width)) + "}")
        at += width
    d = [f"%r{50 + i}" for i in range(results)]
    body.append(f"mma.sync.aligned.{shape}.row.col.{types} {{{', '.join(d)}}}, {', '.join(names)};")
    body.append(f"mad.wide.u32 %d20, %r0, {4 * results}, %d{len(fragments)};")
    body += [f"st.global.u32 [%d20+{4 * i}], {name};" for i, name in enumerate(d)]
    launch(kernel("\n".join(body), len(given) + 1), [*given, out])
    return out.numpy().view(np.uint32).reshape(32, results)


# Every kind that Triton's products compile to before sm_90, and the narrower ones of the same family.
@pytest.mark.parametrize(
    ("depth", "types"),
    [
        (16, "f32.bf16.bf16.f32"),
        (16, "f32.f16.f16.f32"),
        (16, "f16.f16.f16.f16"),
        (8, "f32.bf16.bf16.f32"),
        (8, "f32.f16.f16.f32"),
        (8, "f32.tf32.tf32.f32"),
        (4, "f32.tf32.tf32.f32"),
    ],
)
def test_products_of_fragments(depth: int, types: str) -> None:
    """Integers small enough that every sum is exact in every format: a wrong place of any element shows."""
    result, kind, _, _ = types.split(".")
    halves = kind != "tf32"
    g = np.random.default_rng(depth)
    a, b, c = (g.integers(-4, 5, shape).astype(np.float64) for shape in ((16, depth), (depth, 8), (16, 8)))
    c *= 16
    each = 16 * depth // 32, depth * 8 // 32
    fragments = [
        registers(a, lambda lane, i: place_of_a(lane, i, depth, halves), each[0], kind),
        registers(b, lambda lane, i: place_of_b(lane, i, depth, halves), each[1], kind),
        registers(c, place_of_c, 4, result),
    ]
    got = run(f"m16n8k{depth}", types, fragments, fragments[2].shape[1])
    want = a @ b + c
    assert np.array_equal(got, registers(want, place_of_c, 4, result))


def test_tf32_is_read_without_its_low_bits_and_sums_are_rounded_to_float32() -> None:
    a = np.zeros((16, 8))
    a[:, 0] = 1 + 2.0**-11  # one bit more than TF32 has
    a[:, 1] = 2.0**-10
    b = np.ones((8, 8))
    c = np.full((16, 8), 2.0**14)
    fragments = [
        registers(a, lambda lane, i: place_of_a(lane, i, 8, False), 4, "tf32"),
        registers(b, lambda lane, i: place_of_b(lane, i, 8, False), 2, "tf32"),
        registers(c, place_of_c, 4, "f32"),
    ]
    got = run("m16n8k8", "f32.tf32.tf32.f32", fragments, 4).view(np.float32)
    assert (got == np.float32(2.0**14 + 1)).all(), "2^-10 beside 2^14 is less than half a unit of float32"


def test_products_of_what_is_not_finite() -> None:
    a, b = np.zeros((16, 16)), np.ones((16, 8))
    a[0, 3], a[1, 15], a[2, 0], a[3, 0], a[3, 1] = np.inf, -np.inf, np.nan, np.inf, -np.inf
    fragments = [
        registers(a, lambda lane, i: place_of_a(lane, i, 16, True), 8, "bf16"),
        registers(b, lambda lane, i: place_of_b(lane, i, 16, True), 4, "bf16"),
        registers(np.zeros((16, 8)), place_of_c, 4, "f32"),
    ]
    got = run("m16n8k16", "f32.bf16.bf16.f32", fragments, 4).view(np.float32)
    for lane in range(32):
        for i in range(4):
            want = {0: np.inf, 1: -np.inf, 2: np.nan, 3: np.nan}.get(place_of_c(lane, i)[0], 0.0)
            assert np.array_equal(got[lane, i], np.float32(want), equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_loads_of_matrices(count: int, transposed: bool) -> None:
    """Rows of 16 bytes wherever the lanes say; here in an order of their own, with a gap between them."""
    g = np.random.default_rng(count)
    memory = np.arange(32 * 16, dtype=np.uint16)  # 32 places of 32 bytes, of which a row uses the first half
    place = g.permutation(32)
    out = torch.zeros(32 * count, dtype=torch.int32)
    registers_ = ", ".join(f"%r{20 + i}" for i in range(count))
    body = f"""mov.u32 %r10, buffer; mad.wide.u32 %d20, %r0, 32, %d0; mad.lo.u32 %r11, %r0, 32, %r10;
    ld.global.v4.u32 {{%r12, %r13, %r14, %r15}}, [%d20]; st.shared.v4.u32 [%r11], {{%r12, %r13, %r14, %r15}};
    mad.wide.u32 %d20, %r0, 4, %d1; ld.global.u32 %r16, [%d20]; mad.lo.u32 %r17, %r16, 32, %r10; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers_}}}, [%r17];
    mad.wide.u32 %d20, %r0, {4 * count}, %d2;
    """ + "\n".join(f"st.global.u32 [%d20+{4 * i}], %r{20 + i};" for i in range(count))
    launch(kernel(body, 3, shared=1024), [tensor(memory), tensor(place.astype(np.uint32)), out])
    got = out.numpy().view(np.uint16).reshape(32, count, 2)
    for lane in range(32):
        for matrix in range(count):
            for i in range(2):
                row, column = (2 * (lane % 4) + i, lane // 4) if transposed else (lane // 4, 2 * (lane % 4) + i)
                assert got[lane, matrix, i] == memory[place[8 * matrix + row] * 16 + column]


COPY = """mov.u32 %r10, buffer; mad.lo.u32 %r11, %r0, 16, %r10; mad.wide.u32 %d20, %r2, 16, %d0;
cp.async.cg.shared.global [%r11], [%d20], 16; cp.async.commit_group;
cp.async.ca.shared.global [%r11+1024], [%d20+1024], 16; cp.async.commit_group; """
READ = "ld.shared.v4.u32 {%r12, %r13, %r14, %r15}, [%r11]; mad.wide.u32 %d21, %r2, 16, %d1;"
READ += "st.global.v4.u32 [%d21], {%r12, %r13, %r14, %r15};"
# the next thread's, of another warp at the ends
OTHERS = "add.u32 %r20, %r0, 1; and.b32 %r20, %r20, 63; mad.lo.u32 %r11, %r20, 16, %r10;"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("cp.async.wait_group 1; " + READ, None),
        ("cp.async.wait_group 0; add.u32 %r11, %r11, 1024; " + READ, None),
        ("cp.async.wait_all; add.u32 %r11, %r11, 1024; " + READ, None),
        ("cp.async.wait_group 0; bar.sync 0; " + OTHERS + READ, None),
        ("cp.async.wait_group 2; " + READ, "nobody has written"),
        ("cp.async.wait_group 1; add.u32 %r11, %r11, 1024; " + READ, "nobody has written"),
        ("bar.sync 0; " + READ, "nobody has written"),
        ("cp.async.wait_group 0; " + OTHERS + READ, "race on shared memory"),
        ("bar.sync 0; cp.async.wait_group 0; " + OTHERS + READ, "race on shared memory"),
        (  # the stage is filled again while another warp may still be reading it
            "cp.async.wait_group 0; bar.sync 0; mov.u32 %r30, %r11; " + OTHERS + READ
            + "cp.async.cg.shared.global [%r30], [%d20], 16; cp.async.wait_all;",
            "race on shared memory",
        ),
        (  # only some threads wait
            "setp.lt.u32 %p1, %r0, 40; @%p1 bra over; cp.async.wait_all; over: " + READ, "40 lanes"
        ),
    ],
)  # fmt: skip
def test_copies_are_there_when_they_have_been_waited_for(code: str, message: str | None) -> None:
    source, out = torch.arange(512, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    arguments = kernel(COPY + code, 2, shared=2048), [source, out]
    if message is None:
        launch(*arguments, block=64)
        start = 256 if "1024; ld" in code else 0
        want = source[start : start + 256].reshape(64, 4)
        assert torch.equal(out.reshape(64, 4), want.roll(-1, 0) if OTHERS in code else want)
    else:
        with pytest.raises(EmulatorError, match=message):
            launch(*arguments, block=64)
