"""The examples: their exact precision and recall against brute force, their formulas, resuming, and quick runs."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples"
if not (FOLDER / "coverage_parts").is_dir():
    pytest.skip("examples/ is not shipped with the package", allow_module_level=True)
for package in ("matplotlib", "rich", "typer"):
    pytest.importorskip(package)
sys.path.insert(0, str(FOLDER))

import command_line  # noqa: E402
from coverage_parts import exact, one_token, report, training  # noqa: E402
from coverage_parts.losses import GAMMA, LOSSES  # noqa: E402
from coverage_parts.task import Size, Transformer, random_language, sequence_probabilities  # noqa: E402

sys.path.remove(str(FOLDER))

from fastcalib.errors import UserError  # noqa: E402

TINY = Size(vocabulary=3, length=3, valid=2, width=8, warm_up=2, steps=2, batch=4)


def load(name: str) -> ModuleType:
    """An example as a module, under a name of its own: `coverage` is that of a package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def invoke(name: str, *arguments: str) -> str:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(load(name).run)
    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_language_is_a_distribution_over_distinct_sequences():
    size = Size()
    language = random_language(size, 3)
    sequences = language.sequences
    assert sequences.shape == (24 * 4**4, 5) and sequences.unique(dim=0).shape == sequences.shape
    # Only rounding: 6,144 float64 products of five factors.
    assert language.probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    # After each pair exactly four tokens, with the weights 1, 1/2, 1/3, 1/4, wherever in the sequence the pair is.
    following: dict[tuple[int, int], dict[int, float]] = {}
    prefix: dict[tuple[int, ...], float] = {}
    for sequence, p in zip(sequences.tolist(), language.probabilities.tolist()):
        for end in range(6):
            prefix[tuple(sequence[:end])] = prefix.get(tuple(sequence[:end]), 0.0) + p
    for sequence, p in prefix.items():
        if len(sequence) >= 3:
            given = p / prefix[sequence[:-1]]
            known = following.setdefault(sequence[-3:-1], {}).setdefault(sequence[-1], given)
            assert given == pytest.approx(known, rel=1e-9)
    for shares in following.values():
        assert sorted(shares.values(), reverse=True) == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], rel=1e-9)


def brute_force(model: torch.nn.Module, temperature: float) -> dict[tuple[int, ...], float]:
    """Q of every sequence there is, valid or not: one prefix at a time, plain softmax."""
    q = {}
    for sequence in itertools.product(range(TINY.vocabulary), repeat=TINY.length):
        q[sequence] = 1.0
        for i, token in enumerate(sequence):
            seen = (*sequence[:i], *[0] * (TINY.length - i))  # a causal model does not look at what follows
            logits = model(torch.tensor([seen]))[0, i]
            q[sequence] *= (logits / temperature).softmax(-1)[token].item()
    return q


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_sequence_measures_equal_brute_force_over_the_whole_space(temperature):
    language = random_language(TINY, 1)
    model = Transformer(TINY).double()
    for parameter in model.parameters():  # far from uniform, so that both sides of every minimum occur
        torch.nn.init.normal_(parameter, std=0.7)
    everything = brute_force(model, temperature)
    assert len(everything) == 27 and sum(everything.values()) == pytest.approx(1, abs=1e-12)
    p = dict(zip(map(tuple, language.sequences.tolist()), language.probabilities.tolist()))
    (q,) = sequence_probabilities(model, language.sequences, [temperature])
    lam = torch.tensor([1e-4, 0.05, 0.3, 1.0, 2.0, 40.0, 1e6], dtype=torch.float64)
    alpha, beta = exact.alpha_beta(language.probabilities, q, lam)
    for i, value in enumerate(lam.tolist()):
        expected = sum(min(value * p.get(s, 0.0), everything[s]) for s in everything)
        # float64 throughout; the orders of summation differ.
        assert alpha[i].item() == pytest.approx(expected, rel=1e-11)
        assert beta[i].item() == pytest.approx(expected / value, rel=1e-11)
    assert exact.precision(q) == pytest.approx(sum(everything[s] for s in p), rel=1e-11)
    assert exact.recall(language.probabilities, q) == pytest.approx(
        sum(p[s] for s in p if everything[s] >= 0.1 * p[s]), abs=1e-12
    )
    assert exact.soft_recall(language.probabilities, q) == pytest.approx(
        sum(min(p[s], 10 * everything[s]) for s in p), rel=1e-11
    )


