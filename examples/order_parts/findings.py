"""What the runs say to the paper's claims: a few figures of each run, worked out from its tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastcalib.diagnostics import diversity_bound
from fastcalib.report.data import Columns, Run

ORACLE = "size_oracle"


def f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall; 0 where both are 0 or the precision is not defined."""
    p, r = np.nan_to_num(precision), np.nan_to_num(recall)
    total = p + r
    return np.where(total > 0, 2 * p * r / np.where(total > 0, total, 1), 0.0)


def findings(run: Run) -> dict[str, Any]:
    """Every figure of one run."""
    return {
        **_order(run),
        **rules(run),
        **_whole(run),
        **_shape(run),
        "by_depth": by_depth(run),
        "bound": bound(run),
    }


def _table(run: Run, name: str) -> Columns:
    table = run.table(name)
    if table is None:
        raise ValueError(f"{run.folder} has no table {name}: run the example again")
    return table


def _order(run: Run) -> dict[str, Any]:
    order = _table(run, "order")
    first = order["node"] == 0
    return {
        "prefixes": len(first),
        "valid_first": int(order["valid"][first][0]),
        **{f"{key}_first": float(order[key][first][0]) for key in ("recall_at_precision", "r_precision", "area")},
        **{key: float(order[key].mean()) for key in ("recall_at_precision", "r_precision", "area", "order_calibrated")},
    }


def by_depth(run: Run) -> list[dict[str, float]]:
    """Means over the prefixes of each length, the first token's first."""
    order = _table(run, "order")
    depth = np.array([run.depth_of[node] for node in order["node"].tolist()])
    keys = ("area", "recall_at_precision", "r_precision", "valid")
    return [
        {"prefixes": int((depth == d).sum()), **{key: float(order[key][depth == d].mean()) for key in keys}}
        for d in np.unique(depth)
    ]


def rules(run: Run) -> dict[str, Any]:
    """The size oracle beside every rule at every temperature, by means over prefixes.

    A cutoff that keeps as many tokens as are valid has precision = recall = R-precision. A rule beats it by the mean of
    F1, and beats it beyond doubt where its mean precision and its mean recall are both at least the oracle's.
    """
    table = _table(run, "cutoffs")
    names, rule = np.unique(table["rule"], return_inverse=True)
    temperatures, t = np.unique(table["temperature"], return_inverse=True)
    cell, size = rule * len(temperatures) + t, len(names) * len(temperatures)
    settings = list(itertools.product(names.tolist(), temperatures.tolist()))
    scores = f1(table["precision"], table["token_recall"])
    columns = (np.nan_to_num(table["precision"]), table["recall"], scores)
    precision, recall, score = (np.bincount(cell, c, size) / np.bincount(cell, minlength=size) for c in columns)
    oracle = settings.index((ORACLE, 1.0))  # the same at every temperature
    others = np.array([name != ORACLE for name, _ in settings])
    best = int(np.argmax(np.where(others, score, -1)))
    better = others & (precision >= precision[oracle]) & (recall >= recall[oracle])
    return {
        "oracle_f1": float(score[oracle]),
        "best_rule": settings[best],
        "best_rule_f1": float(score[best]),
        "best_rule_precision": float(precision[best]),
        "best_rule_recall": float(recall[best]),
        "settings": int(others.sum()),
        "settings_above_oracle": int(better.sum()),
    }


