"""What is not implemented is refused by name and line, and only where it would run."""

from __future__ import annotations

import pytest
import torch

from tests.emulator import Unsupported, load
from tests.emulator.parser import parse

from .snippets import HEADER, kernel, launch


@pytest.mark.parametrize(
    "code",
    [
        "wgmma.fence.sync.aligned;",
        "cp.async.bulk.commit_group;",
        "addc.u32 %r10, %r11, %r12;",
        "add.cc.u32 %r10, %r11, %r12;",
        "add.rn.relu.oob.f16 %h1, %h2, %h3;",
        "ld.global.frobnicate.u32 %r10, [%d0];",
        "cvt.rm.bf16.s32 %h1, %r10;",
        "cvt.rz.f32.s64 %r10, %d10;",
        "shfl.bfly.b32 %r10, %r11, 1, 31;",
        "atom.global.frob.add.u32 %r10, [%d0], %r11;",
        "tex.2d.v4.f32.f32 {%r10, %r11, %r12, %r13}, [%d0, {%r14, %r15}];",
        "mul.frob.f32 %r10, %r11, %r12;",
        "min.f32 %r10, %r11, %r12, %r13;",
        "call function, (%r10);",
        "brx.idx %r10, targets;",
        "fmafoo.rn.f32 %r10, %r10, %r10, %r10;",
        "mov.u32 %r10, %nope1;",
    ],
)
def test_an_unknown_instruction_is_named_where_it_is_reached(code: str) -> None:
    name = code.split()[0].rstrip(";").split(".")[0]
    with pytest.raises(Unsupported, match=rf"line \d+ `{name}"):
        launch(kernel(code, 1), [torch.zeros(4)])
    launch(kernel(f"bra.uni over; {code} over:", 1), [torch.zeros(4)])  # never reached, so no harm


def test_too_wide_or_too_narrow_registers_are_refused() -> None:
    for code in ("mov.u64 %r10, %d0;", "add.u64 %d10, %r10, %r11;"):
        with pytest.raises(Unsupported, match="register"):
            launch(kernel(code, 1), [torch.zeros(4)])


def test_unknown_directives() -> None:
    with pytest.raises(Unsupported, match="directive"):
        parse(kernel(".frobnicate 3;", 0))


def test_wrong_arguments_say_what_is_wanted() -> None:
    module = load(kernel("", 1))
    with pytest.raises(ValueError, match="kernel takes 1 arguments, got 2"):
        module.launch("kernel", (1,), (1,), [1, 2])
    with pytest.raises(KeyError, match="no kernel other in the PTX; there are kernel"):
        module.launch("other", (1,), (1,), [1])
    with pytest.raises(ValueError, match="is on meta"):
        module.launch("kernel", (1,), (1,), [torch.zeros(1, device="meta")])


def test_the_parser_reads_what_compilers_write() -> None:
    ptx = f"""{HEADER}
    // a comment; with }} and {{
    .extern .shared .align 16 .b8 dynamic[];
    .global .align 8 .u64 words[2] = {{0xFFFFFFFFFFFFFFFF, -2}}; /* another
    one */ .global .align 1 .b8 text[4] = {{104, 105}};
    .visible .entry first(.param .u64 .ptr .global .align 16 first_param_0, .param .align 4 .b8 first_param_1[12],
        .param .u32 first_param_2)
    .maxntid 128, 1, 1
    .minnctapersm 2
    {{
        .reg .pred %p<3>; .reg .b32 %r<5>, %extra;
        .shared .align 8 .b8 fixed[24];
        .loc 1 5 0
        $L__start:
        .pragma "nounroll";
        mov.b32 %extra, 0f3F800000;
        @!%p1 ld.shared.v2.b32 {{%r1, _}}, [fixed+-8];
        setp.lt.s32 %p1|%p2, %r1, -5;
        @%p2 bra.uni $L__start;
        ret;
    }}
    .section .debug_abbrev {{ .b8 1 }}
    """
    module = parse(ptx)
    first = module.kernels["first"]
    assert [(v.offset, v.size) for v in first.parameters.values()] == [(0, 8), (8, 12), (20, 4)]
    assert (first.shared["fixed"].offset, first.shared["dynamic"].offset, first.shared_bytes) == (0, 32, 32)
    assert module.variables["words"][1].view("u8").tolist() == [2**64 - 1, 2**64 - 2]
    assert module.variables["text"][1].tolist() == [104, 105, 0, 0]
    load_instruction = first.instructions[1]
    assert (load_instruction.name, load_instruction.modifiers) == ("ld", ("shared", "v2", "b32"))
    assert ptx.splitlines()[load_instruction.line - 1].strip().startswith("@!%p1 ld.shared")
    assert first.target(first.instructions[3], "$L__start") == 0