def test_ends_of_the_curve_ties_and_areas():
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    far = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64)
    alpha, beta = exact.alpha_beta(p, 0.8 * p, far)  # all ratios tie
    assert alpha.tolist() == pytest.approx([1e-9, 0.8, 0.8], rel=1e-12)
    assert beta.tolist() == pytest.approx([1.0, 0.8, 0.8e-9], rel=1e-12)
    for share in (1.0, 0.8, 0.3):
        # A rectangle share x 1 (the curve of share P). The midpoint rule over angles of 1.6e-3 errs by its square.
        assert exact.curve_area(*exact.alpha_beta(p, share * p, exact.angles())) == pytest.approx(share, abs=1e-5)


def test_recall_at_precision_and_area_of_the_plane():
    points = [(1.0, 0.2), (0.9, 0.5), (0.7, 0.7), (0.6, 0.6)]
    assert exact.recall_at_precision(points, 0.8) == pytest.approx(0.6)
    assert exact.recall_at_precision(points, 0.95) == pytest.approx(0.35)
    assert exact.recall_at_precision([(0.7, 0.9)], 0.8) == 0
    assert exact.plane_area(points) == pytest.approx(1.0 * 0.2 + 0.9 * 0.3 + 0.7 * 0.2)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.3])
@pytest.mark.parametrize("lam", [0.2, 1.0, 5.0])
def test_slopes_in_the_temperature_equal_finite_differences(temperature, lam):
    """The two formulas of the temperature theory, on arbitrary P and Q rather than those of the example."""
    p = torch.rand(7, dtype=torch.float64).softmax(-1)
    q = (2 * torch.randn(20, dtype=torch.float64)).softmax(-1)
    precision, recall = one_token.slopes_by_differences(p, q, lam, temperature)
    # Central differences with step 1e-5: truncation 1e-10 times a third derivative, rounding 1e-16 / 1e-5.
    assert one_token.precision_slope(q, 7, temperature) == pytest.approx(precision, rel=1e-6, abs=1e-8)
    assert one_token.recall_slope(p, q, lam, temperature) == pytest.approx(recall, rel=1e-6, abs=1e-8)


def test_signs_of_the_slopes():
    """A model whose support is likelier than the rest loses precision as T rises, and with an exact head recall too."""
    p = one_token.zipf(10)
    q = one_token.with_wrong_tail(p, 100, 0.2)
    assert q.sum().item() == pytest.approx(1, abs=1e-12)
    assert one_token.precision_slope(q, 10, 1.0) < 0
    assert one_token.recall_slope(p, q, 1.0, 1.0) < 0  # every token of the support is short of lam p
    unlikely = one_token.with_wrong_tail(p, 12, 0.95)  # here the support is what the model finds surprising
    assert one_token.precision_slope(unlikely, 10, 1.0) > 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_even_head_in_closed_form(temperature):
    logits = torch.cat([torch.full((5,), 3.0, dtype=torch.float64), torch.zeros(45, dtype=torch.float64)])
    at = one_token.tempered(logits.softmax(-1), temperature)
    precision = one_token.even_head(5, 50, 3.0, temperature)
    assert at[:5].sum().item() == pytest.approx(precision, rel=1e-12)
    p = torch.full((5,), 0.2, dtype=torch.float64)
    lam = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64)
    alpha, _ = exact.alpha_beta(p, at[:5], lam)
    assert alpha.tolist() == pytest.approx([min(v, precision) for v in lam.tolist()], rel=1e-12)


