"""Ahead-of-time compilation of every Triton kernel: registers, spills, 128-bit accesses and exponentials, without a
GPU.

``table(targets)`` compiles what the public operations would launch, for each target in a process of its own (Triton
keeps one target per process), and returns one ``Kernel`` for each kernel, dtype and alignment. For NVIDIA the figures
are those of the machine code (SASS) that ptxas makes, disassembled with the tools inside Triton's wheel; for AMD those
of the assembly. Nothing is run.

    python benchmarks/gpu_evidence/aot.py --targets sm_80 sm_90 gfx942 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # called by path, one process for each target
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_evidence import sass
from gpu_evidence.sass import Counts

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("float32", "bfloat16", "float16")
# Rows that are aligned to 16 bytes, and rows that are not.
VOCABULARIES = (128_256, 50_257)
OPERATIONS = ("statistics", "ranks", "softmax", "linear")
DEPTH = 4_096  # of the layer of "linear"
MARK = "AOT-RESULT "
PARALLEL = 2  # targets compiled at a time


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel. Counts are of instructions in the text of the program, not executions."""

    target: str
    kernel: str
    dtype: str
    vocab: int
    warps: int
    registers: int
    spills: int  # NVIDIA: loads and stores of local memory; AMD: vector registers spilled
    shared: int  # bytes
    loads: dict[str, int]  # width in bits -> global loads
    stores: dict[str, int]
    ex2: int
    barriers: int
    instructions: int
    loop: Counts | None  # one iteration of the main loop (sass.main_loop)
    products: int = 0  # instructions of the tensor cores


def table(
    targets: tuple[str, ...] = TARGETS,
    dtypes: tuple[str, ...] = DTYPES,
    vocabularies: tuple[int, ...] = VOCABULARIES,
    operations: tuple[str, ...] = OPERATIONS,
) -> list[Kernel]:
    """Compile for each target and collect; raises with the compiler's words where one does not compile."""
    out = []
    with ThreadPoolExecutor(PARALLEL) as pool:
        for kernels in pool.map(lambda target: _one(target, dtypes, vocabularies, operations), targets):
            out += kernels
    return out


def _one(
    target: str, dtypes: tuple[str, ...], vocabularies: tuple[int, ...], operations: tuple[str, ...]
) -> list[Kernel]:
    command = [sys.executable, __file__, "--one", target, "--dtypes", *dtypes, "--vocabularies",
               *map(str, vocabularies), "--operations", *operations]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{target}: {done.stderr[-2000:]}")
    return [from_json(entry) for entry in json.loads(lines[-1].removeprefix(MARK))]


def from_json(entry: dict[str, Any]) -> Kernel:
    """A kernel as ``--json`` prints it."""
    loop = entry["loop"]
    return Kernel(**{**entry, "loop": loop and Counts(**loop)})


def markdown(kernels: list[Kernel]) -> str:
    """The table for people."""
    head = (
        "| target | kernel | dtype | V | registers | spills | shared | loads | stores | ex2 | barriers |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {k.target} | {k.kernel} | {k.dtype} | {k.vocab:,} | {k.registers} | {k.spills} | {k.shared} | "
        f"{_widths(k.loads)} | {_widths(k.stores)} | {k.ex2} | {k.barriers} |"
        for k in kernels
    ]
    return "\n".join([head, *rows])


