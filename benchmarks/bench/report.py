"""Results as text: for a terminal and for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import gpu_report, scale
from .targets import format_table

Row = dict[str, Any]
TITLES = {
    "statistics": "Statistics",
    "ranks": "Ranks",
    "dense": "Dense softmax",
    "pr": "Precision-recall divergence",
    "losses": "Losses",
    "diagnostics": "Order, cutoffs and shape",
    "linear": "Linear layer",
}


def describe_machine(machine: dict[str, Any]) -> list[str]:
    """The machine and the software, one fact a line."""
    library = machine["fastcalib"]
    return [
        *(gpu_report.facts(machine["gpu"]) if "gpu" in machine else []),
        f"CPU: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used; {machine['caches']}",
        f"memory: {machine['memory_gib']} GiB, transparent huge pages: {machine['transparent_huge_pages']}",
        f"instruction set: {machine['isa']} (torch), {library.get('isa', 'none')} (fastcalib's kernels)",
        f"software: {machine['system']}, Python {machine['python']}, torch {machine['torch']}, {machine['compiler']}",
        f"fastcalib {library['version']} ({library['commit']}), backend {library.get('backend', 'none')}",
        f"date: {machine['date']}",
    ]


def _number(value: float | None, pattern: str = "{:.2f}") -> str:
    return "-" if value is None else pattern.format(value)


def _ms(entry: Row, key: str = "median_ms") -> str:
    value = entry[key]
    text = f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"
    return text + ("~" if entry["noisy"] else "")


def _speedup(row: Row, name: str) -> float | None:
    """How many times faster we are: of least times on a CPU, the median over rounds on a GPU."""
    speedup = row["speedup"].get(name)
    return speedup["paired" if "gpu" in row else "least"] if speedup else None


def _cells(row: Row, name: str, entry: Row) -> list[str]:
    read, key = row["read"], "median_ms" if "gpu" in row else "least_ms"
    against = read[key] / entry[key] if read else None
    return [
        _ms(entry),
        _ms(entry, "least_ms"),
        _number(against),
        "" if name == "fastcalib" else _number(_speedup(row, name), "{:.1f}x"),
        _number(entry["extra_mb"], "{:.1f}"),
        _number(entry["error"], "{:.0e}"),
        *(gpu_report.cells(entry) if "gpu" in row else []),
    ]


HEAD = ["median ms", "least ms", "read/this", "fastcalib is", "extra MB", "error"]


def _listing(title: str, entries: dict[str, Row], width: int, describe: Callable[[str, Row], str]) -> list[str]:
    """A heading and what there is to say of each entry beside its name, or why there is nothing."""
    said = {
        n: f"not available: {e['unavailable']}" if e.get("unavailable") else describe(n, e) for n, e in entries.items()
    }
    return [title, *(f"  {name:<{width}}{text}" for name, text in said.items())]


def format_row(row: Row) -> str:
    """One case for a terminal: a heading line, then a line for each competitor."""
    heap = ", retained heap" if row["heap"] == "retained" else ""
    read = f"; pure read {_ms(row['read'])} ms" if row["read"] else ""
    columns = "{:>11}{:>11}{:>11}{:>14}{:>11}{:>9}" + ("{:>9}{:>13}{:>12}" if "gpu" in row else "")
    head = HEAD + (gpu_report.HEAD if "gpu" in row else [])
    title = (
        f"{row['op']} | {row['dtype']} | {row['n']} x {row['v']:,} | {row['direction']}{heap}   "
        f"[{row['bytes_formula']} = {row['bytes'] / 1e6:.0f} MB{read}]\n{'':<26}{columns.format(*head)}"
    )
    lines = _listing(title, row["entries"], 24, lambda name, entry: columns.format(*_cells(row, name, entry)))
    if row["note"]:
        lines.append(f"  note: {row['note']}")
    return "\n".join(lines)


def format_scaling(scaling: dict[str, Any]) -> str:
    """Slopes and points of each series."""

    def describe(_: str, s: Row) -> str:
        points = "  ".join(f"{x:g}: {t:.3g} ms" for x, t in zip(s["x"], s["least_ms"]))
        slopes = (_number(s["slope_time"]), _number(s["slope_time_large"]), _number(s["slope_memory"]))
        return "time {} (large values {}), memory {}\n      {}".format(*slopes, points)

    title = "Scaling (fp32; slope of log time or memory over log of what varies; 1 = proportional)"
    return "\n".join(_listing(title, scaling, 31, describe))


def format_overhead(overhead: dict[str, Any]) -> str:
    """Microseconds per call."""
    title = "Cost of a call (logits 1 x 32, fp32), microseconds, median (least)"
    return "\n".join(_listing(title, overhead, 47, lambda _, e: f"{e['median_us']:8.1f} ({e['least_us']:.1f})"))


HOW_TO_READ = """\
- Every line of a table is one interleaved run in one process: all competitors and the pure read take turns, warm-up is
  outside the clock, samples taken while other processes ran are dropped (`~` marks figures for which too few remained).
