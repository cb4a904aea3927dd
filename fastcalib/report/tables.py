"""The page's tables: what the charts show, as text. One run gives a column a measure, several give a column a run."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .data import PrefixSample, Run
from .headlines import percent, plain

Format = Callable[[Any], str]
# The measures of one run, under the key of their row.
Values = dict[tuple[str, ...], dict[str, Any]]
ORDER_MEASURES: dict[str, tuple[str, Format]] = {
    "valid": ("valid tokens", plain),
    "area": ("area under the frontier", plain),
    "recall_at_precision": ("recall at precision {precision:g}", percent),
    "token_recall_at_precision": ("the same, of tokens", percent),
    "r_precision": ("R-precision (size oracle)", percent),
    "average_precision": ("average precision", plain),
    "auroc": ("AUROC", plain),
    "order_calibrated": ("order-calibrated", percent),
}
# What the runs can differ in, in words.
DIFFERENCES = {
    "answers": "valid answers",
    "max_depth": "tokens of the longest answer",
    "end_token": "an answer ends with",
    "style": "the question is put as",
}


@dataclass
class Table:
    """Text for one HTML table; the first column names the row."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    prose: bool = False


def compare(
    caption: str,
    runs: Sequence[Run],
    keys: Sequence[str],
    measures: dict[str, tuple[str, Format]],
    values: Sequence[Values | None],
) -> Table | None:
    """A table of measures under keys.

    Args:
        caption: says what the rows are.
        runs: give the columns' names where there are several.
        keys: names of the key columns.
        measures: what to show, each with a name and a format.
        values: for each run, the measures under each key; None where the run lacks them.
    """
    found = [value for value in values if value]
    if not found:
        return None
    every = list(dict.fromkeys(key for value in found for key in value))
    if len(runs) == 1:
        rows = [[*key, *(fmt(found[0][key].get(m)) for m, (_, fmt) in measures.items())] for key in every]
        return Table(caption, [*keys, *(name for name, _ in measures.values())], rows)
    rows = [
        [*key, name, *(fmt(((value or {}).get(key) or {}).get(m)) for value in values)]
        for key in every
        for m, (name, fmt) in measures.items()
    ]
    return Table(caption, [*keys, "measure", *(run.label for run in runs)], rows)


def all_tables(runs: Sequence[Run], payload: dict[str, Any], sample: PrefixSample) -> dict[str, Any]:
    """Every table of the page, by the name of its section."""
    return {
        "sequence": _sequence(runs, payload),
        "frontier": _frontier(runs, payload),
        "order": _order(runs, payload, by_depth=len(runs) == 1),
        "order_by_depth": _order(runs, payload, by_depth=True) if len(runs) > 1 else None,
        "rules": _rules(runs, payload),
        "prefixes": _prefixes(runs, payload, sample),
        "shape": _shape(runs, payload),
        "compounding": _compounding(runs, payload),
        "reliability": _reliability(runs, payload),
        "calibration": _calibration(runs),
        "cost": _cost(runs),
        "facts": _facts(runs),
        "differences": differences(runs),
    }


def _at(entry: dict[str, Any], i: int, names: Sequence[str]) -> dict[str, Any]:
    return {name: entry[name][i] for name in names}


def _sequence(runs: Sequence[Run], payload: dict[str, Any]) -> Table | None:
    measures: dict[str, tuple[str, Format]] = {
        "validity": ("validity", percent),
        "diversity": ("diversity", percent),
        "precision": ("precision of answers", percent),
        "recall": ("recall of answers", percent),
    }
    values: list[Values | None] = [
        {
            (entry["label"], plain(t)): _at(entry, i, [*measures])
            for entry in entries or ()
            for i, t in enumerate(entry["temperature"])
        }
        for entries in payload["sequence"]
    ]
    return compare("Whole answers: each rule at each temperature", runs, ["rule", "T"], measures, values)