def test_expected_losses_of_the_small_softmax():
    model = one_token.random_softmax(6, 20, 4, seed=0)
    theta = torch.randn(4, dtype=torch.float64)
    log_q = model.probabilities(theta)[:6].log()
    assert model.expected_loss("nll", theta).item() == pytest.approx(-(model.p * log_q).sum().item(), rel=1e-12)
    weight = log_q.exp() / (GAMMA + (1 - GAMMA) * log_q.exp())
    expected = -(model.p * weight * log_q).sum().item()
    assert model.expected_loss("tailr", theta).item() == pytest.approx(expected, rel=1e-12)
    # trunc drops the most surprising 0.4 of P: the tokens kept weigh no more than 0.6, and one more would be too many.
    order = (-log_q).argsort()
    kept = [int(i) for n, i in enumerate(order) if model.p[order[: n + 1]].sum() < 0.6]
    expected = -(model.p[kept] * log_q[kept]).sum().item()
    assert 0 < len(kept) < 6
    assert model.expected_loss("trunc 0.4", theta).item() == pytest.approx(expected, rel=1e-12)
    for name in LOSSES:
        assert math.isfinite(model.expected_loss(name, theta).item())
    # At the optimum of nll the expected features under Q are those under P.
    best, gradient = model.optimum("nll", torch.zeros(4, dtype=torch.float64), 300)
    moments = model.features.T @ model.probabilities(best) - model.features[:6].T @ model.p
    assert gradient < 1e-6 and moments.abs().max() < 1e-6
    direct, _ = model.optimum("alpha 1", best, 50)
    overlap = [torch.minimum(model.p, model.probabilities(at)[:6]).sum().item() for at in (best, direct)]
    assert overlap[1] > overlap[0]


