"""The precision-recall frontier of a run, over all prefixes and by depth: what the page draws of order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..diagnostics import order_from_ranks
from ..valid_sets import ValidSets
from .data import Run, counts_of, numbers

# Recall at which a frontier is read, and the most depths that are drawn apart.
GRID = np.linspace(0, 1, 51)
MAX_DEPTHS = 5


def best_precision(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """At each recall of the grid, the best precision of the cutoffs that keep at least so much."""
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return best[np.minimum(np.searchsorted(recall, GRID - 1e-9), len(best) - 1)]


def frontiers(run: Run) -> list[dict[str, Any]] | None:
    """The frontier of all prefixes and of each depth: mean and quartiles, and where the size oracle cuts.

    None where the run lacks the tables.
    """
    table, trie = run.table("valid"), run.table("trie")
    if table is None or trie is None:
        return None
    place = np.argsort(table["node"], kind="stable")
    nodes, first = np.unique(table["node"][place], return_index=True)
    greater, equal, child = (torch.from_numpy(table[key][place]) for key in ("n_greater", "n_equal", "child"))
    weight = counts_of(trie, child.numpy())
    # Nothing here depends on the size of the vocabulary, which a run of old may not have written down.
    ranked = 1 + int((greater + equal).max())
    sets = ValidSets(child, torch.from_numpy(np.append(first, len(place))))
    order = order_from_ranks(greater, equal, sets, counts=torch.from_numpy(weight), vocab_size=ranked)

    kept = (greater < sets.counts()[sets.rows()]).numpy()  # at or above the |G|-th largest logit
    of_answers = np.add.reduceat(kept * weight, first) / np.add.reduceat(weight, first)
    of_tokens = np.add.reduceat(kept.astype(float), first) / sets.counts().numpy()
    oracle = np.stack([order.r_precision.numpy(), of_answers, of_tokens], axis=1)
    ordered = np.isfinite(oracle[:, 0])  # a row with NaN among its logits has no order
    if not ordered.any():
        return None
    precision, recall, token_recall = (
        [part for part, ok in zip(np.split(values.numpy(), first[1:]), ordered) if ok]
        for values in (order.precision, order.recall, order.token_recall)
    )
    by_answers, by_tokens = (
        np.array([best_precision(p, r) for p, r in zip(precision, reached)]) for reached in (recall, token_recall)
    )
    depths = np.array([run.depth_of[node] for node in nodes[ordered].tolist()])
    present = np.unique(depths)
    if len(present) > MAX_DEPTHS:
        present = present[np.linspace(0, len(present) - 1, MAX_DEPTHS).round().astype(int)]
    chosen = [(None, np.ones(len(depths), bool)), *((int(d), depths == d) for d in present)]
    return [
        {
            "depth": depth,
            "prefixes": int(mask.sum()),
            "answers": _mean_and_quartiles(by_answers[mask]),
            "tokens": _mean_and_quartiles(by_tokens[mask]),
            "oracle": numbers(oracle[ordered][mask].mean(0)),
        }
        for depth, mask in chosen
    ]


def _mean_and_quartiles(curves: np.ndarray) -> dict[str, Any]:
    low, high = np.quantile(curves, [0.25, 0.75], axis=0)
    return {"mean": numbers(curves.mean(0), 4), "low": numbers(low, 4), "high": numbers(high, 4)}
