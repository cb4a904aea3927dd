"""The precision-recall plane of ``examples/coverage.py``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fastcalib.demo.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE
from fastcalib.storage import whole_file

from .report import LEVEL

COLOURS = [BLUE, ORANGE, GREEN, PURPLE, SKY, "#E69F00", "#8C564B"]
MARKERS = "osD^vPX"
PANELS = {
    "Weight grows with p: likely tokens count more": [
        "tailr", "trunc 0.4", "c_div 0.5", "gold", "dft", "mixce", "gce",
    ],
    "Weight falls with p, or two temperatures": ["trunc_r 0.4", "c_div 2", "focal", "gem"],
    "lambda-PR": ["lambda_pr 0.1", "lambda_pr 0.5", "lambda_pr 2"],
}  # fmt: skip


def draw(results: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Three planes, one curve over temperatures for each loss, and the recalls at the level seed by seed."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12.5, 10.5))
        for ax, (title, names) in zip(axes.flat, PANELS.items()):
            _plane(ax, results, names)
            ax.set_title(title)
        _recalls(axes[1, 1], rows)
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)


def _plane(ax: Axes, results: list[dict[str, Any]], names: list[str]) -> None:
    present = {result["loss"] for result in results}
    _curves(ax, results, "nll", "black", "o")
    for name, colour, marker in zip(names, COLOURS, MARKERS):
        if name in present:
            _curves(ax, results, name, colour, marker)
    ax.axhline(LEVEL, color=GREY, lw=1, ls=":")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall P(Q ≥ P/10)", ylabel="precision Q(supp P)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 0.12), title="marker: T = 1")


def _curves(ax: Axes, results: list[dict[str, Any]], name: str, colour: str, marker: str) -> None:
    mine = [result for result in results if result["loss"] == name]

    def path(result: dict[str, Any], measure: str) -> list[float]:
        return [row[measure] for row in result["temperatures"]]

    for result in mine:
        ax.plot(path(result, "recall"), path(result, "precision"), color=colour, lw=0.6, alpha=0.25)
    mean = {
        measure: [statistics.fmean(values) for values in zip(*(path(result, measure) for result in mine))]
        for measure in ("recall", "precision")
    }
    ax.plot(mean["recall"], mean["precision"], color=colour, lw=2 if name == "nll" else 1.6)
    at_one = [statistics.fmean(result["at_one"][m] for result in mine) for m in ("recall", "precision")]
    ax.plot(*at_one, marker, color=colour, ms=8, mec="white", ls="-", label=name, zorder=5)


def _recalls(ax: Axes, rows: list[dict[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: row["recall_at_level"]["mean"])
    for y, row in enumerate(ordered):
        spread = row["recall_at_level"]
        colour = "black" if row["loss"] == "nll" else BLUE
        ax.plot(spread["values"], [y] * len(spread["values"]), "o", color=colour, ms=5, alpha=0.45, mew=0)
        ax.plot([spread["mean"]], [y], "|", color=colour, ms=16, mew=2.5)
    reference = next(row for row in rows if row["loss"] == "nll")["recall_at_level"]["mean"]
    ax.axvline(reference, color="black", lw=1, ls=":")
    ax.set_yticks(range(len(ordered)), [row["loss"] for row in ordered])
    ax.set(xlabel="recall", title=f"Best recall at precision {LEVEL}, over temperatures (dots: seeds)")
    ax.grid(axis="y", visible=False)
