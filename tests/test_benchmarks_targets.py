"""The benchmark's targets: gates, what arithmetic and memory allow, and the verdict of each row."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
if not (FOLDER / "bench").is_dir():
    pytest.skip("benchmarks/ is not shipped with the package", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

from bench import ceilings, targets  # noqa: E402

sys.path.remove(str(FOLDER))


def test_targets_have_their_eighteen_rows():
    rows = targets.table(targets.parts())
    assert [r["row"] for r in rows] == list(range(1, 19))
    assert all(r["parts"] for r in rows)
    assert [r["verdict"] for r in rows] == ["not available"] * 18
    assert len([line for line in targets.format_table(rows).splitlines() if line[:2].strip().isdigit()]) == 18


@pytest.mark.parametrize(
    "values, verdict",
    [
        ((12.0, 8.0), "pass"),
        ((30.0, 6.0), "pass, stretch"),
        ((30.0, 3.0), "FAIL"),
        ((30.0, None), "not available"),
        ((3.0, None), "FAIL"),
    ],
)
def test_verdict_of_a_row_with_two_gates(values, verdict):
    row = [p for p in targets.parts() if p.row == 3]
    for part, value in zip(row, values):
        part.value = value
    if verdict == "pass":
        row[0].stretch = 25
    assert targets.verdict(row) == verdict


@pytest.mark.parametrize(
    "value, allowed, verdict",
    [
        (0.85, 0.5, "pass"),  # met, whatever the arithmetic
        (0.41, 0.5, "at the arithmetic limit"),  # 0.8 of what is possible
        (0.39, 0.5, "FAIL"),
        (0.79, 0.9, "FAIL"),  # the gate was within reach
    ],
)
def test_a_gate_beyond_the_arithmetic_is_held_to_what_that_allows(value, allowed, verdict):
    row = [p for p in targets.parts() if p.row == 1]
    row[0].value, row[0].allowed = value, allowed
    assert targets.verdict(row) == verdict
    shown = targets.format_table([r for r in targets.table(row) if r["row"] == 1])
    assert f"arithmetic alone: {allowed:.2f}" in shown


@pytest.mark.parametrize(
    "value, allowed, verdict",
    [
        (1.75, 2.0, "pass"),
        (1.65, 2.0, "FAIL"),  # reading takes half of the peer's time: the gate was within reach
        (0.97, 1.0, "at the memory limit"),  # the peer reads at full speed, and so do we
        (0.94, 1.0, "FAIL"),
    ],
)
def test_a_peer_at_the_speed_of_the_read_cannot_be_beaten_by_more(value, allowed, verdict):
    row = [p for p in targets.parts() if p.row == 13]
    row[0].value, row[1].value, row[1].allowed = 0.97, value, allowed
    assert targets.verdict(row) == verdict
    shown = targets.format_table([r for r in targets.table(row) if r["row"] == 13])
    assert f"memory alone: {allowed:.2f}" in shown


@pytest.mark.parametrize("kind", ["statistics", "logsumexp", "gradient", "eight powers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_ceilings_compute_something(kind, dtype):
    if ceilings.find_compiler() is None:
        pytest.skip("no C++ compiler")
    if kind == "eight powers" and dtype != torch.float32:
        with pytest.raises(ceilings.CeilingsUnavailable, match="float32"):
            ceilings.Ceilings(1).arithmetic(torch.empty(4, 2048, dtype=dtype), kind)
        return
    call = ceilings.Ceilings(1).arithmetic(torch.empty(4, 2048, dtype=dtype), kind)
    assert call() != 0 and call() == call()


def test_at_most_gates_point_the_other_way():
    row = [p for p in targets.parts() if p.row == 7]
    for value, verdict in ((0.99, "pass, stretch"), (1.05, "pass"), (1.2, "FAIL")):
        for part in row:
            part.value = value
        assert targets.verdict(row) == verdict


def test_a_value_that_cannot_be_had_says_why():
    filled = targets.parts()

    def value() -> float:
        raise KeyError("compile K=1: left out")

    targets.fill(filled, 3, "against torch.compile", value)
    part = next(p for p in filled if p.row == 3 and p.label == "against torch.compile")
    assert part.value is None and part.why == "not available: compile K=1: left out"
