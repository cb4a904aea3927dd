"""Atomic operations against a loop over the threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .snippets import kernel, launch, tensor

OPERATIONS = {
    "add.u32": lambda old, b: (old + b) % 2**32,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda old, b: old & b,
    "or.b32": lambda old, b: old | b,
    "xor.b32": lambda old, b: old ^ b,
    "exch.b32": lambda old, b: b,
    "inc.u32": lambda old, b: 0 if old >= b else old + 1,
    "dec.u32": lambda old, b: b if old == 0 or old > b else old - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operations_return_what_they_found(name: str, space: str) -> None:
    """128 threads at 5 addresses, in turn."""
    rng = np.random.default_rng(3)
    values, start = rng.integers(0, 50, 128).astype(np.uint32), rng.integers(0, 30, 5).astype(np.uint32)
    cells, found = start.tolist(), []
    for i, value in enumerate(values.tolist()):
        found.append(cells[i % 5])
        cells[i % 5] = OPERATIONS[name](cells[i % 5], value)
    memory, got, given = tensor(start), torch.zeros(128, dtype=torch.int32), tensor(values)
    body = "rem.u32 %r11, %r0, 5; mad.wide.u32 %d20, %r0, 4, %d1; ld.global.u32 %r12, [%d20];"
    if space == "global":
        body += f"mad.wide.u32 %d21, %r11, 4, %d0; atom.global.{name} %r10, [%d21], %r12;"
    else:
        body += "mov.u32 %r13, buffer; setp.lt.u32 %p1, %r0, 5; mad.lo.u32 %r14, %r0, 4, %r13;"
        body += "mad.wide.u32 %d22, %r0, 4, %d0;"
        body += "@%p1 ld.global.u32 %r15, [%d22]; @%p1 st.shared.u32 [%r14], %r15; bar.sync 0;"
        body += f"mad.lo.u32 %r16, %r11, 4, %r13; atom.shared.{name} %r10, [%r16], %r12; bar.sync 0;"
        body += "@%p1 ld.shared.u32 %r15, [%r14]; @%p1 st.global.u32 [%d22], %r15;"
    body += "mad.wide.u32 %d23, %r0, 4, %d2; st.global.u32 [%d23], %r10;"
    launch(kernel(body, 3, shared=32), [memory, given, got], block=128)
    assert got.numpy().view(np.uint32).tolist() == found
    assert memory.numpy().view(np.uint32).tolist() == cells


def test_compare_and_swap_as_a_lock() -> None:
    """Each thread takes the lock once; a critical section that two shared would lose an increment."""
    state = torch.zeros(2, dtype=torch.int32)
    body = """top: atom.acquire.gpu.global.cas.b32 %r10, [%d0], 0, 1; setp.ne.u32 %p1, %r10, 0; @%p1 bra top;
    ld.relaxed.gpu.global.u32 %r11, [%d0+4]; add.u32 %r11, %r11, 1; st.relaxed.gpu.global.u32 [%d0+4], %r11;
    atom.release.gpu.global.exch.b32 %r12, [%d0], 0;"""
    launch(kernel(body, 1), [state], grid=3, block=8)
    assert state.tolist() == [0, 24]


@pytest.mark.parametrize(("ptx_type", "dtype"), [("f32", torch.float32), ("f64", torch.float64)])
def test_float_add_in_turn(ptx_type: str, dtype: torch.dtype) -> None:
    values, total = torch.randn(64, dtype=dtype), torch.zeros(1, dtype=dtype)
    size, register = dtype.itemsize, "%d10" if ptx_type == "f64" else "%r10"
    body = f"mad.wide.u32 %d20, %r2, {size}, %d0; ld.global.{ptx_type} {register}, [%d20];"
    body += f"red.global.add.{ptx_type} [%d1], {register};"
    launch(kernel(body, 2), [values, total], block=64)
    expected = torch.zeros((), dtype=dtype)
    for value in values:
        expected = expected + value
    assert total.item() == expected.item()


def test_packed_and_vector_add() -> None:
    pair, quad = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(4)
    body = "mov.b32 %r10, 0x40003F80; red.global.add.noftz.bf16x2 [%d0], %r10; mov.b32 %r11, 0f3F800000;"
    launch(kernel(body + "red.global.v4.f32.add [%d1], {%r11, %r11, %r11, %r11};", 2), [pair, quad], block=32)
    assert pair.tolist() == [32.0, 64.0] and quad.tolist() == [32.0] * 4


def test_the_last_block_may_read_what_the_others_released() -> None:
    """Partial results, a fence or an atomic of .acq_rel, a ticket: no race. With neither it is one."""
    from tests.emulator import EmulatorError

    def body(fence: str, order: str = "relaxed") -> str:
        return f"""mad.wide.u32 %d20, %r1, 4, %d0; st.global.u32 [%d20], %r1; {fence}
        mov.b32 %r11, 1; atom.{order}.gpu.global.add.u32 %r12, [%d1], %r11; setp.ne.u32 %p1, %r12, 7; @%p1 ret; {fence}
        mov.b32 %r10, 0; mov.b32 %r13, 0; mov.u64 %d21, %d0;
        sum: ld.global.u32 %r14, [%d21]; add.u32 %r10, %r10, %r14; add.u64 %d21, %d21, 4; add.u32 %r13, %r13, 1;
        setp.lt.u32 %p2, %r13, 8; @%p2 bra sum; st.global.u32 [%d2], %r10;"""

    for batch in (1, 4096):  # CTAs one after the other, and together
        buffers = [
            torch.zeros(8, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
        ]
        for ptx in (kernel(body("membar.gl;"), 3), kernel(body("", "acq_rel"), 3)):
            launch(ptx, buffers, grid=8, block=1, batch_lanes=batch)
            assert buffers[2].item() == 28
            buffers[1].zero_()
        with pytest.raises(EmulatorError, match="race on argument 0"):
            launch(kernel(body(""), 3), buffers, grid=8, block=1, batch_lanes=batch)
