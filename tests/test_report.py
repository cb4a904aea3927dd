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

import numpy as np
import pytest
import torch

pytest.importorskip("jinja2", reason="the report needs the extra fastcalib[report]")
pytest.importorskip("pyarrow", reason="the report needs the extra fastcalib[report]")

from fastcalib import ValidSets
from fastcalib.diagnostics import order_from_ranks
from fastcalib.report import data, measures, write_report
from fastcalib.report.data import read_runs, sample_prefixes
from fastcalib.report.headlines import headlines
from fastcalib.report.page import collect, render, script_json
from fastcalib.runner.tables import SCHEMAS, RunFacts, write_facts, write_table

from .report_runs import NASTY, RULES, TEMPERATURES, TOKENS, write_large_run, write_toy_run

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


# Numbers


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_that_of_the_diagnostics(seed: int) -> None:
    # Few distinct logits, so that valid tokens tie with each other and with invalid ones.
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(0, 12, (40,), generator=generator).double()
    valid = torch.randperm(40, generator=generator)[:9].sort().values
    counts = torch.randint(1, 9, (9,), generator=generator)
    above = (z > z[valid, None]).sum(1)
    equal = (z == z[valid, None]).sum(1) - 1
    want = order_from_ranks(above, equal, ValidSets.from_lists([valid.tolist()]), counts=counts, vocab_size=40)
    precision, recall, token_recall = measures.frontier(above.numpy(), equal.numpy(), counts.double().numpy())
    # The diagnostics repeat a point for each tied token.
    distinct = np.append(np.diff(want.rank.numpy()) != 0, True)
    np.testing.assert_allclose(precision, want.precision.numpy()[distinct], rtol=1e-12)
    np.testing.assert_allclose(recall, want.recall.numpy()[distinct], rtol=1e-12)
    np.testing.assert_allclose(token_recall, want.token_recall.numpy()[distinct], rtol=1e-12)
    # At each recall of the grid the best precision among the cutoffs that reach it, by looking at all of them.
    brute = [max(p for p, r in zip(precision, recall) if r >= q - 1e-9) for q in measures.GRID]
    np.testing.assert_allclose(measures.best_precision(precision, recall), brute, rtol=1e-12)


def test_frontiers_are_means_over_prefixes(toy: Path) -> None:
    (run,) = read_runs([toy])
    table, trie = run.table("valid"), run.table("trie")
    assert table is not None and trie is not None
    groups = measures.frontiers(run)
    assert groups is not None
    assert [group["depth"] for group in groups] == [None, 0, 1, 2]
    inner = set(trie["parent"].tolist()) - {-1}
    assert groups[0]["prefixes"] == len(inner)
    at_half, kept, hits = [], [], []
    for node in sorted(inner):
        rows = table["node"] == node
        weight = trie["count"][table["child"][rows]]
        precision, recall, _ = measures.frontier(table["n_greater"][rows], table["n_equal"][rows], weight.astype(float))
        at_half.append(max(p for p, r in zip(precision, recall) if r >= 0.5))
        inside = table["n_greater"][rows] < rows.sum()
        kept.append(weight[inside].sum() / weight.sum())
        hits.append(inside.sum() / rows.sum())
    half = int(np.flatnonzero(measures.GRID == 0.5)[0])
    assert groups[0]["answers"]["mean"][half] == pytest.approx(np.mean(at_half), rel=5e-4)  # four digits
    assert groups[0]["answers"]["high"][half] == pytest.approx(np.quantile(at_half, 0.75), rel=5e-4)
    order = run.table("order")
    assert order is not None
    want = [order["r_precision"].mean(), np.mean(kept), np.mean(hits)]
    assert groups[0]["oracle"] == pytest.approx(want, rel=FIVE_DIGITS)


def test_rules_are_means_over_the_prefixes_where_they_are_defined(tmp_path: Path) -> None:
    rows = [
        {"node": 0, "rule": "top_k=2", "temperature": 1.0, "kept": 2, "precision": 0.5, "recall": 1.0},
        {"node": 1, "rule": "top_k=2", "temperature": 1.0, "kept": 4, "precision": math.nan, "recall": 0.0},
        {"node": 0, "rule": "none", "temperature": 2.0, "kept": 9, "precision": 0.1, "recall": 1.0},
    ]
    full = [{"kept_mass": 0.25, "token_recall": 0.75, **row} for row in rows]
    write_table(tmp_path, "cutoffs", {key: [row[key] for row in full] for key in SCHEMAS["cutoffs"].names})
    write_facts(tmp_path, RunFacts({"name": "m"}))
    table = measures.rules(read_runs([tmp_path])[0])
    assert table is not None
    assert table["temperatures"] == [1, 2]
    none, top_k = table["rows"]  # no cutoff comes first
    assert (none["label"], top_k["label"], top_k["family"], top_k["parameter"]) == ("no cutoff", "top-k 2", "top-k", 2)
    assert top_k["precision"] == [0.5, None]
    assert top_k["recall"] == [0.5, None]
    assert top_k["kept"] == [3, None]
    assert none["kept"] == [None, 9]


