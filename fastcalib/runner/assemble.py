"""Chunks put together: results in the order of the trie, whole answers, and the tables of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..answer_trie import AnswerTrie
from ..diagnostics.sequence import Compounding, at_nodes, at_prefixes, compounding, sequence, truncated_log_prob
from ..valid_sets import ValidSets
from .measure import CUTOFFS, FIT, ORDER, SHAPE
from .options import DiagnoseOptions
from .tables import write_table

_FLAT = ("n_greater", "n_equal", "logit", "log_prob", "log_prob_at_1", "keeps")


@dataclass
class Results:
    """What was measured, in the order of the trie.

    Attributes:
        nodes: int64 (n,), the prefixes, ascending.
        sets: their valid tokens. children: int64 (nnz,), the nodes these lead to.
        valid: results a valid token, (nnz, ...). rows: results a prefix, (n, ...).
        complete: every prefix of the trie is there.
    """

    nodes: Tensor
    sets: ValidSets
    children: Tensor
    valid: dict[str, Tensor]
    rows: dict[str, Tensor]
    complete: bool

    @classmethod
    def of(cls, trie: AnswerTrie, nodes: list[Tensor], records: list[dict[str, Tensor]], *, complete: bool) -> Results:
        """From the records of chunks and the prefixes of each, in any order."""
        every = torch.cat(nodes)
        by_node, by_child = every.argsort(), trie.children(every).argsort()  # children of rising nodes rise
        columns = {name: torch.cat([record[name] for record in records]).cpu() for name in records[0]}
        ascending = every[by_node]
        return cls(
            ascending,
            trie.valid_sets(ascending),
            trie.children(ascending),
            {name: column[by_child] for name, column in columns.items() if name in _FLAT},
            {name: column[by_node] for name, column in columns.items() if name not in _FLAT},
            complete,
        )


def sequence_tables(trie: AnswerTrie, found: Results, options: DiagnoseOptions) -> dict[str, dict[str, list[Any]]]:
    """Whole answers: the tables "sequence" and "compounding", one rule after the other."""
    log_prob = at_nodes(trie, found.valid["log_prob"])
    whole: dict[str, list[Any]] = {
        key: [] for key in ("rule", "temperature", "validity", "diversity", "precision", "recall")
    }
    steps: dict[str, list[Any]] = {key: [] for key in ("rule", "temperature", "depth", "alpha", "beta")}
    n_temperatures, depth = len(options.temperatures), trie.max_depth
    for r, rule in enumerate(options.rules):
        keeps = at_nodes(trie, found.valid["keeps"][..., r])
        mass = at_prefixes(trie, found.rows["cutoffs_kept_mass"][..., r])
        kept = at_prefixes(trie, found.rows["cutoffs_kept"][..., r])
        result = sequence(trie, truncated_log_prob(trie, log_prob, keeps, mass))
        product = compounding(trie, keeps, kept, counts=trie.weight)
        if bool(mass.isnan().any()):  # logits that are no numbers keep nothing, which would pass for a strict rule
            product = Compounding(*(torch.full_like(x, math.nan) for x in vars(product).values()))
        whole["rule"] += [str(rule)] * n_temperatures
        whole["temperature"] += options.temperatures
        whole["validity"] += result.validity.tolist()
        whole["diversity"] += result.diversity.tolist()
        whole["precision"] += product.precision.tolist()
        whole["recall"] += product.recall.tolist()
        steps["rule"] += [str(rule)] * (n_temperatures * depth)
        steps["temperature"] += [t for t in options.temperatures for _ in range(depth)]
        steps["depth"] += list(range(1, depth + 1)) * n_temperatures
        steps["alpha"] += product.alpha.t().flatten().tolist()
        steps["beta"] += product.beta.t().flatten().tolist()
    return {"sequence": whole, "compounding": steps}


def write_tables(
    out: Path,
    trie: AnswerTrie,
    found: Results,
    sequences: dict[str, dict[str, list[Any]]] | None,
    options: DiagnoseOptions,
    tokenizer: Any,
) -> None:
    """All tables of the run into an empty folder."""
    texts = _Texts(tokenizer)
    write_table(out, "trie", _trie_table(trie, texts))
    n, nodes = len(found.nodes), found.nodes
    per_prefix = {"node": nodes.numpy()}
    write_table(
        out, "order",
        per_prefix
        | {"valid": found.sets.counts().numpy()}
        | {name: found.rows[f"order_{name}"].numpy() for name in ORDER},
    )  # fmt: skip
    valid = found.valid
    write_table(
        out, "valid",
        {
            "node": nodes[found.sets.rows()].numpy(),
            "child": found.children.numpy(),
            "n_greater": valid["n_greater"].numpy(),
            "n_equal": valid["n_equal"].numpy(),
            "logit": valid["logit"].numpy(),
            "log_prob": valid["log_prob_at_1"].double().numpy(),
        },
    )  # fmt: skip
    write_table(out, "top", _top_table(found, texts))
    write_table(out, "fit", per_prefix | {name: found.rows[f"fit_{name}"].numpy() for name in FIT})
    k, rules = len(options.temperatures), [str(rule) for rule in options.rules]
    temperatures = torch.tensor(options.temperatures, dtype=torch.float64)
    write_table(
        out, "shape",
        {
            "node": nodes.repeat_interleave(k).numpy(),
            "temperature": temperatures.repeat(n).numpy(),
            **{name: found.rows[f"shape_{name}"].flatten().numpy() for name in SHAPE},
        },
    )  # fmt: skip
    write_table(
        out, "cutoffs",
        {
            "node": nodes.repeat_interleave(k * len(rules)).numpy(),
            "rule": pa.array(rules).take(pa.array(np.tile(np.arange(len(rules)), n * k))),
            "temperature": temperatures.repeat_interleave(len(rules)).repeat(n).numpy(),
            **{name: _column(found.rows[f"cutoffs_{name}"]) for name in CUTOFFS},
        },
    )  # fmt: skip
    for name, columns in (sequences or {}).items():
        write_table(out, name, columns)


def _column(values: Tensor) -> Any:
    flat = values.flatten()
    return (flat.double() if flat.is_floating_point() else flat).numpy()


def _trie_table(trie: AnswerTrie, texts: _Texts) -> dict[str, Any]:
    token, parent, levels = trie.token.tolist(), trie.parent.tolist(), trie.levels().tolist()
    prefixes = [""]
    above: list[list[int]] = [[]]  # the tokens of every prefix of one depth
    for depth in range(1, trie.max_depth + 1):
        before = levels[depth - 1]
        above = [[*above[parent[node] - before], token[node]] for node in range(levels[depth], levels[depth + 1])]
        prefixes += map(texts.whole, above)
    return {
        "node": range(len(trie)),
        "parent": trie.parent.numpy(),
        "depth": trie.depth.numpy(),
        "token": trie.token.numpy(),
        "text": ["", *(texts(t) for t in token[1:])],
        "prefix": prefixes,
        "count": trie.count.numpy(),
    }


def _top_table(found: Results, texts: _Texts) -> dict[str, Any]:
    token = found.rows["top_token"]
    n, m = token.shape
    # One key a (row, token): the vocabulary is below 2^31, so are the rows of a run.
    keys = (torch.arange(n)[:, None] << 31) + token
    valid = torch.isin(keys, (found.sets.rows() << 31) + found.sets.values)
    return {
        "node": found.nodes.repeat_interleave(m).numpy(),
        "position": torch.arange(m).repeat(n).numpy(),
        "token": token.flatten().numpy(),
        "text": [texts(t) for t in token.flatten().tolist()],
        "logit": found.rows["top_logit"].flatten().numpy(),
        "valid": valid.flatten().numpy(),
    }


class _Texts:
    """Tokens as text, each decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.whole([token])
        return self.known[token]

    def whole(self, tokens: list[int]) -> str:
        """Several tokens together."""
        decode = self.tokenizer.decode
        return str(decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if tokens else ""
