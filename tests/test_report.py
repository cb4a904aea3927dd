"""The report without a browser: its numbers against the tables, its HTML, what it does when something is missing."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="the report needs the extra fastcalib[report]")
pytest.importorskip("pyarrow", reason="the report needs the extra fastcalib[report]")

from fastcalib.report import data, write_report
from fastcalib.report.data import read_runs, sample_prefixes
from fastcalib.report.page import collect, render, script_json
from fastcalib.report.tables import differences
from fastcalib.runner.tables import SCHEMAS, RunFacts, write_facts, write_table

from .report_runs import NASTY, TOKENS, write_large_run, write_toy_run

# Numbers are rounded to five digits for the page.
FIVE_DIGITS = 5e-5
NAME = 'Toy & <i>small</i> "one" </script>'
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_run(tmp_path_factory.mktemp("toy") / "run", model=NAME)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_run(tmp_path_factory.mktemp("other") / "run", model="toy-large", skill=5.0, seed=1)


def page_of(*folders: Path) -> str:
    """The page alone: pictures take most of a report's time."""
    runs = read_runs(folders)
    return render(runs, *collect(runs))


def copy_without(run: Path, folder: Path, *tables: str) -> Path:
    """A copy of a run that lacks some tables."""
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*(f"{name}.parquet" for name in tables))))


