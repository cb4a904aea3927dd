"""Runs cases on a GPU: our backends side by side, the competitors of every device, and other people's GPU kernels.

Rows are those of the CPU's suite with a few more keys (``GPU_ROW_KEYS`` and ``GPU_ENTRY_KEYS`` in suite.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import gpu_peers
from .cases import Call, Case
from .gpu import Gpu, nominal_bandwidth
from .gpu_peers import Factory, Prepared
from .gpu_timing import measure
from .harness import Timing, Variant, ratio
from .problem import Outputs, Problem, max_error
from .suite import READ, Settings, reason, row_of

COPY = "copy"
# The first is the size of one micro-batch of a current model, the second that of a reasoning model's rollout; then few
# rows (each split over many programs), and one.
SHAPES = ((4_096, 128_256), (8_192, 151_936), (256, 128_256), (1, 262_144))


def _on_backend(call: Call, backend: str) -> Call:
    import fastcalib

    def run() -> Outputs:
        with fastcalib.use_backend(backend):
            return call()

    return run


def _ours(factory: Callable[[], Call], backend: str) -> Prepared:
    import fastcalib

    with fastcalib.use_backend(backend):
        return Prepared(_on_backend(factory(), backend))


def _prepared(factory: Callable[[], Call]) -> Prepared:
    return Prepared(factory())


def competitors(case: Case, problem: Problem, gpu: Gpu, settings: Settings) -> tuple[dict[str, Factory], Any]:
    """Every competitor of a row by name, ours first; and the float64 answers."""
    job = case.build(problem)
    found: dict[str, Factory] = {}
    for name, factory in job.factories.items():
        if name.startswith("fastcalib"):
            for i, backend in enumerate(gpu.backends):
                found[name if i == 0 else f"{name} {backend}"] = partial(_ours, factory, backend)
        else:
            found[name] = partial(_prepared, factory)
    found |= {name: f for name, f in gpu_peers.factories(case, problem).items() if name not in found}
    if not settings.compile:
        found = {name: f for name, f in found.items() if not name.startswith("torch.compile")}
    return found, job.reference


def _prepare(found: dict[str, Factory]) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Those that work, once called, and why the others do not."""
    works: dict[str, Prepared] = {}
    missing: dict[str, str] = {}
    for name, factory in found.items():
        try:
            prepared = factory()
            if prepared.before is not None:
                prepared.before()
            prepared.call()
        except Exception as error:  # whatever a competitor throws, running out of memory included, the others go on
            missing[name] = reason(error)
        else:
            works[name] = prepared
    return works, missing


def _ceilings(problem: Problem) -> list[Variant]:
    """Reading the logits once (as float32 words whatever their dtype), and copying them."""
    words = problem.logits.view(torch.float32) if problem.logits.shape[1] % 2 == 0 else problem.logits
    out = torch.zeros((), dtype=words.dtype, device=words.device)
    flat = words.reshape(-1)
    return [
        Variant(READ, lambda: torch.sum(flat, dim=0, out=out)),
        Variant(COPY, lambda: problem.scratch.copy_(problem.logits)),
    ]


def run_case(case: Case, problem: Problem, settings: Settings, gpu: Gpu) -> dict[str, Any]:
    """One row of results as plain JSON values."""
    if settings.compile:
        torch._dynamo.reset()
    found, reference_of = competitors(case, problem, gpu, settings)
    works, missing = _prepare(found)
    variants = _ceilings(problem) + [Variant(name, p.call, p.before) for name, p in works.items()]
    timings = measure(variants, gpu, rounds=settings.rounds, budget=settings.budget)
    row = row_of(case, problem)
    row["gpu"] = _bandwidths(case, problem, gpu, timings)
    try:
        reference = reference_of()
    except Exception as error:
        reference = {}
        row["note"] = f"no float64 answer: {reason(error)}"
    entries: dict[str, Any] = {name: {"unavailable": why} for name, why in missing.items()}
    for name, prepared in works.items():
        entries[name] = _entry(row, timings[name], prepared, reference, gpu)
    row["entries"] = {name: entries[name] for name in found}
    _ratios(row, timings)
    del found, reference_of, works, variants
    gc.collect()
    gpu.api.empty_cache()
    return row


def _bandwidths(case: Case, problem: Problem, gpu: Gpu, timings: dict[str, Timing]) -> dict[str, Any]:
    """What the memory gave in this very run, and by the data sheet. Jobs that only read are held against the read,
    those that write as well against the copy."""
    read, copy = problem.nbytes / timings[READ].median / 1e9, 2 * problem.nbytes / timings[COPY].median / 1e9
    nominal = nominal_bandwidth(gpu.name)
    return {
        "read_gb_per_s": read,
        "copy_gb_per_s": copy,
        "measured": READ if case.passes == 1 else COPY,
        "nominal_gb_per_s": None if nominal is None else nominal / 1e9,
    }


def _entry(
    row: dict[str, Any], timing: Timing, prepared: Prepared, reference: dict[str, torch.Tensor], gpu: Gpu
) -> dict[str, Any]:
    speed, ceilings = row["bytes"] / timing.median / 1e9, row["gpu"]
    nominal = ceilings["nominal_gb_per_s"]
    return {
        "unavailable": None,
        **timing.as_dict(),
        "extra_mb": gpu.peak_extra(prepared.call, prepared.before),
        "error": _error(prepared, reference),
        "gb_per_s": speed,
        "fraction_of_measured": speed / ceilings[f"{ceilings['measured']}_gb_per_s"],
        "fraction_of_nominal": None if nominal is None else speed / nominal,
    }


def _error(prepared: Prepared, reference: dict[str, torch.Tensor]) -> float | None:
    if prepared.before is not None:
        prepared.before()
    try:
        return max_error(prepared.call(), reference)
    except ValueError:
        return None


def _ratios(row: dict[str, Any], timings: dict[str, Timing]) -> None:
    """Adds the read's own figures and our speed-ups."""
    own = timings.get("fastcalib")
    row["read"] = timings[READ].as_dict()
    row["speed_against_read"] = ratio(timings[READ], own, "paired") if own else None
    row["speedup"] = {}
    for name, timing in timings.items():
        if own and name not in (READ, COPY, "fastcalib"):
            row["speedup"][name] = {"least": ratio(timing, own), "paired": ratio(timing, own, "paired")}


def run_cases(
    cases: list[Case], settings: Settings, gpu: Gpu, show: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """All cases, in order, each handed to ``show`` when done; neighbours of the same size and dtype share a problem."""
    rows: list[dict[str, Any]] = []
    problem: Problem | None = None
    for i, case in enumerate(cases):
        if problem is None or (problem.n, problem.v, problem.dtype) != (case.n, case.v, case.dtype):
            problem = None  # free the old one first
            gc.collect()
            gpu.api.empty_cache()
            problem = Problem(case.n, case.v, case.dtype, device=gpu.device)
        settings.say(f"[{i + 1}/{len(cases)}] {case.name}")
        rows.append(run_case(case, problem, settings, gpu))
        show(rows[-1])
    return rows