def _frontier(runs: Sequence[Run], payload: dict[str, Any]) -> Table | None:
    grid = payload["grid"]
    steps = [i for i, recall in enumerate(grid) if round(recall * 50) % 5 == 0]
    measures: dict[str, tuple[str, Format]] = {
        "mean": ("precision, mean", percent),
        "low": ("lower quartile", percent),
        "high": ("upper quartile", percent),
    }
    values: list[Values | None] = [
        {(_group(g["depth"]), percent(grid[i])): _at(g["answers"], i, [*measures]) for g in found or () for i in steps}
        for found in payload["frontiers"]
    ]
    return compare("Best precision at a recall of answers", runs, ["depth", "recall at least"], measures, values)


def _order(runs: Sequence[Run], payload: dict[str, Any], by_depth: bool) -> Table | None:
    precision = payload["precision"]
    measures = {key: (name.format(precision=precision), fmt) for key, (name, fmt) in ORDER_MEASURES.items()}
    counted: dict[str, tuple[str, Format]] = {"prefixes": ("prefixes", plain), **measures}
    values: list[Values | None] = [
        {(_group(row["depth"]),): row for row in found["rows"] if by_depth or row["depth"] is None} if found else None
        for found in payload["order"]
    ]
    if not by_depth:
        return compare(
            "Order: means over prefixes", runs, [], counted, [v and {(): v[(_group(None),)]} for v in values]
        )
    return compare("Order: means over prefixes", runs, ["depth"], counted, values)


def _rules(runs: Sequence[Run], payload: dict[str, Any]) -> Table | None:
    measures: dict[str, tuple[str, Format]] = {
        "precision": ("precision", percent),
        "recall": ("recall of answers", percent),
        "token_recall": ("recall of tokens", percent),
        "kept": ("tokens kept", plain),
        "kept_mass": ("mass kept", percent),
    }
    values: list[Values | None] = [
        {
            (row["label"], plain(t)): _at(row, i, [*measures])
            for row in found["rows"]
            for i, t in enumerate(found["temperatures"])
        }
        if found
        else None
        for found in payload["rules"]
    ]
    return compare("Cutoff rules: means over prefixes", runs, ["rule", "T"], measures, values)


def _prefixes(runs: Sequence[Run], payload: dict[str, Any], sample: PrefixSample) -> Table | None:
    precision = payload["precision"]
    measures = {key: (name.format(precision=precision), fmt) for key, (name, fmt) in ORDER_MEASURES.items()}
    values: list[Values | None] = [
        {
            (visible(prefix.text) or "(prompt)",): entry["order"]
            for prefix, entry in zip(sample.prefixes, entries)
            if entry and entry["order"]
        }
        for entries in payload["details"]
    ]
    return compare("The prefixes that can be chosen", runs, ["after"], measures, values)


def _shape(runs: Sequence[Run], payload: dict[str, Any]) -> Table | None:
    measures: dict[str, tuple[str, Format]] = {
        "valid_mass": ("valid mass", percent),
        "kl": ("KL(w || p), nats", plain),
        "kl_valid": ("KL among the valid, nats *", plain),
        "evenness": ("evenness *", percent),
        "expected_distinct": ("distinct valid tokens drawn", percent),
        "entropy": ("entropy, nats", plain),
    }
    values: list[Values | None] = [
        {
            (plain(t),): {key: found["measures"][key]["mean"][i] for key in measures}
            for i, t in enumerate(found["temperatures"])
        }
        if found
        else None
        for found in payload["shape"]
    ]
    return compare("Shape: means over prefixes; * over those with several valid tokens", runs, ["T"], measures, values)


def _compounding(runs: Sequence[Run], payload: dict[str, Any]) -> Table | None:
    measures: dict[str, tuple[str, Format]] = {
        "alpha": ("α", percent),
        "beta": ("β", percent),
        "alpha_product": ("precision so far", percent),
        "beta_product": ("recall so far", percent),
    }
    values: list[Values | None] = [
        {
            (entry["label"], plain(entry["temperature"]), plain(token)): _at(entry, i, [*measures])
            for entry in entries or ()
            for i, token in enumerate(entry["token"])
        }
        for entries in payload["compounding"]
    ]
    return compare("Compounding: each rule, temperature and token", runs, ["rule", "T", "token"], measures, values)