class Page(HTMLParser):
    """Elements, ids, text and whatever is not well formed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        self.wrong += [f"<{tag}> never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, text: str) -> None:
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside == "script" else self.text if inside != "style" else []).append(text)


def payload_of(html: str) -> dict[str, Any]:
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert block is not None
    loaded: dict[str, Any] = json.loads(block[1])
    return loaded


# The page


def test_the_page_is_well_formed_and_stands_alone(toy: Path, other: Path) -> None:
    html = page_of(toy, other)
    page = Page(html)
    assert not page.wrong
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "data"):
            link = attributes.get(name)
            assert link is None or link == "data:," or (link.startswith("#") and link[1:] in ids), (tag, link)
    # Nothing in styles or scripts reaches out either; the one address that is named is a namespace.
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", html)
    assert set(re.findall(r"\w+://[^\s\"'<]*", html)) == {"http://www.w3.org/2000/svg"}
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    # Without scripts the numbers are still there.
    assert sum(tag == "table" for tag, _ in page.elements) >= 12


def test_names_and_tokens_are_text_and_nothing_else(toy: Path) -> None:
    html = page_of(toy)
    page = Page(html)
    scripts = [a for tag, a in page.elements if tag == "script"]
    assert len(scripts) == html.count("<script") == html.count("</script>")
    assert not any(tag == "i" for tag, _ in page.elements)  # as in the model's name
    assert NAME in "".join(page.text)
    assert "Say <b>something</b>:\n" in "".join(page.text)
    payload = payload_of(html)
    assert payload["runs"] == [NAME]
    assert set(TOKENS[: len(NASTY)]) == set(NASTY) < set(payload["details"][0][0]["valid"]["text"])


def test_json_in_a_script_element() -> None:
    nasty = ["</script>", "<!--", "]]>", "&lt;", "\u2028", "\x00", "\ud800", "日", '"\\']
    text = script_json(nasty)
    assert not re.search(r"[<>&\u2028]", text) and text.isascii()
    assert json.loads(text) == nasty
    with pytest.raises(ValueError):  # not JSON for a browser
        script_json([math.nan])


def test_several_runs_stand_side_by_side(toy: Path, other: Path) -> None:
    html = page_of(toy, other)
    payload = payload_of(html)
    assert payload["runs"] == [NAME, "toy-large"]
    lists = ("sequence", "frontiers", "order", "rules", "shape", "compounding", "reliability", "details", "answers")
    assert all(len(payload[name]) == 2 and all(payload[name]) for name in lists)
    # The same prefixes under both, so every one has the details of both.
    assert all(a and b for a, b in zip(*payload["details"]))
    head = re.search(r"<caption>Order: means over prefixes</caption>\s*<thead>(.*?)</thead>", html, re.S)
    assert head is not None and re.findall(r"<th[^>]*>(.*?)</th>", head[1])[-1] == "toy-large"


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    facts = {"a": ("m", "x"), "b": ("m", "x"), "c": ("n", "x")}
    for folder, (model, task) in facts.items():
        write_facts(tmp_path / folder, RunFacts({"name": model}, {"name": task}))
    assert [run.label for run in read_runs(tmp_path / name for name in facts)] == ["m (a)", "m (b)", "n"]
    # What all runs share is said in the title once, and not in every label.
    assert [run.label for run in read_runs(tmp_path / name for name in "ab")] == ["a", "b"]
    assert [run.label for run in read_runs([tmp_path / "a"])] == ["m"]
    write_facts(tmp_path / "b", RunFacts({"name": "m"}, {"name": "y"}))
    assert [run.label for run in read_runs(tmp_path / name for name in facts)] == ["m · x", "m · y", "n · x"]
    assert [run.label for run in read_runs(tmp_path / name for name in "ab")] == ["x", "y"]
    for folder in ("one/run", "two/run"):
        write_facts(tmp_path / folder, RunFacts({"name": "m"}, {"name": "x"}))
    assert [run.label for run in read_runs(tmp_path / name / "run" for name in ("one", "two"))] == [
        "one/run",
        "two/run",
    ]


def test_the_head_says_what_runs_differ_in(toy: Path, other: Path, tmp_path: Path) -> None:
    assert "What the runs differ in" not in page_of(toy) + page_of(toy, other)
    chat = copy_without(other, tmp_path / "chat")
    facts = json.loads((chat / "run.json").read_text())
    facts["task"] |= {"style": "chat", "end_token": "\n"}
    facts["options"]["draws"] = 5
    (chat / "run.json").write_text(json.dumps(facts))
    found = differences(read_runs([other, chat]))
    assert found is not None
    assert found.rows == [
        ["an answer ends with", "<end>", "⏎"],
        ["the question is put as", "plain", "chat"],
        ["draws", "–", "5"],
    ]
    assert "What the runs differ in" in page_of(other, chat)


def test_prefixes_meet_in_their_text(tmp_path: Path) -> None:
    # One model takes "ab" as one token, the other as two; "ab" comes twice under the second.
    def run(name: str, rows: list[tuple[int, int, int, str, int]]) -> Path:
        node, parent, depth, prefix, count = zip(*rows)
        columns = {"node": node, "parent": parent, "depth": depth, "prefix": prefix, "count": count}
        write_table(tmp_path / name, "trie", {**columns, "token": node, "text": prefix})
        write_facts(tmp_path / name, RunFacts({"name": name}, {"name": "t"}))
        return tmp_path / name

    one = run("one", [(0, -1, 0, "", 2), (1, 0, 1, "ab", 2), (2, 1, 2, "abc", 1), (3, 1, 2, "abd", 1)])
    other = run(
        "other",
        [
            *[(0, -1, 0, "", 3), (1, 0, 1, "a", 1), (2, 0, 1, "ab", 2)],
            *[(3, 1, 2, "ab", 1), (4, 2, 2, "abc", 2), (5, 3, 3, "abc", 1)],
        ],
    )
    sample = sample_prefixes(read_runs([one, other]))
    found = [(prefix.text, prefix.nodes) for prefix in sample.prefixes]
    assert found == [("", [0, 0]), ("ab", [1, 2]), ("a", [None, 1]), ("ab", [None, 3])]
    assert sample.total == 4


# What is missing


@pytest.mark.parametrize("name", [*SCHEMAS, "every table"])
def test_a_missing_table_is_said_and_no_error(toy: Path, tmp_path: Path, name: str) -> None:
    folder = copy_without(toy, tmp_path / "a run", *(SCHEMAS if name == "every table" else [name]))
    html = page_of(folder)
    page = Page(html)
    assert not page.wrong
    text = "".join(page.text)
    payload = payload_of(html)
    said = {"order": "In short", "fit": "One prefix", "top": "One prefix"}.get(name)
    command = "fastcalib score" if name == "reliability" else "fastcalib diagnose"
    if said is None:
        assert f"{command} --model 'made for a test'" in text and f"--out '{folder}'" in text
    if name == "every table":
        assert text.count("not measured") >= 6 and not any(payload["details"][0])
    if name == "valid":
        assert payload["frontiers"] == [None] and "fig-frontier" not in [a.get("id") for _, a in page.elements]


def test_one_run_of_two_that_lacks_a_table_is_named(toy: Path, other: Path, tmp_path: Path) -> None:
    lacking = copy_without(other, tmp_path / "run", "reliability", "sequence")
    text = "".join(Page(page_of(toy, lacking)).text)
    assert "toy-large: calibration on text was not measured" in text
    assert "toy-large: validity and diversity were not measured" in text
    assert text.count("not measured. To add it") == 2
    assert "not measured in this run" in text  # among the headline numbers


def test_errors_are_for_people(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fastcalib diagnose --out"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no folder given"):
        write_report([])
    with pytest.raises(ValueError, match="given twice"):
        write_report([toy, toy / "." / ".." / toy.name])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        write_report(tmp_path)


def test_a_large_run_gives_a_small_page(tmp_path: Path) -> None:
    run = write_large_run(tmp_path)
    html = page_of(run)
    payload = payload_of(html)
    assert len(html.encode()) < 5e6
    assert len(payload["prefixes"]) == data.MAX_PREFIXES
    assert f"{data.MAX_PREFIXES} of 10,101 prefixes, those with the most answers at each depth" in html
    assert [sum(p["depth"] == d for p in payload["prefixes"]) for d in range(3)] == [1, 74, 75]
    assert payload["frontiers"][0][0]["prefixes"] == 10_101


# Files


def test_report_and_pictures_on_disk(toy: Path, other: Path, tmp_path: Path) -> None:
    page = write_report([toy, other], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    Page(page.read_text("utf-8"))
    names = ["val_div", "temperature", "frontier", "rules", "shape", "compounding", "reliability"]
    names += ["ranks", "probabilities", "fit"]
    found = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert found == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    for name in names:
        assert (tmp_path / "out" / "figures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        tree = ElementTree.parse(tmp_path / "out" / "figures" / f"{name}.svg")
        links = [value for element in tree.iter() for key, value in element.items() if key.endswith("href")]
        assert all(link.startswith("#") for link in links)
    text = "".join(ElementTree.parse(tmp_path / "out" / "figures" / "shape.svg").getroot().itertext())
    assert "toy-large" in text and NAME in text


def test_where_the_report_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_facts(tmp_path / name, RunFacts({"name": name}))
    assert write_report(tmp_path / "a") == tmp_path / "a" / "report.html"
    assert write_report(["a", "b"]) == Path("fastcalib-report/report.html")
    assert (tmp_path / "fastcalib-report" / "report.html").is_file()


def test_the_command(toy: Path, tmp_path: Path) -> None:
    def run(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastcalib", "report", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    bare = copy_without(toy, tmp_path / "bare", *SCHEMAS)  # no chart, so no time for pictures
    done = run(bare, "--out", "there")
    assert (done.returncode, done.stdout.split()) == (0, ["there/report.html"]), done.stderr
    assert (tmp_path / "there" / "report.html").is_file()
    failed = run(tmp_path / "nothing")
    assert failed.returncode == 1
    assert "fastcalib report: " in failed.stderr and "has no run.json" in failed.stderr
    assert "Traceback" not in failed.stderr
