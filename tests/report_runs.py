"""Runs for the tests of the report: a toy model on a small trie, every number computed from its definition in float64.

The names and tokens are nasty on purpose: markup, quotes, newlines, byte tokens, other scripts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcalib.runner.tables import SCHEMAS, RunFacts, write_facts, write_table

NASTY = [
    "</script><script>alert(1)</script>",
    '"',
    "'",
    "\n",
    "&amp;",
    "é",
    "<0xE2>",
    " ",
    "$x_1$",
    "日",
    "\u2028",
    "`${1}`",
]
TOKENS = [*NASTY, *(f" {chr(97 + i)}{j}" for i in range(26) for j in range(3))]
END = len(TOKENS) - 1
TEMPERATURES = [0.3, 0.6, 1.0, 1.4, 2.0, 3.0]
RULES = [
    "none",
    "size_oracle",
    "top_k=5",
    "top_k=20",
    "top_p=0.5",
    "top_p=0.9",
    "min_p=0.1",
    "eta=0.02",
    "top_n_sigma=1.0",
]


@dataclass
class ToyTrie:
    """Nodes in breadth-first order, as AnswerTrie has them."""

    prefix: list[tuple[int, ...]]
    count: list[int]

    def __post_init__(self) -> None:
        self.node = {prefix: u for u, prefix in enumerate(self.prefix)}
        self.parent = [self.node[prefix[:-1]] if prefix else -1 for prefix in self.prefix]
        self.children: list[list[int]] = [[] for _ in self.prefix]
        for u, parent in enumerate(self.parent):
            if parent >= 0:
                self.children[parent].append(u)
        self.inner = [u for u, below in enumerate(self.children) if below]
        self.max_depth = max(map(len, self.prefix))


def toy_trie() -> ToyTrie:
    """14 first tokens (the nasty ones among them), some answers of one token, some of two, each closed by END."""
    first = [*range(len(NASTY)), 20, 21]
    answers = [
        (a, *rest, END) for a in first for rest in ([()] if a % 3 == 2 else [(30 + k,) for k in range(1 + a % 5)])
    ]
    prefixes = sorted({answer[:i] for answer in answers for i in range(len(answer) + 1)}, key=lambda p: (len(p), p))
    return ToyTrie(prefixes, [sum(answer[: len(p)] == p for answer in answers) for p in prefixes])


def toy_logits(trie: ToyTrie, skill: float, seed: int) -> dict[int, Tensor]:
    """Noise, plus something for the valid tokens that shrinks with depth; rounded coarsely, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = {}
    for u in trie.inner:
        row = torch.randn(len(TOKENS), generator=generator, dtype=torch.float64) * 1.5
        for child in trie.children[u]:
            row[trie.prefix[child][-1]] += (skill + 0.4 * math.log(trie.count[child])) / (
                1 + 0.15 * len(trie.prefix[u])
            )
        logits[u] = (row * 8).round() / 8
    return logits


def kept_by(rule: str, z: Tensor, temperature: float, n_valid: int) -> Tensor:
    """The tokens that a rule keeps, by its definition."""
    name, _, argument = rule.partition("=")
    p = torch.softmax(z / temperature, 0)
    if name == "none":
        return torch.ones_like(z, dtype=torch.bool)
    if name in ("size_oracle", "top_k"):
        k = n_valid if name == "size_oracle" else int(argument)
        return z >= z.sort(descending=True).values[min(k, len(z)) - 1]
    value = float(argument)
    if name == "top_p":
        return (p * (z > z[:, None])).sum(1) < value  # row v: the mass above token v
    if name == "min_p":
        return p >= value * p.max()
    if name == "eta":
        entropy = -(p * p.log()).sum().item()
        return p >= min(value, math.sqrt(value) * math.exp(-entropy))
    return z / temperature >= z.max() / temperature - value * (z / temperature).std()


