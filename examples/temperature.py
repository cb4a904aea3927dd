"""What a temperature can and cannot do for coverage, on single predictions that are known exactly.

    python examples/temperature.py           about a quarter of a minute on an idle core
    python examples/temperature.py --quick   fewer losses and steps, a few seconds

Three parts: the precision-recall curves of models with a wrong tail under temperatures; the two formulas for the slopes
of precision and recall in the temperature beside finite differences; a softmax with too few parameters at the optimum
of each loss of fastcalib, and with alpha_lam maximised directly. docs/coverage.md says what came out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from coverage_parts import exact, one_token
from coverage_parts.losses import LOSSES
from coverage_parts.training import TEMPERATURES
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch import Tensor

from fastcalib.storage import whole_file

SUPPORT, VOCABULARY, TAIL = 50, 1000, 0.2
OVERCONFIDENT = 1.5  # the head of the second model is P^1.5: without its tail, T = 1.5 would put it right
SHOWN = (0.5, 0.7, 1.0, 1.5, 2.0)
LAM = 0.5  # of the recall whose slope is looked at
LEVEL = 0.8
SOFTMAX = {"support": 40, "vocabulary": 200, "parameters": 20, "seed": 0}
DIRECT = ("alpha 0.3", "alpha 1", "alpha 3")


def wrong_tails() -> list[dict[str, Any]]:
    """Curves, measures and slopes of the two models with a wrong tail, over temperatures."""
    p = one_token.zipf(SUPPORT)
    sharp = p**OVERCONFIDENT / (p**OVERCONFIDENT).sum()
    models = {
        "exact head": ("Q: P itself, and a fifth of its mass on 950 wrong tokens", p),
        "overconfident head": ("Q: P overconfident, and the same wrong tail", sharp),
    }
    return [
        {"name": name, "title": title, **_under_temperatures(p, one_token.with_wrong_tail(head, VOCABULARY, TAIL))}
        for name, (title, head) in models.items()
    ]


def _under_temperatures(p: Tensor, q: Tensor) -> dict[str, Any]:
    lam = exact.angles()
    curves = []
    for t in SHOWN:
        alpha, beta = exact.alpha_beta(p, one_token.tempered(q, t)[: p.numel()], lam)
        area = exact.curve_area(alpha, beta)
        curves.append({"temperature": t, "alpha": alpha[::5].tolist(), "beta": beta[::5].tolist(), "area": area})
    rows = []
    for t in TEMPERATURES:
        at = one_token.tempered(q, t)[: p.numel()]
        precision, recall = one_token.slopes_by_differences(p, q, LAM, t)
        rows.append(
            {
                "temperature": t,
                "precision": exact.precision(at),
                "recall": float(torch.minimum(p, at / LAM).sum()),
                "precision_slope": one_token.precision_slope(q, p.numel(), t),
                "recall_slope": one_token.recall_slope(p, q, LAM, t),
                "precision_slope_by_differences": precision,
                "recall_slope_by_differences": recall,
            }
        )
    return {"curves": curves, "temperatures": rows}


def optima(names: list[str], steps: int) -> list[dict[str, Any]]:
    """A softmax with too few parameters at the optimum of each loss; all start from that of nll, where it is convex."""
    model = one_token.random_softmax(**SOFTMAX)
    support = model.p.numel()
    start, _ = model.optimum("nll", torch.zeros(SOFTMAX["parameters"], dtype=torch.float64), steps)
    rows = []
    for name in track(names, "optima"):
        theta, gradient = model.optimum(name, start, steps)
        q = model.probabilities(theta)
        tempered = [one_token.tempered(q, t)[:support] for t in TEMPERATURES]
        points = [(exact.precision(at), exact.recall(model.p, at)) for at in tempered]
        rows.append(
            {
                "loss": name,
                "gradient_norm": gradient,
                "precision": exact.precision(q[:support]),
                "recall": exact.recall(model.p, q[:support]),
                "recall_at_level": exact.recall_at_precision(points, LEVEL),
                "plane_area": exact.plane_area(points),
                "temperatures": [
                    {"temperature": t, "precision": precision, "recall": recall}
                    for t, (precision, recall) in zip(TEMPERATURES, points)
                ],
            }
        )
    return rows


def table(report: dict[str, Any]) -> str:
    """The optima, and the slopes at a few temperatures, as markdown."""
    head = ["loss", "precision, T = 1", "recall, T = 1", f"recall at precision {LEVEL}", "area, plane"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head))]
    for row in report["optima"]:
        values = (row[name] for name in ("precision", "recall", "recall_at_level", "plane_area"))
        lines.append(f"| {row['loss']} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    lines += ["", "| model | T | d precision / dT: formula | differences | d beta / dT: formula | differences |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for case in report["cases"]:
        for row in case["temperatures"][::6]:
            names = ("precision_slope", "recall_slope")
            values = [row[f"{name}{suffix}"] for name in names for suffix in ("", "_by_differences")]
            cells = " | ".join(f"{value:+.6f}" for value in values)
            lines.append(f"| {case['name']} | {row['temperature']:g} | {cells} |")
    return "\n".join(lines) + "\n"


def run(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastcalib-temperature"),
    quick: Annotated[bool, typer.Option("--quick", help="Two losses, few steps.")] = False,
) -> None:
    """Compute everything, and write temperature.json, table.md and temperature.png."""
    torch.set_num_threads(1)
    names, steps = (["nll", "trunc 0.4"], 30) if quick else ([*LOSSES, *DIRECT], 600)
    support, vocabulary, gap = SUPPORT, VOCABULARY, 5.0
    report = {
        "torch": torch.__version__,
        "lam": LAM,
        "cases": wrong_tails(),
        "even": {
            "support": support,
            "vocabulary": vocabulary,
            "gap": gap,
            "temperatures": [
                {"temperature": t, "precision": one_token.even_head(support, vocabulary, gap, t)} for t in TEMPERATURES
            ],
        },
        "softmax": SOFTMAX,
        "optima": optima(names, steps),
    }
    from coverage_parts.temperature_figure import draw  # matplotlib takes a second to import

    with whole_file(out / "temperature.json") as path:
        path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    with whole_file(out / "table.md") as path:
        path.write_text(table(report), encoding="utf-8")
    draw(report, out / "temperature.png")
    console = Console()
    console.print(Markdown(table(report)))
    console.print(f"Everything is in {out}: temperature.json, table.md, temperature.png.")


if __name__ == "__main__":
    typer.run(run)
