"""The report as PNG figures. Every function draws one part into the axes it is given, so that parts can be combined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from ..storage import whole_file
from .report import N_BINS

# Okabe and Ito's palette: distinct for colour-blind readers.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7A7A7A"
TASK_STYLES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (SKY, "v")]
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
}


def save_all(report: dict[str, Any], out: Path) -> list[Path]:
    """reliability, temperature, target_ranks, valid_tokens, cost and overview, as PNG in ``out``."""
    with plt.rc_context(STYLE):
        figures = {
            "reliability": _figure(report, (8.6, 4.2), 1, 2, [_reliability_before, _reliability_after]),
            "temperature": _figure(report, (8.6, 3.8), 1, 2, [nll_curve, ece_curve]),
            "target_ranks": _figure(report, (6.4, 3.8), 1, 1, [target_ranks]),
            "valid_tokens": _valid_figure(report),
            "cost": _figure(report, (9.4, 3.4), 1, 2, [cost_time, cost_memory]),
            "overview": _overview(report),
        }
        paths = []
        for name, figure in figures.items():
            path = out / f"{name}.png"
            with whole_file(path) as temporary:
                figure.savefig(temporary, dpi=150)
            plt.close(figure)
            paths.append(path)
    return paths


def reliability(ax: Axes, diagram: dict[str, Any], title: str, colour: str) -> None:
    """Accuracy against confidence; the share of tokens in each bin as bars from below, on the same axis."""
    centres = [(i + 0.5) / N_BINS for i in range(N_BINS)]
    total = sum(diagram["count"])
    share = [c / total for c in diagram["count"]]
    ax.bar(centres, share, width=0.92 / N_BINS, color="#CFCFCF", label="share of tokens")
    ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfect calibration")
    full = [i for i, c in enumerate(diagram["count"]) if c]
    confidence, accuracy = ([diagram[name][i] for i in full] for name in ("confidence", "accuracy"))
    for x, y in zip(confidence, accuracy):
        ax.plot([x, x], [x, y], color=colour, lw=2.5, alpha=0.35, solid_capstyle="butt")
    ax.plot(confidence, accuracy, "o-", color=colour, ms=5, lw=1.5, label="accuracy in the bin")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=title)
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="upper left")


def _reliability_before(ax: Axes, report: dict[str, Any]) -> None:
    diagram = report["tokens"]["reliability_held_out"]["before"]
    reliability(ax, diagram, f"T = 1: ECE {diagram['ece']:.2%}", ORANGE)


def _reliability_after(ax: Axes, report: dict[str, Any]) -> None:
    diagram = report["tokens"]["reliability_held_out"]["after"]
    reliability(ax, diagram, f"T = {diagram['temperature']:.3f} (fitted): ECE {diagram['ece']:.2%}", BLUE)


def nll_curve(ax: Axes, report: dict[str, Any]) -> None:
    """NLL and entropy against temperature; they cross where NLL is least."""
    held_out = report["tokens"]["held_out"]
    t = [row["temperature"] for row in held_out]
    ax.plot(t, [row["nll"] for row in held_out], "o-", color=BLUE, ms=4, label="NLL")
    ax.plot(t, [row["entropy"] for row in held_out], "s-", color=GREEN, ms=4, label="entropy")
    ax.set(xlabel="temperature", ylabel="nats per token", title="NLL and entropy, held-out half")
    _mark_fit(ax, report)
    ax.legend()


def ece_curve(ax: Axes, report: dict[str, Any]) -> None:
    """Calibration errors against temperature."""
    held_out = report["tokens"]["held_out"]
    t = [row["temperature"] for row in held_out]
    ax.plot(t, [row["ece"] for row in held_out], "o-", color=ORANGE, ms=4, label=f"ECE, {N_BINS} equal widths")
    value = [row["adaptive_ece"] for row in held_out]
    bound = [row["adaptive_ece_bound"] for row in held_out]
    ax.plot(t, value, "s--", color=PURPLE, ms=4, label=f"ECE, {N_BINS} equal masses")
    ax.fill_between(
        t, [v - b for v, b in zip(value, bound)], [v + b for v, b in zip(value, bound)], color=PURPLE, alpha=0.2, lw=0
    )
    ax.set(xlabel="temperature", ylabel="calibration error", title="Calibration error, held-out half")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _mark_fit(ax, report)
    ax.legend(loc="upper center")


def _mark_fit(ax: Axes, report: dict[str, Any]) -> None:
    t = report["tokens"]["temperature_fit"]["temperature"]
    ax.axvline(t, color="black", lw=1, ls=":", label=f"fitted: T = {t:.3f}")
    ax.set_xscale("log")
    ax.set_xticks([0.5, 0.7, 1, 1.4, 2], ["0.5", "0.7", "1", "1.4", "2"])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="minor", length=0)


def target_ranks(ax: Axes, report: dict[str, Any]) -> None:
    """Where the token that really came stands in the model's ranking."""
    ranks = report["tokens"]["target_ranks"]
    total = sum(ranks["count"])
    share = [c / total for c in ranks["count"]]
    x = range(len(share))
    ax.bar(x, share, color=SKY, label="in this bin")
    ax.plot(x, list(ranks["top_k_accuracy"].values()), "o-", color=BLUE, ms=4, label="up to this rank")
    edges = [f"{2**i}" if i < 10 else f"{2 ** (i - 10)}k" for i in x]
    ax.set_xticks(list(x)[::2], edges[::2])
    ax.set(
        xlabel="rank of the target (bins end at powers of 2)", ylim=(0, 1.02), title=f"Target rank, {total:,} tokens"
    )
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="center right")


