"""The measurements behind the table of targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear, ours, plain
from .cases import compiled
from .ceilings import Ceilings
from .harness import Timing, Variant, measure, ratio
from .memory import MB, RETAINED_HEAP, peak_extra
from .problem import ARBITRARY, ARITHMETIC, Outputs, Problem
from .suite import Settings, make_ceilings, reason
from .targets import Part, fill, parts, table

Factory = Callable[[], Callable[[], Any]]


class Run:
    """One interleaved run: add competitors (those that fail are remembered), then take times and ratios by name."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.variants: list[Variant] = []
        self.missing: dict[str, str] = {}
        self.timings: dict[str, Timing] = {}

    def add(self, name: str, factory: Factory, before: Callable[[], Any] | None = None) -> None:
        if name.startswith("compile") and not self.settings.compile:
            self.missing[name] = "left out by --no-compile"
            return
        try:
            if before:
                before()
            call = factory()
            call()
        except Exception as error:
            self.missing[name] = reason(error)
        else:
            self.variants.append(Variant(name, call, before))

    def go(self) -> None:
        settings = self.settings
        self.timings = measure(self.variants, rounds=settings.rounds, budget=6 * settings.budget, quiet=settings.quiet)

    def over(self, numerator: str, denominator: str) -> float:
        """Least time of one over that of the other; KeyError with the reason where one is missing."""
        for name in (numerator, denominator):
            if name not in self.timings:
                raise KeyError(f"{name}: {self.missing.get(name, 'not measured')}")
        return ratio(self.timings[numerator], self.timings[denominator])

    def times(self) -> dict[str, Any]:
        """Every competitor's figures, for JSON."""
        return {name: timing.as_dict() for name, timing in self.timings.items()} | {
            name: {"unavailable": why} for name, why in self.missing.items()
        }


def _add_ceiling(
    run: Run,
    name: str,
    ceilings: Ceilings | None,
    make: Callable[[Ceilings], Callable[[], Any]],
    before: Callable[[], Any] | None = None,
) -> None:
    if ceilings is None:
        run.missing[name] = "no C++ compiler"
    else:
        run.add(name, partial(make, ceilings), before)


def _statistics(settings: Settings, ceilings: Ceilings | None, dtype: torch.dtype, filled: list[Part]) -> Run:
    """Rows 1 to 7 for one dtype, all in one run."""
    problem = Problem(*settings.target_shape, dtype)
    z, target = problem.logits, problem.target
    run = Run(settings)
    _add_ceiling(run, "read", ceilings, lambda c: c.read(z))
    _add_ceiling(run, "read, four streams", ceilings, lambda c: c.read(z, best=True))
    _add_ceiling(run, "arithmetic", ceilings, lambda c: c.arithmetic(z, "statistics"))
    if dtype == torch.float32:
        _add_ceiling(run, "eight powers", ceilings, lambda c: c.arithmetic(z, "eight powers"))
    grids = {"K=1": (1.0,), "K=1 T=0.05": (0.05,), "K=8": ARBITRARY[8], "K=8 arithmetic": ARITHMETIC[8]}
    for name, grid in grids.items():
        run.add(name, partial(ours.statistics, z, target, grid))
    fast, tuned = plain.compiled_statistics(), compiled(plain.statistics_tuned)
    run.add("eager K=1", lambda: partial(plain.statistics, z, target, (1.0,)))
    run.add("compile K=1", lambda: partial(fast, z, target, (1.0,)))
    run.add("compile K=8", lambda: partial(fast, z, target, ARBITRARY[8]))
    run.add("compile K=1, tuned", lambda: partial(tuned, z, target, (1.0,)))
    run.add("compile K=8, tuned", lambda: partial(tuned, z, target, ARBITRARY[8]))
    run.go()
    kind, own_row, against = ("fp32", 1, 3) if dtype == torch.float32 else ("bf16", 2, 4)
    fill(filled, own_row, "speed against read", lambda: run.over("read", "K=1"), lambda: run.over("read", "arithmetic"))
    fill(filled, against, "against eager", lambda: run.over("eager K=1", "K=1"))
    fill(filled, against, "against torch.compile", lambda: run.over("compile K=1", "K=1"))
    fill(filled, 5, f"time against K=1, {kind}", lambda: run.over("K=8", "K=1"))
    fill(filled, 5, f"against torch.compile, {kind}", lambda: run.over("compile K=8", "K=8"))
    hand_tuned = "against torch.compile, hand-tuned"
    fill(filled, against, f"{hand_tuned} (for information)", lambda: run.over("compile K=1, tuned", "K=1"))
    fill(filled, 5, f"{hand_tuned}, {kind} (for information)", lambda: run.over("compile K=8, tuned", "K=8"))
    fill(filled, 7, kind, lambda: run.over("K=1 T=0.05", "K=1"))
    if kind == "fp32":
        most = None if ceilings is None else lambda: run.over("K=8", "eight powers")
        fill(filled, 6, kind, lambda: run.over("K=8", "K=8 arithmetic"), most)
    return run


