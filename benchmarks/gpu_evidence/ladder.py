"""Which rungs of evidence each kernel has passed, by which tests; and how those tests went for this page.

Nothing is taken on trust: a test that is named here and does not exist is an error, and a cell says "passed" only for
tests that were run for the page and passed.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRITON, CUDA, INTERPRETED = "test_triton_emulated", "test_cuda_emulated", "test_triton_interpret"
TRITON_FUSED = "test_triton_fused_emulated"
CUDA_RANKS, CUDA_FUSED = "test_cuda_ranks_emulated", "test_cuda_fused_emulated"
CUDA_SOFTMAX = "test_cuda_softmax_emulated"
TRITON_LINEAR, LINEAR_INTERPRETED = "test_triton_linear_emulated", "test_triton_linear_interpret"
_STATISTICS = ("test_statistics", "test_hostile_rows", "test_bad_ids_read_nothing", "test_exponentials_per_element")
_BITS = "test_a_row_has_the_same_bits_alone_in_company_and_at_any_alignment"
_TRAFFIC = "test_statistics_reads_each_logit_once_and_its_gradient_reads_and_writes_once"


@dataclass(frozen=True)
class Kernel:
    """Functions of a test file that run a kernel, on the emulator and in Triton's interpreter."""

    name: str
    module: str
    emulated: tuple[str, ...]  # none named: all of the module
    interpreted: tuple[str, ...] = ()
    interpreter: str = INTERPRETED  # the file with those


KERNELS = (
    Kernel("Triton statistics, forward", TRITON, (*_STATISTICS, _BITS, _TRAFFIC, "test_many_temperatures"),
           ("test_statistics", "test_temperatures", "test_hostile_rows", "test_any_layout")),
    Kernel("Triton statistics, backward", TRITON, ("test_gradient_of_statistics", _BITS, _TRAFFIC,
           "test_gradient_of_masked_padded_ignored_and_undefined_rows"), ("test_gradient",)),
    Kernel("Triton loss and gradient in one launch", TRITON_FUSED, ()),
    Kernel("Triton ranks", TRITON, ("test_ranks", "test_ranks_along_with_statistics", "test_ranks_read_each_logit_once",
           "test_ranks_of_ragged_sets_and_hostile_rows", _BITS), ("test_ranks", "test_ragged_ranks")),
    Kernel("Triton statistics of a linear layer, forward", TRITON_LINEAR, (),
           ("test_every_field_is_that_of_the_logits",), LINEAR_INTERPRETED),
    Kernel("Triton softmax, forward and backward", TRITON, ("test_softmax",), ("test_softmax",)),
    Kernel("CUDA statistics, forward", CUDA, ("test_hostile_rows", "test_sizes_around_vectors_warps_and_segments",
           "test_temperatures", "test_many_temperatures", "test_every_alignment_gives_the_same_bits", "test_traffic",
           "test_vocabularies_of_real_models", "test_bits_do_not_depend_on_the_batch_or_on_the_number_of_blocks")),
    Kernel("CUDA statistics, backward", CUDA, ("test_gradients", "test_gradients_of_each_field_alone",
           "test_gradients_of_hostile_rows", "test_gradients_of_a_token_selected_twice", "test_traffic")),
    Kernel("CUDA loss and gradient in one launch", CUDA_FUSED, ()),
    Kernel("CUDA ranks", CUDA_RANKS, ()),
)  # fmt: skip
if (ROOT / "tests" / f"{CUDA_SOFTMAX}.py").exists():
    KERNELS += (Kernel("CUDA softmax, forward and backward", CUDA_SOFTMAX, ()),)


def missing() -> list[str]:
    """Tests that are named here and nowhere else."""
    out = []
    for kernel in KERNELS:
        for module, names in ((kernel.module, kernel.emulated), (kernel.interpreter, kernel.interpreted)):
            tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text())
            there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            out += [f"{module}.{name}" for name in names if name not in there]
    return out


Outcomes = dict[tuple[str, str], str]  # (module, "test_x[sm90-...]") -> passed, failed or skipped


def run(everything: bool) -> Outcomes:
    """Run the tests; ``everything`` adds those that are marked prove, which take most of an hour."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.xml")
        modules = dict.fromkeys(module for k in KERNELS for module in (k.module, k.interpreter))
        files = [f"tests/{module}.py" for module in modules]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}", *files]
        command += ["-m", "prove or not prove"] if everything else []
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        return read([path])


def read(paths: list[Path]) -> Outcomes:
    """The outcomes in junit files, as ``pytest --junitxml`` writes them; of a test in several files, the last."""
    out: Outcomes = {}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            module = case.get("classname", "").rpartition(".")[2]
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            out[module, case.get("name", "")] = outcome
    return out


def emulated(kernel: Kernel, sm: int, outcomes: Outcomes) -> str:
    """The cell of a kernel on an emulated GPU."""
    marks = (f"sm{sm}", f"sm_{sm}")
    found = [
        outcome
        for (module, name), outcome in outcomes.items()
        if module == kernel.module
        and (not kernel.emulated or name.partition("[")[0] in kernel.emulated)
        and any(mark in name for mark in marks)
    ]
    return _cell(found)


def grid(outcomes: Outcomes) -> list[list[str]]:
    """The CPU's own tests on the emulated GPUs (``make prove``), a line for each file: its name, sm_90, sm_80."""
    marks = ("triton-sm90", "triton-sm80")
    modules = sorted({module for module, name in outcomes if any(mark in name for mark in marks)})
    return [
        [f"tests/{module}.py"]
        + [_cell([o for (m, name), o in outcomes.items() if m == module and mark in name]) for mark in marks]
        for module in modules
    ]


def interpreted(kernel: Kernel, outcomes: Outcomes) -> str:
    """They run in a process of their own, which one test stands for."""
    if not kernel.interpreted:
        return "does not apply"
    found = [
        outcome for (module, name), outcome in outcomes.items()
        if module == kernel.interpreter and name.startswith("test_in_a_process_of_its_own")
    ]  # fmt: skip
    return _cell(found).replace("1 passed", "passed") if found else "not run for this page"


def _cell(outcomes: list[str]) -> str:
    counts = {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")}
    words = [f"{number} {kind}" for kind, number in counts.items() if number]
    return ", ".join(words) or "not run for this page"
