"""Warp-wide instructions against plain loops over lanes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulator import EmulatorError

from .snippets import apply, kernel, launch

VALUES = np.random.default_rng(0).integers(0, 1000, 96).astype(np.uint32)
SEGMENTS = {32: 0x1F, 16: 0x101F, 8: 0x181F}  # width of a segment -> control operand of up with clamp 0, others with 31


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("amount", [1, 3, 7, 16])
def test_shuffle(mode: str, width: int, amount: int) -> None:
    """As CUDA's __shfl_*_sync(mask, value, amount, width) is compiled."""
    control = ((32 - width) << 8) | (0 if mode == "up" else 31)
    code = f"shfl.sync.{mode}.b32 %x|%p1, %a, {amount}, {control}, -1; selp.u32 %y, 1, 0, %p1;"
    got, inside = apply(code, [("u32", VALUES)], ["u32", "u32"], block=96)
    for position in range(96):
        warp, lane = divmod(position, 32)
        first = lane // width * width
        if mode == "up":
            source, fine = lane - amount, lane - amount >= first
        elif mode == "down":
            source, fine = lane + amount, lane + amount < first + width
        elif mode == "bfly":
            source, fine = lane ^ amount, (lane ^ amount) < first + width
        else:
            source, fine = first + amount % width, True
        assert inside[position] == fine
        assert got[position] == VALUES[32 * warp + (source if fine else lane)]


def test_shuffle_with_a_lane_of_each_threads_choice() -> None:
    source = np.random.default_rng(1).integers(0, 32, 64).astype(np.uint32)
    (got,) = apply("shfl.sync.idx.b32 %x, %a, %b, 31, -1;", [("u32", VALUES[:64]), ("u32", source)], ["u32"])
    assert got.tolist() == [VALUES[i // 32 * 32 + source[i]] for i in range(64)]


def test_votes() -> None:
    a = np.concatenate([np.arange(32) % 3 == 0, np.ones(32), np.zeros(32)]).astype(np.uint32)
    code = "setp.ne.u32 %p1, %a, 0; vote.sync.ballot.b32 %x, %p1, -1; vote.sync.all.pred %p2, %p1, -1;"
    code += "vote.sync.any.pred %p3, !%p1, -1; vote.sync.uni.pred %p4, %p1, -1;"
    code += "selp.u32 %y, 1, 0, %p2; @%p3 add.u32 %y, %y, 2; @%p4 add.u32 %y, %y, 4;"
    ballot, flags = apply(code, [("u32", a)], ["u32", "u32"], block=96)
    expected = [sum(int(bit) << i for i, bit in enumerate(a[32 * w : 32 * w + 32].tolist())) for w in range(3)]
    assert ballot[::32].tolist() == expected and (ballot.reshape(3, 32) == ballot[::32, None]).all()
    assert flags[::32].tolist() == [2, 1 + 4, 2 + 4]


def test_votes_of_the_lanes_whose_guard_holds() -> None:
    code = "mov.b32 %x, 99; setp.lt.u32 %p1, %a, 8; setp.ge.u32 %p2, %a, 4; @%p1 vote.sync.ballot.b32 %x, %p2, 255;"
    (got,) = apply(code, [("u32", np.arange(32, dtype=np.uint32))], ["u32"])
    assert got.tolist() == [0xF0] * 8 + [99] * 24


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add.s32", np.sum),
        ("min.s32", np.min),
        ("max.s32", np.max),
        ("min.u32", None),
        ("and.b32", np.bitwise_and.reduce),
        ("or.b32", np.bitwise_or.reduce),
        ("xor.b32", np.bitwise_xor.reduce),
    ],
)
def test_reductions(name: str, function: object) -> None:
    values = VALUES.astype(np.int32) - 500
    (got,) = apply(f"redux.sync.{name} %x, %a, -1;", [("s32", values)], ["s32"], block=96)
    for warp in range(3):
        row = values[32 * warp : 32 * warp + 32]
        expected = row.view(np.uint32).min().view(np.int32) if function is None else function(row)  # type: ignore[operator]
        assert (got[32 * warp : 32 * warp + 32] == expected).all()


