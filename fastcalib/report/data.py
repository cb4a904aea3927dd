"""Reading runs: their tables as NumPy columns, a label for each, and the prefixes whose details the page shows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..runner.tables import RunFacts, read_facts, read_table

Columns = dict[str, np.ndarray]

# What a page holds of each run. Above these the page says what was left out; the tables hold everything.
MAX_PREFIXES = 150
MAX_VALID = 300
MAX_HEAD = 60


@dataclass
class Run:
    """One folder: its facts, and its tables, read when first asked for."""

    folder: Path
    facts: RunFacts
    label: str = ""
    _tables: dict[str, Columns | None] = field(default_factory=dict)

    def table(self, name: str) -> Columns | None:
        """The columns, NumPy arrays of one length; None where the run has no such table or it is empty."""
        if name not in self._tables:
            found = read_table(self.folder, name)
            self._tables[name] = (
                None
                if found is None or not len(found)
                else {
                    key: column.to_numpy(zero_copy_only=False) for key, column in zip(found.column_names, found.columns)
                }
            )
        return self._tables[name]

    def rows_of(self, name: str, nodes: Sequence[int]) -> dict[int, Columns]:
        """The rows of a table for some nodes alone, one entry a node, in the table's order.

        The tables of single prefixes are long: text becomes Python strings only for the rows that are kept.
        """
        found = read_table(self.folder, name)
        if found is None:
            return {}
        kept = found.filter(pc.is_in(found["node"], value_set=pa.array(nodes, pa.int64())))
        columns = {key: column.to_numpy(zero_copy_only=False) for key, column in zip(kept.column_names, kept.columns)}
        order = np.argsort(columns["node"], kind="stable")
        wanted, first = np.unique(columns["node"][order], return_index=True)
        parts = np.split(order, first[1:])
        return {int(u): {key: column[part] for key, column in columns.items()} for u, part in zip(wanted, parts)}

    @cached_property
    def model(self) -> str:
        return str(self.facts.model.get("name") or self.folder.name)

    @cached_property
    def task(self) -> str:
        return str(self.facts.task.get("name") or "")

    @property
    def answers(self) -> int | None:
        """How many token sequences count as valid answers."""
        trie = self.table("trie")
        if trie is not None:
            return int(trie["count"][np.argmin(trie["depth"])])
        value = self.facts.task.get("sequences", self.facts.task.get("answers"))
        return int(value) if value is not None else None

    @cached_property
    def depth_of(self) -> dict[int, int]:
        """Depth of every node."""
        trie = self.table("trie")
        return {} if trie is None else dict(zip(trie["node"].tolist(), trie["depth"].tolist()))


def counts_of(trie: Columns, nodes: np.ndarray) -> np.ndarray:
    """The answers below some nodes (a table of the trie is in order of its nodes)."""
    return trie["count"][np.searchsorted(trie["node"], nodes)].astype(float)


def read_runs(folders: Iterable[Path | str]) -> list[Run]:
    """Open the runs and label them by what they differ in: the model, the task, else the folder.

    Raises:
        FileNotFoundError: a folder is not a run.
        ValueError: no folder is given, one is given twice, or its run.json cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("no folder given: fastcalib report wants the folder of at least one run")
    runs: list[Run] = []
    for path in paths:
        if any(path.resolve() == run.folder.resolve() for run in runs):
            raise ValueError(f"{path} is given twice")
        try:
            facts = read_facts(path)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / 'run.json'} cannot be read ({error}); run `fastcalib diagnose` again") from error
        runs.append(Run(path, facts))
    several_models = len({run.model for run in runs}) > 1
    several_tasks = len({run.task for run in runs}) > 1
    folders_of = dict(zip((run.folder for run in runs), _tails([run.folder.resolve() for run in runs])))
    for run in runs:
        parts = [run.model] if several_models else []
        parts += [run.task] if several_tasks and run.task else []
        run.label = " · ".join(parts) or (run.model if len(runs) == 1 else folders_of[run.folder])
    repeated = {label for label, times in Counter(run.label for run in runs).items() if times > 1}
    for run in runs:
        if run.label in repeated:
            run.label = f"{run.label} ({folders_of[run.folder]})"
    return runs


