"""benchmarks/gpu_evidence: how it counts, reads machine code and compares; and what it finds of the GPU kernels.

Nothing here has been run on a GPU: kernels are compiled, and executed by the emulator.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if not (FOLDER / "gpu_evidence").is_dir():
    pytest.skip("benchmarks/ is not shipped with the package", allow_module_level=True)
pytest.importorskip("triton", reason="Triton compiles and emulates the kernels")
sys.path.insert(0, str(FOLDER))

from gpu_evidence import aot, code_pages, compare, counting, cubins, ladder, ours, pages, peers, prediction, sass  # noqa: E402

sys.path.remove(str(FOLDER))

PEERS = os.environ.get("FASTCALIB_PEERS", "")

# By more than eight warps to a multiprocessor, reading 64 (16-bit) or 128 bytes at a time each lane, an H100's memory
# is kept busy: 18 KiB in flight (launch.py).
LEAST_WARPS = 8

LISTING = """
	code for sm_90
		Function : _Z4walkPfi
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E R9, desc[UR4][R2.64] ;           /* 0x0000000402097981 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;       /* 0x0000000402047981 */
        /*0030*/                   MUFU.EX2 R5, R4 ;                      /* 0x0000000400057308 */
        /*0040*/              @!P0 LDG.E.U16 R9, desc[UR4][R2.64] ;       /* 0x0000000402097981 */
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R4 ;        /* 0x0000000402007986 */
        /*0060*/               @P0 BRA 0x20 ;                             /* 0xfffffffc00f00947 */
        /*0070*/                   STL.64 [R1+0x8], R12 ;                 /* 0x0000080c01007387 */
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;       /* 0x0000000402047981 */
        /*0090*/               @P1 BRA 0x20 ;                             /* 0xfffffffc00f00947 */
        /*00a0*/                   EXIT ;                                 /* 0x000000000000794d */
        /*00b0*/                   BRA 0xb0;                              /* 0xfffffffc00fc7947 */
        /*00c0*/                   NOP;                                   /* 0x0000000000007918 */
"""


def test_machine_code_is_read():
    code = sass.functions(LISTING)["_Z4walkPfi"]
    whole = sass.count(code)
    assert whole.loads == {"32": 1, "128": 2, "16": 1} and whole.stores == {"64": 1}
    assert (whole.ex2, whole.spills, whole.instructions) == (1, 1, 12)
    # The inner loop moves more than half of what the outer one does; a branch to itself at the end is no loop.
    assert sass.main_loop(code) == sass.Counts({"128": 1, "16": 1}, {"64": 1}, ex2=1, spills=0, instructions=5)
    assert sass.main_loop(code[:2]) is None


OUT_OF_LINE = """
	code for sm_80
		Function : rare
        /*0000*/                   BRA.DIV ~URZ, 0x90 ;
        /*0010*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P2 BRA 0x10 ;
        /*0040*/                   LDG.E.U16 R9, desc[UR4][R2.64] ;
        /*0050*/               @P0 CALL.REL.NOINC 0x70 ;
        /*0060*/                   BRA 0x40 ;
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   EXIT ;
        /*0090*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00a0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00b0*/                   BRA 0x10 ;
        /*00c0*/                   BRA 0xc0;