- Times are medians in milliseconds. "x read" is the speed of fastcalib as a fraction of a plain sum of the same array
  with the same number of threads, by least times: 1.00 means as fast as merely reading the logits once. Where the array
  fits in the caches (1 x 262,144) the read is a read of the cache.
- "eager" and "torch.compile" are the obvious code; among the others, "torch.compile tuned" is the same job rewritten
  for the compiler by hand (one maximum, all sums from one exponential).
- Speed-ups are ratios of least times. Forward is only compared with forward, forward + backward with the same.
- "extra MB" is the most memory resident during the call beyond what was there before, results and gradients included.
- "error" is the largest error against float64 over the first rows, relative, or absolute below 1; of gradients,
  relative to the largest one; of ranks, in counts.
- "bytes" is what the job must move at least; b bytes an element.
"""


def _markdown_line(row: Row) -> str:
    own = row["entries"].get("fastcalib", {"unavailable": "absent"})
    shape = f"{row['n']:,} x {row['v']:,}"
    what = [f"{row['op']}", row["dtype"], shape, row["bytes_formula"]]
    if own.get("unavailable"):
        blank = [""] * (8 if "gpu" in row else 7)
        return "| " + " | ".join([*what, f"not available: {own['unavailable']}", *blank]) + " |"

    def other(name: str) -> list[str]:
        entry = row["entries"].get(name)
        if entry is None or entry.get("unavailable"):
            return ["-", "-"]
        return [_ms(entry), _number(_speedup(row, name), "{:.1f}x")]

    peers = [
        f"{name} {_number(_speedup(row, name), '{:.1f}x')}"
        for name, entry in row["entries"].items()
        if name not in ("fastcalib", "eager", "torch.compile") and not entry.get("unavailable")
    ]
    memory = [_number(own["extra_mb"], "{:.1f}")]
    eager = row["entries"].get("eager", {})
    memory.append(_number(eager.get("extra_mb"), "{:.0f}"))
    cells = [*what, _ms(own), _number(row["speed_against_read"]), *other("eager"), *other("torch.compile")]
    cells += [", ".join(peers), " / ".join(memory), _number(own["error"], "{:.0e}")]
    return "| " + " | ".join(cells) + " |" + (gpu_report.markdown_cell(own) if "gpu" in row else "")


MARKDOWN_HEAD = (
    "| job | dtype | N x V | bytes | fastcalib ms | x read | eager ms | speed-up | torch.compile ms | speed-up "
    "| others | extra MB (ours / eager) | error |\n|---|---|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|"
)


def _markdown_head(rows: list[Row]) -> str:
    if "gpu" not in rows[0]:
        return MARKDOWN_HEAD
    head, line = MARKDOWN_HEAD.split("\n")
    return f"{head}{gpu_report.MARKDOWN_HEAD}\n{line}--:|"


def markdown(document: dict[str, Any]) -> str:
    """docs/benchmarks.md: the machine, how to read it, one table per family, direction and kind of heap."""
    on_gpu = "gpu" in document["machine"]
    command = f"python benchmarks/run.py {'--device cuda ' if on_gpu else ''}--markdown"
    title = "# Benchmarks on a GPU" if on_gpu else "# Benchmarks"
    lines = [title, "", f"Written by `{command}`; do not edit.", ""]
    lines += [f"- {fact}" for fact in describe_machine(document["machine"])]
    lines += ["", "How to read the tables:", "", gpu_report.HOW_TO_READ if on_gpu else HOW_TO_READ]
    for group, title in TITLES.items():
        for direction in ("fwd", "fwd+bwd"):
            for heap in ("fresh", "retained"):
                key = (group, direction, heap)
                rows = [r for r in document["rows"] if (r["group"], r["direction"], r["heap"]) == key]
                if not rows:
                    continue
                words = {"fwd": "forward", "fwd+bwd": "forward + backward"}[direction]
                if direction == "fwd+bwd" and not on_gpu:
                    words += f", {heap} gradient memory"
                lines += [f"## {title}: {words}", "", _markdown_head(rows), *map(_markdown_line, rows), ""]
    if document["targets"]:
        lines += ["## Figures to reach", "", "```", format_table(document["targets"]["table"]), "```", ""]
    if document.get("scale"):
        lines += ["## Many prefixes", "", *scale.table(document["scale"]), ""]
    if document["scaling"]:
        lines += ["## Scaling", "", "```", format_scaling(document["scaling"]), "```", ""]
    if document["overhead"]:
        lines += ["## Cost of a call", "", "```", format_overhead(document["overhead"]), "```", ""]
    lines += ["## Peers", "", "| package | version | what was compared |", "|---|---|---|"]
    lines += [f"| {p['name']} | {p['version'] or 'not installed'} | {p['note']} |" for p in document["peers"]]
    return "\n".join(lines) + "\n"
