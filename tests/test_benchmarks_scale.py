"""The benchmark of order, cutoffs and shape: all competitors do the same work, and the table says what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if not (FOLDER / "bench").is_dir():
    pytest.skip("benchmarks/ is not shipped with the package", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

from bench import diagnostics, report, scale, warpers  # noqa: E402
from bench.problem import max_error  # noqa: E402

from .test_benchmarks import load_run  # noqa: E402

sys.path.remove(str(FOLDER))


def test_plain_diagnostics_are_those_of_the_library():
    """What is compared is the same work: every number of one is a number of the other."""
    logits = torch.randn(5, 3_000, dtype=torch.float64) * 3
    factories, reference = diagnostics.competitors(logits)
    want = reference(5)
    for name in ("fastcalib", "fastcalib, three calls"):
        got = factories[name]()()
        assert set(got) == set(want), name
        assert max_error(got, want) < 6e-8, name  # shares of counts, which the plain one divides in float32
    assert max_error(diagnostics.plain(logits.float(), diagnostics.valid_tokens(logits)), want) < 1e-3


def test_warpers_do_the_same_work():
    if why := warpers.why_not():
        pytest.skip(why)
    logits = torch.randn(3, 700, dtype=torch.float64) * 3
    ids = diagnostics.valid_tokens(logits)
    got, want = warpers.by_warpers(logits, ids), diagnostics.plain(logits, ids)
    assert set(got) == set(want)
    assert max_error(got, want) < 1e-7  # their probabilities go through float32 shares


def test_scale_in_small():
    found = scale.run(5, 400, 2, torch.float32, eager_rows=(1, 2), rounds=1, warper_rows=1)
    assert found["prefixes"] == 5 and found["chunk"] == 1  # the last one is measured, here of one row
    assert scale.ratio(found) > 0 and found["eager"] == "eager, 1 rows"
    assert "5 prefixes" in scale.describe(found)
    facts = {"cpu": "a CPU", "threads": 2, "date": "today", "commit": "abc"}
    lines = scale.table([found | facts, found | facts | {"extra_mb": None, "warpers_ms": None, "eager_extra_mb": None}])
    head, rule, *rows = [line.count("|") for line in lines if line.startswith("|")]
    assert head == rule == rows[0] == rows[1] and "fastcalib abc" in "\n".join(lines)
    assert report.TITLES["diagnostics"]


def test_results_are_counted_once():
    x = torch.zeros(10)
    assert scale.results_bytes((x, (x[2:], x.view(2, 5)), torch.zeros(3, dtype=torch.int64), None)) == 64


def test_documents_of_several_runs_become_one(tmp_path):
    document = {"rows": [1], "targets": None, "scaling": [2], "overhead": None}
    for name, other in (("a", {}), ("b", {"rows": [3], "scale": [4], "scaling": None})):
        (tmp_path / name).write_text(json.dumps(document | other))
    merged = load_run().read_earlier([str(tmp_path / "a"), str(tmp_path / "b")])
    assert merged == {"rows": [1, 3], "targets": None, "scaling": [2], "overhead": None, "scale": [4]}
