"""The tables that a finished run prints."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..answer_trie import AnswerTrie
from .assemble import Results
from .tables import RunFacts


def show(
    facts: RunFacts,
    trie: AnswerTrie,
    found: Results,
    sequences: dict[str, dict[str, list[Any]]] | None,
    console: Console,
) -> None:
    """Means of the order by depth, the best rules for whole answers, and what it took."""
    title = f"{facts.model['name']} on {facts.task['name']}: {facts.task['answers']:,} answers"
    console.print(_order_by_depth(title, trie, found, facts.options["precision"]))
    if sequences is not None:
        console.print(_answers(sequences["sequence"]))
    total = sum(entry["seconds"] for entry in facts.cost)
    parts = ", ".join(f"{entry['stage']} {entry['seconds']:.1f}" for entry in facts.cost)
    console.print(f"{total:.1f} seconds: {parts}.")


def _order_by_depth(title: str, trie: AnswerTrie, found: Results, precision: float) -> Table:
    table = Table(title=title, caption="means over prefixes; recall weighs a token by the answers below it")
    for name in (
        "depth",
        "prefixes",
        "valid tokens",
        f"recall at precision {precision:g}",
        "R-precision",
        "area",
        "AUROC",
    ):
        table.add_column(name, justify="right")
    depth = trie.depth[found.nodes]
    sizes = found.sets.counts().double()
    measures = ("recall_at_precision", "r_precision", "area", "auroc")
    columns = (sizes, *(found.rows[f"order_{name}"] for name in measures))
    for d in depth.unique().tolist():
        at = depth == d
        means = [column[at].nanmean().item() for column in columns]
        table.add_row(str(d), f"{int(at.sum()):,}", f"{means[0]:.1f}", *(f"{x:.3f}" for x in means[1:]))
    return table


def _answers(whole: dict[str, list[Any]]) -> Table:
    """At each rule the temperature where validity and diversity are both high (their product is largest)."""
    table = Table(title="whole answers, each rule at the temperature where validity times diversity is largest")
    for name in ("rule", "temperature", "validity", "diversity", "precision", "recall"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    validity, diversity = (torch.tensor(whole[key], dtype=torch.float64) for key in ("validity", "diversity"))
    score = (validity * diversity).nan_to_num(-1.0)
    for rule in dict.fromkeys(whole["rule"]):
        rows = [i for i, name in enumerate(whole["rule"]) if name == rule]
        best = max(rows, key=lambda i: score[i].item())
        if score[best] <= 0:  # no valid answer at any temperature: none is best
            table.add_row(rule, "-", "0", "-", "-", "-")
            continue
        numbers = (f"{whole[key][best]:.3g}" for key in ("validity", "diversity", "precision", "recall"))
        table.add_row(rule, f"{whole['temperature'][best]:g}", *numbers)
    return table
