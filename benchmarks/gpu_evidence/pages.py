"""The page of report.py, section by section."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import triton as triton_package

from . import ladder, prediction
from .aot import Kernel
from .code_pages import compiled, compiled_cuda
from .compare import Loss
from .counting import Failure, Row
from .cubins import CudaKernel
from .tables import table

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED_LOGITS = 8192 * 151_936
JOBS = ("loss", "loss and gradient", "gradient", "softmax", "softmax gradient")

SEPARATE = (
    "FILE: what `aot.py --json` printed, and junit files of the ladder's tests, from runs beforehand on the same "
    "kernels; without\nthem the script compiles and tests by itself. "
)
SANITIZER = """\
## Rung 3: triton-viz

triton-viz 3.0 imports with triton 3.7.1 and finds a planted read past the end of a simple kernel. It cannot follow most
of ours, which is why rung 3 is empty for them; each was tried at V=36 in a process of its own:

| kernel | what triton-viz says |
|---|---|
| ranks `_finish_compared` | no access out of bounds; one result too few is found |
| ranks `_place` | nothing, but also nothing when it is told that rows are longer than they are: it does not see the loads of a loop whose bounds are tensors |
| ranks `_compare`, softmax `_write` | `AttributeError: 'SymbolicExprDataWrapper' object has no attribute 'view'`: a pointer made an integer, to find the first 16-byte boundary |
| softmax `_rows`, `_segments` | `AttributeError: ... no attribute 'squeeze'`: a loop whose bound is a tensor |
| softmax `_merge` | `TypeError: unsupported operand type(s) for *: 'float' and 'SymbolicExprDataWrapper'` |
| statistics `_segments` without an index | `TypeError: 'SymbolicExprDataWrapper' object is not subscriptable`: `tl.split` |
| statistics `_segments` with an index (bad ids) | no answer in 200 s: z3 simplifies an address that depends on loaded ids |
| statistics `_finish` | `NotImplementedError: Concretize for op min is not implemented` |
| ranks `_finish` | `ValueError: Nonrepresentable integer 18446744073709551616`: a search by doubling |

`tests/test_triton_viz.py` (marked prove) keeps the one that works, and planted faults, under test. Out-of-bounds
accesses of all kernels, ragged V and bad ids included, are what the emulator of rung 2 reports for each launch.
"""  # noqa: E501

LIMITS = """\
## What this page does not show

- **No kernel here has run on a GPU.** The emulator executes PTX by its specification, as we read it; it has not been
  compared with a real GPU, and what ptxas makes of the PTX is compiled and counted but never executed.
- Bytes are those of a launch by itself: no cache is simulated. "From memory" supposes that a line that was read is
  still there when the same launch looks again, "asked for" that it never is; the truth is between.
- Instructions are PTX instructions, counted for each thread, its guard true or not. Not counted are lanes that wait for
  others of their warp, the sorting of thresholds (`torch.sort`) and the filling of counters with zeros, which are
  torch's own kernels, and the time that a launch takes.
- Predictions have three ceilings and no latency. A kernel may miss all of them.
"""


def page(
    *,
    given: str,
    versions: dict[str, str | None],
    rows: int,
    theirs: Sequence[Row | Failure],
    same: Sequence[Row | Failure],
    alone: Sequence[Row | Failure],
    published: Sequence[Row],
    triton: Sequence[Kernel],
    cuda: Sequence[CudaKernel],
    outcomes: ladder.Outcomes,
    losses: Sequence[Loss],
) -> str:
    sections = [
        _head(given, versions),
        _ladder(outcomes, bool(triton), bool(cuda)),
        _side_by_side(versions, rows, theirs, same),
        _losses(losses, any(isinstance(result, Row) for result in theirs)),
        _alone(alone),
        _predicted(published),
        compiled(triton),
        compiled_cuda(cuda),
        SANITIZER,
        LIMITS,
    ]
    return "\n".join(section.rstrip() + "\n" for section in sections)


def _head(given: str, versions: dict[str, str | None]) -> str:
    peers = ", ".join(f"{name} {version or '(not installed)'}" for name, version in versions.items())
    return f"""\
# The GPU kernels, without a GPU: evidence

**Not yet run on a GPU.** Everything below comes from machines that have none: PTX executed by an emulator on a CPU,
machine code that compilers made and nobody ran, and a prediction. This page is written by a script; do not edit it.

    pip install --no-deps --target DIR liger-kernel==0.8.5 fla-core==0.6.0 einops==0.8.2 unsloth==2026.10.9
    make build-cuda
    .venv/bin/python benchmarks/gpu_evidence/report.py --packages DIR{given}

