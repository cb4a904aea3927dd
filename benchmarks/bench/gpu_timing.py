"""Interleaved timing on a GPU: each sample one call between two events, the L2 flushed before it.

The time is the device's own: a pause ahead of the first event lets the host queue all launches of the call, so that
slow Python is not counted against anyone (what a call costs the host is ``--overhead``).
"""

from __future__ import annotations

import time

from .gpu import Gpu
from .harness import Timing, Variant

WARM_UP = 3
SLACK = 50e-6  # seconds that the device waits beyond what the host took for the same launches


def measure(variants: list[Variant], gpu: Gpu, *, rounds: int = 50, budget: float = 20.0) -> dict[str, Timing]:
    """Seconds per call by name, ``rounds`` samples of each, variants in turn, the order rotating.

    Args:
        variants: the competitors; ``before`` of each runs ahead of every call, outside the clock.
        gpu: the device.
        rounds: samples of each.
        budget: seconds after which no further round starts; three rounds are always made.
    """
    timings = {variant.name: Timing(variant.name) for variant in variants}
    launch: dict[str, float] = {}
    for variant in variants:
        for _ in range(WARM_UP):
            if variant.before is not None:
                variant.before()
            launch[variant.name] = gpu.enqueue_seconds(variant.call)
    start = time.perf_counter()
    for r in range(rounds):
        if r >= 3 and time.perf_counter() - start > budget:
            break
        shift = r % len(variants) if variants else 0
        pending = [(v.name, *_sample(v, gpu, launch[v.name])) for v in variants[shift:] + variants[:shift]]
        for name, begin, end in pending:
            seconds = gpu.between(begin, end)
            timings[name].samples.append(seconds)
            timings[name].raw.append(seconds)
    return timings


def _sample(variant: Variant, gpu: Gpu, launch: float) -> tuple[object, object]:
    """Queues one call between two events; the device may still be busy with it on return."""
    if variant.before is not None:
        variant.before()
    gpu.flush()
    gpu.head_start(1.5 * launch + SLACK)
    begin, end = gpu.events()
    begin.record()
    variant.call()
    end.record()
    return begin, end