def _whole(run: Run) -> dict[str, Any]:
    table = _table(run, "sequence")
    plain = _at(table, "none", 1.0)
    oracle = _at(table, ORACLE, 1.0)
    rules = table["rule"] != ORACLE
    valid = int(np.argmax(np.where(rules, table["validity"], -1)))
    score = f1(table["precision"], table["recall"])
    best = int(np.argmax(np.where(rules, score, -1)))
    return {
        "validity": float(table["validity"][plain]),
        "diversity": float(table["diversity"][plain]),
        "most_valid": (str(table["rule"][valid]), float(table["temperature"][valid])),
        "most_validity": float(table["validity"][valid]),
        "diversity_of_most_valid": float(table["diversity"][valid]),
        "answers": run.answers,
        "whole_oracle": [float(np.nan_to_num(table[key][oracle])) for key in ("precision", "recall")],
        "whole_oracle_f1": float(score[oracle]),
        "whole_best": (str(table["rule"][best]), float(table["temperature"][best])),
        "whole_best_point": [float(np.nan_to_num(table[key][best])) for key in ("precision", "recall")],
        "whole_best_f1": float(score[best]),
    }


def _at(table: Columns, rule: str, temperature: float) -> int:
    return int(np.flatnonzero((table["rule"] == rule) & (table["temperature"] == temperature))[0])


def _shape(run: Run) -> dict[str, Any]:
    """Among prefixes that leave a choice; the others have distance 0 and evenness 1 whatever the model does."""
    table, order, fit = _table(run, "shape"), _table(run, "order"), _table(run, "fit")
    several = np.isin(table["node"], order["node"][order["valid"] > 1])
    found: dict[str, Any] = {"choices": int((order["valid"] > 1).sum())}
    temperatures = np.unique(table["temperature"])
    for key, rows in (("kl_valid", several), ("evenness", several), ("valid_mass", several)):
        found[key] = [float(table[key][rows & (table["temperature"] == t)].mean()) for t in temperatures]
    found["temperatures"] = temperatures.tolist()
    found["r_squared"] = [float(np.median(fit["r_squared"])), float(fit["r_squared"].min())]
    return found


def bound(run: Run) -> dict[str, Any] | None:
    """Theorem 5.2 beside every setting: how often diversity lies above the bound for its validity, and the nearest.

    Only where every answer has as many valid tokens at each step as every other, so that one bound holds for all. The
    theorem is about a model whose logits fall evenly with the rank and ranks valid tokens first; ours is no such model.
    """
    order, table = _table(run, "order"), _table(run, "sequence")
    depth = np.array([run.depth_of[node] for node in order["node"].tolist()])
    sizes = [np.unique(order["valid"][depth == d]) for d in np.unique(depth)]
    if any(len(size) > 1 for size in sizes):
        return None
    defined = np.isfinite(table["diversity"])
    lacking = torch.from_numpy((1 - table["validity"][defined]).clip(0, 1))
    most = diversity_bound(torch.tensor([int(size[0]) for size in sizes]), lacking).numpy()
    diversity = table["diversity"][defined]
    nearest = int(np.argmax(diversity / most))
    return {
        "settings": int(defined.sum()),
        "above": int((diversity > most * (1 + 1e-6)).sum()),
        "tightest_bound": float(most.min()),
        "nearest": {
            "rule": [str(table["rule"][defined][nearest]), float(table["temperature"][defined][nearest])],
            "validity": float(table["validity"][defined][nearest]),
            "diversity": float(diversity[nearest]),
            "bound": float(most[nearest]),
        },
    }


def at_temperature(found: dict[str, Any], key: str, temperature: float) -> float:
    """One of the lists over temperature, read off."""
    return float(found[key][found["temperatures"].index(temperature)])


def least_temperature(found: dict[str, Any], evenness: float) -> tuple[float, float] | None:
    """The lowest temperature that spreads so evenly over the valid tokens, and the valid mass left there."""
    for t, even, mass in zip(found["temperatures"], found["evenness"], found["valid_mass"]):
        if even >= evenness:
            return t, mass
    return None


def names(tasks: Sequence[str]) -> list[str]:
    """The tasks in words."""
    words = {"us-states": "US states", "digits": "{n} digits", "digits-sum": "{n} digits, sum 9"}
    return [words[task.rstrip("-0123456789")].format(n=task[-1]).replace("1 digits", "1 digit") for task in tasks]
