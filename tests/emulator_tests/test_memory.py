"""Loads and stores: widths, vectors, state spaces, hints, and what the counters say of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulator import load
from tests.emulator.machine import Options

from .snippets import HEADER, apply, kernel, launch


@pytest.mark.parametrize(
    ("suffix", "registers"),
    [
        ("v2.b32", "{%r10, %r11}"),
        ("v4.b32", "{%r10, %r11, %r12, %r13}"),
        ("v2.b64", "{%d10, %d11}"),
        ("v4.b16", "{%h1, %h2, %h3, %h4}"),
        ("v8.b32", "{%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17}"),
        ("v4.b64", "{%d10, %d11, %d12, %d13}"),
        ("b128", "%q0"),
        ("L1::evict_last.v4.b32", "{%r10, %r11, %r12, %r13}"),
        ("relaxed.gpu.b64", "%d10"),
    ],
)
def test_copy_by_vectors(suffix: str, registers: str) -> None:
    count = 32 if "{" not in registers else 32 * (registers.count(",") + 1)
    size = {"b16": 2, "b32": 4, "b64": 8, "128": 16}[suffix[-3:]] * count // 32
    source = torch.randint(0, 255, (32 * size,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    body = f"mad.wide.u32 %d20, %r2, {size}, %d0; mad.wide.u32 %d21, %r2, {size}, %d1;"
    body += f"ld.global.{suffix} {registers}, [%d20]; st.global.{suffix} [%d21], {registers};"
    run = launch(kernel(body, 2), [source, target])
    assert torch.equal(source, target)
    traffic = run.counters.buffers["argument 0"], run.counters.buffers["argument 1"]
    assert (traffic[0].loaded, traffic[0].loaded_once, traffic[0].loaded_sectors) == (32 * size, 32 * size, size)
    assert (traffic[1].stored, traffic[1].stored_once, traffic[1].loaded) == (32 * size, 32 * size, 0)
    assert dict(run.counters.load_widths) == {min(8 * size, 128): 32 * max(size // 16, 1)}


def test_counters_tell_total_from_distinct_bytes() -> None:
    """Each thread of two CTAs reads the same four words; one warp at one address is one access."""
    source, out = torch.arange(4, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = "mov.u32 %r9, 0; " + "".join(f"ld.global.u32 %r10, [%d0+{4 * i}]; add.u32 %r9, %r9, %r10;" for i in range(4))
    run = launch(kernel(body + "mad.wide.u32 %d20, %r2, 4, %d1; st.global.u32 [%d20], %r9;", 2), [source, out], grid=2)
    assert out.tolist() == [6] * 64
    traffic = run.counters.buffers["argument 0"]
    assert (traffic.loaded, traffic.loaded_once, traffic.loaded_sectors) == (2 * 4 * 4, 16, 1)
    assert run.counters.buffers["argument 1"].stored_sectors == 8


def test_instructions_are_counted_by_thread_and_class() -> None:
    out = torch.zeros(64)
    body = "mov.b32 %r10, 0f3F800000; ex2.approx.f32 %r10, %r10; fma.rn.f32 %r10, %r10, %r10, %r10;"
    counters = launch(
        kernel(body + "mad.wide.u32 %d20, %r2, 4, %d0; st.global.f32 [%d20], %r10;", 1), [out], grid=2
    ).counters
    assert counters.ex2 == 64 and counters.instructions["float"] == 64 and counters.opcodes["fma"] == 64
    assert (
        counters.per_element(64)["ex2"] == 1.0 and counters.per_element(64)["memory"] == 2.0
    )  # ld.param and the store


@pytest.mark.parametrize(
    ("ptx_type", "register"), [("s8", "%r10"), ("u8", "%r10"), ("s16", "%r10"), ("u16", "%d10"), ("s32", "%d10")]
)
def test_narrow_loads_extend_by_their_type(ptx_type: str, register: str) -> None:
    values = (
        np.array([-1, 0, 1, 127, -128], np.int8)
        if ptx_type[1:] == "8"
        else np.array([-1, 0, 1, 32767, -32768], np.int16)
    )
    values = values.astype(np.int32) if ptx_type == "s32" else values
    size, wide = values.itemsize, "64" if register == "%d10" else "32"
    source, target = torch.from_numpy(values.copy()).clone(), torch.zeros(5, dtype=torch.int64)
    body = f"mad.wide.u32 %d20, %r2, {size}, %d0; ld.global.{ptx_type} {register}, [%d20];"
    body += f"cvt.s64.s{wide} %d11, {register}; mad.wide.u32 %d21, %r2, 8, %d1; st.global.u64 [%d21], %d11;"
    launch(kernel(body, 2), [source, target], block=5)
    unsigned = values.view(f"u{size}") if ptx_type[0] == "u" else values
    assert target.tolist() == unsigned.tolist()


def test_parameters_of_every_size_and_a_structure() -> None:
    names = ".param .u64 p0, .param .f32 p1, .param .u16 p2, .param .align 8 .b8 p3[24], .param .f64 p4"
    body = """ld.param.u64 %rd1, [p0]; ld.param.f32 %f1, [p1]; ld.param.u16 %rs1, [p2];
    ld.param.v2.u32 {%r1, %r2}, [p3+8]; ld.param.f64 %fd1, [p4];
    st.global.f32 [%rd1], %f1; st.global.u16 [%rd1+4], %rs1; st.global.u32 [%rd1+8], %r1; st.global.u32 [%rd1+12], %r2;
    st.global.f64 [%rd1+16], %fd1;"""
    registers = ".reg .b64 %rd<4>; .reg .f32 %f<4>; .reg .b16 %rs<4>; .reg .b32 %r<4>; .reg .f64 %fd<4>;"
    ptx = f"{HEADER}.visible .entry kernel({names}) {{ {registers} {body} ret; }}"
    out = torch.zeros(24, dtype=torch.uint8)
    structure = np.arange(6, dtype=np.uint32).tobytes()
    load(ptx).launch("kernel", (1,), (1,), [out, 1.5, 65535, structure, -2.5])
    raw = out.numpy()
    assert raw[:4].view(np.float32)[0] == 1.5 and raw[4:6].view(np.uint16)[0] == 65535
    assert raw[8:16].view(np.uint32).tolist() == [2, 3] and raw[16:].view(np.float64)[0] == -2.5


def test_shared_local_and_generic_addresses() -> None:
    """Each thread writes shared memory generically, reads its neighbour's word, and passes it through local memory."""
    out = torch.zeros(64, dtype=torch.int32)
    body = """.local .align 4 .b8 scratch[8];
    mov.u32 %r10, buffer; cvta.shared.u32 %r11, %r10; cvt.u64.u32 %d10, %r10; cvta.shared.u64 %d10, %d10;
    mad.wide.u32 %d11, %r0, 4, %d10; st.u32 [%d11], %r0;
    bar.sync 0;
    xor.b32 %r12, %r0, 1; shl.b32 %r12, %r12, 2; add.u32 %r12, %r12, %r10; ld.shared.u32 %r13, [%r12];
    mov.u64 %d12, scratch; cvta.local.u64 %d13, %d12; st.local.u32 [%d12+4], %r13; ld.u32 %r14, [%d13+4];
    mad.wide.u32 %d20, %r2, 4, %d0; cvta.to.global.u64 %d20, %d20; st.global.u32 [%d20], %r14;"""
    run = launch(kernel(body, 1, shared=128), [out], grid=2)
    assert out.tolist() == [i ^ 1 for i in range(32)] * 2
    assert run.counters.shared_loaded == run.counters.shared_stored == 256 and run.counters.barriers == 2