def valid_strip(ax: Axes, report: dict[str, Any]) -> None:
    """Each valid first token at its rank, one row a task."""
    tasks = report["valid"]
    for y, (task, (colour, marker)) in enumerate(zip(tasks, TASK_STYLES)):
        ranks = [row["rank"] for row in task["tokens"]]
        ax.plot(ranks, [y] * len(ranks), "|", color=colour, ms=16, mew=1.3, alpha=0.75)
        ax.plot([task["median_rank"]], [y], marker, color="white", mec=colour, mew=1.8, ms=7, zorder=3)
        best = task["tokens"][0]
        ax.annotate(
            f"first: {best['token'].strip()!r} (rank {best['rank']}); median {task['median_rank']:,.0f}",
            (0.01, y),
            xycoords=("axes fraction", "data"),
            xytext=(0, 11),
            textcoords="offset points",
            fontsize=8,
            color="#333333",
        )
    names = [f"{task['name']}\n({task['valid_tokens']} tokens)" for task in tasks]
    ax.set_yticks(range(len(tasks)), names)
    ax.set_ylim(len(tasks) - 0.5, -0.7)
    ax.set_xscale("log")
    ax.set_xlim(0.8, max(task["worst_rank"] for task in tasks) * 1.6)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set(xlabel="rank among all tokens (1 = most probable)", title="Rank of every valid first token")
    ax.grid(axis="y", visible=False)


def valid_cutoffs(ax: Axes, report: dict[str, Any], measure: str) -> None:
    """Precision or recall of top-k against k."""
    for task, (colour, marker) in zip(report["valid"], TASK_STYLES):
        k = [row["k"] for row in task["cutoffs"]]
        ax.plot(k, [row[measure] for row in task["cutoffs"]], marker=marker, color=colour, ms=4.5, label=task["name"])
    ax.set_xscale("log")
    ax.set(xlabel="top-k cutoff", ylabel=measure, ylim=(-0.03, 1.03), title=f"{measure.capitalize()} of top-k")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_formatter(PercentFormatter(1))


def _precision(ax: Axes, report: dict[str, Any]) -> None:
    valid_cutoffs(ax, report, "precision")


def _recall(ax: Axes, report: dict[str, Any]) -> None:
    valid_cutoffs(ax, report, "recall")
    ax.legend(loc="upper left")


def _cost_bars(ax: Axes, report: dict[str, Any], field: str, factor: float, unit: str, title: str) -> None:
    jobs = report["cost"]["jobs"]
    for offset, who, label, colour in ((-0.19, "ours", "fastcalib", BLUE), (0.19, "eager", "eager PyTorch", GREY)):
        values = [(job[f"{who}_{field}"] or 0) * factor for job in jobs]
        bars = ax.barh([i + offset for i in range(len(jobs))], values, height=0.36, color=colour, label=label)
        ax.bar_label(bars, [f"{v:,.1f}" if v < 100 else f"{v:,.0f}" for v in values], padding=3, fontsize=8)
    ax.set_yticks(range(len(jobs)), [job["job"].replace(", ", ",\n") for job in jobs])
    ax.invert_yaxis()
    ax.set_xscale("log")
    low = min(max(job[f"{who}_{field}"] or 0, 1e-12) * factor for job in jobs for who in ("ours", "eager"))
    high = max((job[f"eager_{field}"] or 0) * factor for job in jobs)
    ax.set_xlim(max(low / 3, high / 1e6), max(high, low) * 8)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.set(xlabel=unit, title=title)
    ax.grid(axis="y", visible=False)


def cost_time(ax: Axes, report: dict[str, Any]) -> None:
    """Median seconds of each job."""
    cost = report["cost"]
    size = f"{cost['rows']} x {cost['vocabulary']:,} logits"
    _cost_bars(ax, report, "seconds", 1e3, "milliseconds (log scale)", f"Time, {size}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def cost_memory(ax: Axes, report: dict[str, Any]) -> None:
    """Peak extra memory of each job."""
    logits = report["cost"]["logits_bytes"] / 1e6
    _cost_bars(ax, report, "peak_bytes", 1e-6, "MB (log scale)", f"Peak extra memory (logits: {logits:,.0f} MB)")


def _figure(report: dict[str, Any], size: tuple[float, float], rows: int, columns: int, parts: list[Any]) -> Figure:
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax, part in zip(axes.flat, parts):
        part(ax, report)
    return figure


def _valid_figure(report: dict[str, Any]) -> Figure:
    figure, axes = plt.subplot_mosaic([["strip", "strip"], ["p", "r"]], figsize=(9.0, 7.2), height_ratios=[1.15, 1])
    valid_strip(axes["strip"], report)
    _precision(axes["p"], report)
    _recall(axes["r"], report)
    return figure


def _overview(report: dict[str, Any]) -> Figure:
    figure, axes = plt.subplot_mosaic(
        [["before", "after", "nll"], ["ranks", "strip", "strip"], ["precision", "recall", "time"]], figsize=(14.5, 12.0)
    )
    parts = {
        "before": _reliability_before,
        "after": _reliability_after,
        "nll": nll_curve,
        "ranks": target_ranks,
        "strip": valid_strip,
        "precision": _precision,
        "recall": _recall,
        "time": cost_time,
    }
    for name, part in parts.items():
        part(axes[name], report)
    n = report["tokens"]["n_tokens"]
    figure.suptitle(f"{report['model']} on {n:,} tokens of {report['text']}", fontsize=13, x=0.01, ha="left")
    return figure
