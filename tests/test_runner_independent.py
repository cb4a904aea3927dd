# ruff: noqa: E402 (the imports need what is checked for first)
"""The tables of a run against transformers and float64 PyTorch alone: nothing of the library but the command is used.

Tokens, prefixes, masks, sorted frontiers, cutoffs (the warpers of transformers) and sums over every answer are written
out once more here, as slowly and plainly as they come. ``plain_reading`` and ``differences`` take any model, so that
the same can be asked of a real one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pq = pytest.importorskip("pyarrow.parquet")

from typer.testing import CliRunner

from fastcalib import cli

from .tiny_model import save_tiny_model

Prefix = tuple[int, ...]


@dataclass
class Reading:
    """What a model says after every prefix of every answer.

    Attributes:
        prompt: token ids read before an answer.
        answers: the token ids of each answer, its end included.
        weights: of each.
        logits: float64 (V,) after each prefix.
    """

    prompt: list[int]
    answers: list[Prefix]
    weights: list[float]
    logits: dict[Prefix, torch.Tensor]

    def next_tokens(self, prefix: Prefix) -> dict[int, float]:
        """The valid next tokens, and the weight of the answers behind each."""
        found: dict[int, float] = defaultdict(float)
        for answer, weight in zip(self.answers, self.weights):
            if len(answer) > len(prefix) and answer[: len(prefix)] == prefix:
                found[answer[len(prefix)]] += weight
        return dict(sorted(found.items()))


def plain_reading(network: Any, tokenizer: Any, prompt: str, answers: list[str], weights: list[float]) -> Reading:
    """Forward passes over the whole of prompt and prefix, one prefix at a time, no cache."""
    whole = [tokenizer(f"{prompt} {answer}")["input_ids"] for answer in answers]
    shared = next(i for i, ids in enumerate(zip(*whole)) if len(set(ids)) > 1)
    spelled = [(*ids[shared:], tokenizer.eos_token_id) for ids in whole]
    prefixes = sorted({answer[:n] for answer in spelled for n in range(len(answer))}, key=lambda p: (len(p), p))
    logits = {}
    for prefix in prefixes:
        ids = torch.tensor([[*whole[0][:shared], *prefix]])
        with torch.inference_mode():
            logits[prefix] = network(input_ids=ids).logits[0, -1, : len(tokenizer)].double()
    return Reading(whole[0][:shared], spelled, weights, logits)


def order(z: torch.Tensor, valid: dict[int, float]) -> dict[str, float]:
    """From the sorted vocabulary: every cutoff of it, not those at valid tokens alone."""
    assert all(int((z == z[v]).sum()) == 1 for v in valid), "ties of valid tokens are not asked about here"
    ranking = z.argsort(descending=True)
    weight = torch.zeros_like(z)
    weight[list(valid)] = torch.tensor(list(valid.values()), dtype=torch.float64)
    hit = (weight > 0)[ranking].double()
    kept = torch.arange(1, z.numel() + 1)
    precision, recall = hit.cumsum(0) / kept, weight[ranking].cumsum(0) / weight.sum()
    token_recall = hit.cumsum(0) / len(valid)
    best = precision.flip(0).cummax(0).values.flip(0)  # of all cutoffs that reach a recall
    enough = precision >= 0.8
    invalid = torch.ones_like(z, dtype=torch.bool)
    invalid[list(valid)] = False
    return {
        "valid": len(valid),
        "area": float((best * torch.diff(recall, prepend=recall.new_zeros(1))).sum()),
        "token_area": float((best * torch.diff(token_recall, prepend=recall.new_zeros(1))).sum()),
        "recall_at_precision": float(recall[enough].max()) if enough.any() else 0.0,
        "token_recall_at_precision": float(token_recall[enough].max()) if enough.any() else 0.0,
        "r_precision": float(hit[: len(valid)].mean()),
        "average_precision": float(precision[hit > 0].mean()),
        "auroc": float((z[list(valid)][:, None] > z[invalid]).double().mean()),
        "order_calibrated": bool(hit[: len(valid)].all()),
    }


def kept(z: torch.Tensor, rule: str, t: float, valid: int) -> torch.Tensor:
    """bool (V,): what transformers' warpers leave of z / t; the rule nobody has a warper for is written out."""
    from transformers import generation as g

    name, _, number = rule.partition("=")
    scores = (z / t)[None]
    if name == "none":
        return torch.ones_like(z, dtype=torch.bool)
    if name == "top_n_sigma":
        return scores[0] >= scores.max() - float(number) * scores[0].std()
    warper = {
        "size_oracle": lambda: g.TopKLogitsWarper(valid),
        "top_k": lambda: g.TopKLogitsWarper(int(number)),
        "top_p": lambda: g.TopPLogitsWarper(float(number)),
        "min_p": lambda: g.MinPLogitsWarper(float(number)),
        "epsilon": lambda: g.EpsilonLogitsWarper(float(number)),
        "eta": lambda: g.EtaLogitsWarper(float(number)),
    }[name]()
    return warper(torch.zeros(1, 1, dtype=torch.int64), scores.clone())[0] > -torch.inf


