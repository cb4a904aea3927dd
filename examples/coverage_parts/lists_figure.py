"""The planes of recall and validity of ``examples/coverage_lists.py``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fastcalib.demo.figures import BLUE, GREY, ORANGE, STYLE
from fastcalib.storage import whole_file

from .figures import COLOURS, MARKERS, PANELS
from .lists_training import BEFORE, WARM_UP
from .report import LEVEL
from .training import TEMPERATURES

MARKED = min(range(len(TEMPERATURES)), key=lambda i: abs(TEMPERATURES[i] - 1))


def draw(found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each list: three planes, one curve over temperatures for each loss, and the recalls at the level."""
    lists = {row["list"]: row["answers"] for row in found}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(4, len(lists), figsize=(5.4 * len(lists) + 2, 19), squeeze=False)
        for column, (task, answers) in enumerate(lists.items()):
            mine = [row for row in found if row["list"] == task]
            for ax, (title, names) in zip(axes[:, column], PANELS.items()):
                _plane(ax, mine, names)
                ax.set_title(f"{task}, {answers} answers\n{title}")
            _recalls(axes[3, column], [row for row in rows if row["list"] == task], task)
        for ax in axes[:, -1]:  # what a colour means is the same along a row
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes[0, -1].get_legend().set_title(f"marker: T = {TEMPERATURES[MARKED]:.2f}")
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=90)
        plt.close(figure)


def _plane(ax: Axes, mine: Sequence[dict[str, Any]], names: list[str]) -> None:
    _curves(ax, mine, WARM_UP, GREY, "*")
    _curves(ax, mine, "nll", "black", "o")
    for name, colour, marker in zip(names, COLOURS, MARKERS):
        _curves(ax, mine, name, colour, marker)
    ax.axhline(LEVEL, color=GREY, lw=1, ls=":")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall: answers with Q ≥ 0.1 / n", ylabel="validity")


def _curves(ax: Axes, mine: Sequence[dict[str, Any]], name: str, colour: str, marker: str) -> None:
    runs = [row["curves"] for row in mine if row["loss"] == name]
    if not runs:
        return
    mean = [[statistics.fmean(at) for at in zip(*(run[m] for run in runs))] for m in ("recall_all", "validity")]
    line = "--" if name == WARM_UP else "-"
    ax.plot(*mean, color=colour, lw=2 if name == "nll" else 1.4, ls=line)
    at = [values[MARKED] for values in mean]
    ax.plot(*at, marker, color=colour, ms=8, mec="white", ls=line, label=name, zorder=5)


def _recalls(ax: Axes, rows: Sequence[dict[str, Any]], task: str) -> None:
    """Dots: seeds; bars: means. The measure of held-out answers beside that of all."""
    ordered = sorted((row for row in rows if row["loss"] != BEFORE), key=lambda row: row["recall_all"]["mean"])
    for measure, colour, label in (("recall_all", BLUE, "all answers"), ("recall_held_out", ORANGE, "held out")):
        for y, row in enumerate(ordered):
            spread = row[measure]
            ax.plot(spread["values"], [y] * len(spread["values"]), "o", color=colour, ms=4.5, alpha=0.45, mew=0)
            ax.plot([spread["mean"]], [y], "|", color=colour, ms=14, mew=2.5, label=label if y == 0 else None)
            if row["loss"] == "nll":
                ax.axvline(spread["mean"], color=colour, lw=1, ls=":", zorder=0)
    ax.set_yticks(range(len(ordered)), [row["loss"] for row in ordered])
    ax.set(
        xlabel="recall",
        xlim=(-0.02, 1.02),
        title=f"{task}: best recall at validity {LEVEL}\n(dots: seeds; dotted: nll)",
    )
    ax.grid(axis="y", visible=False)