"""


def test_code_that_stands_behind_the_end_and_jumps_back_is_no_loop():
    """Textually [0x10, 0xb0] looks like one. A call that is never returned from is a jump, here out of a loop."""
    (code,) = sass.functions(OUT_OF_LINE).values()
    bodies = {span: [i.address for i in body] for span, body in sass.loops(code).items()}
    assert bodies == {(0x10, 0x30): [0x10, 0x20, 0x30], (0x40, 0x60): [0x40, 0x50, 0x60]}
    # three 128-bit loads in no loop, one in the first
    assert sass.main_loop(code) == sass.Counts({"128": 3}, {}, ex2=0, spills=0, instructions=7)
    assert sass.main_loop(code[:8]) == sass.Counts({"32": 1, "128": 1}, {}, ex2=0, spills=0, instructions=3)


def test_a_loop_around_little_is_the_main_one():
    little, much = sass.Counts({"32": 1}, {}, 0, 0, 3), sass.Counts({"32": 1, "128": 4}, {}, 0, 0, 40)
    assert sass.innermost({(0, 100): much, (50, 60): little}) is much
    around = sass.Counts({"32": 80, "128": 4}, {}, 0, 0, 90)
    assert sass.innermost({(0, 100): around, (50, 60): much}) is much, "narrow loads about it are not of the stream"
    assert sass.innermost({}) is None


def test_register_usage_is_read():
    text = " Function _Z4walkPfi:\n  REG:40 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:616\n"
    text += " Function _Z1gv:\n  REG:7 STACK:0 SHARED:0"
    assert sass.usage(text) == {"_Z4walkPfi": (40, 8, 16), "_Z1gv": (7, 0, 0)}


@pytest.mark.parametrize(
    "target, registers, warps, shared, resident",
    [
        ("sm_90", 32, 4, 0, 64),  # as many as there may be
        ("sm_90", 33, 4, 0, 48),  # 40 registers: 51 warps, 12 blocks of 4
        ("sm_90", 96, 4, 64, 20),
        ("sm_90", 128, 16, 0, 16),
        ("sm_90", 129, 16, 0, 0),  # 17 registers too many for a block of 16 warps
        ("sm_90", 32, 1, 0, 32),  # blocks
        ("sm_89", 32, 4, 0, 48),
        ("sm_80", 32, 4, 40 << 10, 16),  # shared memory: 41 KiB of 164
    ],
)
def test_warps_that_fit_a_multiprocessor(target, registers, warps, shared, resident):
    assert prediction.warps_resident(target, registers, warps, shared) == resident


def a_row(**changes) -> counting.Row:
    row = counting.Row(
        "ours, triton", "loss", "bfloat16", 1024, read=1.0, written=0.0, memory_read=1.0, memory_written=0.0, wide=1.0,
        ex2=1.0, instructions=10.0, launches=1, error=0.0,
    )  # fmt: skip
    return replace(row, **changes)


def test_the_three_ceilings():
    """An H100's arithmetic by hand: a second of each resource is a second."""
    read = prediction.predict(a_row(written=1.0), 3_350_000_000, 2)
    assert read.memory == pytest.approx(2.0) and read.asked == pytest.approx(4.0)  # 3.35e9 x 2 bytes, once and twice
    assert (read.least, read.most, read.limit) == (read.memory, read.asked, "memory")
    special = prediction.predict(a_row(ex2=132 * 16.0), 1_700_000, 2)
    assert special.ex2 == pytest.approx(1.0) and special.limit == "ex2"
    issue = prediction.predict(a_row(instructions=132 * 128.0), 1_700_000, 2)
    assert issue.instructions == pytest.approx(1.0) and issue.limit == "instructions"
    ex2, instructions = prediction.budget(2)
    assert ex2 == pytest.approx(2.14, abs=0.01) and instructions == pytest.approx(17.1, abs=0.1)


def test_a_row_that_loses_is_found_and_one_without_a_reason_said_so():
    peer = a_row(who="peer")
    assert compare.losses([a_row(read=1.03, memory_read=1.005)], [peer]) == []
    (worse,) = compare.losses([a_row(read=1.05)], [peer])
    assert worse.measure == "asked" and worse.reason is None
    (worse,) = compare.losses([a_row(memory_written=0.02)], [peer])
    assert worse.measure == "memory"
    (known,) = compare.losses([a_row(job="softmax", read=2.0)], [replace(peer, job="softmax")])
    assert known.reason
    (unknown,) = compare.losses(
        [a_row(job="loss and gradient", memory_read=2.0)], [replace(peer, job="loss and gradient")]
    )
    assert unknown.reason is None, "forward and backward in one launch: the second look may come from a cache"
    assert compare.losses([a_row(read=2.0, vocab=7)], [peer]) == [], "another problem"
    assert compare.losses([a_row(read=2.0, dtype="float32")], [peer]) == []
    # two reads: twice the tolerance, and no more
    two = replace(peer, read=2.0)
    assert compare.losses([a_row(read=2.06)], [two]) == [] and compare.losses([a_row(read=2.08)], [two])
    shown = pages._losses([worse], True)
    assert "No reason is known" in shown and "peer: 1.00" in shown