def test_match() -> None:
    values = VALUES[:64] % 5
    values[32:] = 3
    code = "match.any.sync.b32 %x, %a, -1; match.all.sync.b32 %y|%p1, %a, -1; selp.u32 %z, 1, 0, %p1;"
    anybody, everybody, same = apply(code, [("u32", values)], ["u32", "u32", "u32"])
    for lane in range(64):
        row = values[lane // 32 * 32 : lane // 32 * 32 + 32]
        assert anybody[lane] == sum(1 << i for i in range(32) if row[i] == values[lane])
    assert everybody[:32].any() == 0 and (everybody[32:] == 2**32 - 1).all() and same.tolist() == [0] * 32 + [1] * 32


def test_active_mask_and_membermask_in_a_divergent_branch() -> None:
    """Lanes 0 to 7 shuffle among themselves while the others do not take part."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """mov.b32 %r10, 0; setp.ge.u32 %p1, %r0, 8; @%p1 bra done;
    activemask.b32 %r11; shfl.sync.bfly.b32 %r12, %r0, 1, 31, 255; mad.lo.u32 %r10, %r11, 100, %r12;
    done: mad.wide.u32 %d20, %r2, 4, %d0; st.global.u32 [%d20], %r10;"""
    launch(kernel(body, 1), [out])
    assert out.tolist() == [25500 + (i ^ 1) for i in range(8)] + [0] * 24


def test_lanes_that_parted_meet_again_before_a_shuffle() -> None:
    """The odd lanes take a longer way round; the shuffle behind both ways sees all 32."""
    out = torch.zeros(64, dtype=torch.int32)
    body = """and.b32 %r10, %r0, 1; setp.eq.u32 %p1, %r10, 0; mov.b32 %r11, 5; @%p1 bra meet;
    mov.b32 %r12, 0; again: add.u32 %r12, %r12, 1; setp.lt.u32 %p2, %r12, %r0; @%p2 bra again; add.u32 %r11, %r11, %r12;
    meet: redux.sync.add.u32 %r13, %r11, -1; mad.wide.u32 %d20, %r2, 4, %d0; st.global.u32 [%d20], %r13;"""
    launch(kernel(body, 1), [out], block=64)
    odd = [sum(range(1 + 32 * w, 32 + 32 * w, 2)) for w in range(2)]
    assert out.tolist() == [160 + odd[0]] * 32 + [160 + odd[1]] * 32


def test_a_shuffle_that_comes_first_in_the_code_waits_for_lanes_on_a_later_path() -> None:
    """The even lanes are at the shuffle at once; the odd ones come back to it from behind."""
    out = torch.zeros(32, dtype=torch.int32)
    body = """and.b32 %r10, %r0, 1; setp.ne.u32 %p1, %r10, 0; mov.b32 %r11, 1; @%p1 bra odd;
    meet: redux.sync.add.u32 %r12, %r11, -1; bra.uni done;
    odd: mov.b32 %r11, 10; bra.uni meet;
    done: mad.wide.u32 %d20, %r2, 4, %d0; st.global.u32 [%d20], %r12;"""
    launch(kernel(body, 1), [out])
    assert out.tolist() == [16 + 160] * 32


def test_elect() -> None:
    (leader, elected) = apply("elect.sync %x|%p1, -1; selp.u32 %y, 1, 0, %p1;", [("u32", VALUES[:64])], ["u32", "u32"])
    assert (leader == 0).all() and np.flatnonzero(elected).tolist() == [0, 32]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "setp.lt.u32 %p1, %r0, 8; @!%p1 bra done; shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1; done: bar.sync 0;",
            "do not arrive",
        ),
        ("shfl.sync.bfly.b32 %r10, %r0, 1, 31, 255;", "membermask does not name"),
        ("setp.lt.u32 %p1, %r0, 8; @!%p1 bra done; shfl.sync.down.b32 %r10, %r0, 8, 31, 255; done:", "takes no part"),
    ],
)
def test_wrong_membermasks_are_reported(body: str, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        launch(kernel(body, 0), [])


def test_matrix_fragments() -> None:
    """ldmatrix, its transpose, and a product of m16n8k16 against NumPy."""
    a, b = (torch.randn(shape).bfloat16() for shape in ((16, 16), (16, 8)))
    out = torch.zeros(16, 8)
    body = """mov.u32 %r10, buffer; mad.wide.u32 %d20, %r0, 16, %d0; ld.global.v4.u32 {%r20, %r21, %r22, %r23}, [%d20];
    mad.lo.u32 %r11, %r0, 16, %r10; st.shared.v4.u32 [%r11], {%r20, %r21, %r22, %r23};
    setp.lt.u32 %p1, %r0, 16; mad.wide.u32 %d21, %r0, 16, %d1; @%p1 ld.global.v4.u32 {%r20, %r21, %r22, %r23}, [%d21];
    @%p1 st.shared.v4.u32 [%r11+512], {%r20, %r21, %r22, %r23};
    bar.sync 0;
    and.b32 %r12, %r0, 15; shl.b32 %r12, %r12, 5; shr.u32 %r13, %r0, 4; mad.lo.u32 %r12, %r13, 16, %r12;
    add.u32 %r12, %r12, %r10;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r30, %r31, %r32, %r33}, [%r12];
    and.b32 %r14, %r0, 15; mad.lo.u32 %r14, %r14, 16, %r10;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r40, %r41}, [%r14+512];
    mov.b32 %r50, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
      {%r51, %r52, %r53, %r54}, {%r30, %r31, %r32, %r33}, {%r40, %r41}, {%r50, %r50, %r50, %r50};
    shr.u32 %r15, %r0, 2; and.b32 %r16, %r0, 3; mad.lo.u32 %r17, %r15, 8, 0; mad.lo.u32 %r17, %r16, 2, %r17;
    mad.wide.u32 %d22, %r17, 4, %d2; st.global.v2.f32 [%d22], {%r51, %r52};
    st.global.v2.f32 [%d22+256], {%r53, %r54};"""
    launch(kernel(body, 3, shared=1024), [a, b, out])
    assert torch.allclose(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)