def cutoff(z: torch.Tensor, keep: torch.Tensor, t: float, valid: dict[int, float]) -> dict[str, float]:
    ids = [v for v in valid if keep[v]]
    return {
        "kept": int(keep.sum()),
        "kept_mass": float((z / t).softmax(-1)[keep].sum()),
        "precision": len(ids) / int(keep.sum()),
        "recall": sum(valid[v] for v in ids) / sum(valid.values()),
        "token_recall": len(ids) / len(valid),
    }


def shape(z: torch.Tensor, t: float, valid: dict[int, float]) -> dict[str, float]:
    everything = (z / t).softmax(-1)
    p = everything[list(valid)]
    w = torch.tensor(list(valid.values()), dtype=torch.float64) / sum(valid.values())
    # In logs: at a low temperature some of these probabilities are 0 in float64 too.
    log_p, q = (z / t).log_softmax(-1)[list(valid)], (z[list(valid)] / t).softmax(-1)
    return {
        "kl": float((w * (w.log() - log_p)).sum()),
        "kl_valid": float((w * (w.log() - (z[list(valid)] / t).log_softmax(-1))).sum()),
        "valid_mass": float(p.sum()),
        "evenness": math.exp(float(torch.special.entr(q).sum())) / len(valid),
        "entropy": float(torch.special.entr(everything).sum()),
        "expected_distinct": float((1 - (1 - p) ** len(valid)).sum()),
    }


def whole_answers(reading: Reading, rule: str, t: float, where: str = "temperature-first") -> dict[str, float]:
    """Every answer spelled out: its probability under the rule, and whether all of it is kept."""
    probability, even, recalled = [], [], 0.0
    keeps = {
        prefix: kept(z, rule, t if where == "temperature-first" else 1.0, len(reading.next_tokens(prefix)))
        for prefix, z in reading.logits.items()
    }
    depth = max(map(len, reading.answers))
    on_the_way: list[set[Prefix]] = [set() for _ in range(depth + 1)]
    for answer in reading.answers:
        for n in range(depth + 1):
            on_the_way[n].add(answer[:n])  # an answer that has ended stays

    masses = {p: torch.where(keeps[p], (z / t).softmax(-1), 0.0) for p, z in reading.logits.items()}
    shares = {prefix: mass / mass.sum() for prefix, mass in masses.items()}
    sizes = {prefix: int(keep.sum()) for prefix, keep in keeps.items()}

    def path(prefix: Prefix) -> tuple[float, float]:
        """Probability under the rule, and drawn evenly from what it keeps."""
        steps = [(prefix[:n], token) for n, token in enumerate(prefix)]
        return (
            math.prod(float(shares[before][token]) for before, token in steps),
            math.prod(float(keeps[before][token]) / sizes[before] for before, token in steps),
        )

    for answer, weight in zip(reading.answers, reading.weights):
        p, q = path(answer)
        probability.append(p)
        even.append(q)
        recalled += weight * (q > 0)
    reached = [sum(path(prefix)[1] for prefix in prefixes) for prefixes in on_the_way]
    told = [sum(w for a, w in zip(reading.answers, reading.weights) if path(a[:n])[1] > 0) for n in range(depth + 1)]
    q = torch.tensor(probability, dtype=torch.float64)
    validity = float(q.sum())
    return {
        "validity": validity,
        "diversity": math.exp(torch.special.entr(q / validity).sum()) / len(q) if validity else math.nan,
        "precision": sum(even),
        "recall": recalled / sum(reading.weights),
        **{f"alpha{n}": b / a if a else math.nan for n, (a, b) in enumerate(itertools.pairwise(reached), 1)},
        **{f"beta{n}": b / a if a else math.nan for n, (a, b) in enumerate(itertools.pairwise(told), 1)},
    }