def test_the_ladder_names_tests_that_exist_and_cells_say_how_they_went(monkeypatch, tmp_path):
    assert ladder.missing() == []
    kernel = replace(ladder.KERNELS[0], emulated=("test_statistics", "test_x"))
    monkeypatch.setattr(ladder, "KERNELS", (kernel,))
    assert ladder.missing() == ["test_triton_emulated.test_x"]
    path = tmp_path / "junit.xml"
    case = '<testcase classname="tests.test_triton_emulated" name="{}">{}</testcase>'
    path.write_text(
        "<testsuites><testsuite>"
        + case.format("test_statistics[sm90-a]", "")
        + case.format("test_statistics[sm90-b]", "<failure/>")
        + case.format("test_statistics[sm80-a]", "<skipped/>")
        + case.format("test_softmax[sm90]", "")
        + "</testsuite></testsuites>"
    )
    outcomes = ladder.read([path])
    assert ladder.emulated(kernel, 90, outcomes) == "1 passed, 1 failed"
    assert ladder.emulated(kernel, 80, outcomes) == "1 skipped"
    assert ladder.interpreted(kernel, outcomes) == "not run for this page"
    assert ladder.grid(outcomes) == [] and "were not run" in pages._grid(outcomes)
    outcomes["test_ranks", "test_x[triton-sm80-1]"] = "passed"
    outcomes["test_ranks", "test_x[triton-sm90-1]"] = "skipped"
    assert ladder.grid(outcomes) == [["tests/test_ranks.py", "1 skipped", "1 passed"]]
    assert "| tests/test_ranks.py | 1 skipped | 1 passed |" in pages._grid(outcomes)


def measured(job: str, backend: str, dtype: torch.dtype, vocab: int, rows: int = 2) -> counting.Row:
    (task,) = [task for task in ours.tasks() if task.job == job]
    row = ours.measure(task, backend, *counting.problem(rows, vocab, dtype))
    assert isinstance(row, counting.Row), row
    return row


def test_bytes_ex2_and_errors_are_counted():
    """A forward and a backward of known traffic, of rows of two segments; the backward does not count its forward."""
    loss = measured("loss", "triton", torch.bfloat16, 33_000)
    assert loss.memory_read == pytest.approx(1.0, abs=0.01) and loss.read == pytest.approx(1.0, abs=0.02)
    assert loss.written < 0.01 and loss.launches == 2 and loss.error < 2e-6
    gradient = measured("gradient", "triton", torch.bfloat16, 33_000)
    assert gradient.memory_read == pytest.approx(1.0, abs=0.01) and gradient.written == pytest.approx(1.0, abs=0.01)
    assert 1.0 <= gradient.ex2 < 1.3 and gradient.launches == 3
    both = measured("loss and gradient", "triton", torch.bfloat16, 33_000)
    assert both.read == pytest.approx(2.0, abs=0.02) and both.memory_read == pytest.approx(1.0, abs=0.01)
    assert both.memory_written == pytest.approx(1.0, abs=0.01) and both.launches == 1 and both.error < 1e-3
    if not ours.emulated_cuda.why_not():
        both = measured("loss and gradient", "cuda", torch.bfloat16, 33_000)
        assert both.launches == 1 and both.error < 1e-3
        # partial states count; of three segments the second look finds two in shared memory and one in registers
        assert both.memory_read + both.memory_written == pytest.approx(2.0, abs=0.02) and both.read < 1.1
    softmax = measured("softmax", "triton", torch.bfloat16, 33_000)
    assert softmax.read == pytest.approx(2.0, abs=0.01), "a second look counts where it is asked for"
    assert softmax.memory_read == pytest.approx(1.0, abs=0.01), "and not where a cache may serve it"


def check_compiled(kernels: list[aot.Kernel]) -> None:
    """No spills, 128-bit loads in the main loop, as many ex2 as logits, registers for as many warps as memory needs."""
    for k in kernels:
        what = f"{k.kernel}, {k.target}, {k.dtype}, V={k.vocab}: {k}"
        if k.kernel.startswith("linear_statistics_tiles"):
            # the sums of the rows wait in local memory while a product is made, where registers are short of both
            assert k.loop is not None and k.loop.products >= 4, what
            # Blackwell's loop fetches a pointer or two from there: the logits of 128 by 128 are worth more
            assert k.loop.spills <= (4 if k.target == "sm_100" else 0), what
            assert k.spills == 0 or k.target != "sm_90" or "of a layer" not in k.kernel, what
        else:
            assert k.spills == 0, what
        assert k.registers <= (512 if k.target.startswith("gfx") else 255), what
        if k.kernel not in code_pages.MAIN:
            continue
        assert k.loop is None or k.loop.spills == 0, what
        if k.target.startswith("gfx"):
            continue  # loads single elements on AMD (docs/gpu-evidence.md); only that it compiles is claimed
        assert code_pages.resident(k) >= LEAST_WARPS, what
        if k.vocab % 8 == 0:
            assert code_pages.loads_of_main_loop(k).get("128", 0) > 0, what
        if (each := code_pages.per_logit(k)) is not None and k.dtype != "float32":
            # one each, and one to move 32 sums to a new maximum; the fused loss looks twice, and moves two more sums
            assert each[0] <= (2 + 3 / 32 if k.kernel.startswith("fused_rows") else 1 + 1 / 32), what