def test_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed in the third of four, a second run trains only the third and the fourth, and a third run nothing."""
    calls: list[str] = []
    trained = training.train

    def counting(model, loss, *rest, decay, **keywords):
        if decay:  # not the warm-up
            calls.append(type(loss).__name__)
            if len(calls) == 3:
                raise KeyboardInterrupt
        trained(model, loss, *rest, decay=decay, **keywords)

    def all_results() -> tuple[list[dict], list[bool]]:
        there: list[bool] = []
        return list(training.results(["nll", "tailr"], [0, 1], TINY, tmp_path, there.append)), there

    monkeypatch.setattr(training, "train", counting)
    with pytest.raises(KeyboardInterrupt):
        all_results()
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(files) == ["nll-seed0.json", "tailr-seed0.json"]  # nothing half-written
    first, there = all_results()
    assert there == [True, True, False, False] and calls[3:] == ["NLLLoss", "TailrLoss"]
    assert {name: next(tmp_path.rglob(name)).read_bytes() for name in files} == files
    second, there = all_results()
    assert there == [True] * 4 and second == first and len(calls) == 5
    # A damaged file, or one made with other numbers of the loss, is work to do again, with the same answer.
    next(tmp_path.rglob("nll-seed1.json")).write_text("{", encoding="utf-8")
    other = next(tmp_path.rglob("tailr-seed0.json"))
    other.write_text(other.read_text(encoding="utf-8").replace("gamma=0.1", "gamma=0.2"), encoding="utf-8")
    third, there = all_results()
    assert there == [True, False, False, True] and third == first


def planted(loss: str, seed: int, recall: float, alpha: float = 0.5) -> dict:
    rows = [
        {"temperature": 0.5, "precision": 0.9, "recall": recall, "soft_recall": recall, "curve_area": 0.2},
        {"temperature": 1.0, "precision": 0.7, "recall": recall + 0.2, "soft_recall": recall, "curve_area": 0.4},
    ]
    at_one = {"precision": 0.7, "recall": recall + 0.2, "alpha": {"1.0": alpha}}
    return {"loss": loss, "seed": seed, "entropy": 1.0, "at_one": at_one, "temperatures": rows}


def test_table_holds_means_spread_and_differences_by_seed(tmp_path):
    found = [planted("nll", 0, 0.1), planted("nll", 1, 0.5), planted("gem", 1, 0.7, 0.6), planted("gem", 0, 0.2, 0.7)]
    rows = report.table(found)
    assert [row["loss"] for row in rows] == ["nll", "gem"]
    gem = rows[1]["recall_at_level"]
    assert gem["values"] == pytest.approx([0.3, 0.8])  # in the order of the seeds, half-way between temperatures
    assert gem["mean"] == pytest.approx(0.55) and gem["sd"] == pytest.approx(math.sqrt(0.125))
    assert gem["minus_nll"]["values"] == pytest.approx([0.1, 0.2])
    assert rows[1]["best_temperature"]["mean"] == 1.0 and rows[1]["curve_area"]["mean"] == pytest.approx(0.4)
    report.write(rows, {"size": {}}, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["losses"] == rows
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["loss"], line["seed"]) for line in lines] == [("nll", "0"), ("nll", "1"), ("gem", "0"), ("gem", "1")]
    assert float(lines[3]["recall_at_level"]) == pytest.approx(0.8)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| gem | 0.700 ± 0.000 | 0.650 ± 0.354 | 0.550 ± 0.354 | +0.150 ± 0.071 | 2 of 2 |" in text
    assert "| gem | +0.150 ± 0.071 |" in text.split("alpha_lam")[1]


def test_coverage_quick(tmp_path):
    output = invoke("coverage", "--quick", "--out", str(tmp_path))
    assert "0 of 2 results came from an earlier run" in output
    losses = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["losses"]
    assert [row["loss"] for row in losses] == ["nll", "tailr"]
    assert all(0 <= row[name]["mean"] <= 1 for row in losses for name in report.MEASURES if "temp" not in name)
    assert (tmp_path / "coverage.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "table.csv").read_bytes()
    assert "2 of 2 results came from an earlier run" in invoke("coverage", "--quick", "--out", str(tmp_path))
    assert (tmp_path / "table.csv").read_bytes() == before


def test_coverage_names_an_unknown_loss(tmp_path):
    with pytest.raises(AssertionError, match="unknown 'nlll'"):
        invoke("coverage", "--loss", "nlll", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (KeyboardInterrupt(), "Stopped. The same command goes on from there.", 130),
        (UserError("no such model: take another"), "no such model: take another", 1),
    ],
)
def test_commands_end_in_a_sentence(monkeypatch, capsys, error, words, code):
    def run(out: Path = Path("here")) -> None:
        assert out == Path("there")
        raise error

    monkeypatch.setattr(sys, "argv", ["example", "--out", "there"])
    with pytest.raises(SystemExit) as end:
        command_line.command(run)
    assert end.value.code == code and capsys.readouterr().err.strip() == words


def test_temperature_quick(tmp_path):
    invoke("temperature", "--quick", "--out", str(tmp_path))
    found = json.loads((tmp_path / "temperature.json").read_text(encoding="utf-8"))
    assert [row["loss"] for row in found["optima"]] == ["nll", "trunc 0.4"]
    for case in found["cases"]:
        for row in case["temperatures"]:
            for name in ("precision_slope", "recall_slope"):
                assert row[name] == pytest.approx(row[f"{name}_by_differences"], rel=1e-5, abs=1e-7)
        precisions = [row["precision"] for row in case["temperatures"]]
        assert precisions == sorted(precisions, reverse=True)
    assert (tmp_path / "temperature.png").read_bytes()[:4] == b"\x89PNG"
    assert "| exact head | 1.3296 |" in (tmp_path / "table.md").read_text(encoding="utf-8")
