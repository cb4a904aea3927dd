"""Pictures of one prefix, the prompt: ranks of the valid tokens, their probabilities, the fit of logit against rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from .labels import Labels
from .style import GREY, INK, colour, facets, log_axis
from .tables import visible

Payload = dict[str, Any]


def _details(payload: Payload, part: str) -> list[tuple[int, dict[str, Any]]]:
    entries = [(run, found[0] if found else None) for run, found in enumerate(payload["details"])]
    return [(run, entry) for run, entry in entries if entry and entry[part]]


def has(payload: Payload, part: str) -> bool:
    """Whether any run has this part of the first prefix."""
    return bool(_details(payload, part))


def ranks(payload: Payload) -> Figure:
    """Each valid token at its rank; below, the invalid ones at the head and the place where the size oracle cuts."""
    found = _details(payload, "valid")
    figure, (ax,) = facets(["Ranks of the valid first tokens"], size=(9, 1.1 + 1.1 * len(found)))
    most, labels = 10, Labels()
    for lane, (run, entry) in enumerate(reversed(found)):
        valid, top = entry["valid"], entry["top"]
        at = [g + 1 for g in valid["greater"]]
        most = max(most, *at)
        ax.plot(at, [lane] * len(at), "|", color=colour(run), ms=20, mew=1.4)
        if top:
            invalid = [p + 1 for p, ok in zip(top["position"], top["valid"]) if not ok]
            ax.plot(invalid, [lane - 0.33] * len(invalid), "|", color=GREY, ms=8, mew=1)
        ax.plot([valid["total"]], [lane - 0.33], "D", color=INK, ms=4)
        for text, x in zip(valid["text"], at):
            labels.add(ax, visible(text)[:12], [(x, lane)], "#44484D", above=True)
    log_axis(ax, "x")
    ax.set_xlim(0.9, most * 1.3)
    ax.set_ylim(-0.6, len(found) - 0.3)
    ax.set_yticks(range(len(found)), [payload["runs"][run] for run, _ in reversed(found)])
    ax.set_xlabel("rank among all tokens; diamond: the number of valid tokens")
    ax.grid(axis="y", visible=False)
    labels.place(figure)
    return figure


def probabilities(payload: Payload) -> Figure:
    """Probability of each valid token among the valid ones, beside the target w."""
    found = _details(payload, "valid")
    figure, axes = facets([payload["runs"][run] for run, _ in found], size=(5.4, 3.4))
    for (run, entry), ax in zip(found, axes):
        v = entry["valid"]
        order = sorted(range(len(v["w"])), key=lambda i: (-v["w"][i], -v["p"][i]))
        ax.step(range(1, len(order) + 1), [v["w"][i] for i in order], where="mid", color=GREY, lw=1.2, label="target")
        among = [v["p"][i] / v["mass"] if v["mass"] and v["p"][i] else float("nan") for i in order]
        ax.plot(range(1, len(order) + 1), among, "o", color=colour(run), ms=4, label="model, T = 1")
        log_axis(ax, "y", share=True)
        ax.set(xlabel="valid token, most answers below it first", ylabel="probability among the valid")
        ax.legend()
    return figure


def fit(payload: Payload) -> Figure:
    """Logit against rank with the fitted head and tail; filled dots are valid."""
    found = [(run, entry) for run, entry in _details(payload, "fit") if entry["top"]]
    figure, axes = facets([payload["runs"][run] for run, _ in found] or ["no fit"], size=(5.4, 3.4))
    for (run, entry), ax in zip(found, axes):
        top, valid, line = entry["top"], entry["valid"], entry["fit"]
        points = {p + 1: (z, bool(ok)) for p, z, ok in zip(top["position"], top["logit"], top["valid"])}
        for greater, z in zip(valid["greater"], valid["logit"]) if valid else ():
            points.setdefault(greater + 1, (z, True))
        for ok, face in ((False, "white"), (True, colour(run))):
            some = [(k, z) for k, (z, is_valid) in points.items() if is_valid is ok and z is not None]
            edge = colour(run) if ok else GREY
            ax.plot([k for k, _ in some], [z for _, z in some], "o", mfc=face, mec=edge, ms=4 if ok else 3, ls="none")
        log_axis(ax, "x")
        if line["r_squared"] is not None:
            last = max(points)
            ks = sorted({round(last ** (i / 150)) for i in range(151)})
            head, tail = [k for k in ks if k <= line["knee"]], [k for k in ks if k > line["knee"]]
            ax.plot(head, [line["slope"] * k + line["intercept"] for k in head], color=INK, lw=1.2)
            ax.plot(
                tail, [line["scale"] + line["decay"] * math.log(k + line["shift"]) for k in tail], color=INK, lw=1.2
            )
            ax.axvline(line["knee"], color=GREY, ls=":", lw=1)
            ax.text(0.98, 0.95, f"R² {line['r_squared']:.3f}", transform=ax.transAxes, ha="right", va="top", color=GREY)
        ax.set(xlabel="rank", ylabel="logit")
    return figure


# The name of the file, and the part of a prefix that the picture needs.
FIGURES: dict[str, tuple[str, Callable[[Payload], Figure]]] = {
    "ranks": ("valid", ranks),
    "probabilities": ("valid", probabilities),
    "fit": ("fit", fit),
}
