"""What the probabilities of all answers say: validity and recall at every temperature, and the table over losses."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcalib.storage import whole_file

from . import exact
from .lists import Settings, split
from .report import LEVEL, as_markdown, cell, signed, spread
from .training import TEMPERATURES

PARTS = {"all": "all answers", "learnt": "learnt", "held_out": "held out"}
MEASURES = {
    "validity_at_one": "validity, T = 1",
    "held_out_mass_at_one": "mass of held-out answers, T = 1",
    "recall_at_one": "recall, T = 1",
    **{f"recall_{part}": f"recall at validity {LEVEL}, {words}" for part, words in PARTS.items()},
    "distinct": f"distinct answers at validity {LEVEL}",
    "diversity": f"diversity at validity {LEVEL}",
    "temperature": f"T where validity falls to {LEVEL}",
    "best_validity": "highest validity",
}


def curves(log_q: Tensor, learnt: Tensor) -> dict[str, list[float]]:
    """At every temperature, of one list.

    ``validity``: the mass of all answers. ``recall_*``: the share of those answers whose probability is at least a
    tenth of an even share of all n. ``mass_held_out``: the mass of the answers that were not learnt. ``distinct``: the
    share of the n answers that n draws from the model are expected to contain. ``diversity``: exp(entropy) / n of the
    answers given that the output is valid (Banayeeanzade et al. 2026, Definition 3.1).

    Args:
        log_q: float64 (n, T). learnt: int64, which answers were.
    """
    q, n = log_q.exp(), log_q.shape[0]
    held_out = torch.ones(n, dtype=torch.bool)
    held_out[learnt] = False
    covered = q >= exact.COVERED / n
    of_part = {"all": covered, "learnt": covered[learnt], "held_out": covered[held_out]}
    entropy = -((log_q - log_q.logsumexp(0)).exp() * (log_q - log_q.logsumexp(0))).sum(0)
    found = {
        "validity": q.sum(0),
        "mass_held_out": q[held_out].sum(0),
        **{f"recall_{part}": x.double().mean(0) for part, x in of_part.items()},
        "distinct": -torch.expm1(n * torch.log1p(-q)).mean(0),
        "diversity": entropy.exp() / n,
    }
    return {name: values.tolist() for name, values in found.items()}


def at_level(found: dict[str, list[float]], measure: str) -> float:
    """The best of a measure over the temperatures at which the validity is at least the level; 0 if nowhere."""
    return exact.recall_at_precision(list(zip(found["validity"], found[measure])), LEVEL)


def last_temperature(found: dict[str, list[float]]) -> float:
    """The highest temperature with a validity of the level, on straight lines between neighbours; 0 for none."""
    points = list(zip(TEMPERATURES, found["validity"]))
    for (t0, v0), (t1, v1) in reversed(list(itertools.pairwise(points))):
        if v1 >= LEVEL:
            return t1
        if v0 >= LEVEL:
            return t0 + (v0 - LEVEL) / (v0 - v1) * (t1 - t0)
    return 0.0


def measures(found: dict[str, list[float]]) -> dict[str, float]:
    """The numbers that the table averages; those at T = 1 on the straight line between the two nearest temperatures."""
    above = next(i for i, t in enumerate(TEMPERATURES) if t >= 1)
    share = (1 - TEMPERATURES[above - 1]) / (TEMPERATURES[above] - TEMPERATURES[above - 1])

    def at_one(name: str) -> float:
        return (1 - share) * found[name][above - 1] + share * found[name][above]

    return {
        "validity_at_one": at_one("validity"),
        "held_out_mass_at_one": at_one("mass_held_out"),
        "recall_at_one": at_one("recall_all"),
        **{f"recall_{part}": at_level(found, f"recall_{part}") for part in PARTS},
        "distinct": at_level(found, "distinct"),
        "diversity": at_level(found, "diversity"),
        "temperature": last_temperature(found),
        "best_validity": max(found["validity"]),
    }


def all_curves(results: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """The curves of every list, loss and seed: dicts of list, answers, loss, seed and curves."""
    return [
        {
            "list": name,
            "answers": len(log_q),
            "loss": result["loss"],
            "seed": result["seed"],
            "curves": curves(log_q, split(len(log_q), settings, result["seed"])[0]),
        }
        for result in results
        for name, log_q in result["log_q"].items()
    ]


def table(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a list and loss: for each measure the values of all seeds, mean and standard deviation, and the same of
    the difference from nll with the same seed (same learnt answers, same start, same draws)."""
    values: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in found:
        values.setdefault((row["list"], row["loss"]), {})[row["seed"]] = measures(row["curves"])
    tasks = list(dict.fromkeys(task for task, _ in values))
    rows = []
    for (task, loss), seeds in sorted(values.items(), key=lambda item: tasks.index(item[0][0])):
        row: dict[str, Any] = {"list": task, "loss": loss, "seeds": sorted(seeds)}
        reference = values[task, "nll"]
        for name in MEASURES:
            row[name] = spread([seeds[s][name] for s in row["seeds"]])
            row[name]["minus_nll"] = spread([seeds[s][name] - reference[s][name] for s in row["seeds"]])
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]], task: str) -> str:
    """The table of one list for people: mean ± standard deviation over the seeds."""
    shown = ["validity_at_one", "recall_at_one", "recall_all", "recall_learnt", "recall_held_out", "distinct"]
    head = ["loss", *(MEASURES[name] for name in shown[:3]), "against nll", "seeds above nll"]
    head += [MEASURES[name] for name in shown[3:]]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if row["list"] != task:
            continue
        difference = row["recall_all"]["minus_nll"]
        above = sum(d > 0 for d in difference["values"])
        against = [signed(difference), f"{above} of {len(row['seeds'])}"]
        cells = [
            row["loss"],
            *(cell(row[name]) for name in shown[:3]),
            *(["", ""] if row["loss"] == "nll" else against),
        ]
        lines.append(cells + [cell(row[name]) for name in shown[3:]])
    return as_markdown(lines)


def write(rows: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], facts: dict[str, Any], out: Path) -> None:
    """table.json (everything, the curves too), table.csv (one line a list, loss and seed), table.md."""
    whole = {**facts, "temperatures": TEMPERATURES, "rows": rows, "curves": found}
    with whole_file(out / "table.json") as path:
        path.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    tasks = list(dict.fromkeys(row["list"] for row in rows))
    with whole_file(out / "table.md") as path:
        path.write_text("\n".join(f"{task}:\n\n{markdown(rows, task)}" for task in tasks), encoding="utf-8")
    with whole_file(out / "table.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["list", "loss", "seed", *MEASURES])
        for row in rows:
            for i, seed in enumerate(row["seeds"]):
                writer.writerow([row["list"], row["loss"], seed, *(row[name]["values"][i] for name in MEASURES)])
