"""What people get wrong with fastcalib diagnose and score: one sentence each, before anything is lost."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytest.importorskip("pyarrow")

from fastcalib import cli
from fastcalib.decoding import KeepAll, TopK
from fastcalib.errors import UserError
from fastcalib.runner import assemble
from fastcalib.runner import model as runner_model
from fastcalib.runner.diagnose import run_diagnose
from fastcalib.runner.model import load, locate
from fastcalib.runner.options import DiagnoseOptions, read_rules, read_temperatures
from fastcalib.runner.score import ScoreOptions, run_score
from fastcalib.runner.tables import read_facts, read_table
from fastcalib.runner.tasks import Task

from .tiny_model import save_tiny_model, tiny_options

TASK = Task("words", "Say:", ("ab", "abc", "ba"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> DiagnoseOptions:
    return tiny_options(folder, tmp_path / "out", temperatures=(1.0,), rules=(KeepAll(),))


def run(options: DiagnoseOptions, console: Console | None = None, task: Task | None = TASK, **how):
    return run_diagnose(options, console or Console(quiet=True), task=task, **how)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"style": "poem"}, "--style poem: use plain or chat"),
        ({"order": "last"}, "--order last"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"max_prefixes": 0}, "--max-prefixes must be at least 1"),
        ({"precision": 80.0}, r"--precision must lie in \(0, 1\], got 80"),
        ({"device": "gpu"}, "--device gpu: use auto, cpu"),
        ({"dtype": "int8"}, "--dtype int8: use one of auto"),
        ({"device": "meta"}, "--device meta: there are no numbers on it"),
        ({"seed": 2**64}, "--seed must fit into 64 bits"),
        ({"model": "./nowhere.gguf"}, r"expected a \.gguf file"),
        ({"model": " "}, "--model is empty"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_folder(options, changes, words):
    with pytest.raises(UserError, match=words):
        run(dataclasses.replace(options, **changes))
    assert not options.out.exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"task": "us-states", "digits": 3}, "--digits is for --task digits or digits-sum, not for us-states"),
        ({"task": "digits", "total": 5}, "--sum is for --task digits-sum, not for digits"),
        ({"task": "digits", "sum_rule": "at-most"}, "--sum-rule is for --task digits-sum"),
        ({"task": "digits", "prompt": " "}, "--prompt is empty"),
    ],
)
def test_options_of_another_task_are_not_passed_over(options, changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(options, **changes).build_task()


def test_a_prompt_takes_the_place_of_the_tasks_own(options):
    task = dataclasses.replace(options, task="digits", digits=2, start=9, end=11, prompt="Two:").build_task()
    assert task.prompt == "Two:" and task.answers[:4] == ("9,9", "9,10", "9,11", "10,9") and len(task.answers) == 9


@pytest.mark.parametrize(
    "task, changes, words",
    [
        (
            Task("t", "Say:", ("a", "x" * 300)),
            {},
            r"prompt and answer 1, 'xxx.*, are 306 tokens, of which tiny\d* would read 305 and can read 256",
        ),
        (
            Task("t", "Say:", ("ab", "abc")),
            {"end_token": "none"},
            "answer 0, 'ab', is the beginning of answer 1, 'abc', and nothing says that it ends there; use --end-token",
        ),
        (Task("t", "Say:", ("ab", "ba,c")), {"end_token": ","}, "answer 1, 'ba,c', holds the end token itself"),
    ],
)
def test_answers_that_no_model_or_trie_can_take(options, task, changes, words):
    with pytest.raises(UserError, match=words):
        run(dataclasses.replace(options, **changes), task=task)


def test_the_longest_answer_that_fits(options):
    """The last token of an answer, its end, is predicted and not read: "Say: " and 251 letters are 256 tokens."""
    assert run(options, task=Task("t", "Say:", ("a", "x" * 251))).task["max_depth"] == 252
    with pytest.raises(UserError, match=r"are 258 tokens, of which .* would read 257 and can read 256"):
        run(options, task=Task("t", "Say:", ("a", "x" * 252)))


def test_answers_that_the_tokenizer_cannot_tell_apart(options):
    def same_case(*how: object) -> object:
        from tokenizers import normalizers

        model = load(*how)
        model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        return model

    task = Task("t", "say:", ("red", "Green", "green"))
    with pytest.raises(UserError, match="answer 1, 'Green', has the same tokens as answer 2, 'green', so the two are"):
        run(options, task=task, load_model=same_case)


def test_a_tokenizer_of_another_model(options):
    def smaller(*how: object) -> object:
        return dataclasses.replace(load(*how), vocab_size=256)

    with pytest.raises(UserError, match="gives token 256, but the model has only 256 of them"):
        run(options, load_model=smaller)


def test_a_later_checkpoint_under_the_same_names_is_read_again(options, folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "checkpoint"))
    options = dataclasses.replace(options, model=str(copied))
    run(options)
    first = read_table(options.out, "valid")["logit"].to_pylist()
    network, _ = runner_model.load_module(locate(copied))
    with torch.no_grad():
        network.lm_head.weight.mul_(2)
    network.save_pretrained(copied)
    run(options)
    assert read_table(options.out, "valid")["logit"].to_pylist() == pytest.approx([2 * z for z in first])


def test_a_model_of_the_working_directory_has_a_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert locate(".").name == folder.name and locate(".").place == str(folder)


def test_another_task_in_the_same_folder_is_told_and_an_error_leaves_the_old_run_whole(options, monkeypatch):
    run(options)
    before = {path.name: path.read_bytes() for path in options.out.iterdir() if path.is_file()}
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fails(*how: object, failure: BaseException = failure) -> None:
            raise failure

        with monkeypatch.context() as patch, pytest.raises(type(failure)):
            patch.setattr(assemble, "_top_table", fails)
            run(dataclasses.replace(options, max_prefixes=2))
        assert {path.name: path.read_bytes() for path in options.out.iterdir() if path.is_file()} == before
        assert {path.name for path in options.out.iterdir() if path.is_dir()} == {"state"}
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    run(dataclasses.replace(options, max_prefixes=2), console, task=Task("others", "Say:", ("x", "y")))
    assert f"A run of {locate(options.model).name} on words was in {options.out} and is replaced." in " ".join(
        console.export_text().split()
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers(options, value):
    """As float16 overflows: told, and NaN in the tables instead of ranks that a comparison with NaN gives."""

    def broken(*how: object) -> object:
        model = load(*how)
        inner = model.network.lm_head.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            z = inner(hidden)
            return z.clone().index_fill_(-1, torch.tensor([5]), value)

        model.network.lm_head.forward = forward
        return model

    console = Console(record=True, width=200, file=io.StringIO())
    facts = run(options, console, load_model=broken)
    n = facts.options["prefixes"]
    assert f"After {n} of {n} prefixes the model's logits are NaN or infinite" in console.export_text()
    assert set(read_table(options.out, "valid")["n_greater"].to_pylist()) == {-1}
    assert set(read_table(options.out, "order")["order_calibrated"].to_pylist()) == {False}
    for table, column in (("order", "auroc"), ("order", "area"), ("shape", "kl"), ("cutoffs", "precision")):
        assert all(math.isnan(x) for x in read_table(options.out, table)[column].to_pylist())
    assert set(read_table(options.out, "cutoffs")["kept"].to_pylist()) == {0}
    for table, columns in (("sequence", ("validity", "diversity", "precision", "recall")), ("compounding", ("alpha",))):
        assert all(math.isnan(read_table(options.out, table)[column].to_pylist()[0]) for column in columns)


def test_temperatures_and_rules_as_typed():
    assert read_temperatures("0.5 1, 2") == (0.5, 1.0, 2.0) and read_rules("none,top_k=5") == (KeepAll(), TopK(5))
    assert len(read_temperatures(None)) == 12 and len({str(r) for r in read_rules(None)}) == len(read_rules(None)) >= 17
    for text in ("1,1", "inf", "nan", "0", "-1", "1e30", "x", ""):
        with pytest.raises(UserError, match="--temperatures "):
            read_temperatures(text)
    for text in ("top_q=1", "none none", " "):
        with pytest.raises(UserError, match="--rules"):
            read_rules(text)
    with pytest.raises(UserError, match=r"--rules: 'top_k=2.5': top_k must be a positive int, got 2.5"):
        read_rules("top_k=2.5")
    with pytest.raises(UserError, match=r"--rules: 'top_p=much': 'much' is no number"):
        read_rules("top_p=much")


def test_an_id_of_the_hub_without_a_network(monkeypatch, options):
    import transformers

    source = locate("someone/some-model")
    assert source.hub_id == source.name == "someone/some-model" and source.identity == [["hub", "someone/some-model"]]

    def offline(*args: object, **kwargs: object) -> None:
        assert args[0] == "someone/some-model" and "local_files_only" not in kwargs
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand so on")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(
        UserError, match=r"hub did not give it \(offline, or no such model\?\): We couldn't connect"
    ) as info:
        run(dataclasses.replace(options, model="someone/some-model"))
    assert "\n" not in str(info.value)


def test_models_on_disk_never_ask_the_network(monkeypatch, folder):
    import transformers

    seen = []
    original = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: (seen.append(k), original(*a, **k))[1]
    )
    model = load(locate(folder), dtype="bfloat16")
    assert seen == [{"local_files_only": True}] and model.network.dtype == torch.bfloat16
    assert runner_model.model_facts(locate(folder), model)["device"] == "cpu"
    if not torch.cuda.is_available():
        assert runner_model.pick_device("auto") == "cpu"
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            load(locate(folder), "cuda")


def test_command_line(options, folder, tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps({"prompt": "Say:", "answers": ["red", "green"]}))
    arguments = [
        "diagnose", "--model", str(folder), "--task", str(tmp_path / "answers.json"), "--out", str(options.out),
        "--temperatures", "1", "--rules", "none,top_p=0.9", "--end-token", "\\n",
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "2 answers" in done.output and "top_p=0.9" in done.output and (options.out / "run.json").is_file()
    assert read_table(options.out, "trie")["text"].to_pylist()[-1] == "\n"
    for bad, words in (
        (["--task", "nope"], "neither a file nor one of us-states, digits, digits-sum"),
        (["--temperatures", "-1"], "positive numbers are needed"),
        (["--rules", "top_p=2"], "--rules"),
    ):
        failed = CliRunner().invoke(cli.app, [*arguments, *bad])
        assert failed.exit_code == 1 and words in failed.output and isinstance(failed.exception, SystemExit)
        assert len(failed.output.strip().splitlines()) == 1
    failed = CliRunner().invoke(cli.app, ["score", "--text", "nothing.txt", "--out", str(tmp_path / "s")])
    assert failed.exit_code == 1 and "there is no such file" in failed.output
    (tmp_path / "file").write_text("")
    for out, words in (("file", "no folder can be made there"), ("file/x", "no folder can be made there")):
        failed = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / out)])
        assert failed.exit_code == 1 and words in failed.output


@pytest.mark.parametrize("content", ["{", "[1]", '{"task": {}}'])
def test_a_folder_with_a_run_json_of_somebody_else(options, content):
    options.out.mkdir()
    (options.out / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"its run.json cannot be read .*; take another folder"):
        run(options)
    assert (options.out / "run.json").read_text() == content


@pytest.mark.parametrize("command", ["diagnose", "score"])
def test_without_the_packages_and_stopped_before_anything_was_finished(monkeypatch, tmp_path, command):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, f"fastcalib.runner.{command}", None)
        failed = CliRunner().invoke(cli.app, [command, "--out", str(tmp_path)])
    assert failed.exit_code == 1 and failed.output.endswith("; pip install 'fastcalib[report]'\n")

    def stop(*how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastcalib.runner.{command}.run_{command}", stop)
    stopped = CliRunner().invoke(cli.app, [command, "--out", str(tmp_path)])
    assert stopped.exit_code == 130 and "Stopped. Nothing was finished yet." in stopped.output
    (tmp_path / "state").mkdir()
    stopped = CliRunner().invoke(cli.app, [command, "--out", str(tmp_path)])
    assert stopped.exit_code == 130 and "the same command goes on from there" in stopped.output


def test_a_full_disk_is_one_sentence(options, folder, monkeypatch):
    def full(*how: object) -> None:
        raise OSError(28, "No space left on device", "state/prefixes.safetensors")

    monkeypatch.setattr("fastcalib.storage.Store.get", full)
    failed = CliRunner().invoke(
        cli.app, ["diagnose", "--model", str(folder), "--task", "digits", "--out", str(options.out)]
    )
    assert failed.exit_code == 1
    assert failed.output.splitlines()[-1] == ("fastcalib diagnose: No space left on device: state/prefixes.safetensors")


@pytest.mark.parametrize(
    "text, changes, words",
    [
        (b"", {}, "there is nothing in it to measure on"),
        (b" \n", {}, "there is nothing in it to measure on"),
        (b"a", {"window": 1}, "too short: 1 tokens, but two windows of 1 need 3"),
        (b"ab" * 2000, {"window": 257}, r"--window 257: tiny\d* can read 256 tokens"),
        (b"ab", {"window": 0}, "--window must be at least 1, got 0"),
        (b"ab", {"n_tokens": 0}, "--tokens must be at least 1, got 0"),
        (b"ab", {"dtype": "int8"}, "--dtype int8"),
        (b"\xff", {}, "cannot be read as UTF-8"),
    ],
)
def test_texts_that_cannot_be_scored(folder, tmp_path, text, changes, words):
    (tmp_path / "text.txt").write_bytes(text)
    options = ScoreOptions(out=tmp_path / "out", model=str(folder), text=tmp_path / "text.txt", window=32)
    with pytest.raises(UserError, match=words):
        run_score(dataclasses.replace(options, **changes), Console(quiet=True))
    assert not (tmp_path / "out" / "run.json").exists()


def test_scores_of_a_model_of_the_same_name_elsewhere(folder, options, tmp_path):
    run(options)
    other = shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / "text.txt").write_text("ab" * 200)
    scoring = ScoreOptions(out=options.out, model=str(other), text=tmp_path / "text.txt", window=32)
    with pytest.raises(UserError, match=rf"holds a run of {folder}, not of {other}: take another folder"):
        run_score(scoring, Console(quiet=True))
    assert not read_facts(options.out).calibration