def write_toy_run(folder: Path, *, model: str = "toy", skill: float = 3.5, seed: int = 0) -> Path:
    """A run as ``fastcalib diagnose`` and ``fastcalib score`` would leave it."""
    trie = toy_trie()
    logits = toy_logits(trie, skill, seed)
    tables: dict[str, dict[str, list[Any]]] = {
        name: {key: [] for key in schema.names} for name, schema in SCHEMAS.items()
    }

    def add(table: str, **row: Any) -> None:
        for key, value in row.items():
            tables[table][key].append(value)

    text = [*TOKENS[:-1], "<end>"]
    for u, prefix in enumerate(trie.prefix):
        token = prefix[-1] if prefix else -1
        add(
            "trie", node=u, parent=trie.parent[u], depth=len(prefix), token=token, count=trie.count[u],
            text=text[token] if prefix else "", prefix="".join(text[t] for t in prefix),
        )  # fmt: skip
    for u in trie.inner:
        _prefix_tables(add, trie, u, logits[u], text)
    for rule in RULES:
        for temperature in TEMPERATURES:
            _sequence_tables(add, trie, logits, rule, temperature)
    count = [5, 8, 20, 0, 60]
    for i, n in enumerate(count):
        confidence = (i + 0.5) / 5 if n else math.nan
        add(
            "reliability",
            lower=i / 5,
            upper=(i + 1) / 5,
            count=n,
            accuracy=confidence * 0.9 if n else math.nan,
            confidence=confidence,
        )
    for name, columns in tables.items():
        write_table(folder, name, columns)
    scored = {
        "nll": 2.5, "perplexity": math.exp(2.5), "accuracy": 0.5, "brier": 0.6, "ece": 0.07, "mce": 0.2,
        "full_ece": 0.001, "mean_entropy": 2.1, "temperature": 1.1, "tokens": 93, "text": "a text",
    }  # fmt: skip
    task = {
        "name": "toy", "prompt": "Say <b>something</b>:\n", "answers": trie.count[0], "sequences": trie.count[0],
        "max_depth": trie.max_depth, "end_token": "<end>", "tokenisation": "canonical", "style": "plain",
    }  # fmt: skip
    options = {"temperatures": TEMPERATURES, "rules": RULES, "order": "temperature-first", "precision": 0.8}
    facts = RunFacts(
        model={"name": model, "source": "made for a test", "vocab_size": len(TOKENS), "parameters": 7},
        task=task,
        options={**options, "draws": None},
        calibration=scored,
        cost=[
            {"stage": "forward", "seconds": 1.25, "covers": f"{len(trie.inner)} prefixes"},
            {"stage": "order", "seconds": 0.01, "covers": "ranks"},
        ],
        versions={"fastcalib": "0", "torch": "2", "transformers": "5", "python": "3", "machine": "x"},
    )
    write_facts(folder, facts)
    return folder


