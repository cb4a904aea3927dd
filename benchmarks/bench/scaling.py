"""How time and memory grow with V, N, K and M: least times, and slopes fitted on log-log axes (1 is proportional)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from . import ours
from .harness import Variant, measure
from .memory import peak_extra
from .problem import Outputs, Problem
from .suite import Settings, reason

DTYPE = torch.float32
MEMORY_FLOOR = 0.3  # MB: below this the high-water mark is noise, and no slope is fitted

Make = Callable[[int], Callable[[], Outputs]]


def _grid(k: int) -> tuple[float, ...]:
    """k temperatures from 0.5 to 2 whose inverses are in no arithmetic progression."""
    return tuple(0.5 * 4 ** (i / max(1, k - 1)) for i in range(k)) if k > 1 else (1.0,)


def series(quick: bool = False) -> dict[str, tuple[tuple[int, ...], Make]]:
    """Name -> the values of what varies, and how to make the call for one of them."""
    base = Problem(64, 32_000, DTYPE)

    def statistics(n: int, v: int) -> Callable[[], Outputs]:
        p = Problem(n, v, DTYPE)
        return ours.statistics(p.logits, p.target, (1.0,))

    def nll(n: int, v: int) -> Callable[[], Outputs]:
        p = Problem(n, v, DTYPE)
        leaf, function = p.logits.requires_grad_(), ours.loss_function("nll", {})
        return lambda: {"grad": torch.autograd.grad(function(leaf, p.target), leaf)[0]}

    vs: tuple[int, ...] = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
    ns: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    ks: tuple[int, ...] = (1, 2, 4, 8, 16)
    ms: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    if quick:
        vs, ns, ks, ms = vs[:3], ns[:3], ks[:3], ms[:3]
    return {
        "statistics, V (N=16)": (vs, lambda v: statistics(16, v)),
        "statistics, N (V=32,000)": (ns, lambda n: statistics(n, 32_000)),
        "statistics, K (64 x 32,000)": (ks, lambda k: ours.statistics(base.logits, base.target, _grid(k))),
        "ranks, M (64 x 32,000)": (ms, lambda m: ours.ranks(base.logits, base.selected(m))),
        "nll fwd+bwd, V (N=16)": (vs, lambda v: nll(16, v)),
        "nll fwd+bwd, N (V=32,000)": (ns, lambda n: nll(n, 32_000)),
    }


def slope(xs: list[float], ys: list[float]) -> float | None:
    """Least-squares slope of log y over log x; None with fewer than two positive points."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys) if x > 0 and y > 0]
    if len(points) < 2:
        return None
    mx, my = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    spread = sum((x - mx) ** 2 for x, _ in points)
    return sum((x - mx) * (y - my) for x, y in points) / spread if spread else None


def run_scaling(settings: Settings, quick: bool = False) -> dict[str, Any]:
    """Measures each series, its points interleaved.

    Returns:
        By name: "x", "least_ms", "extra_mb" (fresh memory at the peak, results included), "slope_time" over all points,
        "slope_time_large" over the upper half (where the fixed cost of a call no longer counts), "slope_memory", or
        "unavailable" with the reason.
    """
    results: dict[str, Any] = {}
    for name, (values, make) in series(quick).items():
        settings.say(f"scaling: {name}")
        try:
            calls = {x: make(x) for x in values}
            for call in calls.values():
                call()
        except Exception as error:
            results[name] = {"unavailable": reason(error)}
            continue
        variants = [Variant(str(x), call) for x, call in calls.items()]
        timings = measure(variants, rounds=settings.rounds, budget=2 * settings.budget, quiet=settings.quiet)
        xs = [float(x) for x in values]
        times = [timings[str(x)].least * 1e3 for x in values]
        memory = [peak_extra(call) for call in calls.values()]
        seen = [m if m is not None and m > MEMORY_FLOOR else 0.0 for m in memory]
        half = len(xs) // 2
        results[name] = {
            "x": xs,
            "least_ms": times,
            "extra_mb": memory,
            "slope_time": slope(xs, times),
            "slope_time_large": slope(xs[half:], times[half:]),
            "slope_memory": slope(xs, seen),
        }
    return results
