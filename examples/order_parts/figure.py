"""One picture of the findings: order, the oracle beside rules, depth, whole answers, compounding, shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastcalib.report.data import Run
from fastcalib.report.frontiers import GRID, frontiers
from fastcalib.report.measures import compounding, sequence
from fastcalib.report.style import COLOURS, GREY, INK, STYLE, log_axis, share_axis
from fastcalib.storage import whole_file

from .findings import names
from .runs import WAYS, RunPlan

Drawn = list[tuple[RunPlan, dict[str, Any], Run]]
DASHES = dict(zip((way.name for way in WAYS), ("-", ":", "--")))


def draw(drawn: Drawn, path: Path) -> None:
    """Write the picture: a colour a task, a dash a way of asking."""
    tasks = list(dict.fromkeys(plan.task for plan, _, _ in drawn))
    tone = dict(zip(tasks, COLOURS))
    panels: dict[str, Callable[[Axes, Drawn, dict[str, str]], None]] = {
        "Order at the first token": _frontier,
        "Size oracle beside the best rule": _oracle,
        "Area under the frontier by depth": _depth,
        "Validity without a cutoff": _validity,
        "Precision so far, best rule of each run": _left,
        "Spread over the valid tokens": _evenness,
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(13, 7.6))
        for ax, (title, make) in zip(axes.flat, panels.items()):
            ax.set_title(title)
            make(ax, drawn, tone)
        handles = [Line2D([], [], color=tone[task], lw=2.5) for task in tasks]
        handles += [Line2D([], [], color=GREY, ls=DASHES[way.name]) for way in WAYS]
        words = [*names(tasks), *(f"{way.name}: {way.text}" for way in WAYS)]
        figure.legend(handles, words, loc="outside lower center", ncols=3)
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)


def _look(plan: RunPlan, tone: dict[str, str]) -> dict[str, Any]:
    return {"color": tone[plan.task], "ls": DASHES[plan.way.name], "lw": 1.5}


def _longest(drawn: Drawn) -> Drawn:
    """Of each family the longest answers alone, and two ways: lines could not be told apart otherwise."""
    tasks = {plan.task.rstrip("-0123456789"): plan.task for plan, _, _ in drawn}
    return [d for d in drawn if d[0].task in tasks.values() and d[0].way.name != "line"]


def _frontier(ax: Axes, drawn: Drawn, tone: dict[str, str]) -> None:
    for plan, _, run in _longest(drawn):
        first = next(group for group in frontiers(run) or [] if group["depth"] == 0)
        ax.plot(GRID, first["answers"]["mean"], **_look(plan, tone))
        precision, recall, _ = first["oracle"]
        ax.plot([recall], [precision], "D", color=tone[plan.task], mec="white", ms=6)
    share_axis(ax, "x")
    share_axis(ax, "y")
    ax.set(xlabel="recall of answers (diamond: size oracle)", ylabel="precision of the best cutoff")


def _oracle(ax: Axes, drawn: Drawn, tone: dict[str, str]) -> None:
    filled = {way.name: style for way, style in zip(WAYS, ("full", "left", "none"))}
    for plan, found, _ in drawn:
        ax.plot(
            [found["best_rule_f1"]], [found["oracle_f1"]], "o", color=tone[plan.task], ms=7,
            fillstyle=filled[plan.way.name],
        )  # fmt: skip
    ax.plot([0, 1], [0, 1], ":", color=GREY, lw=1)
    share_axis(ax, "x")
    share_axis(ax, "y")
    ax.set(xlabel="best rule and temperature: mean F1", ylabel="size oracle: mean F1")
    ax.text(0.03, 0.93, "full: plain, half: line, empty: chat", transform=ax.transAxes, color=GREY, fontsize=8)


def _depth(ax: Axes, drawn: Drawn, tone: dict[str, str]) -> None:
    for plan, found, _ in _longest(drawn):
        areas = [row["area"] for row in found["by_depth"]]
        ax.plot(range(1, len(areas) + 1), areas, marker="o", ms=4, **_look(plan, tone))
    share_axis(ax, "y")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="token of the answer (digits: even ones are commas)", ylabel="area under the frontier")


def _validity(ax: Axes, drawn: Drawn, tone: dict[str, str]) -> None:
    for plan, _, run in drawn:
        if plan.way.name == "line":
            continue
        entry = next(e for e in sequence(run) or [] if e["rule"] == "none")
        ax.plot(entry["temperature"], _positive(entry["validity"]), **_look(plan, tone))
    log_axis(ax, "y", share=True)
    ax.set_ylim(1e-7, 1)
    ax.set(xlabel="temperature", ylabel="validity, logarithmic")


def _left(ax: Axes, drawn: Drawn, tone: dict[str, str]) -> None:
    for plan, found, run in _longest(drawn):
        rule, temperature = found["whole_best"]
        entries = compounding(run) or []
        entry = next(e for e in entries if e["rule"] == rule and e["temperature"] == temperature)
        ax.plot(entry["token"], _positive(entry["alpha_product"]), marker="o", ms=4, **_look(plan, tone))
    log_axis(ax, "y", share=True)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="token of the answer", ylabel="product of α, logarithmic")


def _evenness(ax: Axes, drawn: Drawn, tone: dict[str, str]) -> None:
    for plan, found, _ in _longest(drawn):
        ax.plot(found["valid_mass"], found["evenness"], marker="o", ms=3, **_look(plan, tone))
        at = found["temperatures"].index(1.0)
        ax.plot([found["valid_mass"][at]], [found["evenness"][at]], "s", color=INK, ms=5, zorder=4)
    share_axis(ax, "x")
    share_axis(ax, "y")
    ax.set(xlabel="valid mass (square: T = 1)", ylabel="evenness among the valid")


def _positive(values: Iterable[float | None]) -> list[float]:
    return [value if value else float("nan") for value in values]