def _cross_entropy(problem: Problem) -> dict[str, Factory]:
    """Eager, compiled and our cross-entropy, forward and backward with a new gradient."""
    leaf, target = problem.logits.detach().requires_grad_(), problem.target

    def both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(function(leaf, target), leaf)[0]

    def mean(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t)

    def drop_in(x: Tensor, t: Tensor) -> Tensor:
        return ours.functional("cross_entropy", x, t)()["loss"]

    return {
        "cross-entropy": lambda: both(drop_in),
        "eager": lambda: both(mean),
        "compile": lambda: both(compiled(mean)),
    }


def _gradients(settings: Settings, ceilings: Ceilings | None, dtype: torch.dtype, filled: list[Part]) -> Run:
    """Rows 8 and 9, and with fp32 rows 10 to 12. What works in place finds fresh logits, outside the clock."""
    problem = Problem(*settings.target_shape, dtype)
    z, target, work, out = problem.logits, problem.target, problem.logits.clone(), problem.scratch
    run = Run(settings)

    def refresh() -> None:
        work.copy_(z)

    kind = "fp32" if dtype == torch.float32 else "bf16"
    _add_ceiling(run, "in-place read + write", ceilings, lambda c: c.readwrite(work), before=refresh)
    run.add("backward in place", lambda: ours.backward_into(work, work, target, nontemporal=False), before=refresh)
    _add_ceiling(run, "copy", ceilings, lambda c: c.copy(out, z))
    for job in ("logsumexp", "gradient"):
        _add_ceiling(run, f"arithmetic, {job}", ceilings, lambda c, job=job: c.arithmetic(z, job))  # type: ignore[misc]
    run.add("backward into", lambda: ours.backward_into(out, z, target, nontemporal=True))
    if kind == "fp32":
        run.add("fused in place", lambda: ours.fused_in_place(work, target), before=refresh)
        for name, factory in _cross_entropy(problem).items():
            run.add(name, factory)
    run.go()
    gradient = "arithmetic, gradient"
    moved = "in-place read + write"
    fill(filled, 8, kind, lambda: run.over(moved, "backward in place"), lambda: run.over(moved, gradient))
    fill(filled, 9, kind, lambda: run.over("copy", "backward into"), lambda: run.over("copy", gradient))
    if kind == "fp32":
        both = lambda: 1 / (1 / run.over(moved, "arithmetic, logsumexp") + 1 / run.over(moved, gradient))  # noqa: E731
        fill(filled, 10, kind, lambda: run.over(moved, "fused in place"), both)
        for row, name in ((11, "fused in place"), (12, "cross-entropy")):
            fill(filled, row, "against eager", lambda name=name: run.over("eager", name))  # type: ignore[misc]
            fill(filled, row, "against torch.compile", lambda name=name: run.over("compile", name))  # type: ignore[misc]
    return run


def retained_run(settings: Settings) -> Run:
    """Rows 11 and 12 in a process that keeps its heap (see :data:`memory.RETAINED_HEAP`)."""
    problem = Problem(*settings.target_shape, torch.float32)
    work, target = problem.logits.clone(), problem.target
    run = Run(settings)
    run.add("fused in place", lambda: ours.fused_in_place(work, target), before=lambda: work.copy_(problem.logits))
    for name, factory in _cross_entropy(problem).items():
        run.add(name, factory)
    run.go()
    return run