def _prefix_tables(add: Any, trie: ToyTrie, u: int, z: Tensor, text: list[str]) -> None:
    tokens = [trie.prefix[child][-1] for child in trie.children[u]]
    weight = torch.tensor([trie.count[child] for child in trie.children[u]], dtype=torch.float64)
    weight /= weight.sum()
    valid = torch.zeros_like(z, dtype=torch.bool)
    valid[tokens] = True
    log_p = torch.log_softmax(z, 0)
    greater = [int((z > z[v]).sum()) for v in tokens]
    equal = [int((z == z[v]).sum()) - 1 for v in tokens]
    for i, v in enumerate(tokens):
        add(
            "valid", node=u, child=trie.children[u][i], n_greater=greater[i], n_equal=equal[i],
            logit=z[v].item(), log_prob=log_p[v].item(),
        )  # fmt: skip

    # The frontier: one cutoff at the logit of each valid token, ties kept.
    cutoffs = sorted({z[v].item() for v in tokens}, reverse=True)
    kept = [z >= t for t in cutoffs]
    precision = [(k & valid).sum().item() / k.sum().item() for k in kept]
    recall = [sum(weight[i].item() for i, v in enumerate(tokens) if k[v]) for k in kept]
    token_recall = [(k & valid).sum().item() / len(tokens) for k in kept]
    invalid = z[~valid]
    above = [((invalid > z[v]).double().mean() + 0.5 * (invalid == z[v]).double().mean()).item() for v in tokens]
    # The best precision from each cutoff on, over the recall that the cutoff adds.
    best = np.maximum.accumulate(precision[::-1])[::-1]
    border = z.sort(descending=True).values[len(tokens) - 1]
    room = (len(tokens) - (z > border).sum()) / (z == border).sum()  # the oracle shares out what is tied at its border
    add(
        "order", node=u, valid=len(tokens), area=float(best @ np.diff([0.0, *recall])),
        token_area=float(best @ np.diff([0.0, *token_recall])),
        recall_at_precision=max([r for p, r in zip(precision, recall) if p >= 0.8], default=0.0),
        token_recall_at_precision=max([r for p, r in zip(precision, token_recall) if p >= 0.8], default=0.0),
        r_precision=(((z > border) & valid).sum() + room * ((z == border) & valid).sum()).item() / len(tokens),
        average_precision=float(np.mean([(z[valid] >= z[v]).sum().item() / (z >= z[v]).sum().item() for v in tokens])),
        auroc=1 - float(np.mean(above)), order_calibrated=bool(z[valid].min() >= invalid.max()),
    )  # fmt: skip
    ranking = z.argsort(descending=True, stable=True).tolist()
    for position, v in enumerate(ranking[:40]):
        add("top", node=u, position=position, token=v, text=text[v], logit=z[v].item(), valid=bool(valid[v]))
    add("fit", node=u, **_fit(z[ranking].numpy()))
    for temperature in TEMPERATURES:
        p = torch.softmax(z / temperature, 0)
        on_valid = p[tokens] / p[tokens].sum()
        entropy = -(p * p.log()).sum().item()
        add(
            "shape", node=u, temperature=temperature, kl=(weight * (weight / p[tokens]).log()).sum().item(),
            kl_valid=(weight * (weight / on_valid).log()).sum().item(), valid_mass=p[tokens].sum().item(),
            evenness=math.exp(-(on_valid * on_valid.log()).sum().item()) / len(tokens), entropy=entropy,
            expected_distinct=(1 - (1 - p[tokens]) ** len(tokens)).sum().item(),
        )  # fmt: skip
        for rule in RULES:
            keep = kept_by(rule, z, temperature, len(tokens))
            n, hits = int(keep.sum()), int((keep & valid).sum())
            add(
                "cutoffs", node=u, rule=rule, temperature=temperature, kept=n, kept_mass=p[keep].sum().item(),
                precision=hits / n if n else math.nan, recall=weight[keep[tokens]].sum().item(),
                token_recall=hits / len(tokens),
            )  # fmt: skip


