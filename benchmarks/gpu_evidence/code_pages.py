"""The sections of the page on compiled code."""

from __future__ import annotations

from collections.abc import Sequence

from . import prediction
from .aot import Kernel
from .cubins import CudaKernel
from .sass import Counts
from .tables import table


def _widths(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} x {width}" for width, n in sorted(counts.items(), key=lambda item: -int(item[0]))) or "-"


def resident(kernel: Kernel) -> int:
    return prediction.warps_resident(kernel.target, kernel.registers, kernel.warps, kernel.shared)


def loads_of_main_loop(kernel: Kernel) -> dict[str, int]:
    return kernel.loop.loads if kernel.loop else {}


def per_logit(kernel: Kernel) -> tuple[float, float] | None:
    """ex2 and instructions of the machine code for each logit of the main loop, where the loop loads logits alone."""
    size = 4 if kernel.dtype == "float32" else 2
    if kernel.loop is None or kernel.kernel.startswith("ranks"):
        return None
    own = {str(8 * size), "128"}
    streams = 2 if kernel.kernel.startswith("softmax_backward") else 1
    loaded = sum(int(width) // 8 * number for width, number in kernel.loop.loads.items() if width in own)
    if "128" in kernel.loop.loads:  # then what is narrower is no logit
        loaded = 16 * kernel.loop.loads["128"]
    logits = loaded / size / streams
    return (kernel.loop.ex2 / logits, kernel.loop.instructions / logits) if logits >= 8 else None


MAIN = (
    "statistics_segments", "statistics_segments with ranks", "statistics_backward_gradient", "fused_rows",
    "fused_rows with sum_logits", "ranks_compare", "ranks_histogram_place", "softmax_rows", "softmax_segments",
    "softmax_write", "softmax_backward_rows",
    "softmax_backward_segments", "softmax_backward_write",
)  # fmt: skip


def compiled(kernels: Sequence[Kernel]) -> str:
    """Triton's kernels: the main loops at sm_90, registers on every target, and every spill."""
    targets = list(dict.fromkeys(k.target for k in kernels))
    spilling = [k for k in kernels if k.spills]
    inside = [k for k in spilling if k.loop and k.loop.spills]
    narrow = [
        k
        for k in kernels
        if k.kernel in MAIN and k.vocab % 8 == 0 and loads_of_main_loop(k).get("128", 0) == 0
    ]  # fmt: skip
    narrow_targets = sorted({k.target for k in narrow})
    parts = [
        f"""\
## Rung 5: compiled ahead of time, Triton

{len(kernels)} compilations: every kernel in float32, bfloat16 and float16, for rows aligned to 16 bytes (V = 128,256)
and not (V = 50,257), for {", ".join(targets)}; `benchmarks/gpu_evidence/aot.py` prints them all. Of
the kernels that touch all of V, this is one iteration of the main loop, in bfloat16 at sm_90: widths in bits, ex2 and
machine instructions (SASS) for each logit, registers, and the warps that fit a multiprocessor (64 at most). A kernel
with two looks at a row has two such loops, of which one is shown.

{table(["kernel", "V", "loads", "stores", "ex2", "SASS", "registers", "warps"], _loops(kernels))}

Loads of 16 bits at V = 50,257 are the unaligned rows: sums must not depend on how a row lies, so they go column by
column there; what is written, and read for writing, starts at a boundary and is 128 bits wide.""",
        _verdict_on_loads(narrow_targets, narrow),
        "Registers (and warps that fit) of the same kernels in bfloat16, V = 128,256:",
        _registers(kernels, targets),
        *_layers(kernels, targets),
        _spills(spilling, inside),
    ]
    return "\n\n".join(parts)


def _verdict_on_loads(targets: list[str], narrow: list[Kernel]) -> str:
    if not targets:
        return "Aligned rows are loaded 128 bits at a time in the main loop of every one of them, on every target."
    names = ", ".join(
        dict.fromkeys(f"{k.kernel} ({k.target}, {k.dtype})" for k in narrow if not k.target.startswith("gfx"))
    )
    text = f"Aligned rows are loaded 128 bits at a time in the main loop, except on {', '.join(targets)}."
    if "gfx942" in targets:
        text += (
            " For gfx942 single elements are loaded although the alignment is told (why was not found): slow, and"
            " nothing is claimed of AMD but that it compiles."
        )
    return text + (f" Besides: {names}." if names else "")


def _loops(kernels: Sequence[Kernel]) -> list[list[str]]:
    lines = []
    for name in MAIN:
        for k in kernels:
            if (k.kernel, k.target, k.dtype) == (name, "sm_90", "bfloat16") and k.loop:
                each = per_logit(k)
                lines.append(
                    [k.kernel, f"{k.vocab:,}", _widths(k.loop.loads), _widths(k.loop.stores),
                     f"{each[0]:.2f}" if each else "", f"{each[1]:.1f}" if each else "", str(k.registers),
                     str(resident(k))]
                )  # fmt: skip
    return lines


def _registers(kernels: Sequence[Kernel], targets: list[str]) -> str:
    chosen = {(k.kernel, k.target): k for k in kernels if k.dtype == "bfloat16" and k.vocab == 128_256}

    def cell(name: str, target: str) -> str:
        k = chosen.get((name, target))
        if k is None:
            return ""
        return f"{k.registers} ({resident(k)})" if target in prediction.LIMITS else str(k.registers)

    return table(["kernel", *targets], [[name, *(cell(name, target) for target in targets)] for name in MAIN])


def _layers(kernels: Sequence[Kernel], targets: list[str]) -> list[str]:
    """The kernel of a linear layer, whose main loop multiplies matrices instead of reading logits."""
    found = {(k.kernel, k.dtype, k.target): k for k in kernels if k.kernel.startswith("linear_")}
    if not found:
        return []
    targets = [target for target in targets if any(key[2] == target for key in found)]

    def cell(k: Kernel | None) -> str:
        return "" if k is None else f"{k.registers}, {k.spills}, {k.shared // 1024} KiB"

    rows = [
        [name, dtype, *(cell(found.get((name, dtype, target))) for target in targets)]
        for name, dtype in dict.fromkeys(key[:2] for key in found)
    ]
    inside = sum(k.loop.spills if k.loop else 0 for k in found.values())
    return [
        "The kernel that makes the logits of a linear layer in tiles (D = 4,096; not for AMD): registers, loads and "
        "stores of local memory in the text, shared memory. They put away the sums of a tile's rows while the next "
        f"product is made, once a tile; in the loops that multiply there are {inside or 'none'}.",
        table(["kernel", "dtype", *targets], rows),
    ]


def _spills(spilling: Sequence[Kernel], inside: Sequence[Kernel]) -> str:
    if not spilling:
        return "No kernel spills a register on any target."
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for k in spilling:
        groups.setdefault((k.kernel, k.target), []).append(k)
    lines = [
        [name, target, ", ".join(f"{k.dtype} {k.vocab:,}" for k in several),
         f"{max(k.spills for k in several)}", f"{max(k.loop.spills if k.loop else 0 for k in several)}"]
        for (name, target), several in groups.items()
    ]  # fmt: skip
    where = "none of them in a main loop" if not inside else "those in a main loop are counted in the last column"
    return (
        f"**Not every kernel is free of spills**: {len(spilling)} compilations load or store local memory, {where}. At "
        "most so many such instructions in the text of the kernel:\n\n"
        + table(["kernel", "target", "dtype, V", "instructions", "in the main loop"], lines)
    )


def compiled_cuda(kernels: Sequence[CudaKernel]) -> str:
    title = "## Rung 5: compiled ahead of time, CUDA C++\n\n"
    if not kernels:
        return title + "The extension was built without CUDA kernels (`make build-cuda` builds them): not shown."
    targets = list(dict.fromkeys(k.target for k in kernels))
    names = list(dict.fromkeys(k.kernel for k in kernels))
    found = {(k.kernel, k.target): k for k in kernels}

    def cell(name: str, target: str) -> str:
        k = found.get((name, target))
        return "" if k is None else str(k.registers) + (f", **{k.code.spills}**" if k.code.spills else "")

    lines = [[f"`{name}`", *(cell(name, t) for t in targets), _loads_at(found.get((name, "sm_90")))] for name in names]
    return (
        title
        + "The machine code in the extension that `make build-cuda` makes with nvcc: registers for each target and, in "
        "bold after a comma, the loads and stores of local memory in the text, if any; then the global loads of the "
        f"whole kernel at sm_90 (widths in bits). {sum(bool(k.code.spills) for k in kernels)} of {len(kernels)} spill."
        "\n\n"
        + table(["kernel", *targets, "loads at sm_90"], lines)
        + "\n\nThe 16- and 32-bit loads are heads and tails of rows."
    )


def _loads_at(kernel: CudaKernel | None) -> str:
    code: Counts | None = kernel.code if kernel else None
    return _widths(code.loads) if code else ""
