"""The GPU that is measured: its clock (events), its L2, its memory, its name. Not yet run on a GPU.

Everything goes through ``api``, which is torch.cuda or, in tests, something that behaves like it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

MB = 1e6
# Bytes per second of the memory by the vendors' data sheets. The names are those that the driver reports, whole: a
# laptop's or a part (MIG) of one of these has another bandwidth and must not match.
NOMINAL = {
    r"NVIDIA A100-(SXM4|PCIE)-40GB": 1.555e12,
    r"NVIDIA A100 80GB PCIe": 1.935e12,
    r"NVIDIA A100-SXM4-80GB": 2.039e12,
    r"NVIDIA H100 80GB HBM3": 3.35e12,
    r"NVIDIA H100 PCIe": 2.0e12,
    r"NVIDIA H100 NVL": 3.9e12,
    r"NVIDIA H200( NVL)?": 4.8e12,
    r"NVIDIA L40S": 0.864e12,
    r"NVIDIA GeForce RTX 4090": 1.008e12,
    r"AMD Instinct MI300X": 5.3e12,
}
FLUSHED = 512 << 20  # bytes at least: more than any L2, and twice the Infinity Cache of an MI300X
PROBE_CYCLES = 1_000_000
LONGEST_HEAD_START = 0.02  # seconds


def nominal_bandwidth(name: str) -> float | None:
    """Bytes per second by the data sheet; None for a device that is not in the table."""
    return next((value for pattern, value in NOMINAL.items() if re.fullmatch(pattern, name)), None)


def why_not() -> str:
    """What is missing for ``--device cuda``, and what to do; empty where it can run."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        cause = "this build of torch is for the CPU" if built is None else "torch sees no CUDA device"
        return f"--device cuda: {cause}; run it on a machine with a GPU and a torch built for it, or use --device cpu"
    if not live_backends():
        return "--device cuda: neither Triton nor CUDA kernels are live; `python -m fastcalib info` says why"
    return ""


def live_backends() -> list[str]:
    """fastcalib's GPU backends that run here, the default one first."""
    import fastcalib

    return [kind for kind in ("triton", "cuda") if fastcalib.backends()[kind][0]]


class Gpu:
    """One device.

    Args:
        backends: fastcalib's backends to measure; the first is the one called "fastcalib".
        api: torch.cuda, or a stand-in.
        device: where tensors are made.
        flushed: least bytes that flush the L2.
    """

    def __init__(
        self, backends: Sequence[str], *, api: Any = torch.cuda, device: str = "cuda", flushed: int = FLUSHED
    ) -> None:
        self.backends, self.api, self.device = tuple(backends), api, torch.device(device)
        self.properties = api.get_device_properties(self.device)
        cache = int(getattr(self.properties, "L2_cache_size", 0))
        self._flushed = torch.zeros(max(flushed, 4 * cache) // 4, dtype=torch.float32, device=self.device)
        self._sum = torch.zeros((), dtype=torch.float32, device=self.device)
        self._cycles = self._cycles_per_second()

    @property
    def name(self) -> str:
        return str(self.properties.name)

    def _cycles_per_second(self) -> float:
        self.api._sleep(PROBE_CYCLES)  # wakes the clocks
        start, end = self.events()
        start.record()
        self.api._sleep(PROBE_CYCLES)
        end.record()
        return PROBE_CYCLES / max(self.between(start, end), 1e-9)

    def events(self) -> tuple[Any, Any]:
        """A pair of timing events."""
        return self.api.Event(enable_timing=True), self.api.Event(enable_timing=True)

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one event to the other, once both have happened."""
        self.api.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def flush(self) -> None:
        """Fills the L2 with something else. By reading: dirty lines would be written back on somebody's time."""
        torch.sum(self._flushed, dim=0, out=self._sum)

    def head_start(self, seconds: float) -> None:
        """Keeps the device busy while the host puts the next launches into its queue, so that no gap is timed."""
        self.api._sleep(int(min(seconds, LONGEST_HEAD_START) * self._cycles))

    def enqueue_seconds(self, call: Callable[[], Any]) -> float:
        """How long the host takes to launch ``call``."""
        self.api.synchronize()
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        self.api.synchronize()
        return taken

    def peak_extra(self, call: Callable[[], Any], before: Callable[[], Any] | None = None) -> float:
        """Most megabytes (1e6) that torch's allocator had given out during ``call()`` beyond those before it."""
        if before is not None:
            before()
        self.api.synchronize()
        self.api.reset_peak_memory_stats(self.device)
        start = self.api.memory_allocated(self.device)
        result = call()
        self.api.synchronize()
        peak = self.api.max_memory_allocated(self.device)
        del result
        return max(0.0, (peak - start) / MB)

    def describe(self) -> dict[str, Any]:
        """Facts for the head of the tables: no host names, no serial numbers."""
        p, nominal = self.properties, nominal_bandwidth(self.name)
        return {
            "name": self.name,
            "memory_gib": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
            "capability": f"{p.major}.{p.minor}",
            "l2_mb": round(int(getattr(p, "L2_cache_size", 0)) / MB, 1),
            "nominal_gb_per_s": None if nominal is None else nominal / 1e9,
            "backends": list(self.backends),
            "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}",
        }