def _fit(z: np.ndarray) -> dict[str, Any]:
    """Head and tail by least squares, the knee and the shift by sweeping (a stand-in: the report only draws it)."""
    k = np.arange(1, len(z) + 1.0)
    best: dict[str, Any] = {"r_squared": -math.inf}
    for knee in range(3, len(z) // 2):
        head = np.polyfit(k[:knee], z[:knee], 1)
        for shift in (0.0, 5.0, 20.0):
            tail = np.polyfit(np.log(k[knee:] + shift), z[knee:], 1)
            fitted = np.concatenate([np.polyval(head, k[:knee]), np.polyval(tail, np.log(k[knee:] + shift))])
            r_squared = 1 - ((z - fitted) ** 2).sum() / ((z - z.mean()) ** 2).sum()
            if r_squared > best["r_squared"]:
                best = {
                    "knee": knee,
                    "slope": head[0],
                    "intercept": head[1],
                    "scale": tail[1],
                    "decay": tail[0],
                    "shift": shift,
                    "r_squared": r_squared,
                }
    return {key: value if key == "knee" else float(value) for key, value in best.items()}


def _sequence_tables(add: Any, trie: ToyTrie, logits: dict[int, Tensor], rule: str, temperature: float) -> None:
    """Whole answers, from the root down: the model's probability of a node, the uniform sampler's, and what is kept."""
    model, uniform, kept_path = ([1.0] + [0.0] * (len(trie.prefix) - 1) for _ in range(3))
    for u in trie.inner:
        z = logits[u]
        keep = kept_by(rule, z, temperature, len(trie.children[u]))
        p = torch.softmax((z / temperature).masked_fill(~keep, -math.inf), 0)
        for child in trie.children[u]:
            v = trie.prefix[child][-1]
            model[child] = model[u] * p[v].item()
            uniform[child] = uniform[u] * keep[v].item() / keep.sum().item()
            kept_path[child] = kept_path[u] * keep[v].item()
    leaves = [u for u, below in enumerate(trie.children) if not below]
    validity = sum(model[u] for u in leaves)
    share = np.array([model[u] / validity for u in leaves if model[u] > 0])
    alive, among = [1.0], [1.0]
    for depth in range(1, trie.max_depth + 1):  # answers that ended before stay what they are
        reached = [
            u for u, prefix in enumerate(trie.prefix) if len(prefix) == depth or (len(prefix) < depth and u in leaves)
        ]
        alive.append(sum(uniform[u] for u in reached))
        among.append(sum(kept_path[u] * trie.count[u] for u in reached) / trie.count[0])
        add(
            "compounding", rule=rule, temperature=temperature, depth=depth - 1,
            alpha=alive[-1] / alive[-2] if alive[-2] else math.nan,
            beta=among[-1] / among[-2] if among[-2] else math.nan,
        )  # fmt: skip
    add(
        "sequence", rule=rule, temperature=temperature, validity=validity, precision=alive[-1], recall=among[-1],
        diversity=float(np.exp(-(share * np.log(share)).sum())) / len(leaves) if validity else math.nan,
    )  # fmt: skip


def write_large_run(folder: Path, *, first: int = 100, second: int = 100, valid: int = 10, seed: int = 0) -> Path:
    """A run of 1 + first + first x second prefixes with numbers at random: only its size matters."""
    rng = np.random.default_rng(seed)
    fan = [(1, first), (first, second), (first * second, valid)]
    parent, depth, start = [np.array([-1])], [np.array([0])], 0
    for level, (width, children) in enumerate(fan, 1):
        parent.append(np.repeat(np.arange(start, start + width), children))
        depth.append(np.full(width * children, level))
        start += width
    parents, depths = np.concatenate(parent), np.concatenate(depth)
    nodes = np.arange(len(parents))
    below = np.array([first * second * valid, second * valid, valid, 1])[depths]
    text = [f" t{u % 997}" for u in nodes]
    names = [""]
    for u in nodes[1:]:
        names.append(names[parents[u]] + text[u])
    write_table(
        folder,
        "trie",
        {
            "node": nodes,
            "parent": parents,
            "depth": depths,
            "token": nodes % 997,
            "text": text,
            "prefix": names,
            "count": below,
        },
    )
    inner = nodes[depths < 3]
    rank = rng.integers(0, 100_000, len(nodes) - 1)
    write_table(folder, "valid", {
        "node": parents[1:], "child": nodes[1:], "n_greater": rank, "n_equal": rank * 0, "logit": -rank / 1e4,
        "log_prob": -2 - rank / 1e4,
    })  # fmt: skip
    write_table(folder, "order", {
        "node": inner, "valid": np.bincount(parents[1:]), "order_calibrated": rng.random(len(inner)) < 0.1,
        **{key: rng.random(len(inner)) for key in SCHEMAS["order"].names[2:-1]},
    })  # fmt: skip
    head = 50
    size = len(inner) * head
    write_table(folder, "top", {
        "node": inner.repeat(head), "position": np.tile(np.arange(head), len(inner)),
        "token": rng.integers(0, 997, size), "text": [f" t{i % 997}" for i in range(size)],
        "logit": -rng.random(size), "valid": rng.random(size) < 0.5,
    })  # fmt: skip
    sizes = {"node": inner, "rule": np.array(RULES), "temperature": np.array(TEMPERATURES)}
    for name in ("shape", "cutoffs", "fit"):
        keys = [key for key in SCHEMAS[name].names if key in sizes]
        grid = np.meshgrid(*(np.arange(len(sizes[key])) for key in keys), indexing="ij")
        columns = {key: sizes[key][index.ravel()] for key, index in zip(keys, grid)}
        for column in SCHEMAS[name]:
            if column.name not in columns:
                whole = str(column.type) == "int64"
                columns[column.name] = rng.integers(1, 50, grid[0].size) if whole else rng.random(grid[0].size)
        write_table(folder, name, columns)
    options = {"rules": RULES, "temperatures": TEMPERATURES}
    task = {"name": "made up", "answers": int(below[0])}
    write_facts(folder, RunFacts(model={"name": "large"}, task=task, options=options))
    return folder