def test_variables_of_the_module_outlive_a_launch() -> None:
    more = ".global .align 4 .u32 counter; .const .align 4 .u32 table[3] = {5, 6, 0x10};"
    body = "ld.const.u32 %r10, [table+8]; ld.global.u32 %r11, [counter]; add.u32 %r11, %r11, %r10;"
    ptx = kernel(body + "st.global.u32 [counter], %r11; st.global.u32 [%d0], %r11;", 1, more=more)
    out = torch.zeros(1, dtype=torch.int32)
    for expected in (16, 32, 48):
        run = launch(ptx, [out], block=1)
        assert out.item() == expected
    assert list(run.counters.buffers) == ["argument 0"]  # the module's own memory is no traffic of a buffer


def test_guarded_accesses_touch_nothing_where_the_guard_is_false() -> None:
    source, out = torch.arange(5, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    body = "setp.lt.u32 %p1, %r2, 5; mov.b32 %r10, 77; mad.wide.u32 %d20, %r2, 4, %d0; @%p1 ld.global.u32 %r10, [%d20];"
    body += "setp.lt.u32 %p2, %r2, 8; mad.wide.u32 %d21, %r2, 4, %d1; @%p2 st.global.u32 [%d21], %r10;"
    run = launch(kernel(body, 2), [source, out])
    assert out.tolist() == [0, 1, 2, 3, 4, 77, 77, 77] + [-1] * 24
    assert run.counters.buffers["argument 0"].loaded == 20 and run.counters.buffers["argument 1"].stored == 32


def test_two_arguments_may_share_a_buffer() -> None:
    x = torch.arange(64, dtype=torch.int32)
    body = "mad.wide.u32 %d20, %r2, 4, %d0; ld.global.u32 %r10, [%d20]; mad.wide.u32 %d21, %r2, 4, %d1;"
    run = launch(kernel(body + "add.u32 %r10, %r10, 100; st.global.u32 [%d21], %r10;", 2), [x, x])
    assert x[:32].tolist() == list(range(100, 132)) and x[32:].tolist() == list(range(32, 64))
    assert list(run.counters.buffers) == ["argument 0=argument 1"]


def test_asynchronous_copies_and_zero_fill() -> None:
    source, out = torch.arange(128, dtype=torch.int32), torch.full((128,), -1, dtype=torch.int32)
    body = """mov.u32 %r10, buffer; mad.lo.u32 %r10, %r0, 16, %r10; mad.wide.u32 %d20, %r2, 16, %d0;
    setp.lt.u32 %p1, %r0, 16; selp.b32 %r11, 16, 0, %p1;
    cp.async.cg.shared.global [%r10], [%d20], 16, %r11; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    ld.shared.v4.u32 {%r12, %r13, %r14, %r15}, [%r10]; mad.wide.u32 %d21, %r2, 16, %d1;
    st.global.v4.u32 [%d21], {%r12, %r13, %r14, %r15};"""
    run = launch(kernel(body, 2, shared=512), [source, out])
    assert out.tolist() == [*range(64), *[0] * 64]
    assert run.counters.buffers["argument 0"].loaded == 256


def test_pack_and_unpack() -> None:
    a = np.array([0x11223344AABBCCDD, 2**63 + 5], np.uint64)
    code = "mov.b64 {%r10, %r11}, %a; mov.b32 {%h1, %h2}, %r10; mov.b32 %r12, {%h2, %h1}; mov.b64 %x, {%r11, %r12};"
    (got,) = apply(code + "mov.b64 {_, %r13}, %a; cvt.u64.u32 %y, %r13;", [("b64", a)], ["b64", "b64"])[:1]
    expected = [(v >> 32) | ((v & 0xFFFF) << 16 | (v >> 16 & 0xFFFF)) << 32 for v in a.tolist()]
    assert got.tolist() == expected


def test_large_buffers_cost_no_memory() -> None:
    """Rows beyond 2^31 elements: only the rows touched are ever committed."""
    rows = torch.empty(2**31 + 4096, dtype=torch.int8)
    rows[-32:] = torch.arange(32, dtype=torch.int8)
    out = torch.zeros(32, dtype=torch.int32)
    body = "add.s64 %d10, %d0, 2147487712; cvt.u64.u32 %d11, %r2; add.s64 %d10, %d10, %d11; ld.global.s8 %r10, [%d10];"
    run = launch(kernel(body + "mad.wide.u32 %d20, %r2, 4, %d1; st.global.u32 [%d20], %r10;", 2), [rows, out])
    assert out.tolist() == list(range(32))
    assert run.counters.buffers["argument 0"].loaded_once == 32


def test_strict_options_collect_or_raise() -> None:
    out = torch.zeros(4)
    ptx = kernel("mad.wide.u32 %d20, %r2, 4, %d0; st.global.f32 [%d20], 0f3F800000;", 1)
    run = load(ptx).launch("kernel", (1,), (8,), [out], options=Options(strict=False))
    assert out.tolist() == [1.0] * 4
    assert len(run.reports) == 1 and "out-of-bounds write of 4 bytes at argument 0+16 (16 bytes)" in run.reports[0]
    assert "thread (4, 0, 0)" in run.reports[0] and "line" in run.reports[0]