{SEPARATE if given else ""}Made with torch {torch.__version__}, triton {triton_package.__version__}, Python {platform.python_version()}
on {_machine()}. Peers: {peers}, kept outside of the project's environment.
"""  # noqa: E501


def _machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return f"{len(names)} CPU cores ({names[0]}), no GPU" if names else f"{platform.machine()}, no GPU"


def _ladder(outcomes: ladder.Outcomes, triton: bool, cuda: bool) -> str:
    lines = [
        [
            kernel.name,
            "not yet run on a GPU",
            ladder.emulated(kernel, 90, outcomes),
            ladder.emulated(kernel, 80, outcomes),
            "see below" if kernel.interpreted else "does not apply",
            ladder.interpreted(kernel, outcomes),
            "compiled" if (triton if kernel.interpreted else cuda) else "not compiled for this page",
        ]
        for kernel in ladder.KERNELS
    ]
    head = [
        "kernel",
        "1 real GPU",
        "2 emulator sm_90",
        "2 emulator sm_80",
        "3 triton-viz",
        "4 interpreter",
        "5 compiled",
    ]
    return f"""\
## The ladder of evidence

Tests that ran for this page, against float64, strict about bounds, alignment, races and uninitialised reads on rung 2
(tests/test_triton_*emulated.py, tests/test_cuda_*emulated.py, tests/test_triton_*interpret.py); `make prove` runs all.

{table(head, lines)}

{_grid(outcomes)}
"""


def _grid(outcomes: ladder.Outcomes) -> str:
    lines = ladder.grid(outcomes)
    if not lines:
        return (
            "The CPU's own tests on the Triton kernels were not run for this page:\n"
            '`FASTCALIB_TEST_BACKENDS="triton-sm80 triton-sm90" pytest`, the second half of `make prove`.'
        )
    return f"""\
The CPU's own tests with the Triton kernels in the emulator, the second half of `make prove`. Left out are float64,
which the kernels do not take, threads, and what would take hours (the Makefile names it); skipped are bad ids, which
raise an error on a CPU and give NaN on a GPU, and what asks for float64 on the way:

{table(["file", "emulator sm_90", "emulator sm_80"], lines)}"""


def _row(result: Row | Failure) -> list[str]:
    if isinstance(result, Failure):
        return [result.who, result.dtype, f"not run: {result.reason}", *[""] * 6]
    return [
        result.who, result.dtype, f"{result.read:.2f} + {result.written:.2f}",
        f"{result.memory_read:.2f} + {result.memory_written:.2f}", f"{result.wide:.0%}", f"{result.ex2:.2f}",
        f"{result.instructions:.1f}", str(result.launches), f"{result.error:.0e}",
    ]  # fmt: skip


HEAD = ["who", "dtype", "asked for: read + written", "from memory", "128-bit loads", "ex2", "instructions", "launches",
        "error"]  # fmt: skip


def _side_by_side(
    versions: dict[str, str | None], rows: int, theirs: Sequence[Row | Failure], same: Sequence[Row | Failure]
) -> str:
    parts = [
        f"""\
## Beside the peers, at the same jobs

