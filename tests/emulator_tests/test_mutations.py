"""Planted bugs: each one next to the correct kernel, which must pass, and must give the right answer."""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from tests import emulator  # noqa: E402
from tests.emulator import EmulatorError  # noqa: E402

from .snippets import kernel, launch  # noqa: E402


def caught(match: str) -> pytest.RaisesExc:
    return pytest.raises(EmulatorError, match=match)


@triton.jit
def row_sum(x, out, V, stride, slack, BLOCK: tl.constexpr):
    """The sum of a row; ``slack`` columns too many are read."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * stride + column, mask=column < V + slack, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(total, 0))


@pytest.mark.parametrize("sm", [80, 90])
def test_reading_past_the_last_row(sm: int) -> None:
    x = torch.randn(3, 1000)
    with emulator.triton(sm=sm) as run:
        out = torch.empty(3)
        row_sum[(3,)](x, out, 1000, 1000, 0, BLOCK=256)
        torch.testing.assert_close(out, x.sum(1), rtol=1e-5, atol=1e-4)  # sums of 1000 numbers in another order
        assert run.launches[-1].counters.buffers["x"].loaded == 4 * 3000
        with caught(r"out-of-bounds read of 4 bytes at x\+12000 \(12000 bytes\), 1 lane, first block \(2, 0, 0\)"):
            row_sum[(3,)](x, out, 1000, 1000, 1, BLOCK=256)


def test_reading_past_a_row_inside_a_larger_tensor() -> None:
    """A view of the first 1000 of 1024 columns: the storage goes on, the tensor does not."""
    x = torch.randn(3, 1024)
    with emulator.triton() as run:
        out = torch.empty(3)
        row_sum[(3,)](x[:, :1000], out, 1000, 1024, 0, BLOCK=256)
        with caught("bytes between the rows of the tensor, at x"):
            row_sum[(2,)](x[:, :1000], out, 1000, 1024, 4, BLOCK=256)
    with emulator.triton(strict_views=False) as run:
        row_sum[(2,)](x[:, :1000], torch.empty(3), 1000, 1024, 4, BLOCK=256)
    assert run.reports == []


@triton.jit
def copy_rows(x, y, V, HINT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offset = row * V
    if HINT:
        offset = tl.multiple_of(offset, 8)  # a lie where V is no multiple of 8
    column = tl.arange(0, BLOCK)
    tl.store(y + offset + column, tl.load(x + offset + column))


def test_misaligned_vectors() -> None:
    with emulator.triton() as run:
        for columns, hint in ((1024, True), (1027, False)):
            x, y = torch.randn(2, columns).bfloat16(), torch.zeros(2, columns).bfloat16()
            copy_rows[(2,)](x, y, columns, HINT=hint, BLOCK=1024)
            assert torch.equal(x[:, :1024], y[:, :1024])
        assert max(run.launches[0].counters.load_widths) == 128  # the true hint pays
        x, y = torch.randn(2, 1027).bfloat16(), torch.zeros(2, 1027).bfloat16()
        with caught("misaligned read of 16 bytes at x") as found:
            copy_rows[(2,)](x, y, 1027, HINT=True, BLOCK=1024)
        assert any("misaligned write of 16 bytes at y" in report for report in found.value.reports)


def test_a_missing_barrier() -> None:
    """The compiled reduction, with each of its barriers taken out in turn."""
    x, out = torch.randn(1, 2048), torch.zeros(1)
    with emulator.triton():
        compiled = row_sum[(1,)](x, out, 2048, 2048, 0, BLOCK=512)
    ptx = compiled.asm["ptx"]
    barriers = [match.span() for match in re.finditer(r"bar\.sync\s+0;", ptx)]
    assert barriers
    arguments = [x, out, 2048, 2048, 0]

    def run(text: str) -> None:
        module = emulator.load(text)
        wanted = len(module.program("row_sum").kernel.parameters)
        given = (arguments if wanted == 7 else [x, out, 2048, 2048])[: wanted - 2]
        shared = compiled.metadata.shared
        module.launch("row_sum", (1,), (32 * compiled.metadata.num_warps,), given, dynamic_shared=shared)

    run(ptx)
    torch.testing.assert_close(out, x.sum(1), rtol=1e-5, atol=1e-4)
    found = 0
    for start, end in barriers:
        try:
            run(ptx[:start] + ptx[end:])
        except EmulatorError as error:
            assert "shared memory" in str(error)
            found += 1
    assert found  # a barrier that protects nothing may go; the others may not


@triton.jit
def count_programs(counter, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(counter, 1)
    else:
        tl.store(counter, tl.load(counter) + 1)


def test_a_lost_update() -> None:
    with emulator.triton():
        counter = torch.zeros(1, dtype=torch.int32)
        count_programs[(100,)](counter, ATOMIC=True)
        assert counter.item() == 100
        with caught("race on counter"):
            count_programs[(100,)](counter, ATOMIC=False)


@triton.jit
def copy_tiles(x, y, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index, mask=index < n, other=0.0), mask=index < n)


@pytest.mark.parametrize("batch_lanes", [1, 16384])
def test_overlapping_tiles(batch_lanes: int) -> None:
    """The values are right, by luck: some elements are written twice, with one value. Seen within and over batches."""
    x = torch.randn(1000)
    with emulator.triton(batch_lanes=batch_lanes):
        y = torch.empty(1000)
        copy_tiles[(8,)](x, y, 1000, STEP=128, BLOCK=128)
        assert torch.equal(x, y)
        with caught("race on y: write by block .* and write by block"):
            copy_tiles[(8,)](x, torch.empty(1000), 1000, STEP=127, BLOCK=128)


@triton.jit
def halve_in_place(x, total, V, BLOCK: tl.constexpr):
    """Each program needs the whole row, and writes its own part of it."""
    part = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        sums += tl.load(x + start + tl.arange(0, BLOCK))
    index = part * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + index, tl.load(x + index) / tl.sum(sums, 0))


def test_writing_what_another_program_reads() -> None:
    x = torch.rand(512)
    with emulator.triton():
        y = torch.empty(512)
        halve_in_place[(4,)](x, y, 512, BLOCK=128)
        torch.testing.assert_close(y, x / x.sum(), rtol=1e-6, atol=0)
        with caught("race on x=total: write by block .* and read by block"):
            halve_in_place[(4,)](x, x, 512, BLOCK=128)


@triton.jit
def reverse_through_memory(x, y, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index))
    if BARRIER:
        tl.debug_barrier()
    value = tl.load(y + (BLOCK - 1 - index))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + index, value)


def test_reading_back_through_global_memory() -> None:
    x = torch.randn(256)
    with emulator.triton():
        y = torch.empty(256)
        reverse_through_memory[(1,)](x, y, BARRIER=True, BLOCK=256)
        assert torch.equal(y, x.flip(0))
        with caught("race on y: read by block .* and write by block"):
            reverse_through_memory[(1,)](x, torch.empty(256), BARRIER=False, BLOCK=256)


@triton.jit
def first_of_row(x, out, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + tl.program_id(0), tl.load(x + row * stride))


def test_an_index_beyond_int32() -> None:
    """Three rows, 2^30 + 16 elements apart: memory that is reserved and never committed."""
    stride = 2**30 + 16
    x = torch.empty(2 * stride + 1, dtype=torch.int8)
    for row in range(3):
        x[row * stride] = 10 + row
    with emulator.triton():
        out = torch.empty(3, dtype=torch.int8)
        first_of_row[(3,)](x, out, stride, WIDE=True)
        assert out.tolist() == [10, 11, 12]
        with caught(r"-4294967296 from inside it, as if an index had overflowed int32"):
            first_of_row[(3,)](x, out, stride, WIDE=False)


def test_reading_shared_memory_that_nobody_wrote() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    store = "mov.u32 %r10, buffer; mad.lo.u32 %r11, %r0, 4, %r10; {guard} st.shared.u32 [%r11], %r0; bar.sync 0;"
    rest = "ld.shared.u32 %r12, [%r11]; mad.wide.u32 %d20, %r2, 4, %d0; st.global.u32 [%d20], %r12;"
    launch(kernel(store.format(guard="") + rest, 1, shared=128), [out])
    assert out.tolist() == list(range(32))
    missing = "setp.ne.u32 %p1, %r0, 7;" + store.format(guard="@%p1") + rest
    with caught("shared memory that nobody has written, at offset 28, 1 lanes"):
        launch(kernel(missing, 1, shared=128), [out])


@triton.jit
def add_into(x, out, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    tl.store(out + index, tl.load(out + index, mask=mask) + tl.load(x + index, mask=mask), mask=mask)


def test_reading_output_memory_that_nobody_wrote() -> None:
    x = torch.randn(300)
    with emulator.triton():
        for cleared in (torch.zeros(300), torch.empty(300).zero_(), torch.empty(300).copy_(torch.zeros(300))):
            add_into[(3,)](x, cleared, 300, BLOCK=128)
            assert torch.equal(cleared, x)
        with caught(r"bytes that nobody has written, at out\+0"):
            add_into[(3,)](x, torch.empty(300), 300, BLOCK=128)
        with caught("nobody has written"):
            add_into[(3,)](x, torch.empty_like(x), 300, BLOCK=128)
        partly = x.new_empty(300)
        copy_tiles[(2,)](x, partly, 299, STEP=128, BLOCK=128)  # the first 256 of them
        with caught(r"bytes that nobody has written, at out\+1024"):
            add_into[(3,)](x, partly, 300, BLOCK=128)
    add = torch.empty(4)
    assert torch.isfinite(add.zero_()).all()  # torch.empty is torch's own again


@pytest.mark.parametrize("second", [7, 8])
def test_two_warps_may_store_one_value_but_not_two(second: int) -> None:
    """Triton stores replicated values from several warps; that is no race as long as they agree."""
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra a; mov.b32 %r10, 7; st.shared.u32 [buffer], %r10; bra.uni b;"
    body += f"a: mov.b32 %r10, {second}; st.shared.u32 [buffer], %r10; b:"
    if second == 7:
        launch(kernel(body, 0, shared=16), [], block=64)
    else:
        with caught("race on shared memory: write by block .* and write by block"):
            launch(kernel(body, 0, shared=16), [], block=64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra a; bar.sync 0; bra.uni b; a: bar.sync 0; b:", "divergent barrier"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 bra a; bar.sync 0; bra b; a: bar.sync 0; b:", "only a part of a warp"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 bra a; bar.sync 0; a: ", "16 threads of the CTA had exited"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", "32 threads of the CTA had exited"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra a; bar.sync 1; bra.uni b; a: bar.sync 2; b:", "deadlock at barriers"),
        (
            "setp.lt.u32 %p1, %r0, 32; @%p1 bra a; bar.sync 1, 64; a:",
            "deadlock at barriers.*32 of 64 threads at barrier 1",
        ),
    ],
)
def test_divergent_barriers(body: str, message: str) -> None:
    launch(kernel("bar.sync 0; bar.sync 1, 64;", 0), [], block=64)
    with caught(message):
        launch(kernel(body, 0), [], block=64)


def test_lanes_that_store_different_values_to_one_address() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    launch(kernel("setp.eq.u32 %p1, %r0, 3; @%p1 st.global.u32 [%d0], %r0;", 1), [out])
    assert out.item() == 3
    with caught("lanes store different values to one address of argument 0"):
        launch(kernel("st.global.u32 [%d0], %r0;", 1), [out])


def test_a_device_assertion() -> None:
    @triton.jit
    def positive(x):
        tl.device_assert(tl.load(x) > 0, "not positive")

    with emulator.triton():
        positive[(1,)](torch.ones(1), debug=True)
        with caught("device-side assertion failed, block"):
            positive[(1,)](-torch.ones(1), debug=True)


def test_all_reports_of_a_launch_are_listed() -> None:
    x = torch.zeros(4)
    body = "mad.wide.u32 %d20, %r2, 4, %d0; ld.global.f32 %r10, [%d20+16]; st.global.f32 [%d20+1], %r10; trap;"
    with caught("trap") as found:
        launch(kernel(body, 1), [x], block=1)
    assert [
        bool(re.search(p, r)) for p, r in zip(("out-of-bounds read", "misaligned write", "trap"), found.value.reports)
    ] == [True] * 3
