"""The figure of ``examples/temperature.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fastcalib.demo.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE
from fastcalib.storage import whole_file

DRAWN_WITH_CURVE = {
    "nll": "black", "tailr": BLUE, "trunc 0.4": ORANGE, "c_div 0.5": GREEN, "c_div 2": PURPLE, "trunc_r 0.4": SKY,
}  # fmt: skip
SAME_AS_TAILR = ("lambda_pr 2",)  # with one token a sequence and lam > 1 it is tailr
OFFSETS = {"dft": (-5, -13), "gce": (-22, -13), "alpha 3": (6, -4), "mixce": (-34, -6), "alpha 0.3": (-46, -4)}
TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)


def draw(report: dict[str, Any], path: Path) -> None:
    """PR curves under temperatures for two wrong models, both against T, and the optima of a small softmax."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12.5, 10.5))
        for ax, case in zip(axes[0], report["cases"]):
            _curves(ax, case)
        _against_temperature(axes[1, 0], report)
        _optima(axes[1, 1], report["optima"])
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)


def _curves(ax: Axes, case: dict[str, Any]) -> None:
    colours = plt.get_cmap("viridis")
    for i, curve in enumerate(case["curves"]):
        share = i / max(1, len(case["curves"]) - 1)
        label = f"T = {curve['temperature']:g}, area {curve['area']:.2f}"
        ax.plot(curve["beta"], curve["alpha"], color=colours(0.92 * share), lw=2, label=label)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.3), xlabel="β (recall)", ylabel="α (precision)", title=case["title"])
    ax.set_yticks(TICKS)
    ax.legend(loc="upper right", ncols=2)


def _against_temperature(ax: Axes, report: dict[str, Any]) -> None:
    for case, colour in zip(report["cases"], (BLUE, ORANGE)):
        t = [row["temperature"] for row in case["temperatures"]]
        precision, recall = ([row[name] for row in case["temperatures"]] for name in ("precision", "recall"))
        ax.plot(t, precision, color=colour, lw=2, label=f"{case['name']}: precision")
        ax.plot(t, recall, color=colour, lw=2, ls="--", label=f"{case['name']}: β at λ = {report['lam']:g}")
    even = report["even"]
    t = [row["temperature"] for row in even["temperatures"]]
    label = f"P even on {even['support']} of {even['vocabulary']:,}: precision = α at λ = 1"
    ax.plot(t, [row["precision"] for row in even["temperatures"]], color=GREEN, lw=2, label=label)
    ax.axvline(1, color=GREY, lw=1, ls=":")
    ax.set(xlabel="temperature", ylim=(0, 1.45), title="Precision and recall against temperature")
    ax.set_yticks(TICKS)
    ax.legend(loc="upper right")


def _optima(ax: Axes, optima: list[dict[str, Any]]) -> None:
    for row in optima:
        name = row["loss"]
        if name in DRAWN_WITH_CURVE:
            points = row["temperatures"]
            recall, precision = ([point[key] for point in points] for key in ("recall", "precision"))
            ax.plot(recall, precision, color=DRAWN_WITH_CURVE[name], lw=2 if name == "nll" else 1.4, label=name)
        marker = "*" if name.startswith("alpha") else "o"
        colour = DRAWN_WITH_CURVE.get(name, GREY)
        ax.plot([row["recall"]], [row["precision"]], marker, color=colour, ms=11 if marker == "*" else 7, mec="white")
        if name not in DRAWN_WITH_CURVE and name not in SAME_AS_TAILR:
            offset = OFFSETS.get(name, (6, 4))
            ax.annotate(name, (row["recall"], row["precision"]), offset, textcoords="offset points", fontsize=8)
    ax.set(
        xlim=(0, 1.03), ylim=(0, 1.05), xlabel="recall P(Q ≥ P/10)", ylabel="precision Q(supp P)",
        title="A softmax with too few parameters, at each loss's optimum",
    )  # fmt: skip
    ax.legend(loc="upper right", title="lines: T from 0.2 to 2.5\nmarkers: T = 1")