def _widths(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} x {width}" for width, n in sorted(counts.items(), key=lambda item: -int(item[0]))) or "-"


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def _compile(target: str, dtypes: list[str], vocabularies: list[int], operations: list[str]) -> list[Kernel]:
    """Call the host functions with every launch turned into a compilation."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from fastcalib.triton_kernels import launch

    hip = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    triton.runtime.driver.set_active(_Driver(gpu))
    launch.threads_per_warp = gpu.warp_size
    compiled: dict[str, Any] = {}
    variant = ""
    run = JITFunction.run

    def label(text: str) -> None:
        nonlocal variant
        variant = text

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[f"{self.fn.__module__.rpartition('.')[2]}{self.fn.__name__}{variant}"] = kernel
        return kernel

    JITFunction.run = only_compile
    out = []
    try:
        for dtype in dtypes:
            for vocab in vocabularies:
                compiled.clear()
                _call_everything(torch.zeros(2, vocab, dtype=getattr(torch, dtype)), label, operations)
                out += [_measure(name, kernel, target, dtype, vocab) for name, kernel in compiled.items()]
    finally:
        JITFunction.run = run
    return out


def _call_everything(logits: Any, label: Callable[[str], None], operations: list[str]) -> None:
    """The launches of every operation: one selected token and many, split rows and whole ones; at one temperature."""
    import torch

    from fastcalib.ops import _gpu
    from fastcalib.ops._statistics import allocate
    from fastcalib.ops.softmax import _allocate_logsumexp
    from fastcalib.triton_kernels import launch

    n, v = logits.shape
    one = torch.ones(1, 1, dtype=torch.float64)
    index = torch.zeros(n, dtype=torch.int64)
    if "statistics" in operations:
        for ranks in (True, False) if "ranks" in operations else (False,):
            label(" with ranks" if ranks else "")
            packed = allocate(logits, one, index, ranks)
            _gpu.statistics_forward(packed, logits, one, index, 1, None, v, -100, ranks, "triton")
        rows, scalars, log_prob, argmax, *_, saved = packed
        _gpu.statistics_backward(
            torch.empty_like(logits), rows, scalars, log_prob, logits, one, index, 1, None, rows, scalars, argmax,
            saved, v, -100, "triton",
        )  # fmt: skip
        upstream = (torch.empty_like(rows), torch.empty_like(scalars), torch.empty(n, 1))
        for smoothing in (True, False):
            label(" with sum_logits" if smoothing else "")
            _gpu.statistics_with_gradient(
                torch.empty_like(logits), packed, *upstream, logits, one, index, v, -100, smoothing, "triton"
            )
    if "linear" in operations and v == VOCABULARIES[0] and launch.threads_per_warp == 32:
        _call_layer(logits, label)
    for temperature, many in ((one, 40), (None, 2)) if "ranks" in operations else ():
        ids = torch.zeros(n * many, dtype=torch.int64)
        counts = (torch.empty(n * many, dtype=torch.int64), torch.empty(n * many, dtype=torch.int64))
        mass = torch.empty(n * many, 1 if temperature is not None else 0)
        _gpu.ranks((*counts, mass), logits, ids, None, many, None, temperature, v, -100, "triton")
    out, norm = torch.empty_like(logits), _allocate_logsumexp(logits)
    for launch.processors_override in (1, 1_000) if "softmax" in operations else ():
        _gpu.softmax_forward(out, norm, logits, one, v, False, "triton")
        _gpu.softmax_backward(
            torch.empty_like(logits), torch.empty(n, dtype=torch.float64), logits, out, norm, one, v, False, "triton"
        )
    launch.processors_override = None


def _call_layer(logits: Any, label: Callable[[str], None]) -> None:
    """The launches of linear_statistics. Not for AMD: there the product is the library's (linear_statistics.serves)."""
    import torch
    import triton

    from fastcalib.ops._statistics import allocate
    from fastcalib.triton_kernels import linear_statistics

    n, v = logits.shape
    hidden, weight, bias = (torch.empty(*shape, dtype=logits.dtype) for shape in ((n, DEPTH), (v, DEPTH), (v,)))
    index = torch.zeros(n, dtype=torch.int64)
    linear_statistics.major_override = triton.runtime.driver.active.get_current_target().arch // 10
    kinds = ((1, " of a layer", False), (1, " with bias and softcap", True), (4, " at 4 temperatures", False))
    for k, text, capped in kinds:
        label(text)
        temperature = torch.ones(1, k, dtype=torch.float64)
        out = allocate(logits, temperature, index, False)
        layer = (hidden, weight, bias, 0.5, 30.0) if capped else (hidden, weight, None, None, None)
        linear_statistics.forward(out, *layer, temperature, index, 1, None, -100, True)
    linear_statistics.major_override = None
    label("")


def _measure(name: str, kernel: Any, target: str, dtype: str, vocab: int) -> Kernel:
    figures = _amd(kernel) if target.startswith("gfx") else _nvidia(kernel)
    meta = kernel.metadata
    return Kernel(target, name, dtype, vocab, meta.num_warps, shared=meta.shared, **figures)


def _nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = sass.tool("cuobjdump", "-res-usage", str(path))
        (code,) = sass.functions(sass.tool("cuobjdump", "-sass", str(path))).values()
    return {
        "registers": int(_first(r"REG:(\d+)", usage)),
        "barriers": sum(i.name.startswith("BAR.SYNC") for i in code),
        "loop": sass.main_loop(code),
        **dataclasses.asdict(sass.count(code)),
    }


def _amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    widths = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32", "ushort": "16", "short": "16",
              "short_d16": "16", "short_d16_hi": "16", "ubyte": "8", "byte": "8"}  # fmt: skip

    def count(lines: list[str]) -> Counts:
        found: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
        for line in lines:
            if moved := re.match(r"\s+(?:global|buffer|flat)_(load|store)_(\w+)", line):
                found[moved[1]][widths.get(moved[2], "32")] += 1
        return Counts(
            loads=dict(found["load"]),
            stores=dict(found["store"]),
            ex2=sum(bool(re.match(r"\s+v_exp_f32", line)) for line in lines),
            spills=sum(bool(re.match(r"\s+scratch_", line)) for line in lines),
            instructions=sum(bool(re.match(r"\s+(?:[sv]|global|buffer|flat|ds)_\w+", line)) for line in lines),
        )

    lines = text.splitlines()
    labels = {line.partition(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    spans = set()
    for i, line in enumerate(lines):
        branch = re.match(r"\s+s_c?branch\w*\s+(\.LBB\w+)", line)
        if branch and labels[branch[1]] < i:
            spans.add((labels[branch[1]], i))
    loops = {span: count(lines[span[0] : span[1] + 1]) for span in spans}
    return {
        "registers": int(_first(r"\.vgpr_count:\s+(\d+)", text)),
        "barriers": len(re.findall(r"^\s+s_barrier", text, re.M)),
        "loop": sass.innermost({span: counts for span, counts in loops.items() if counts.loads}),
        **dataclasses.asdict(count(lines)),
        "spills": int(_first(r"\.vgpr_spill_count:\s+(\d+)", text)),
    }


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}: {text[:300]}")
    return found[1]


def _entries(kernels: list[Kernel]) -> Iterator[dict[str, Any]]:
    for kernel in kernels:
        yield dataclasses.asdict(kernel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    parser.add_argument("--operations", nargs="+", default=OPERATIONS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        found = _compile(arguments.one, arguments.dtypes, arguments.vocabularies, arguments.operations)
        print(MARK + json.dumps(list(_entries(found))))
        return
    kernels = table(
        tuple(arguments.targets), tuple(arguments.dtypes), tuple(arguments.vocabularies), tuple(arguments.operations)
    )
    print(json.dumps(list(_entries(kernels)), indent=1) if arguments.json else markdown(kernels))


if __name__ == "__main__":
    main()