def _tails(paths: Sequence[Path]) -> list[str]:
    """The last names of each path, as many as tell all of them apart."""
    for length in range(1, max(len(path.parts) for path in paths)):
        tails = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(tails)) == len(tails):
            return tails
    return [str(path) for path in paths]


@dataclass
class Prefix:
    """A prefix that the page can show, and its node in each run (None where it is no prefix of that run's answers)."""

    text: str
    depth: int
    nodes: list[int | None]


@dataclass
class PrefixSample:
    """Prefixes in order of depth, then of the number of answers below; ``totals``: how many each run has."""

    prefixes: list[Prefix]
    totals: list[int]

    @property
    def total(self) -> int:
        """How many the largest run has."""
        return max(self.totals, default=0)


def sample_prefixes(runs: Sequence[Run], limit: int = MAX_PREFIXES) -> PrefixSample:
    """The prefixes with the most answers below, as many of every depth; several runs share ``limit`` between them.

    Runs meet in the text of their prefixes: models that cut text into different tokens share what they can. Where one
    run has a text more than once (alternative tokenisations), its first meets the other's first, and so on.
    """
    found: dict[tuple[str, int], Prefix] = {}
    weight: dict[tuple[str, int], int] = {}
    totals = []
    share = max(limit // max(sum(run.table("trie") is not None for run in runs), 1), 1)
    nodes_of: list[dict[tuple[str, int], int]] = []
    for run in runs:
        nodes_of.append({})
        trie = run.table("trie")
        if trie is None:
            totals.append(0)
            continue
        inner = np.unique(trie["parent"][trie["parent"] >= 0])
        totals.append(len(inner))
        rows = np.flatnonzero(np.isin(trie["node"], inner))
        times: Counter[str] = Counter()
        key_of = {}
        for row in rows.tolist():
            text = str(trie["prefix"][row])
            key_of[row] = (text, times[text])
            times[text] += 1
        nodes_of[-1] = {key: int(trie["node"][row]) for row, key in key_of.items()}
        for row in _most_answers(trie, rows, share):
            key = key_of[row]
            found.setdefault(key, Prefix(key[0], int(trie["depth"][row]), []))
            weight[key] = max(weight.get(key, 0), int(trie["count"][row]))
    for key, prefix in found.items():
        prefix.nodes = [nodes.get(key) for nodes in nodes_of]
    keys = sorted(found, key=lambda key: (found[key].depth, -weight[key], key))
    return PrefixSample([found[key] for key in keys], totals)


def _most_answers(trie: Columns, rows: np.ndarray, limit: int) -> list[int]:
    """At each depth the same number of rows, as far as there are so many: those with the most answers below."""
    rows = rows[np.lexsort((trie["node"][rows], -trie["count"][rows], trie["depth"][rows]))]
    by_depth = [rows[trie["depth"][rows] == d] for d in np.unique(trie["depth"][rows])]
    left, taken = limit, []
    for i, part in enumerate(sorted(by_depth, key=len)):
        take = min(len(part), left // (len(by_depth) - i))
        taken.append(part[:take])
        left -= take
    return np.sort(np.concatenate(taken)).tolist() if taken else []


def number(value: Any, digits: int = 5) -> float | int | None:
    """For the page: five significant digits, and None for what JSON cannot hold."""
    if value is None:
        return None
    value = float(value)
    if not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.{digits}g}")


def numbers(values: Iterable[Any], digits: int = 5) -> list[float | int | None]:
    return [number(value, digits) for value in values]


def spread(values: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """Mean and quartiles of what is finite."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None, None, None
    low, high = np.quantile(finite, [0.25, 0.75])
    return float(finite.mean()), float(low), float(high)