def _retained_child(settings: Settings, arguments: list[str]) -> dict[str, Any]:
    """Times of :func:`retained_run` in a child process. RuntimeError with the child's last words if it fails."""
    script = Path(__file__).resolve().parent.parent / "run.py"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "retained.json"
        command = [sys.executable, str(script), *arguments, "--retained-child", str(out)]
        done = subprocess.run(command, env={**os.environ, **RETAINED_HEAP}, capture_output=True, text=True, check=False)
        if done.returncode or not out.exists():
            raise RuntimeError(f"the child with a retained heap failed: {done.stderr.strip()[-300:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def _fill_retained(times: dict[str, Any], filled: list[Part]) -> None:
    def over(numerator: str, denominator: str) -> float:
        for name in (numerator, denominator):
            if "least_ms" not in times.get(name, {}):
                raise KeyError(f"{name}: {times.get(name, {}).get('unavailable', 'not measured')}")
        return float(times[numerator]["least_ms"] / times[denominator]["least_ms"])

    for row, ours_name in ((11, "fused in place"), (12, "cross-entropy")):
        for label, name in (("against eager", "eager"), ("against torch.compile", "compile")):
            fill(filled, row, f"{label}, retained heap", partial(over, name, ours_name))


def _ranks(settings: Settings, ceilings: Ceilings | None, filled: list[Part]) -> Run:
    """Rows 13 to 15, fp32."""
    problem = Problem(*settings.target_shape, torch.float32)
    z = problem.logits
    run = Run(settings)
    _add_ceiling(run, "read", ceilings, lambda c: c.read(z))
    fast = compiled(plain.ranks_brute)
    for m in (1, 16, 4096):
        run.add(f"M={m}", partial(ours.ranks, z, problem.selected(m)))
        if m <= 16:
            run.add(f"compile M={m}", lambda m=m: partial(fast, z, problem.selected(m)))  # type: ignore[misc]
    run.add("sort + searchsorted", lambda: partial(plain.ranks_sorted, z, problem.selected(4096)))
    run.go()
    fill(filled, 13, "speed against read", lambda: run.over("read", "M=1"))
    least = None if ceilings is None else lambda: run.over("compile M=1", "read")
    fill(filled, 13, "against torch.compile", lambda: run.over("compile M=1", "M=1"), least)
    fill(filled, 14, "against torch.compile", lambda: run.over("compile M=16", "M=16"))
    fill(filled, 15, "against sort + searchsorted", lambda: run.over("sort + searchsorted", "M=4096"))
    return run


def _output_mb(outputs: Outputs) -> float:
    return sum(t.numel() * t.element_size() for t in outputs.values()) / MB


def _memory(settings: Settings, filled: list[Part]) -> None:
    """Row 16: peak beyond the outputs, per thread, after a first call has made what is made once."""

    def extra(factory: Factory, outputs: bool = True, before: Callable[[], Any] | None = None) -> float:
        try:
            call = factory()
            for _ in range(2):
                if before:
                    before()
                made = call()
        except Exception as error:
            raise KeyError(reason(error)) from error
        own = _output_mb(made) if outputs else 0.0
        del made
        peaks = [peak_extra(call, before) for _ in range(3)]
        if None in peaks:
            raise KeyError("this kernel has no resettable high-water mark")
        return max(0.0, min(p for p in peaks if p is not None) - own) / settings.threads

    for label, dtype, grid in (
        ("statistics K=1 fp32", torch.float32, (1.0,)),
        ("statistics K=8 bf16", torch.bfloat16, ARBITRARY[8]),
    ):
        problem = Problem(*settings.target_shape, dtype)
        make: Factory = partial(ours.statistics, problem.logits, problem.target, grid)
        fill(filled, 16, label, partial(extra, make))
    problem = Problem(*settings.target_shape, torch.float32)
    for label, m in (("ranks M=1 fp32", 1), ("ranks M=4096 fp32, beyond its outputs", 4096)):
        fill(filled, 16, label, partial(extra, partial(ours.ranks, problem.logits, problem.selected(m))))
    work = problem.logits.clone()
    make = partial(ours.fused_in_place, work, problem.target)
    refresh = partial(work.copy_, problem.logits)
    fill(filled, 16, "in-place loss fp32", lambda: extra(make, outputs=False, before=refresh))


def _linear(settings: Settings, filled: list[Part]) -> Run:
    """Rows 17 and 18, bf16: four tokens for each row of the other figures, and hidden states of 1,024."""
    n, v = settings.target_shape
    layer = linear.Layer(4 * n, v, 1024, torch.bfloat16)
    run = Run(settings)
    for name, call in linear.products(layer).items():
        run.add(name, lambda call=call: call)  # type: ignore[misc]
    run.add("statistics", partial(linear.statistics, layer))
    run.add("loss", partial(linear.nll, layer))
    run.go()
    fill(filled, 17, "time", lambda: run.over("statistics", "matmul"))
    fill(filled, 18, "time", lambda: run.over("loss", "three matmuls"))

    def extra() -> float:
        if "statistics" in run.missing:
            raise KeyError(run.missing["statistics"])
        peak = peak_extra(linear.statistics(layer))
        if peak is None:
            raise KeyError("this kernel has no resettable high-water mark")
        return peak

    fill(filled, 17, "extra MB", extra)
    return run


def run_targets(settings: Settings, arguments: list[str]) -> dict[str, Any]:
    """Measures everything. ``arguments``: options to hand to the child process (threads, rounds, ...).

    Returns:
        "table" (18 rows, see :func:`targets.table`) and "times" (the raw figures of each run).
    """
    filled = parts()
    ceilings = make_ceilings(settings.threads)
    times: dict[str, Any] = {}
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        settings.say(f"targets: statistics {kind} (rows 1 to 7)")
        torch._dynamo.reset()
        times[f"statistics {kind}"] = _statistics(settings, ceilings, dtype, filled).times()
        settings.say(f"targets: gradients {kind} (rows 8 to 12)")
        torch._dynamo.reset()
        times[f"gradients {kind}"] = _gradients(settings, ceilings, dtype, filled).times()
    settings.say("targets: gradients with a retained heap (rows 11 and 12)")
    try:
        times["retained"] = _retained_child(settings, arguments)
    except RuntimeError as error:
        times["retained"] = {name: {"unavailable": str(error)} for name in ("eager", "compile")}
    _fill_retained(times["retained"], filled)
    settings.say("targets: ranks (rows 13 to 15)")
    torch._dynamo.reset()
    times["ranks"] = _ranks(settings, ceilings, filled).times()
    settings.say("targets: memory (row 16)")
    _memory(settings, filled)
    settings.say("targets: linear layer (rows 17 and 18)")
    times["linear"] = _linear(settings, filled).times()
    return {"table": table(filled), "times": times}
