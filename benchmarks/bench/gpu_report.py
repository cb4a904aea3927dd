"""What the tables say of a run on a GPU beyond what they say of one on a CPU."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
HEAD = ["GB/s", "of measured", "of nominal"]
MARKDOWN_HEAD = " GB/s (of measured, of nominal) |"


def facts(gpu: dict[str, Any]) -> list[str]:
    """The device, and which of our kernels ran on it."""
    nominal = gpu["nominal_gb_per_s"]
    bandwidth = "nominal bandwidth not in our table" if nominal is None else f"{nominal:,.0f} GB/s nominal"
    first, *others = gpu["backends"]
    beside = "".join(f', "fastcalib {other}" is backend="{other}"' for other in others)
    return [
        f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB, {bandwidth}, {gpu['multiprocessors']} multiprocessors, "
        f"capability {gpu['capability']}, L2 {gpu['l2_mb']} MB, {gpu['runtime']}",
        f'"fastcalib" is backend="{first}"{beside}',
    ]


def cells(entry: Row) -> list[str]:
    """The columns of HEAD."""
    nominal = entry["fraction_of_nominal"]
    return [
        f"{entry['gb_per_s']:,.0f}",
        f"{entry['fraction_of_measured']:.2f}",
        "-" if nominal is None else f"{nominal:.2f}",
    ]


def markdown_cell(entry: Row) -> str:
    speed, measured, nominal = cells(entry)
    return f" {speed} ({measured}, {nominal}) |"


HOW_TO_READ = """\
- Every line of a table is one interleaved run in one process: all competitors, the pure read and the copy take turns,
  warm-up is outside the clock. A sample is one call between two CUDA events; before it the L2 is filled with something
  else, and the device is kept busy until the host has queued the launches, so these are times of the device alone.
- Times are medians in milliseconds, speed-ups medians over rounds of the ratio within a round. "x read" is the speed of
  fastcalib as a fraction of torch.sum over the same bytes.
- GB/s counts what the job must move at least ("bytes"; b bytes an element), whatever a competitor really moves. "of
  measured" is against the read of this very run for jobs that only read, against its copy (read + write) for those that
  write too; "of nominal" is against the data sheet.
- "eager" and "torch.compile" are the obvious code; among the others, "torch.compile tuned" is the same job rewritten
  for the compiler by hand. Peers that write the gradient over the logits get a fresh copy, outside the clock.
- Forward is only compared with forward, forward + backward with the same.
- "extra MB" is the peak of torch's allocator during the call beyond what was allocated before it, results and gradients
  included.
- "error" is the largest error against float64 over the first rows, relative, or absolute below 1; of gradients,
  relative to the largest one; of ranks, in counts.
"""
