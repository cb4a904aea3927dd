"""Peak extra memory of a call, from the kernel's high-water mark of this process."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 1e6
# A child process with these keeps freed gradients in its heap instead of returning them to the system, so that the
# next one costs no page faults: what a long training run with a caching allocator sees. The small-chunk caches have to
# be off: a sliver of padding kept in them stops a freed block from ever fitting an aligned request of the same size.
RETAINED_HEAP = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
    "FASTCALIB_BENCH_HEAP": "retained",
}


def heap_kind() -> str:
    """ "retained" in a child started with :data:`RETAINED_HEAP`, else "fresh"."""
    return os.environ.get("FASTCALIB_BENCH_HEAP", "fresh")


def _field(text: str, name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name + ":"))


def resident() -> int:
    """Bytes resident now. Exact (walks the page tables), unlike VmRSS, which is kept in per-thread batches."""
    try:
        return _field(Path("/proc/self/smaps_rollup").read_text(), "Rss")
    except (OSError, StopIteration):
        return _field(Path("/proc/self/status").read_text(), "VmRSS")


def peak_extra(call: Callable[[], Any], before: Callable[[], Any] | None = None) -> float | None:
    """Most megabytes (1e6) that were resident during ``call()`` beyond what was resident before it, results included.

    None where the kernel offers no resettable high-water mark. Resolution about 0.3 MB.
    """
    try:
        gc.collect()
        if heap_kind() == "fresh":  # what earlier calls left in the heap would serve this one and hide what it takes
            ctypes.CDLL(None).malloc_trim(0)
        if before is not None:
            before()
        start = resident()
        Path("/proc/self/clear_refs").write_text("5")
        result = call()
        peak = _field(Path("/proc/self/status").read_text(), "VmHWM")
        del result
    except (OSError, StopIteration, AttributeError):  # the last: a C library without malloc_trim
        return None
    return max(0.0, (peak - start) / MB)