@dataclass
class Tables:
    """The tables of a folder by what a row is about."""

    rows: dict[str, list[dict]]

    @classmethod
    def of(cls, folder: Path) -> Tables:
        return cls({path.stem: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")})

    def nodes(self) -> dict[Prefix, int]:
        """The node of each prefix, by the tokens from the root."""
        found: dict[int, Prefix] = {0: ()}
        for row in self.rows["trie"][1:]:
            found[row["node"]] = (*found[row["parent"]], row["token"])
        return {prefix: node for node, prefix in found.items()}

    def get(self, table: str, **key: object) -> list[dict]:
        return [row for row in self.rows[table] if all(row[name] == value for name, value in key.items())]


def differences(
    folder: Path,
    reading: Reading,
    prefixes: list[Prefix],
    rules: list[str],
    temperatures: list[float],
    whole: bool = True,
    where: str = "temperature-first",
) -> dict[str, float]:
    """By table and column, how far a row is from what is computed here at most, as a share of its value.

    Where a value may be near 0 by chance (logits, their logarithms, divergences) it is a share of 1 at least.
    """
    tables, off = Tables.of(folder), defaultdict(float)
    node_of = tables.nodes()

    def compare(table: str, got: dict, want: dict) -> None:
        for column, value in want.items():
            x, y = float(got[column]), float(value)
            same = x == y or (math.isnan(x) and math.isnan(y))
            d = 0.0 if same else math.inf if y == 0 else abs(x - y) / max(1.0 if column in LOGS else 0.0, abs(y))
            off[f"{table}.{column}"] = max(off[f"{table}.{column}"], math.inf if math.isnan(d) else d)

    for prefix in prefixes:
        z, valid, node = reading.logits[prefix], reading.next_tokens(prefix), node_of[prefix]
        (row,) = tables.get("order", node=node)
        compare("order", row, order(z, valid))
        rows = tables.get("valid", node=node)
        assert [row["child"] for row in rows] == [node_of[(*prefix, v)] for v in valid]
        for row, v in zip(rows, valid):
            want = {"n_greater": int((z > z[v]).sum()), "n_equal": 0, "logit": z[v], "log_prob": z.log_softmax(-1)[v]}
            compare("valid", row, want)
        top = tables.get("top", node=node)
        highest = z.topk(len(top))
        for row, value, token in zip(top, highest.values, highest.indices.tolist()):
            compare("top", row, {"logit": value, "valid": token in valid})
            if int((z == value).sum()) == 1:
                compare("top", row, {"token": token})
        (fit,) = tables.get("fit", node=node)
        y = z.sort(descending=True).values[:512]
        k = torch.arange(1, y.numel() + 1, dtype=torch.float64)
        head = fit["slope"] * k + fit["intercept"]
        line = torch.where(k <= fit["knee"], head, fit["scale"] + fit["decay"] * (k + fit["shift"]).log())
        compare("fit", fit, {"r_squared": 1 - ((y - line) ** 2).sum() / ((y - y.mean()) ** 2).sum()})
        for t in temperatures:
            compare("shape", *tables.get("shape", node=node, temperature=t), shape(z, t, valid))
            for rule in rules:
                keep = kept(z, rule, t if where == "temperature-first" else 1.0, len(valid))
                (row,) = tables.get("cutoffs", node=node, temperature=t, rule=rule)
                compare("cutoffs", row, cutoff(z, keep, t, valid))
    for t, rule in itertools.product(temperatures if whole else (), rules):
        want = whole_answers(reading, rule, t, where)
        (row,) = tables.get("sequence", temperature=t, rule=rule)
        compare("sequence", row, {name: want[name] for name in ("validity", "diversity", "precision", "recall")})
        for row in tables.get("compounding", temperature=t, rule=rule):
            compare("compounding", row, {name: want[f"{name}{row['depth']}"] for name in ("alpha", "beta")})
    return dict(off)


ANSWERS = ["Ada", "Ad", "Adam", "Bo", "Bob", "Cy", "Dora", "Dot"]
LOGS = ("logit", "log_prob", "kl", "kl_valid")
WEIGHTS = [1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 0.5, 2.5]
RULES = [
    "none",
    "size_oracle",
    "top_k=100",
    "top_p=0.98",
    "min_p=0.01",
    "epsilon=0.001",
    "eta=0.002",
    "top_n_sigma=1.8",
]
# Logits by the cache and by full reads are float32 sums in another order; whole answers are products of a few such.
CLOSE = 5e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Reading]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return folder, plain_reading(network, tokenizer, "A name:", ANSWERS, WEIGHTS)


@pytest.mark.parametrize("where, batch", [("temperature-first", 2), ("temperature-last", 32)])
def test_every_table_of_a_run(model, tmp_path, where, batch):
    folder, reading = model
    task = tmp_path / "names.json"
    task.write_text(json.dumps({"prompt": "A name:", "answers": ANSWERS, "weights": WEIGHTS}))
    out = tmp_path / "out"
    done = CliRunner().invoke(
        cli.app,
        ["diagnose", "--model", str(folder), "--task", str(task), "--out", str(out), "--temperatures", "0.7,1.5",
         "--rules", ",".join(RULES), "--order", where, "--batch", str(batch)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = differences(out, reading, list(reading.logits), RULES, [0.7, 1.5], where=where)
    assert len(found) == 34 and max(found.values()) < CLOSE, {name: x for name, x in found.items() if x >= CLOSE}
    assert len(Tables.of(out).rows["order"]) == len(reading.logits)
    # Not trivially so: the rules differ, and the order is neither perfect nor hopeless.
    rows = Tables.of(out).rows
    assert len({row["kept"] for row in rows["cutoffs"] if row["node"] == 0}) >= 6
    assert 0 < min(row["auroc"] for row in rows["order"]) < max(row["auroc"] for row in rows["order"]) < 1
    assert {row["recall"] for row in rows["cutoffs"]} > {0, 1} and len(
        {row["precision"] for row in rows["cutoffs"]}
    ) > 15
