"""Control flow, barriers and the order of CTAs."""

from __future__ import annotations

import pytest
import torch

from tests.emulator import EmulatorError

from .snippets import kernel, launch

STORE = "mad.wide.u32 %d20, %r2, 4, %d0; st.global.u32 [%d20], %r10;"


def test_nested_divergence_and_loops_of_different_lengths() -> None:
    """Collatz steps: every thread leaves the loop at another time and branches inside it."""
    out = torch.zeros(96, dtype=torch.int32)
    body = """mov.b32 %r10, 0; add.u32 %r11, %r2, 1;
    top: setp.eq.u32 %p1, %r11, 1; @%p1 bra done; add.u32 %r10, %r10, 1;
    and.b32 %r12, %r11, 1; setp.eq.u32 %p2, %r12, 0; @%p2 bra even;
    mad.lo.u32 %r11, %r11, 3, 1; bra.uni top;
    even: shr.u32 %r11, %r11, 1; bra top;
    done: """
    launch(kernel(body + STORE, 1), [out], grid=2, block=48)

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    assert out.tolist() == [steps(i + 1) for i in range(96)]


def test_threads_that_return_early() -> None:
    out = torch.full((64,), -1, dtype=torch.int32)
    body = "mov.b32 %r10, 1; setp.gt.u32 %p1, %r0, 10; @%p1 ret; add.u32 %r10, %r10, %r2;"
    launch(kernel(body + STORE, 1), [out], grid=2)
    assert out.tolist() == [i + 1 if i % 32 <= 10 else -1 for i in range(64)]


def test_a_value_written_in_one_branch_only() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    body = "mov.b32 %r10, 3; setp.lt.u32 %p1, %r0, 4; @!%p1 bra skip; mul.lo.u32 %r10, %r0, 10;"
    body += "skip: @%p1 add.u32 %r10, %r10, 1;"
    launch(kernel(body + STORE, 1), [out])
    assert out.tolist() == [1, 11, 21, 31] + [3] * 28


def test_a_guarded_move_keeps_what_an_earlier_block_wrote() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    body = "mov.b32 %r10, 3; setp.lt.u32 %p1, %r0, 4; bra.uni next; next: @%p1 mov.b32 %r10, 5;"
    launch(kernel(body + STORE, 1), [out])
    assert out.tolist() == [5] * 4 + [3] * 28


def test_scopes_hide_names() -> None:
    """Inline assembly opens a scope; its register must not be the outer one of that name, nor its label."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """.reg .b32 %t; mov.b32 %t, 7;
    { .reg .b32 %t; .reg .pred %w; mov.b32 %t, 0; loop: add.u32 %t, %t, 1; setp.lt.u32 %w, %t, 3; @%w bra loop;
    mov.b32 %r11, %t; }
    { .reg .pred %w; mov.b32 %r12, 0; loop: add.u32 %r12, %r12, 1; setp.lt.u32 %w, %r12, 5; @%w bra loop; }
    mad.lo.u32 %r10, %t, 100, %r11; mad.lo.u32 %r10, %r12, 10, %r10;"""
    launch(kernel(body + STORE, 1), [out])
    assert set(out.tolist()) == {753}


@pytest.mark.parametrize(("name", "expected"), [("popc.u32", 10), ("and.pred", 0), ("or.pred", 1)])
def test_reductions_of_a_barrier(name: str, expected: int) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    target = "%r10" if name == "popc.u32" else "%p2"
    body = f"setp.lt.u32 %p1, %r0, 10; barrier.sync.aligned 1; bar.red.{name} {target}, 0, %p1;"
    body += "" if name == "popc.u32" else "selp.u32 %r10, 1, 0, %p2;"
    launch(kernel(body + STORE, 1), [out], block=64)
    assert set(out.tolist()) == {expected}


def test_named_barriers_order_producer_and_consumer() -> None:
    """Warp 0 writes and only arrives, warp 1 waits; without the wait this is a race."""
    produce = "mov.u32 %r11, buffer; mad.lo.u32 %r12, %r0, 4, %r11; setp.ge.u32 %p1, %r0, 32; @%p1 bra consumer;"
    produce += "mul.lo.u32 %r10, %r0, 3; st.shared.u32 [%r12], %r10; bar.arrive 2, 64; bra.uni done;"
    for wait in ("bar.sync 2, 64;", ""):
        out = torch.zeros(64, dtype=torch.int32)
        body = f"{produce} consumer: {wait} ld.shared.u32 %r10, [%r12-128]; done: {STORE}"
        if wait:
            launch(kernel(body, 1, shared=128), [out], block=64)
            assert out.tolist() == [3 * (i % 32) for i in range(64)]
        else:
            with pytest.raises(EmulatorError, match="race on shared memory"):
                launch(kernel(body, 1, shared=128), [out], block=64)


def test_threads_that_spin_do_not_starve_the_one_they_wait_for() -> None:
    """Within one warp: lane 5 releases the others, whose loop comes first in the code."""
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    body = """setp.eq.u32 %p1, %r0, 5; @%p1 bra release;
    wait: ld.volatile.global.u32 %r10, [%d1]; setp.eq.u32 %p2, %r10, 0; @%p2 bra wait; bra.uni done;
    release: mov.b32 %r10, 9; st.volatile.global.u32 [%d1], %r10;
    done: """
    launch(kernel(body + STORE, 2), [out, flag])
    assert set(out.tolist()) == {9}


def test_a_kernel_that_never_ends_is_stopped() -> None:
    with pytest.raises(EmulatorError, match="no end after 1000 steps"):
        launch(kernel("top: bra top;", 0), [], max_steps=1000)


def test_the_order_of_the_ctas_can_be_shuffled() -> None:
    """A kernel that depends on it gives another result; batches of one CTA each make the order visible."""
    body = "mov.b32 %r11, 1; atom.global.add.u32 %r10, [%d1], %r11;"
    results = []
    for seed in (None, 1, 2):
        out, ticket = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        launch(kernel(body + STORE, 2), [out, ticket], grid=64, block=1, shuffle_seed=seed, batch_lanes=1)
        assert sorted(out.tolist()) == list(range(64))
        results.append(out.tolist())
    assert results[0] == list(range(64)) and results[1] != results[0] and results[2] != results[1]


def test_special_registers_over_three_dimensions() -> None:
    out = torch.zeros(2 * 3 * 4 * 5 * 2, dtype=torch.int32)
    body = """mov.u32 %r10, %tid.y; mov.u32 %r11, %tid.z; mov.u32 %r12, %ctaid.y; mov.u32 %r13, %nctaid.y;
    mov.u32 %r14, %ntid.z;
    mad.lo.u32 %r15, %r12, 2, %r1; mad.lo.u32 %r15, %r15, %r14, %r11; mad.lo.u32 %r15, %r15, 4, %r10;
    mad.lo.u32 %r15, %r15, 5, %r0;
    mov.u32 %r16, %laneid; mov.u32 %r17, %warpid; mad.lo.u32 %r18, %r17, 32, %r16; mad.wide.u32 %d20, %r15, 4, %d0;
    st.global.u32 [%d20], %r18;"""
    from tests.emulator import load

    load(kernel(body, 1)).launch("kernel", (2, 3), (5, 4, 2), [out])
    assert out.tolist() == list(range(40)) * 6
