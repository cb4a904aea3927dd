"""What the page draws, worked out from the tables of one run: means over prefixes with their spread, and curves.

Every function returns None where the run lacks the table. Numbers are rounded to five digits for the page alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .data import MAX_HEAD, MAX_VALID, Columns, Prefix, Run, counts_of, number, numbers, spread

SHAPE_MEASURES = ("kl", "kl_valid", "valid_mass", "evenness", "entropy", "expected_distinct")
_FAMILIES = {
    "none": "no cutoff",
    "size_oracle": "size oracle",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
    "epsilon": "epsilon",
    "eta": "eta",
    "top_n_sigma": "top-n-sigma",
}


def describe_rule(rule: str) -> dict[str, Any]:
    """A rule as the tables spell it: its family, its number, and a label for people.

    >>> describe_rule("top_p=0.9")
    {'rule': 'top_p=0.9', 'family': 'top-p', 'parameter': 0.9, 'label': 'top-p 0.9'}
    """
    name, _, argument = rule.partition("=")
    family = _FAMILIES.get(name, name)
    try:
        parameter = number(argument)
    except ValueError:
        parameter = None
    return {"rule": rule, "family": family, "parameter": parameter, "label": f"{family} {argument}".strip()}


def rule_order(rules: Sequence[str]) -> list[str]:
    """No cutoff and the size oracle first, then family by family, each by its number."""
    families = [*_FAMILIES.values()]

    def key(rule: str) -> tuple[int, float, str]:
        facts = describe_rule(rule)
        known = families.index(facts["family"]) if facts["family"] in families else len(families)
        return known, facts["parameter"] or 0.0, rule

    return sorted(set(rules), key=key)


def sequence(run: Run) -> list[dict[str, Any]] | None:
    """Validity and diversity of whole answers, one entry a rule, in order of temperature."""
    table = run.table("sequence")
    if table is None:
        return None
    entries = []
    for rule in rule_order(table["rule"].tolist()):
        rows = np.flatnonzero(table["rule"] == rule)
        rows = rows[np.argsort(table["temperature"][rows], kind="stable")]
        columns = ("temperature", "validity", "diversity", "precision", "recall")
        entries.append({**describe_rule(rule), **{key: numbers(table[key][rows]) for key in columns}})
    return entries


def compounding(run: Run) -> list[dict[str, Any]] | None:
    """alpha and beta of each depth and their running products, one entry a rule and temperature."""
    table = run.table("compounding")
    if table is None:
        return None
    entries = []
    for rule in rule_order(table["rule"].tolist()):
        for temperature in np.unique(table["temperature"][table["rule"] == rule]):
            rows = np.flatnonzero((table["rule"] == rule) & (table["temperature"] == temperature))
            rows = rows[np.argsort(table["depth"][rows], kind="stable")]
            factors = {key: numbers(table[key][rows]) for key in ("alpha", "beta")}
            products = {f"{key}_product": numbers(running_product(table[key][rows])) for key in ("alpha", "beta")}
            token = table["depth"][rows] - table["depth"].min() + 1
            entries.append(
                {**describe_rule(rule), "temperature": number(temperature), "token": numbers(token)}
                | factors
                | products
            )
    return entries


def running_product(factors: np.ndarray) -> np.ndarray:
    """Products of the first, the first two, ... factors; after a factor of 0 the next are not defined and it stays 0.

    >>> running_product(np.array([0.5, 0.0, np.nan]))
    array([0.5, 0. , 0. ])
    """
    ended = np.append(False, np.cumsum(factors == 0)[:-1] > 0)
    return np.cumprod(np.where(ended, 0.0, factors))


def rules(run: Run) -> dict[str, Any] | None:
    """What each rule keeps at each temperature: means over prefixes, those left out where the number is not defined."""
    table = run.table("cutoffs")
    if table is None:
        return None
    names, rule = np.unique(table["rule"], return_inverse=True)
    temperatures, temperature = np.unique(table["temperature"], return_inverse=True)
    cell = rule * len(temperatures) + temperature
    size = len(names) * len(temperatures)
    means = {}
    for key in ("precision", "recall", "token_recall", "kept", "kept_mass"):
        values = table[key].astype(float)
        finite = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            mean = np.bincount(cell[finite], values[finite], size) / np.bincount(cell[finite], minlength=size)
        means[key] = mean.reshape(len(names), len(temperatures))
    index = {name: i for i, name in enumerate(names)}
    return {
        "temperatures": numbers(temperatures),
        "rows": [
            {**describe_rule(name), **{key: numbers(value[index[name]]) for key, value in means.items()}}
            for name in rule_order(names.tolist())
        ],
    }


def order(run: Run) -> dict[str, Any] | None:
    """Means of the order scalars, over all prefixes and by depth."""
    table = run.table("order")
    if table is None:
        return None
    keys = [key for key in table if key not in ("node", "valid")]
    depths = np.array([run.depth_of.get(node, -1) for node in table["node"].tolist()])
    rows: list[tuple[int | None, np.ndarray]] = [(None, np.ones(len(depths), bool))]
    rows += [(int(d), depths == d) for d in np.unique(depths) if d >= 0]
    return {
        "rows": [
            {"depth": depth, "prefixes": int(mask.sum()), "valid": number(table["valid"][mask].mean())}
            | {key: number(spread(table[key][mask].astype(float))[0]) for key in keys}
            for depth, mask in rows
        ]
    }


def shape(run: Run) -> dict[str, Any] | None:
    """Shape scalars over temperature: mean and quartiles; distinct tokens are a share of the valid ones.

    Where one token alone is valid there is nothing to spread: distance among the valid tokens and evenness are means
    over the other prefixes.
    """
    table = run.table("shape")
    if table is None:
        return None
    temperatures = np.unique(table["temperature"])
    sizes = _by_node(run.table("order"), "valid")
    if not sizes and (valid := run.table("valid")) is not None:
        sizes = dict(zip(*(part.tolist() for part in np.unique(valid["node"], return_counts=True))))
    size = np.array([sizes.get(node, np.nan) for node in table["node"].tolist()])
    measures: dict[str, Any] = {}
    for key in SHAPE_MEASURES:
        values = table[key].astype(float)
        if key == "expected_distinct":
            values = values / size
        if key in ("kl_valid", "evenness"):
            values = np.where(size == 1, np.nan, values)
        columns = zip(*(spread(values[table["temperature"] == t]) for t in temperatures))
        measures[key] = {name: numbers(column) for name, column in zip(("mean", "low", "high"), columns)}
    nodes = [len(np.unique(table["node"][mask])) for mask in (size != 1, np.ones(len(size), bool))]
    return {"temperatures": numbers(temperatures), "measures": measures, "choices": nodes[0], "prefixes": nodes[1]}


def reliability(run: Run) -> list[dict[str, Any]] | None:
    """The bins that hold tokens."""
    table = run.table("reliability")
    if table is None:
        return None
    total = max(int(table["count"].sum()), 1)
    return [
        {key: number(table[key][i]) for key in ("lower", "upper", "count", "accuracy", "confidence")}
        | {"share": number(table["count"][i] / total)}
        for i in np.argsort(table["lower"])
        if table["count"][i]
    ]


def prefix_details(run: Run, prefixes: Sequence[Prefix], which: int) -> list[dict[str, Any] | None]:
    """Ranks, probabilities, the head of the ranking and the fit of each sampled prefix; None where the run lacks it."""
    nodes = [node for prefix in prefixes if (node := prefix.nodes[which]) is not None]
    trie = run.table("trie")
    if trie is None or not nodes:
        return [None] * len(prefixes)
    valid, top = run.rows_of("valid", nodes), run.rows_of("top", nodes)
    scalars = {name: run.rows_of(name, nodes) for name in ("fit", "order")}
    details: list[dict[str, Any] | None] = []
    for prefix in prefixes:
        node = prefix.nodes[which]
        if node is None or (node not in valid and node not in top):
            details.append(None)
            continue
        entry: dict[str, Any] = {name: _first_row(rows.get(node)) for name, rows in scalars.items()}
        entry["valid"] = _valid_tokens(trie, valid[node]) if node in valid else None
        entry["top"] = _head(top[node]) if node in top else None
        details.append(entry)
    return details


def _valid_tokens(trie: Columns, rows: Columns) -> dict[str, Any]:
    """The valid tokens by rank, w beside p; of very many the best ranked, and every n-th of the others."""
    order = np.lexsort((rows["child"], rows["n_greater"]))
    weight = counts_of(trie, rows["child"])
    weight = weight / weight.sum()
    mass = np.exp(rows["log_prob"])
    total = len(order)
    if total > MAX_VALID:
        rest = np.linspace(MAX_VALID // 2, total - 1, MAX_VALID - MAX_VALID // 2).round().astype(int)
        order = order[np.unique(np.concatenate([np.arange(MAX_VALID // 2), rest]))]
    at = np.searchsorted(trie["node"], rows["child"][order])
    return {
        "total": total,
        "mass": number(mass.sum()),
        "text": [str(text) for text in trie["text"][at]],
        "greater": rows["n_greater"][order].tolist(),
        "equal": rows["n_equal"][order].tolist(),
        "logit": numbers(rows["logit"][order]),
        "p": numbers(mass[order], 4),
        "w": numbers(weight[order], 4),
    }


def _head(rows: Columns) -> dict[str, Any]:
    order = np.argsort(rows["position"], kind="stable")[:MAX_HEAD]
    return {
        "text": [str(text) for text in rows["text"][order]],
        "logit": numbers(rows["logit"][order]),
        "valid": [int(v) for v in rows["valid"][order]],
        "position": rows["position"][order].tolist(),
    }


def _first_row(rows: Columns | None) -> dict[str, Any] | None:
    return None if rows is None else {key: number(column[0]) for key, column in rows.items() if key != "node"}


def _by_node(table: Columns | None, key: str) -> dict[int, float]:
    return {} if table is None else dict(zip(table["node"].tolist(), table[key].tolist()))
