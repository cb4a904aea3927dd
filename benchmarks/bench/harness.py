"""Interleaved timing of several variants of one job, with rejection of disturbed samples.

Every variant is timed in turn, round after round, so that a drift of the machine (clock, neighbours) meets all of them
alike; ratios are then taken inside one run. A sample counts as disturbed when, while it ran, other processes used the
CPU, the hypervisor stole time, or our own threads had to wait for a core.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JIFFY = 0.01  # /proc/stat counts hundredths of a second
WARM_BELOW = 0.1  # a variant faster than this (seconds) gets an untimed call before each sample
SLOW = 1.0  # a variant slower than this (seconds) is sampled in the first three rounds only


@dataclass
class Variant:
    """One way of doing a job: ``call`` is timed, ``before`` (if any) runs untimed ahead of every single call."""

    name: str
    call: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass
class Timing:
    """Seconds per call of one variant: ``samples`` by round (None where disturbed), all raw values in ``raw``."""

    name: str
    inner: int = 1
    samples: list[float | None] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)

    @property
    def kept(self) -> list[float]:
        """The undisturbed samples; all of them where fewer than three are undisturbed (then ``noisy``)."""
        clean = [s for s in self.samples if s is not None]
        return self.raw if self.noisy else clean

    @property
    def noisy(self) -> bool:
        """Whether too few samples were undisturbed, so that the figures are of a busy machine."""
        return len([s for s in self.samples if s is not None]) < min(3, len(self.samples))

    @property
    def median(self) -> float:
        return statistics.median(self.kept)

    @property
    def least(self) -> float:
        return min(self.kept)

    def as_dict(self) -> dict[str, Any]:
        """Milliseconds and sample counts, for JSON."""
        clean = sum(s is not None for s in self.samples)
        return {
            "median_ms": self.median * 1e3,
            "least_ms": self.least * 1e3,
            "samples": len(self.raw),
            "disturbed": len(self.raw) - clean,
            "noisy": self.noisy,
            "calls_per_sample": self.inner,
        }


def ratio(numerator: Timing, denominator: Timing, how: str = "least") -> float:
    """``numerator`` / ``denominator``: of the least times, or ``how="paired"`` the median over rounds of the ratio."""
    if how == "least":
        return numerator.least / denominator.least
    if how == "median":
        return numerator.median / denominator.median
    if how == "paired":
        pairs = [a / b for a, b in zip(numerator.samples, denominator.samples) if a is not None and b is not None]
        return statistics.median(pairs) if len(pairs) >= 3 else numerator.median / denominator.median
    raise ValueError(f'how must be "least", "median" or "paired", got {how!r}')


def _machine_busy() -> float | None:
    """Seconds of CPU used since boot by everyone, stolen time included; None where there is no /proc/stat."""
    try:
        with open("/proc/stat") as file:
            v = [int(x) for x in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return (v[0] + v[1] + v[2] + v[5] + v[6] + v[7]) * JIFFY  # user nice system irq softirq steal


def _own_use() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _own_wait() -> float:
    """Seconds our threads spent runnable but without a core (exact, from the scheduler; 0 where unknown)."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue
    return total * 1e-9


class Watch:
    """Notes the state of the machine, then says whether others disturbed us in between."""

    def __init__(self) -> None:
        self.wait, self.own, self.busy, self.start = _own_wait(), _own_use(), _machine_busy(), time.perf_counter()

    def disturbed(self) -> bool:
        elapsed = time.perf_counter() - self.start
        busy, own, wait = _machine_busy(), _own_use(), _own_wait()
        if busy is None or self.busy is None:
            return False
        others = (busy - self.busy) - (own - self.own)
        # two jiffies is the resolution of the counters; beyond that, 5% of the time
        return others > 2 * JIFFY + 0.05 * elapsed or wait - self.wait > 0.002 + 0.03 * elapsed


def wait_for_quiet(at_most: float = 2.0) -> bool:
    """Waits until the rest of the machine is idle for 60 ms; False if that did not happen in ``at_most`` seconds."""
    start = time.perf_counter()
    while time.perf_counter() - start < at_most:
        before = _machine_busy()
        time.sleep(0.06)
        after = _machine_busy()
        if before is None or after is None or after - before <= 1.5 * JIFFY:
            return True
        time.sleep(0.1)
    return False


def _sample(variant: Variant, inner: int) -> float:
    """Seconds per call over ``inner`` calls; the untimed ``before`` of each call is outside the clock."""
    if variant.before is None:
        start = time.perf_counter()
        for _ in range(inner):
            variant.call()
        return (time.perf_counter() - start) / inner
    total = 0.0
    for _ in range(inner):
        variant.before()
        start = time.perf_counter()
        variant.call()
        total += time.perf_counter() - start
    return total / inner


def _is_slow(timing: Timing) -> bool:
    return len(timing.raw) >= 3 and timing.raw[0] > SLOW


def _done(timing: Timing, rounds: int) -> bool:
    return _is_slow(timing) or sum(s is not None for s in timing.samples) >= rounds


def measure(
    variants: list[Variant],
    *,
    rounds: int = 9,
    budget: float = 60.0,
    min_sample: float = 0.04,
    quiet: float = 1.0,
) -> dict[str, Timing]:
    """Times the variants in turn.

    Args:
        variants: the competitors; each is called twice before the clock starts (once if that took over a second).
        rounds: undisturbed samples wanted of each; up to twice as many are taken to get them.
        budget: seconds after which no further round starts (the first round is always finished).
        min_sample: a sample repeats the call until it lasts about this long (seconds), at most 2,000 times.
        quiet: longest wait (seconds) for an idle machine before each round.

    Returns:
        A :class:`Timing` by name, in the order given.
    """
    timings: dict[str, Timing] = {}
    for variant in variants:
        once = _sample(variant, 1)
        if once < SLOW:
            once = _sample(variant, 1)  # the first call compiled or allocated something
        timings[variant.name] = Timing(variant.name, inner=max(1, min(2000, round(min_sample / max(once, 1e-9)))))
    start = time.perf_counter()
    for r in range(2 * rounds):
        if r and time.perf_counter() - start > budget:
            break
        if all(_done(t, rounds) for t in timings.values()):
            break
        wait_for_quiet(quiet)
        turn = variants[r % len(variants) :] + variants[: r % len(variants)]  # nobody always follows the same one
        for variant in turn:
            timing = timings[variant.name]
            if _is_slow(timing):
                continue
            if timing.raw and timing.raw[-1] < WARM_BELOW:
                _sample(variant, 1)
            watch = Watch()
            seconds = _sample(variant, timing.inner)
            timing.samples.append(None if watch.disturbed() else seconds)
            timing.raw.append(seconds)
    return timings
