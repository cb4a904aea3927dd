"""A picture of the results: our speed-up over each competitor, and how close to the pure read we run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Okabe and Ito's palette: told apart by the colour-blind, and by lightness in grey.
COLOURS = {"eager": "#0072B2", "torch.compile": "#E69F00", "torch.compile tuned": "#009E73"}
COLOURS |= {"liger-kernel": "#CC79A7", "quack": "#56B4E9", "trl kernel": "#D55E00"}  # on a GPU
MOST_ROWS = 20
STORY = [(f"statistics {label}", "fwd") for label in ("K=1", "K=8", "K=8 arithmetic")]
STORY += [(f"ranks M={m}", "fwd") for m in (1, 16, 4096)]
STORY += [("softmax", "fwd"), ("loss nll", "fwd"), ("loss nll", "fwd+bwd"), ("loss lambda_pr", "fwd+bwd")]
LABELS = {
    "eager": "eager PyTorch",
    "torch.compile": "torch.compile",
    "torch.compile tuned": "torch.compile, hand-tuned code",
}


def _title(row: Row) -> str:
    heap = ", retained heap" if row["heap"] == "retained" else ""
    return f"{row['op']}, {row['dtype']}, {row['n']:,}×{row['v']:,}, {row['direction']}{heap}"


def _speedup(row: Row, name: str) -> float:
    return float(row["speedup"][name]["paired" if "gpu" in row else "least"])


def _drawn(rows: list[Row]) -> list[Row]:
    """The rows with something to show; of a long list, those of the first shape that tell the story."""
    rows = [r for r in rows if r["speedup"] and not r["entries"]["fastcalib"].get("unavailable")]
    if len(rows) <= MOST_ROWS:
        return rows
    story = [r for r in rows if r["heap"] == "fresh" and (r["n"], r["v"]) == (rows[0]["n"], rows[0]["v"])]
    chosen = [r for r in story if (r["op"], r["direction"]) in STORY]
    return chosen or rows[:MOST_ROWS]


def draw(document: dict[str, Any], path: str | Path) -> bool:
    """Writes the picture. False (and nothing written) if there is no row to draw; ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = _drawn(document["rows"])
    if not rows:
        return False
    names = [n for n in COLOURS if any(n in r["speedup"] for r in rows)]
    height = 0.6 * len(rows) + 1.9
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, width_ratios=(3, 1.1), constrained_layout=True
    )
    thick = 0.8 / max(1, len(names))
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            if name not in row["speedup"]:
                continue
            value = _speedup(row, name)
            y = i + (j - (len(names) - 1) / 2) * thick
            left.barh(y, value - 1, left=1, height=thick * 0.92, color=COLOURS[name])
            left.annotate(
                f"{value:.1f}×" if value < 100 else f"{value:.0f}×",
                (max(value, 1), y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        if row["speed_against_read"] is not None and row["direction"] == "fwd":
            right.plot(row["speed_against_read"], i, "D", color="#333333", markersize=6)
            right.annotate(
                f"{row['speed_against_read']:.2f}", (row["speed_against_read"], i),
                xytext=(7, 0), textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
    left.set_xscale("log")
    speeds = [_speedup(r, n) for r in rows for n in names if n in r["speedup"]]
    left.set_xlim(min(0.5, 0.8 * min(speeds)), 1.7 * max(speeds))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.axvline(1, color="#333333", linewidth=1)
    left.set_yticks(range(len(rows)), [_title(r) for r in rows], fontsize=9)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("how many times faster fastcalib is (log scale)")
    right.axvline(1, color="#333333", linewidth=1, linestyle="--")
    right.set_xlim(0, max(1.25, *(1.25 * (r["speed_against_read"] or 0) for r in rows if r["direction"] == "fwd"), 0))
    right.set_xlabel("speed against plainly reading\nthe logits once (forward)", fontsize=9)
    for axis in (left, right):
        axis.grid(axis="x", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLOURS[n], label=f"against {LABELS.get(n, n)}") for n in names]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    machine = document["machine"]
    on, where = "a CPU", f"{machine['cpu']}, threads: {machine['threads']}"
    if "gpu" in machine:
        on, where = "a GPU", machine["gpu"]["name"]
    figure.suptitle(f"fastcalib on {on}", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(
        f"{where}, torch {machine['torch']}, {machine['date']}",
        fontsize=8, color="#555555", x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
