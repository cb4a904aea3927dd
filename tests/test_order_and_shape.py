"""examples/order_and_shape.py: its figures against the tables they come from, its commands, resuming, a quick run."""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
if not (FOLDER / "order_parts").is_dir():
    pytest.skip("examples/ is not shipped with the package", allow_module_level=True)
for package in ("matplotlib", "rich", "typer", "pyarrow", "jinja2", "transformers"):
    pytest.importorskip(package)
sys.path.insert(0, str(FOLDER))

from order_parts import findings, runs, tables  # noqa: E402

sys.path.remove(str(FOLDER))

from fastcalib.report.data import Run, read_runs  # noqa: E402
from fastcalib.runner.model import locate  # noqa: E402
from fastcalib.runner.tables import RunFacts  # noqa: E402

from .report_runs import RULES, TEMPERATURES, write_toy_run  # noqa: E402
from .tiny_model import save_tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_runs([write_toy_run(tmp_path_factory.mktemp("toy") / "run")])[0]


def rows(run: Run, name: str) -> list[dict[str, Any]]:
    table = run.table(name)
    assert table is not None
    return [dict(zip(table, values)) for values in zip(*table.values())]


def harmonic(p: float, r: float) -> float:
    return 0.0 if math.isnan(p) or p + r == 0 else 2 * p * r / (p + r)


def test_the_size_oracle_beside_the_rules(toy: Run) -> None:
    found = findings.findings(toy)
    cells: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for row in rows(toy, "cutoffs"):
        score = harmonic(row["precision"], row["token_recall"])
        precision = 0.0 if math.isnan(row["precision"]) else row["precision"]
        cells.setdefault((row["rule"], row["temperature"]), []).append((precision, row["recall"], score))
    means = {cell: np.mean(values, axis=0) for cell, values in cells.items()}
    oracle = means.pop(("size_oracle", 1.0))
    others = {cell: value for cell, value in means.items() if cell[0] != "size_oracle"}
    assert found["oracle_f1"] == pytest.approx(oracle[2])
    best = max(others, key=lambda cell: others[cell][2])
    assert found["best_rule"] == best
    assert (found["best_rule_precision"], found["best_rule_recall"], found["best_rule_f1"]) == pytest.approx(
        tuple(others[best])
    )
    above = sum(value[0] >= oracle[0] and value[1] >= oracle[1] for value in others.values())
    assert found["settings"] == (len(RULES) - 1) * len(TEMPERATURES)
    assert found["settings_above_oracle"] == above


def test_a_rule_that_does_as_well_as_the_oracle_counts() -> None:
    # By precision and recall of answers: equal, better in one alone, better in both, worse in one.
    points = {"size_oracle": (0.5, 0.5), "a": (0.5, 0.5), "b": (0.5, 0.6), "c": (0.7, 0.8), "d": (0.9, 0.4)}
    precision, recall = np.array(list(points.values())).T
    table = {
        "rule": np.array(list(points)),
        "temperature": np.ones(5),
        "precision": precision,
        "recall": recall,
        "token_recall": recall,
    }
    found = findings.rules(Run(Path(), RunFacts({}), _tables={"cutoffs": table}))
    assert (found["settings_above_oracle"], found["settings"]) == (3, 4)
    assert found["best_rule"] == ("c", 1.0)


def test_depths_and_whole_answers(toy: Run) -> None:
    found = findings.findings(toy)
    order = rows(toy, "order")
    for d, row in enumerate(found["by_depth"]):
        own = [r for r in order if toy.depth_of[r["node"]] == d]
        assert row["prefixes"] == len(own)
        assert row["area"] == pytest.approx(np.mean([r["area"] for r in own]))
    assert found["recall_at_precision_first"] == next(r for r in order if r["node"] == 0)["recall_at_precision"]
    whole = rows(toy, "sequence")
    plain = next(r for r in whole if (r["rule"], r["temperature"]) == ("none", 1.0))
    assert (found["validity"], found["diversity"]) == (plain["validity"], plain["diversity"])
    rules = [r for r in whole if r["rule"] != "size_oracle"]
    valid = max(rules, key=lambda r: r["validity"])
    assert (found["most_validity"], found["diversity_of_most_valid"]) == (valid["validity"], valid["diversity"])
    best = max(rules, key=lambda r: harmonic(r["precision"], r["recall"]))
    assert found["whole_best"] == (best["rule"], best["temperature"])


