"""The page's charts as pictures, PNG and SVG: the same numbers, for papers and slides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..storage import whole_file
from . import prefix_figures
from .labels import Labels
from .style import GREY, INK, STYLE, colour, facets, log_axis, name_runs, share_axis

Payload = dict[str, Any]


def save_figures(payload: Payload, folder: Path) -> list[Path]:
    """Every chart that the runs have numbers for, as NAME.png and NAME.svg; those of one prefix show the prompt."""
    makers: dict[str, tuple[bool, Callable[[Payload], Figure]]] = {
        "val_div": (any(payload["sequence"]), val_div),
        "temperature": (any(payload["sequence"]), over_temperature),
        "frontier": (any(payload["frontiers"]), frontier),
        "rules": (any(payload["rules"]), rules),
        "shape": (any(payload["shape"]), shape),
        "compounding": (any(payload["compounding"]), compounding),
        "reliability": (any(payload["reliability"]), reliability),
        **{name: (prefix_figures.has(payload, part), make) for name, (part, make) in prefix_figures.FIGURES.items()},
    }
    paths = []
    with plt.rc_context(STYLE), warnings.catch_warnings():
        # Tokens come in every script; a sign that the font lacks is drawn as a box, and the page has it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        for name, (wanted, make) in makers.items():
            if not wanted:
                continue
            figure = make(payload)
            for suffix in ("png", "svg"):
                path = folder / f"{name}.{suffix}"
                # No date: the same runs give the same files.
                with whole_file(path) as temporary:
                    figure.savefig(temporary, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
                figure.set_layout_engine("none")  # laid out for the first file, and so for the second
                paths.append(path)
            plt.close(figure)
    return paths


def _present(values: Sequence[Any]) -> list[tuple[int, Any]]:
    return [(i, value) for i, value in enumerate(values) if value]


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _most(values: Iterable[float | None]) -> float:
    return max((value for value in values if value is not None), default=1.0)


def val_div(payload: Payload) -> Figure:
    """Validity against diversity, a chart for each run and family; each line is a rule, each dot a temperature."""
    found = _present(payload["sequence"])
    reference = {"no cutoff": (":", GREY), "size oracle": ("--", INK)}
    families = [f for f in dict.fromkeys(e["family"] for _, entries in found for e in entries) if f not in reference]
    most, highest = (
        _most(v for _, entries in found for e in entries for v in e[key]) for key in ("diversity", "validity")
    )
    charts = [(family, run, entries) for family in families or ["no cutoff and size oracle"] for run, entries in found]
    lone = len(found) == 1
    titles = [family if lone else f"{payload['runs'][run]}: {family}" for family, run, _ in charts]
    figure, axes = facets(titles, columns=None if lone else min(len(found), 3))
    labels = Labels()
    for (family, run, entries), ax in zip(charts, axes):
        own = [e for e in entries if e["family"] == family]
        for entry in entries:
            points = list(zip(_floats(entry["diversity"]), _floats(entry["validity"])))
            x, y = zip(*points)
            if entry["family"] in reference:
                dash, tone = reference[entry["family"]]
                ax.plot(x, y, dash, color=tone, lw=1, marker=".", ms=3, label=entry["label"])
            elif entry["family"] == family:
                alpha = 0.4 + 0.6 * (own.index(entry) + 1) / len(own)
                ax.plot(x, y, color=colour(run), alpha=alpha, marker="o", ms=3)
                text = f"{entry['parameter']:g}" if entry["parameter"] is not None else entry["label"]
                drawn = [p for p in reversed(points) if np.isfinite(p).all()]
                labels.add(ax, text, drawn[:1] + drawn[-1:] + drawn[1:-1], colour(run))
        share_axis(ax, "y", highest)
        share_axis(ax, "x", min(most, 0.4) if most <= 0.4 else 1.0)
        ax.set(xlabel="diversity: share of the answers", ylabel="validity")
        ax.legend(loc="upper right")
    labels.place(figure)
    return figure


def over_temperature(payload: Payload) -> Figure:
    """Validity and diversity without a cutoff and with the size oracle."""
    figure, axes = facets(["validity", "diversity of the valid samples"])
    dashes = {"none": "-", "size_oracle": "--"}
    lines = [(run, e) for run, entries in _present(payload["sequence"]) for e in entries if e["rule"] in dashes]
    for ax, key in zip(axes, ("validity", "diversity")):
        for run, entry in lines:
            ax.plot(
                entry["temperature"], _floats(entry[key]), dashes[entry["rule"]], color=colour(run), marker="o", ms=3
            )
        for rule, label in {entry["rule"]: entry["label"] for _, entry in lines}.items():
            ax.plot([], [], dashes[rule], color=GREY, label=label)
        share_axis(ax, "y", _most(v for _, entry in lines for v in entry[key]))
        ax.set(xlabel="temperature", ylabel=key)
        ax.legend()
    name_runs(figure, payload["runs"])
    return figure


def frontier(payload: Payload) -> Figure:
    """Best precision at each recall, for all prefixes and by depth; the diamond is the size oracle."""
    found = _present(payload["frontiers"])
    depths: list[int | None] = [None, *sorted({g["depth"] for _, gs in found for g in gs if g["depth"] is not None})]
    titles = [
        "all prefixes" if d is None else f"after {d} token{'s' * (d != 1)}" if d else "first token" for d in depths
    ]
    figure, axes = facets(titles)
    labels = Labels(size=8)
    for depth, ax in zip(depths, axes):
        for run, groups in found:
            for group in (g for g in groups if g["depth"] == depth):
                curve = group["answers"]
                ax.fill_between(payload["grid"], curve["low"], curve["high"], color=colour(run), alpha=0.13, lw=0)
                ax.plot(payload["grid"], curve["mean"], color=colour(run))
                precision, recall, _ = group["oracle"]
                ax.plot([recall], [precision], "D", color=colour(run), mec="white", ms=6, zorder=4)
                if run == found[0][0]:
                    labels.add(ax, "size oracle", [(recall, precision)], colour(run))
        share_axis(ax, "x")
        share_axis(ax, "y")
        ax.set(xlabel="recall of answers", ylabel="precision of the best cutoff")
    name_runs(figure, payload["runs"])
    labels.place(figure)
    return figure


def rules(payload: Payload) -> Figure:
    """Where each rule lands, at the temperature nearest 1, beside the mean frontier."""
    found = _present(payload["rules"])
    figure, axes = facets([payload["runs"][run] for run, _ in found], size=(5.4, 4.2))
    labels = Labels()
    for (run, table), ax in zip(found, axes):
        i = min(range(len(table["temperatures"])), key=lambda k: abs(table["temperatures"][k] - 1))
        groups = payload["frontiers"][run]
        if groups:
            ax.plot(payload["grid"], groups[0]["answers"]["mean"], color="#D9D9D2", lw=4)
        for row in table["rows"]:
            x, y = row["recall"][i], row["precision"][i]
            if x is None or y is None:
                continue
            oracle = row["family"] == "size oracle"
            marker, tone = ("D", INK) if oracle else ("o", colour(run))
            ax.plot([x], [y], marker, color=tone, ms=6, mec="white", zorder=3 + oracle)
            labels.add(ax, row["label"], [(x, y)], "#44484D")
        share_axis(ax, "x")
        share_axis(ax, "y")
        ax.set(xlabel=f"recall of answers, T = {table['temperatures'][i]:g}", ylabel="precision")
    labels.place(figure)
    return figure


def shape(payload: Payload) -> Figure:
    """Six scalars over temperature: mean over prefixes, and the middle half of them."""
    names = {
        "valid_mass": "valid mass",
        "kl": "KL(w || p), nats",
        "kl_valid": "KL(w || p on the valid tokens), nats",
        "evenness": "evenness",
        "expected_distinct": "distinct valid tokens drawn",
        "entropy": "entropy, nats",
    }
    figure, axes = facets([*names.values()])
    for key, ax in zip(names, axes):
        for run, found in _present(payload["shape"]):
            measure, t = found["measures"][key], found["temperatures"]
            ax.fill_between(t, _floats(measure["low"]), _floats(measure["high"]), color=colour(run), alpha=0.13, lw=0)
            ax.plot(t, _floats(measure["mean"]), color=colour(run), marker="o", ms=3)
        means = [v for _, found in _present(payload["shape"]) for v in found["measures"][key]["mean"] if v]
        if key in ("valid_mass", "evenness", "expected_distinct"):
            share_axis(ax, "y", _most(means))
        elif means and max(means) > 20 * sorted(means)[len(means) // 2]:
            log_axis(ax, "y")
            ax.set_ylim(bottom=min(means) * 0.7)
        else:
            ax.set_ylim(bottom=0)
        ax.set(xlabel="temperature")
    name_runs(figure, payload["runs"])
    return figure


def compounding(payload: Payload) -> Figure:
    """alpha, beta and their products by token, at the temperature nearest 1: the size oracle in colour, others grey."""
    names = {
        "alpha": "precision of each token (α)",
        "alpha_product": "precision so far",
        "beta": "recall of each token (β)",
        "beta_product": "recall so far",
    }
    found = _present(payload["compounding"])
    figure, axes = facets([*names.values()])
    chosen, other = "", "others, all runs" if len(found) > 1 else "others"
    for key, ax in zip(names, axes):
        for run, entries in found:
            nearest = min({e["temperature"] for e in entries}, key=lambda t: abs(t - 1))
            rule = "size_oracle" if any(e["rule"] == "size_oracle" for e in entries) else entries[0]["rule"]
            for entry in (e for e in entries if e["temperature"] == nearest):
                y = _floats(entry[key])
                if entry["rule"] == rule:
                    ax.plot(entry["token"], y, color=colour(run), lw=2, marker="o", zorder=3)
                    chosen = f"{entry['label']}, T = {nearest:g}"
                else:
                    ax.plot(entry["token"], y, color="#BDBDB8", lw=0.8)
        values = [v for _, entries in found for e in entries for v in e[key]]
        share_axis(ax, "y", _most(values) if key.endswith("product") else 1.0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="token of the answer")
    tone = colour(found[0][0]) if len(found) == 1 else INK
    axes[0].plot([], [], color=tone, lw=2, marker="o", label=chosen)
    axes[0].plot([], [], color="#BDBDB8", lw=0.8, label=other)
    axes[0].legend(loc="best")
    name_runs(figure, payload["runs"])
    return figure


def reliability(payload: Payload) -> Figure:
    """Accuracy against confidence; bars are the share of tokens."""
    found = _present(payload["reliability"])
    figure, axes = facets([payload["runs"][run] for run, _ in found], size=(4.2, 4.0))
    for (run, bins), ax in zip(found, axes):
        _reliability(ax, bins, colour(run))
    return figure


def _reliability(ax: Axes, bins: list[dict[str, Any]], tone: str) -> None:
    width = [b["upper"] - b["lower"] for b in bins]
    ax.bar([b["lower"] for b in bins], [b["share"] for b in bins], width, align="edge", color="#D9D9D2", ec="white")
    ax.plot([0, 1], [0, 1], ":", color=GREY, lw=1)
    ax.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], color=tone, marker="o", ms=4)
    share_axis(ax, "x")
    share_axis(ax, "y")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    ax.set(xlabel="confidence", ylabel="accuracy")