def _reliability(runs: Sequence[Run], payload: dict[str, Any]) -> Table | None:
    measures: dict[str, tuple[str, Format]] = {
        "count": ("tokens", plain),
        "confidence": ("mean confidence", percent),
        "accuracy": ("accuracy", percent),
    }
    values: list[Values | None] = [
        {(f"{percent(b['lower'])} to {percent(b['upper'])}",): b for b in bins or ()} for bins in payload["reliability"]
    ]
    return compare("Bins of confidence", runs, ["confidence"], measures, values)


def _calibration(runs: Sequence[Run]) -> Table | None:
    shown: dict[str, tuple[str, Format]] = {
        "tokens": ("tokens", plain),
        "nll": ("negative log-likelihood, nats a token", plain),
        "perplexity": ("perplexity", plain),
        "accuracy": ("accuracy", percent),
        "brier": ("Brier score", plain),
        "ece": ("expected calibration error (ECE)", percent),
        "mce": ("greatest error of a bin (MCE)", percent),
        "full_ece": ("error over every token of the vocabulary (Full-ECE)", percent),
        "mean_entropy": ("mean entropy, nats", plain),
        "temperature": ("temperature of least NLL", plain),
        "text": ("text", str),
    }
    keys = [key for key in shown if any(run.facts.calibration.get(key) is not None for run in runs)]
    if not keys:
        return None
    rows = []
    for key in keys:
        name, fmt = shown[key]
        cells = [run.facts.calibration.get(key) for run in runs]
        rows.append([name, *("–" if cell is None else fmt(cell) for cell in cells)])
    return Table("Calibration on text", ["measure", *(run.label for run in runs)], rows)


def _cost(runs: Sequence[Run]) -> list[Table]:
    tables = []
    for run in runs:
        rows = [
            [str(entry.get("stage", "")), plain(entry.get("seconds")), str(entry.get("covers", ""))]
            for entry in run.facts.cost
        ]
        if rows:
            total = sum(float(entry.get("seconds") or 0) for entry in run.facts.cost)
            rows.append(["all stages", plain(total), ""])
            tables.append(Table(run.label, ["stage", "seconds", "covers"], rows, prose=True))
    return tables


def _facts(runs: Sequence[Run]) -> Table:
    rows = []
    for group in ("model", "task", "options", "versions"):
        values = [getattr(run.facts, group) for run in runs]
        for key in dict.fromkeys(key for value in values for key in value):
            cells = [as_text(value.get(key)) for value in values]
            if key == "end_token":
                cells = [visible(cell) for cell in cells]
            rows.append([f"{group}: {key}".replace("_", " "), *cells])
    rows.append(["folder", *(str(run.folder) for run in runs)])
    return Table("Facts", ["", *(run.label for run in runs)], rows, prose=True)


def differences(runs: Sequence[Run]) -> Table | None:
    """What tells the runs apart, for the head of the page; names and prompts stand there anyway."""
    rows = []
    for group, left_out in (
        ("model", ("name", "source")),
        ("task", ("name", "prompt", "sequences")),
        ("options", ("prefixes",)),
    ):
        values = [getattr(run.facts, group) for run in runs]
        for key in dict.fromkeys(key for value in values for key in value):
            cells = [as_text(value.get(key)) for value in values]
            if key not in left_out and len(set(cells)) > 1:
                rows.append([DIFFERENCES.get(key, key.replace("_", " ")), *map(visible, cells)])
    return Table("What the runs differ in", ["", *(run.label for run in runs)], rows) if rows else None


def as_text(value: Any) -> str:
    """A fact as text: lists with commas, nothing for None."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def visible(text: str) -> str:
    """Line ends, spaces at either end and whatever else cannot be seen, as signs.

    >>> visible(" New\\nYork\\u2028")
    '␣New⏎York<U+2028>'
    """
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    text = "".join(f"<U+{ord(c):04X}>" if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c for c in text)
    if text.startswith(" "):
        text = "␣" + text[1:]
    return text[:-1] + "␣" if text.endswith(" ") else text


def _group(depth: int | None) -> str:
    if depth is None:
        return "all prefixes"
    return "first token" if depth == 0 else f"after {depth} token{'s' if depth > 1 else ''}"
