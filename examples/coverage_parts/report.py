"""The table: one row a loss, means over the seeds with their spread; as JSON, CSV and markdown."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

from fastcalib.storage import whole_file

from . import exact

LEVEL = 0.8  # of precision, at which recalls are compared
MEASURES = {
    "precision_at_one": "precision, T = 1",
    "recall_at_one": "recall, T = 1",
    "recall_at_level": f"recall at precision {LEVEL}",
    "soft_recall_at_level": f"soft recall at precision {LEVEL}",
    "plane_area": "area, plane",
    "curve_area": "area, PR curve at its best T",
    "best_temperature": "that T",
}


def measures(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of one loss and seed that the table averages."""
    rows = result["temperatures"]
    points = [(row["precision"], row["recall"]) for row in rows]
    soft = [(row["precision"], row["soft_recall"]) for row in rows]
    best = max(rows, key=lambda row: row["curve_area"])
    return {
        "precision_at_one": result["at_one"]["precision"],
        "recall_at_one": result["at_one"]["recall"],
        "recall_at_level": exact.recall_at_precision(points, LEVEL),
        "soft_recall_at_level": exact.recall_at_precision(soft, LEVEL),
        "plane_area": exact.plane_area(points),
        "curve_area": best["curve_area"],
        "best_temperature": best["temperature"],
    }


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a loss: for each measure the values of all seeds, their mean and standard deviation, and the same of the
    difference from nll with the same seed (same language, same start, same data)."""
    by_loss: dict[str, dict[int, dict[str, float]]] = {}
    alphas: dict[str, dict[int, dict[str, float]]] = {}
    for result in results:
        by_loss.setdefault(result["loss"], {})[result["seed"]] = measures(result)
        alphas.setdefault(result["loss"], {})[result["seed"]] = result["at_one"]["alpha"]
    reference = by_loss["nll"]
    rows = []
    for name, seeds in by_loss.items():
        row: dict[str, Any] = {"loss": name, "seeds": sorted(seeds)}
        for measure in MEASURES:
            row[measure] = spread([seeds[s][measure] for s in row["seeds"]])
            row[measure]["minus_nll"] = spread([seeds[s][measure] - reference[s][measure] for s in row["seeds"]])
        row["alpha_at_one"] = {
            lam: spread([alphas[name][s][lam] - alphas["nll"][s][lam] for s in row["seeds"]])
            for lam in alphas[name][row["seeds"][0]]
        }
        rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, Any]:
    """Values of the seeds, their mean and standard deviation."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people: mean ± standard deviation over the seeds, and recall against nll seed by seed."""
    shown = ["precision_at_one", "recall_at_one", "recall_at_level", "plane_area", "curve_area"]
    head = ["loss", *(MEASURES[name] for name in shown[:3]), "against nll", "seeds above nll"]
    head += [MEASURES[name] for name in shown[3:]]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        difference = row["recall_at_level"]["minus_nll"]
        above = sum(d > 0 for d in difference["values"])
        against = ["", ""] if row["loss"] == "nll" else [signed(difference), f"{above} of {len(row['seeds'])}"]
        cells = [row["loss"], *(cell(row[name]) for name in shown[:3]), *against]
        lines.append(cells + [cell(row[name]) for name in shown[3:]])
    return as_markdown(lines)


def cell(value: dict[str, Any]) -> str:
    """A :func:`spread` in words."""
    return f"{value['mean']:.3f} ± {value['sd']:.3f}"


def signed(value: dict[str, Any]) -> str:
    """A difference."""
    return f"{value['mean']:+.3f} ± {value['sd']:.3f}"


def as_markdown(lines: list[list[str]]) -> str:
    """Cells as a table; the second line is the rule below the head."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def rays(rows: list[dict[str, Any]]) -> str:
    """alpha_lam at T = 1 less nll's, as a markdown table: does a loss gain most on its own ray?"""
    lams = list(rows[0]["alpha_at_one"])
    lines = [["loss", *(f"lam = {lam}" for lam in lams)], ["---"] * (len(lams) + 1)]
    lines += [[row["loss"], *(signed(row["alpha_at_one"][lam]) for lam in lams)] for row in rows]
    return as_markdown(lines)


def write(rows: list[dict[str, Any]], facts: dict[str, Any], out: Path) -> None:
    """table.json (everything), table.csv (one line a loss and seed), table.md."""
    with whole_file(out / "table.json") as path:
        path.write_text(json.dumps({**facts, "losses": rows}, indent=1), encoding="utf-8")
    with whole_file(out / "table.md") as path:
        path.write_text(f"{markdown(rows)}\nalpha_lam at T = 1, less nll's:\n\n{rays(rows)}", encoding="utf-8")
    with whole_file(out / "table.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["loss", "seed", *MEASURES])
        for row in rows:
            for i, seed in enumerate(row["seeds"]):
                writer.writerow([row["loss"], seed, *(row[name]["values"][i] for name in MEASURES)])