def test_shape_is_that_of_prefixes_with_a_choice(toy: Run) -> None:
    found = findings.findings(toy)
    several = {r["node"] for r in rows(toy, "order") if r["valid"] > 1}
    own = [r for r in rows(toy, "shape") if r["node"] in several and r["temperature"] == 1.0]
    assert found["choices"] == len(several) == len(own)
    assert findings.at_temperature(found, "evenness", 1.0) == pytest.approx(np.mean([r["evenness"] for r in own]))
    reached = {"temperatures": [0.5, 1.0, 2.0], "evenness": [0.2, 0.9, 0.95], "valid_mass": [0.8, 0.4, 0.1]}
    assert findings.least_temperature(reached, 0.9) == (1.0, 0.4)
    assert findings.least_temperature(reached, 0.99) is None


def test_the_bound_of_the_paper() -> None:
    # Two valid tokens at one step and validity 0.8: diversity at most exp(-0.0748) (the paper's own value).
    limit = math.exp(-0.0748)
    sequence = {
        "rule": np.array(["none", "none", "top_k=2"]),
        "temperature": np.array([0.5, 1.0, 1.0]),
        "validity": np.array([0.8, 0.8, 0.8]),
        "diversity": np.array([limit - 1e-3, limit + 1e-3, math.nan]),
    }
    order = {"node": np.array([0]), "valid": np.array([2])}
    trie = {"node": np.array([0, 1, 2]), "depth": np.array([0, 1, 1])}
    run = Run(Path(), RunFacts({}), _tables={"order": order, "sequence": sequence, "trie": trie})
    found = findings.bound(run)
    assert found is not None and (found["settings"], found["above"]) == (2, 1)
    assert found["tightest_bound"] == pytest.approx(limit, abs=5e-5)  # the paper gives four digits
    assert found["nearest"]["rule"] == ["none", 1.0]
    uneven = {"node": np.array([1, 2]), "valid": np.array([2, 3])}
    assert findings.bound(Run(Path(), RunFacts({}), _tables={**run._tables, "order": uneven})) is None


def test_precision_and_recall_that_are_not_there() -> None:
    f1 = findings.f1(np.array([0.5, 0.0, np.nan, 1.0]), np.array([0.25, 0.0, 0.0, 1.0]))
    assert f1.tolist() == [1 / 3, 0.0, 0.0, 1.0]


def test_commands_say_what_the_runs_are(tmp_path: Path) -> None:
    every = runs.plans(tmp_path, list(runs.TASKS))
    assert len({plan.out for plan in every}) == len(every) == len(runs.TASKS) * len(runs.WAYS) == 18
    plan = next(plan for plan in every if plan.out.name == "digits-sum-3-line")
    words = shlex.split(plan.command)
    options = plan.options(None)
    assert words[:2] == ["fastcalib", "diagnose"]
    given = dict(zip(words[2::2], words[3::2]))
    assert (given["--task"], given["--digits"], given["--style"]) == (options.task, "3", options.style)
    assert given["--end-token"] == "\\n" and options.end_token == "\n"  # the command takes it as a shell passes it
    assert options.build_task().name == "digits-sum 3 = 9"
    assert findings.names(["us-states", "digits-1", "digits-3", "digits-sum-2"]) == [
        "US states", "1 digit", "3 digits", "2 digits, sum 9"
    ]  # fmt: skip


def test_a_quick_run_and_the_same_again(tmp_path: Path) -> None:
    from .test_examples import invoke

    model = save_tiny_model(tmp_path / "model")
    arguments = ["--out", str(tmp_path / "out"), "--task", "digits-1", "--model", str(model), "--no-reports"]
    assert "0 of 3 runs came from an earlier time" in invoke("order_and_shape", *arguments)
    out = tmp_path / "out"
    assert "3 of 3 runs came from an earlier time" in invoke("order_and_shape", *arguments)
    assert (out / "order-and-shape.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written = json.loads((out / "tables.json").read_text())
    assert [(one["task"], one["way"]) for one in written["runs"]] == [("digits-1", way.name) for way in runs.WAYS]
    with (out / "depth.csv").open() as file:
        depths = list(csv.DictReader(file))
    assert [row["depth"] for row in depths if row["way"] == "line"] == ["0", "1"]
    text = (out / "tables.md").read_text()
    for one in written["runs"]:
        assert f"| 1 digit | {one['way']} |" in text
        assert tables.share(one["recall_at_precision_first"]) in text
    # Another way of asking is another run.
    plan = runs.plans(out, ["digits-1"])[0]
    source = locate(model)
    assert runs.complete(plan, source, str(model))
    other = runs.RunPlan("digits-1", runs.WAYS[1], plan.out)
    assert not runs.complete(other, source, str(model))