{rows} rows of logits in the emulator at sm_90, as one launch of many rows would treat each. Bytes are multiples of the
logits' own size: "asked for" counts a second look at a row again, "from memory" counts each byte once a launch, as if a
cache served the rest. "128-bit loads" is the share of bytes asked for of the logits that came in them. ex2 and PTX instructions are for each logit; the error is the largest against float64. Our loss
computes every field of `TokenStatistics` on the way (entropy, confidence, moments, argmax), theirs the loss: that is
where our instructions go. Triton does not load unaligned rows (V = 50,257) in 128 bits where they are summed; the CUDA
kernels do."""  # noqa: E501
    ]
    absent = [[name, "", "not installed", *[""] * 6] for name, version in versions.items() if version is None]
    for vocab in sorted({result.vocab for result in same}, reverse=True):
        for job in JOBS:
            found = [r for r in (*same, *theirs) if (r.job, r.vocab) == (job, vocab)]
            lines = [_row(result) for result in sorted(found, key=lambda r: r.dtype)]
            parts.append(f"### {job}, V = {vocab:,}\n\n{table(HEAD, [*lines, *absent])}")
    return "\n\n".join(parts)


def _losses(losses: Sequence[Loss], compared: bool) -> str:
    if not compared:
        return "## Rows where ours moves more\n\nNo peer was installed, so nothing was compared."
    head = "## Rows where ours moves more\n\n"
    if not losses:
        return head + "None: ours asks for no more bytes than any peer, nor needs more from memory, at every row above."
    lines = [
        [
            loss.ours.job, loss.ours.dtype, f"{loss.ours.vocab:,}",
            "asked for" if loss.measure == "asked" else "from memory",
            f"{loss.ours.who.removeprefix('ours, ')}: {getattr(loss.ours, loss.measure):.2f}",
            f"{loss.peer.who}: {getattr(loss.peer, loss.measure):.2f}",
        ]
        for loss in losses
    ]  # fmt: skip
    reasons = dict.fromkeys(
        f"- {loss.ours.job}: {loss.reason or 'No reason is known: this is a defect.'}" for loss in losses
    )
    return (
        head
        + "At every other row ours asks for no more than any peer, and needs no more from memory (to within 3.5% of "
        "each read asked for, which lines just read serve again, and 1% of the logits from memory: partial states).\n\n"
        + table(["job", "dtype", "V", "measure", "ours", "peer"], lines)
        + "\n\n"
        + "\n".join(reasons)
    )


def _alone(alone: Sequence[Row | Failure]) -> str:
    parts = [
        """\
## What only ours does

The same counts in bfloat16. Thresholds are the logits of random tokens, the worst case for ranks: nearly every logit
exceeds the lowest of them and must be placed. "Likely" takes every fourth of the 1,024 highest, as sets of valid tokens
rather are: in CUDA C++ a logit below the lowest then costs a comparison and no more; Triton's program places a whole
tile of logits where one of them passes, and gains nothing. With M = 4,096 the thresholds, their order and their results
are a good part of the bytes."""
    ]
    for vocab in sorted({result.vocab for result in alone}, reverse=True):
        lines = [[result.job, *_row(result)[:1], *_row(result)[2:]] for result in alone if result.vocab == vocab]
        parts.append(f"### V = {vocab:,}\n\n{table(['job', HEAD[0], *HEAD[2:]], lines)}")
    return "\n\n".join(parts)


def _predicted(published: Iterable[Row]) -> str:
    lines = []
    for row in published:
        p = prediction.predict(row, PUBLISHED_LOGITS, 2)
        span = f"{p.least:.2f}" if p.most - p.least < 0.05 else f"{p.least:.2f} to {p.most:.2f}"
        lines.append(
            [row.job, row.who.removeprefix("ours, "), span, p.limit, f"{p.memory:.2f}", f"{p.asked:.2f}",
             f"{p.instructions:.2f}", f"{p.ex2:.2f}"]
        )  # fmt: skip
    head = ["job", "ours", "predicted ms", "ceiling", "from memory", "asked for", "instructions", "ex2"]
    ex2, instructions = prediction.budget(2)
    return f"""\
## Predicted time on an H100 SXM: a prediction, not a measurement; not yet run on a GPU

8,192 x 151,936 logits in bfloat16 (2.49 GB), from the counts of one such row in the emulator:

    memory        bytes / 3.35 TB/s
    instructions  PTX instructions / (132 SMs x 4 schedulers x 32 lanes x 1.7 GHz)
    ex2           ex2 / (132 SMs x 16 a cycle x 1.7 GHz)
    predicted     the largest of them, in ms; a range where a second look may or may not be served by L2

1.7 GHz is an assumption, below the 1.98 GHz of the data sheet's peak figures. One read of bfloat16 logits then leaves
{ex2:.1f} ex2 and {instructions:.0f} instructions for each logit before memory is no longer the ceiling; above that, a
row of this table is limited by arithmetic, whatever its bytes. PTX is not what runs: the machine code of the main loop
of statistics, for one, has fewer instructions for each logit than its PTX (rung 5, below).

{table(head, lines)}

Published for this size on that GPU: TRL's prototype for log-probability and entropy, one read, 0.89 ms (83.5% of peak).
Floors: one read 0.74 ms, read and write 1.49, forward and backward 2.23. Others, at other sizes, in fractions of the
peak bandwidth: quack softmax 90%, torch.compile 56%, Liger 60 to 90%, Fast-LLM cross-entropy 69 to 96%. Predictions
here are ceilings and those are measurements: they do not compare like with like.
"""
