"""Runs cases: times the competitors beside the pure read, then memory, then errors. Nothing missing stops it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import SHORT, Call, Case
from .ceilings import Ceilings, CeilingsUnavailable
from .harness import Timing, Variant, measure, ratio
from .memory import heap_kind, peak_extra
from .ours import NotAvailable
from .problem import Problem, max_error

SCHEMA = 1
READ = "read"
COMPILING = ("torch.compile", "cut-cross-entropy")  # how the names of those begin that --no-compile leaves out


@dataclass
class Settings:
    """How long and how thoroughly to measure."""

    threads: int
    rounds: int = 9
    budget: float = 20.0  # seconds per case, beyond warm-up
    compile: bool = True
    quiet: float = 1.0
    target_shape: tuple[int, int] = (256, 128_256)  # where the figures to reach are defined
    say: Callable[[str], None] = field(default=lambda text: None)


def make_ceilings(threads: int) -> Ceilings | None:
    """The compiled ceilings, or None (and a word on the terminal) where they cannot be had."""
    try:
        return Ceilings(threads)
    except (CeilingsUnavailable, OSError) as error:
        print(f"ceilings not available, so no ratios to the pure read: {error}", flush=True)
        return None


def reason(error: BaseException) -> str:
    """One line saying why a competitor is missing; its own words where it has some."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return first if isinstance(error, NotAvailable) else f"{type(error).__name__}: {first}"[:200]


def prepare(factories: dict[str, Callable[[], Call]]) -> tuple[dict[str, Call], dict[str, str]]:
    """Makes and once calls each competitor. Returns those that work, and why the others do not."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, factory in factories.items():
        try:
            call = factory()
            call()
        except Exception as error:  # whatever a competitor throws, the others go on
            missing[name] = reason(error)
        else:
            calls[name] = call
    return calls, missing


def run_case(case: Case, problem: Problem, settings: Settings, ceilings: Ceilings | None) -> dict[str, Any]:
    """One row of results as plain JSON values; :func:`validate` says what is in it."""
    torch._dynamo.reset()
    job = case.build(problem)
    factories = {k: f for k, f in job.factories.items() if settings.compile or not k.startswith(COMPILING)}
    calls, missing = prepare(factories)
    missing |= {k: "left out by --no-compile" for k in job.factories if k not in factories}
    variants = [Variant(name, call) for name, call in calls.items()]
    if ceilings is not None:
        variants.insert(0, Variant(READ, ceilings.read(problem.logits)))
    timings = measure(variants, rounds=settings.rounds, budget=settings.budget, quiet=settings.quiet)
    row = row_of(case, problem)
    entries: dict[str, Any] = {name: {"unavailable": why} for name, why in missing.items()}
    try:
        reference = job.reference()
    except Exception as error:
        reference = {}
        row["note"] = f"no float64 answer: {reason(error)}"
    for name, call in calls.items():
        entry: dict[str, Any] = {"unavailable": None, **timings[name].as_dict()}
        entry["extra_mb"] = peak_extra(call)
        entry["error"] = _error(call, reference)
        entry["gb_per_s"] = row["bytes"] / timings[name].least / 1e9
        entries[name] = entry
    row["entries"] = {name: entries[name] for name in job.factories}
    _ratios(row, timings)
    del calls, variants, job, reference
    gc.collect()
    return row


def row_of(case: Case, problem: Problem) -> dict[str, Any]:
    """What is known of a row before anything is measured."""
    return {
        "op": case.op,
        "group": case.group,
        "dtype": SHORT[case.dtype],
        "n": case.n,
        "v": case.v,
        "direction": case.direction,
        "heap": heap_kind(),
        "bytes_formula": case.formula,
        "bytes": case.passes * problem.nbytes,
        "array_mb": problem.nbytes / 1e6,
        "note": None,
    }


def _error(call: Call, reference: dict[str, torch.Tensor]) -> float | None:
    try:
        return max_error(call(), reference)
    except ValueError:
        return None


def _ratios(row: dict[str, Any], timings: dict[str, Timing]) -> None:
    """Adds: the read's own figures, each competitor's time as a multiple of it, and our speed-ups."""
    read, own = timings.get(READ), timings.get("fastcalib")
    row["read"] = read.as_dict() if read else None
    row["speed_against_read"] = ratio(read, own) if read and own else None
    row["speedup"] = {}
    for name, timing in timings.items():
        if own and name not in (READ, "fastcalib"):
            row["speedup"][name] = {"least": ratio(timing, own), "paired": ratio(timing, own, "paired")}


def run_cases(
    cases: list[Case], settings: Settings, show: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """All cases, in order, each handed to ``show`` when done; neighbours of the same size and dtype share a problem."""
    ceilings = make_ceilings(settings.threads)
    rows: list[dict[str, Any]] = []
    problem: Problem | None = None
    for i, case in enumerate(cases):
        if problem is None or (problem.n, problem.v, problem.dtype) != (case.n, case.v, case.dtype):
            problem = None  # free the old one first
            gc.collect()
            problem = Problem(case.n, case.v, case.dtype)
        settings.say(f"[{i + 1}/{len(cases)}] {case.name}")
        rows.append(run_case(case, problem, settings, ceilings))
        show(rows[-1])
    return rows


ROW_KEYS = {"op", "group", "dtype", "n", "v", "direction", "heap", "bytes_formula", "bytes", "array_mb", "note"}
ROW_KEYS |= {"entries", "read", "speed_against_read", "speedup"}
ENTRY_KEYS = {"unavailable", "median_ms", "least_ms", "samples", "disturbed", "noisy", "calls_per_sample"}
ENTRY_KEYS |= {"extra_mb", "error", "gb_per_s"}
# Rows measured on a GPU have these as well: the memory's bandwidth in this run and by the data sheet, and what is used.
GPU_ROW_KEYS = {"gpu"}
GPU_ENTRY_KEYS = {"fraction_of_measured", "fraction_of_nominal"}


def validate(document: dict[str, Any]) -> None:
    """Checks the shape of what ``--json`` writes.

    Raises:
        ValueError: naming the first part that is missing or unknown.
    """
    if document.get("schema") != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {document.get('schema')!r}")
    for key in ("machine", "peers", "rows", "targets", "scaling", "overhead"):
        if key not in document:
            raise ValueError(f"{key} is missing")
    for i, row in enumerate(document["rows"]):
        on_gpu = "gpu" in row
        row_keys = ROW_KEYS | (GPU_ROW_KEYS if on_gpu else set())
        entry_keys = ENTRY_KEYS | (GPU_ENTRY_KEYS if on_gpu else set())
        if set(row) != row_keys:
            raise ValueError(f"rows[{i}]: keys differ by {sorted(set(row) ^ row_keys)}")
        for name, entry in row["entries"].items():
            if entry.get("unavailable") is None and set(entry) != entry_keys:
                raise ValueError(f"rows[{i}].entries[{name}]: keys differ by {sorted(set(entry) ^ entry_keys)}")