def test_curves_keep_the_numbers_of_their_tables(toy: Path) -> None:
    (run,) = read_runs([toy])
    sequence, compounding = measures.sequence(run), measures.compounding(run)
    assert sequence is not None and compounding is not None
    assert [entry["rule"] for entry in sequence][:2] == ["none", "size_oracle"]
    assert {entry["rule"] for entry in sequence} == set(RULES)
    table = run.table("sequence")
    assert table is not None
    at = {(r, t): i for i, (r, t) in enumerate(zip(table["rule"], table["temperature"]))}
    for entry in sequence:
        assert entry["temperature"] == TEMPERATURES
        for key in ("validity", "diversity"):
            want = [table[key][at[entry["rule"], t]] for t in TEMPERATURES]
            assert entry[key] == pytest.approx(want, rel=FIVE_DIGITS)
    # The products end at the precision and recall of whole answers.
    for entry in compounding:
        row = at[entry["rule"], entry["temperature"]]
        assert entry["token"] == [1, 2, 3]
        assert entry["alpha_product"][-1] == pytest.approx(table["precision"][row], rel=FIVE_DIGITS)
        assert entry["beta_product"][-1] == pytest.approx(table["recall"][row], rel=FIVE_DIGITS)


def test_shape_is_mean_and_quartiles_of_what_is_finite(toy: Path) -> None:
    (run,) = read_runs([toy])
    table, order = run.table("shape"), run.table("order")
    assert table is not None and order is not None
    table["kl"] = table["kl"].copy()
    table["kl"][table["node"] == 0] = math.inf
    found = measures.shape(run)
    assert found is not None
    rows = (table["temperature"] == 1.0) & (table["node"] != 0)
    at = found["temperatures"].index(1)
    kl = found["measures"]["kl"]
    want = [table["kl"][rows].mean(), *np.quantile(table["kl"][rows], [0.25, 0.75])]
    assert [kl["mean"][at], kl["low"][at], kl["high"][at]] == pytest.approx(want, rel=FIVE_DIGITS)
    every = table["temperature"] == 1.0
    sizes = dict(zip(order["node"], order["valid"]))
    shares = [d / sizes[node] for node, d in zip(table["node"][every], table["expected_distinct"][every])]
    assert found["measures"]["expected_distinct"]["mean"][at] == pytest.approx(np.mean(shares), rel=FIVE_DIGITS)


def test_the_details_of_a_prefix(toy: Path) -> None:
    (run,) = read_runs([toy])
    sample = sample_prefixes([run])
    root = measures.prefix_details(run, sample.prefixes, 0)[0]
    assert root is not None and root["valid"] is not None and root["top"] is not None
    valid = root["valid"]
    assert valid["total"] == 14 and set(NASTY) < set(valid["text"])
    assert valid["greater"] == sorted(valid["greater"])
    assert sum(valid["w"]) == pytest.approx(1, abs=1e-3)  # fourteen numbers of four digits
    assert valid["mass"] == pytest.approx(sum(valid["p"]), rel=1e-3)
    # A valid token is where the head of the ranking has it.
    place = dict(zip(root["top"]["text"], root["top"]["position"]))
    for text, greater, equal in zip(valid["text"], valid["greater"], valid["equal"]):
        if text in place:
            assert greater <= place[text] <= greater + equal
            assert root["top"]["valid"][place[text]] == 1
    assert sum(root["top"]["valid"]) == sum(text in place for text in valid["text"])


def test_headlines(toy: Path) -> None:
    (run,) = read_runs([toy])
    found = {item["label"]: item["values"][0] for item in headlines([run])}
    sequence, order = run.table("sequence"), run.table("order")
    assert sequence is not None and order is not None
    (plain,) = np.flatnonzero((sequence["rule"] == "none") & (sequence["temperature"] == 1.0))
    assert found["Valid samples"]["value"] == f"{100 * sequence['validity'][plain]:.1f}%"
    reliable = (sequence["validity"] >= 0.8) & (sequence["rule"] != "size_oracle")
    best = int(np.flatnonzero(reliable)[sequence["diversity"][reliable].argmax()])
    assert found["Most variety at 80% validity"]["value"] == f"{100 * sequence['diversity'][best]:.1f}%"
    assert f"temperature {sequence['temperature'][best]:g}" in found["Most variety at 80% validity"]["sentence"]
    assert found["Recall at precision 0.8"]["value"] == f"{100 * order['recall_at_precision'].mean():.1f}%"
    share = f"{100 * order['r_precision'].mean():.1f}".removesuffix(".0")
    assert found["Size oracle"]["value"] == share + "%"
    assert found["Order-calibrated prefixes"]["sentence"].startswith(f"{order['order_calibrated'].sum()} of ")
    assert found["Calibration error on text"]["value"] == "7%"


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
    write_facts(tmp_path / "b", RunFacts({"name": "m"}, {"name": "y"}))
    assert [run.label for run in read_runs(tmp_path / name for name in facts)] == ["m · x", "m · y", "n · x"]


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


def test_many_valid_tokens_are_thinned_out(tmp_path: Path) -> None:
    run = write_large_run(tmp_path, first=1000, second=1, valid=1)
    root = measures.prefix_details(read_runs([run])[0], sample_prefixes(read_runs([run])).prefixes, 0)[0]
    assert root is not None and root["valid"] is not None
    valid = root["valid"]
    assert valid["total"] == 1000
    assert len(valid["greater"]) == len(valid["text"]) == data.MAX_VALID
    every = sorted(read_runs([run])[0].table("valid")["n_greater"][:1000].tolist())  # type: ignore[index]
    assert valid["greater"][: data.MAX_VALID // 2] == every[: data.MAX_VALID // 2]
    assert valid["greater"][-1] == every[-1]
    assert valid["mass"] > sum(valid["p"])  # of all, not of those shown


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