def test_kernels_compile_without_spills_and_load_128_bits_at_a_time():
    kernels = aot.table(("sm_90",), ("bfloat16",), (128_256,), ("statistics",))
    assert not [k for k in kernels if k.spills]
    check_compiled(kernels)
    (forward,) = [k for k in kernels if k.kernel == "statistics_segments"]
    assert forward.loop is not None and forward.loop.loads == {"128": 4} and forward.loop.ex2 == 33
    assert code_pages.per_logit(forward) == (33 / 32, forward.loop.instructions / 32)
    (gradient,) = [k for k in kernels if k.kernel == "statistics_backward_gradient"]
    assert gradient.loop is not None and gradient.loop.stores == {"128": 4} and gradient.loop.ex2 == 32
    shown = code_pages.compiled(kernels)
    assert "| statistics_segments | 128,256 | 4 x 128 |" in shown and "No kernel spills" in shown


@pytest.mark.prove
def test_the_tiles_of_a_layer_keep_everything_in_registers_on_an_h100():
    kernels = aot.table(("sm_90",), ("bfloat16",), (128_256,), ("linear",))
    check_compiled(kernels)
    (tiles,) = [k for k in kernels if k.kernel == "linear_statistics_tiles of a layer"]
    assert tiles.loop is not None and (tiles.spills, tiles.loop.products) == (0, 8)
    shown = code_pages.compiled(kernels)
    assert "| linear_statistics_tiles of a layer | bfloat16 | 255, 0, 96 KiB |" in shown
    assert "loops that multiply there are none" in shown


@pytest.mark.prove
@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_kernel_compiles_for_every_target(target):
    kernels = aot.table((target,))
    assert len({(k.kernel, k.dtype, k.vocab) for k in kernels}) == len(kernels) >= 100
    assert {*code_pages.MAIN} <= {k.kernel for k in kernels}
    check_compiled(kernels)


@pytest.mark.skipif(cubins.extension() is None, reason="the extension was built without CUDA kernels: make build-cuda")
@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=() if t == "sm_90" else pytest.mark.prove) for t in cubins.TARGETS]
)
def test_cuda_kernels_load_128_bits_at_a_time_and_do_not_spill(target):
    kernels = cubins.table((target,))
    assert len(kernels) > 15
    for k in kernels:
        what = f"{k.kernel}, {k.target}: {k}"
        assert k.code.spills == 0, what
        if any(name in k.kernel for name in ("sweep_kernel", "write_gradient", "fused_rows")):
            # statistics take one segment a block: those loads stand in no loop
            assert k.registers <= 128 and k.code.loads.get("128", 0) >= 16, what


@pytest.mark.prove
@pytest.mark.skipif(not PEERS, reason="FASTCALIB_PEERS names no folder of peers (benchmarks/gpu_evidence/peers.py)")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=counting.dtype_name)
@pytest.mark.parametrize("vocab", [128_256, 50_257])
def test_ours_moves_no_more_bytes_than_any_peer_but_where_the_page_says_so(vocab, dtype):
    versions = peers.installed(Path(PEERS))
    assert any(versions.values()), f"no peer in {PEERS}: {versions}"
    logits, target = counting.problem(4, vocab, dtype)
    theirs = [
        peers.measure(who, job, run, want, logits, target)
        for package, jobs in peers.PEERS.items() if versions[package] for who, job, run, want in jobs()
    ]  # fmt: skip
    mine = [
        ours.measure(task, backend, logits, target)
        for task in ours.tasks() if not task.alone for backend in task.backends
    ]  # fmt: skip
    ran = [row for row in mine if isinstance(row, counting.Row)]
    peer_rows = [row for row in theirs if isinstance(row, counting.Row)]
    assert len(peer_rows) >= 4 and len(ran) >= 5
    assert [loss for loss in compare.losses(ran, peer_rows) if loss.reason is None] == []
