"""The numbers of the report against the tables they come from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="the report needs the extra fastcalib[report]")
pytest.importorskip("pyarrow", reason="the report needs the extra fastcalib[report]")

from fastcalib.report import data, measures
from fastcalib.report.data import read_runs, sample_prefixes
from fastcalib.report.frontiers import GRID, frontiers
from fastcalib.report.headlines import headlines
from fastcalib.report.page import collect
from fastcalib.runner.tables import SCHEMAS, RunFacts, write_facts, write_table

from .report_runs import NASTY, RULES, TEMPERATURES, write_large_run, write_toy_run

# Numbers are rounded to five digits for the page.
FIVE_DIGITS = 5e-5


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_run(tmp_path_factory.mktemp("toy") / "run")


def frontier_of(greater: np.ndarray, equal: np.ndarray, weight: np.ndarray) -> list[tuple[float, float, float]]:
    """Precision, recall by weight and by tokens of the cutoff at each valid token: by looking at all of them."""
    points = []
    for g, e in zip(greater, equal):
        kept = greater <= g
        points.append((kept.sum() / (g + e + 1), weight[kept].sum() / weight.sum(), kept.mean()))
    return points


def best_at(points: list[tuple[float, float, float]], recall: float, by: str = "answers") -> float:
    column = 1 if by == "answers" else 2
    return max(p[0] for p in points if p[column] >= recall - 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_of_tied_logits(tmp_path: Path, seed: int) -> None:
    # Few distinct logits, so that valid tokens tie with each other and with invalid ones; rows in no order of nodes.
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 12, (2, 40))
    valid = [rng.permutation(40)[:size] for size in (9, 4)]
    node, child, greater, equal = [], [], [], []
    for u in (1, 0):
        for v in valid[u]:
            node.append(u)
            child.append(2 + 40 * u + v)
            greater.append((logits[u] > logits[u, v]).sum())
            equal.append((logits[u] == logits[u, v]).sum() - 1)
    nodes = [0, 1, *range(2, 82)]
    counts = rng.integers(1, 9, 82)
    blank = [0] * len(nodes)
    depth = [0, 1, *[2] * 80]
    write_table(tmp_path, "trie", {"node": nodes, "parent": blank, "depth": depth, "token": nodes,
        "text": [""] * 82, "prefix": [""] * 82, "count": counts})  # fmt: skip
    columns = {"node": node, "child": child, "n_greater": greater, "n_equal": equal}
    write_table(tmp_path, "valid", {**columns, "logit": [0.0] * len(node), "log_prob": [0.0] * len(node)})
    write_facts(tmp_path, RunFacts({"name": "m"}))
    groups = frontiers(read_runs([tmp_path])[0])
    assert groups is not None and [(g["depth"], g["prefixes"]) for g in groups] == [(None, 2), (0, 1), (1, 1)]
    for u, group in enumerate(groups[1:]):
        rows = np.flatnonzero(np.array(node) == u)
        above, weight = np.array(greater)[rows], counts[np.array(child)[rows]].astype(float)
        points = frontier_of(above, np.array(equal)[rows], weight)
        for by in ("answers", "tokens"):
            want = [best_at(points, q, by) for q in GRID]
            np.testing.assert_allclose(group[by]["mean"], want, rtol=5e-4)  # four digits
        # The oracle: the tokens at or above the |G|-th largest; its precision shares out the places that tie.
        size = len(rows)
        inside = above < size
        border = np.sort(logits[u])[-size]
        room = (size - (logits[u] > border).sum()) / (logits[u] == border).sum()
        hits = sum(1 if logits[u, v] > border else room if logits[u, v] == border else 0 for v in valid[u])
        want = [hits / size, weight[inside].sum() / weight.sum(), inside.mean()]
        assert group["oracle"] == pytest.approx(want, rel=FIVE_DIGITS)


def test_frontiers_are_means_over_prefixes(toy: Path) -> None:
    (run,) = read_runs([toy])
    table, trie = run.table("valid"), run.table("trie")
    assert table is not None and trie is not None
    groups = frontiers(run)
    assert groups is not None
    assert [group["depth"] for group in groups] == [None, 0, 1, 2]
    inner = set(trie["parent"].tolist()) - {-1}
    assert groups[0]["prefixes"] == len(inner)
    at_half, kept, hits = [], [], []
    for node in sorted(inner):
        rows = table["node"] == node
        weight = trie["count"][table["child"][rows]].astype(float)
        at_half.append(best_at(frontier_of(table["n_greater"][rows], table["n_equal"][rows], weight), 0.5))
        inside = table["n_greater"][rows] < rows.sum()
        kept.append(weight[inside].sum() / weight.sum())
        hits.append(inside.sum() / rows.sum())
    half = int(np.flatnonzero(GRID == 0.5)[0])
    assert groups[0]["answers"]["mean"][half] == pytest.approx(np.mean(at_half), rel=5e-4)  # four digits
    assert groups[0]["answers"]["high"][half] == pytest.approx(np.quantile(at_half, 0.75), rel=5e-4)
    order = run.table("order")
    assert order is not None
    want = [order["r_precision"].mean(), np.mean(kept), np.mean(hits)]
    assert groups[0]["oracle"] == pytest.approx(want, rel=FIVE_DIGITS)


def test_a_prefix_without_an_order_is_left_out(toy: Path) -> None:
    (run,) = read_runs([toy])
    table = run.table("valid")
    assert table is not None
    table["n_greater"] = np.where(table["node"] == 0, -1, table["n_greater"])
    groups = frontiers(run)
    assert groups is not None and [group["depth"] for group in groups] == [None, 1, 2]
    table["n_greater"][:] = -1
    assert frontiers(run) is None


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


def test_shape_among_the_valid_needs_a_choice(toy: Path) -> None:
    # A prefix with one valid token has distance 0 and evenness 1 whatever the model does: it would hide the others.
    (run,) = read_runs([toy])
    table, order = run.table("shape"), run.table("order")
    found = measures.shape(run)
    assert table is not None and order is not None and found is not None
    size = dict(zip(order["node"], order["valid"]))
    several = np.array([size[node] > 1 for node in table["node"]])
    assert 0 < several.sum() < len(several)
    assert (found["choices"], found["prefixes"]) == ((order["valid"] > 1).sum(), len(order["node"]))
    at, rows = found["temperatures"].index(1), table["temperature"] == 1.0
    for key, mask in (("kl_valid", rows & several), ("evenness", rows & several), ("valid_mass", rows)):
        want = [table[key][mask].mean(), *np.quantile(table[key][mask], [0.25, 0.75])]
        got = [found["measures"][key][name][at] for name in ("mean", "low", "high")]
        assert got == pytest.approx(want, rel=FIVE_DIGITS), key


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
    found = {item["label"]: item["values"][0] for item in headlines([run], collect([run])[0])}
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
    # Most prefixes stand near the end of an answer, so the beginning is said apart.
    first = f"{100 * order['r_precision'][order['node'] == 0][0]:.1f}".removesuffix(".0")
    assert found["Size oracle"]["sentence"] == f"At the first token alone: {first}%."
    assert found["Order-calibrated prefixes"]["sentence"].startswith(f"{order['order_calibrated'].sum()} of ")
    assert found["Calibration error on text"]["value"] == "7%"


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
