"""The findings as Markdown tables, JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from fastcalib.report.headlines import percent
from fastcalib.report.measures import describe_rule
from fastcalib.storage import whole_file

from .findings import at_temperature, least_temperature, names
from .runs import RunPlan

Found = list[tuple[RunPlan, dict[str, Any]]]


def setting(rule: tuple[str, float]) -> str:
    return f"{describe_rule(rule[0])['label']}, T = {rule[1]:g}"


def share(value: float) -> str:
    """Three digits after the point, or as many as there is something to see with.

    >>> share(0.25), share(0.0), share(1.0), share(4.4e-05)
    ('0.250', '0', '1', '4.4e-05')
    """
    if value in (0, 1):
        return f"{value:g}"
    return f"{value:.3f}" if value >= 0.0095 else f"{value:.2g}"


def _rows(found: Found, columns: dict[str, Any]) -> str:
    head = ["task", "put as", *columns]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for plan, f in found:
        cells = [names([plan.task])[0], plan.way.name, *(str(make(f)) for make in columns.values())]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def order(found: Found) -> str:
    columns = {
        "prefixes": lambda f: f"{f['prefixes']:,}",
        "recall at precision 0.8, first token": lambda f: share(f["recall_at_precision_first"]),
        "all prefixes": lambda f: share(f["recall_at_precision"]),
        "size oracle, first token": lambda f: share(f["r_precision_first"]),
        "all prefixes ": lambda f: share(f["r_precision"]),
        "best rule by F1": lambda f: setting(f["best_rule"]),
        "its F1": lambda f: share(f["best_rule_f1"]),
        "settings above the oracle": lambda f: f"{f['settings_above_oracle']} of {f['settings']}",
    }
    return _rows(found, columns)


def depth(found: Found) -> str:
    deepest = max(len(f["by_depth"]) for _, f in found)

    def at(d: int) -> Any:
        return lambda f: share(f["by_depth"][d]["area"]) if d < len(f["by_depth"]) else ""

    return _rows(found, {("first token" if d == 0 else f"after {d}"): at(d) for d in range(deepest)})


def whole(found: Found) -> str:
    columns = {
        "validity, T = 1": lambda f: percent(f["validity"]),
        "diversity, T = 1": lambda f: percent(f["diversity"]),
        "most valid setting": lambda f: setting(f["most_valid"]),
        "its validity": lambda f: percent(f["most_validity"]),
        "its diversity": lambda f: percent(f["diversity_of_most_valid"]),
        "size oracle: precision, recall": lambda f: ", ".join(map(share, f["whole_oracle"])),
        "best rule by F1": lambda f: setting(f["whole_best"]),
        "its precision, recall": lambda f: ", ".join(map(share, f["whole_best_point"])),
    }
    return _rows(found, columns)


def shape(found: Found) -> str:
    def even(f: dict[str, Any]) -> str:
        least = least_temperature(f, 0.9)
        return f"T = {least[0]:g}: {percent(least[1])}" if least else "at none"

    columns = {
        "prefixes with a choice": lambda f: f"{f['choices']:,}",
        "valid mass, T = 1": lambda f: percent(at_temperature(f, "valid_mass", 1.0)),
        "KL among the valid, T = 1": lambda f: share(at_temperature(f, "kl_valid", 1.0)),
        "evenness, T = 1": lambda f: share(at_temperature(f, "evenness", 1.0)),
        "evenness 0.9 from; valid mass there": even,
        "R² of head and tail, median; least": lambda f: f"{f['r_squared'][0]:.4f}; {f['r_squared'][1]:.4f}",
    }
    return _rows(found, columns)


TABLES = {"order": order, "depth": depth, "whole": whole, "shape": shape}


def markdown(found: Found) -> str:
    titles = {
        "order": "Order",
        "depth": "Area under the frontier, mean over the prefixes of each length",
        "whole": "Whole answers",
        "shape": "Shape",
    }
    parts = [f"## {titles[name]}\n\n{make(found)}" for name, make in TABLES.items()]
    return "\n\n".join(parts) + "\n"


def write(found: Found, facts: dict[str, Any], out: Path) -> None:
    """tables.md, tables.json with every digit, depth.csv."""
    with whole_file(out / "tables.md") as path:
        path.write_text(markdown(found), encoding="utf-8")
    runs = [{"task": plan.task, "way": plan.way.name, "command": plan.command, **f} for plan, f in found]
    with whole_file(out / "tables.json") as path:
        path.write_text(json.dumps({**facts, "runs": runs}, indent=2) + "\n", encoding="utf-8")
    with whole_file(out / "depth.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        keys = list(found[0][1]["by_depth"][0])
        writer = csv.writer(file)
        writer.writerow(["task", "way", "depth", *keys])
        for plan, f in found:
            for d, row in enumerate(f["by_depth"]):
                writer.writerow([plan.task, plan.way.name, d, *(row[key] for key in keys)])
