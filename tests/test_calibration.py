"""CalibrationState against brute force in float64 and against torchmetrics; the temperature fit against scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import multiclass_calibration_error

import fastcalib
from fastcalib.calibration import (
    CalibrationState,
    NLLSums,
    fit_temperature,
    fit_temperature_from,
    interpolate_temperature,
)
from fastcalib.calibration.bins import cell_index

TEMPERATURES = [0.5, 1.0, 2.0]


def make(n: int = 600, vocab: int = 40, seed: int = 0, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 logits (only our own arithmetic is tested) and targets drawn at temperature 1.7: overconfident."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=g, dtype=torch.float64) * scale
    target = torch.multinomial((logits / 1.7).softmax(-1), 1, generator=g).squeeze(-1)
    return logits, target


def state_of(
    logits: torch.Tensor, target: torch.Tensor, temperatures: list[float] = TEMPERATURES, **kwargs: int
) -> CalibrationState:
    state = CalibrationState(temperatures, **kwargs)
    state.update(fastcalib.statistics(logits, target, temperatures, ranks=True), target)
    return state


def same(a: CalibrationState, b: CalibrationState) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def brute_ece(confidence: np.ndarray, hit: np.ndarray, n_bins: int) -> tuple[float, float, float]:
    """ECE, MCE, RMSCE by a loop over bins (low, high], the first one closed."""
    gaps, shares = [], []
    for i in range(n_bins):
        low, high = i / n_bins, (i + 1) / n_bins
        inside = (confidence > low) & (confidence <= high) | ((confidence == 0) & (i == 0))
        if inside.any():
            gaps.append(abs(hit[inside].mean() - confidence[inside].mean()))
            shares.append(inside.mean())
    g, w = np.array(gaps), np.array(shares)
    return float((w * g).sum()), float(g.max()), float(np.sqrt((w * g * g).sum()))


def test_means_are_those_of_plain_float64_softmax():
    logits, target = make()
    state = state_of(logits, target)
    for k, t in enumerate(TEMPERATURES):
        p = (logits / t).softmax(-1)
        p_y = p.gather(-1, target[:, None]).squeeze(-1)
        onehot = torch.nn.functional.one_hot(target, logits.shape[-1])
        expected = {
            "nll": -p_y.log().mean(),
            "perplexity": (-p_y.log().mean()).exp(),
            "entropy": -(p * p.log()).sum(-1).mean(),
            "brier": ((p - onehot) ** 2).sum(-1).mean(),
            "accuracy": (p.argmax(-1) == target).double().mean(),
        }
        for name, value in expected.items():
            assert getattr(state, name)[k].item() == pytest.approx(value.item(), abs=1e-7, rel=1e-7), (name, t)
    assert torch.allclose(state.entropy_gap, state.entropy - state.nll, atol=1e-12)


@pytest.mark.parametrize("n_bins", [1, 10, 15, 30])
def test_calibration_errors_equal_brute_force(n_bins):
    logits, target = make()
    state = state_of(logits, target)
    for k, t in enumerate(TEMPERATURES):
        confidence, top = (logits / t).softmax(-1).max(-1)
        ece, mce, rmsce = brute_ece(confidence.numpy(), (top == target).numpy(), n_bins)
        assert state.ece(n_bins)[k].item() == pytest.approx(ece, abs=1e-7)
        assert state.mce(n_bins)[k].item() == pytest.approx(mce, abs=1e-7)
        assert state.rmsce(n_bins)[k].item() == pytest.approx(rmsce, abs=1e-7)


@pytest.mark.parametrize("norm, method", [("l1", "ece"), ("max", "mce"), ("l2", "rmsce")])
def test_calibration_errors_equal_torchmetrics(norm, method):
    logits, target = make(seed=3)
    probs = logits.softmax(-1)
    theirs = multiclass_calibration_error(probs, target, num_classes=logits.shape[-1], n_bins=15, norm=norm)
    ours = getattr(state_of(logits, target, [1.0]), method)(15)
    assert ours.item() == pytest.approx(theirs.item(), abs=2e-6)  # they compute in float32


def test_confidence_of_exactly_zero_one_and_edges():
    assert cell_index(torch.tensor([0.0, 0.2, 0.25, 0.5, 0.75, 1.0]), 4).tolist() == [0, 0, 0, 1, 2, 3]
    # torchmetrics#3510, #1646: a confidence of exactly 1 fell into no bin
    logits = torch.tensor([[100.0, -100.0], [100.0, -100.0]])
    state = state_of(logits, torch.tensor([0, 1]), [1.0])
    diagram = state.reliability(15)
    assert diagram.count[0].tolist() == [0] * 14 + [2]
    assert diagram.confidence[0, -1] == 1.0 and diagram.accuracy[0, -1] == 0.5
    assert state.ece().item() == state.mce().item() == 0.5


def test_one_over_bins_sits_in_the_bin_it_closes():
    """Uniform over v tokens: confidence 1/v, exact in float32, is the right edge of the first of v bins."""
    for v in (2, 4, 16):
        state = state_of(torch.zeros(1, v), torch.tensor([0]), [1.0])
        assert state.reliability(v).count[0].nonzero().item() == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 120), scale=st.floats(0.1, 30.0), n_bins=st.integers(1, 20))
def test_adaptive_ece_is_within_its_bound(seed, n, scale, n_bins):
    logits, target = make(n, 6, seed, scale)
    value, bound = state_of(logits, target, [1.0], cells=60).adaptive_ece(n_bins)
    confidence, top = logits.softmax(-1).max(-1)
    order = confidence.argsort()
    gap = ((top == target).double() - confidence)[order]
    edges = [m * n // n_bins for m in range(n_bins + 1)]
    exact = sum(gap[a:b].sum().abs().item() for a, b in itertools.pairwise(edges)) / n
    assert abs(value.item() - exact) <= bound.item() + 1e-6
    if n_bins == 1:
        assert bound.item() == 0.0 and value.item() == pytest.approx(exact, abs=1e-6)


def test_adaptive_ece_bound_is_useful():
    logits, target = make(4000, 40)
    value, bound = state_of(logits, target, [1.0]).adaptive_ece(15)
    assert bound.item() < 0.02 and value.item() > 5 * bound.item()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 90), min_size=2, max_size=2))
def test_merge_is_associative_and_order_free_bit_for_bit(seed, cuts):
    logits, target = make(90, 12, seed)
    logits = logits.float()
    a, b = sorted(cuts)
    x, y, z = (state_of(logits[i:j], target[i:j]) for i, j in ((0, a), (a, b), (b, 90)))
    whole = state_of(logits, target)
    assert same(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert same(x.merge(y).merge(z), whole)
    assert same(z.merge(x).merge(y), whole)
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(seed))
    assert same(state_of(logits[shuffled], target[shuffled]), whole)


def test_merge_leaves_its_arguments_alone_and_refuses_strangers():
    logits, target = make(50)
    a, b = state_of(logits, target), state_of(logits, target)
    merged = a.merge(b)
    assert same(a, b) and merged.n_tokens == 100
    with pytest.raises(ValueError, match="temperatures"):
        a.merge(CalibrationState([1.0]))
    with pytest.raises(ValueError, match="cells"):
        a.merge(CalibrationState(TEMPERATURES, cells=60))


def test_state_dict_round_trip_and_select():
    state = state_of(*make(80))
    assert same(CalibrationState.from_state_dict(state.state_dict()), state)
    with pytest.raises(ValueError, match="sum_nll"):
        CalibrationState.from_state_dict({k: v for k, v in state.state_dict().items() if k != "sum_nll"})
    some = state.select([2, 0])
    assert some.temperatures == (2.0, 0.5)
    assert torch.equal(some.ece(), state.ece()[[2, 0]]) and some.n_tokens == state.n_tokens


def test_ignored_and_undefined_tokens_are_left_out_and_counted():
    logits, target = make(30)
    logits, target = logits.clone(), target.clone()
    target[3] = -100
    logits[5] = -torch.inf
    logits[7, 2] = torch.nan
    keep = [i for i in range(30) if i not in (3, 5, 7)]
    state, expected = state_of(logits, target), state_of(logits[keep], target[keep])
    assert state.n_undefined == 2 and state.n_tokens == 27
    expected.n_undefined += 2
    assert same(state, expected)


def test_everything_ignored_is_nan_and_no_bin_is_touched():
    state = state_of(torch.randn(3, 5), torch.full((3,), -100))
    assert state.n_tokens == 0 and state.cell_count.sum() == 0 and state.cell_confidence.sum() == 0
    assert state.nll.isnan().all() and state.ece().isnan().all() and state.mce().isnan().all()
    assert state.adaptive_ece().value.isnan().all()


def test_target_rank_histogram_and_ties():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1, -2, -3, -4]]).repeat(5, 1)
    logits[4] = 0.0
    state = state_of(logits, torch.tensor([0, 1, 3, 9, 2]), [1.0])
    # ranks 1, 2, 4, 10, and 1 (all equal: none is greater)
    assert state.rank_count[:6].tolist() == [2, 1, 1, 0, 1, 0] and state.rank_count.sum() == 5
    assert state.ties == 1
    assert [state.top_k_accuracy(k).item() for k in (1, 2, 4, 8, 16)] == [0.4, 0.6, 0.8, 0.8, 1.0]
    with pytest.raises(ValueError, match="power of two"):
        state.top_k_accuracy(3)


def test_float_temperature_and_any_leading_dimensions():
    logits, target = make(24)
    flat = CalibrationState([1.0])
    flat.update(fastcalib.statistics(logits, target, [1.0]), target)
    shaped = CalibrationState(1.0)
    shaped.update(fastcalib.statistics(logits.view(2, 3, 4, -1), target.view(2, 3, 4)), target.view(2, 3, 4))
    assert same(flat, shaped)


def test_update_says_what_is_wrong():
    logits, target = make(4)
    state = CalibrationState(TEMPERATURES)
    with pytest.raises(ValueError, match="no log_prob"):
        state.update(fastcalib.statistics(logits, None, TEMPERATURES), target)
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        state.update(fastcalib.statistics(logits, target, [1.0, 2.0]), target)
    with pytest.raises(ValueError, match="positive"):
        CalibrationState([1.0, 0.0])
    with pytest.raises(ValueError, match="must divide"):
        state.ece(7)


def scipy_fit(logits: torch.Tensor, target: torch.Tensor) -> float:
    def nll(log_t: float) -> float:
        return torch.nn.functional.cross_entropy(logits / math.exp(log_t), target).item()

    found = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    return math.exp(found.x)


@pytest.mark.parametrize("scale, offset", [(0.3, 0.0), (2.0, 0.0), (2.0, 1e4), (20.0, 0.0)])
def test_fit_temperature_finds_what_scipy_finds(scale, offset):
    logits, target = make(2000, 30, seed=1)
    factor = scale / 2.0
    fit = fit_temperature(logits * factor + offset, target)
    assert fit.temperature == pytest.approx(scipy_fit(logits * factor, target), rel=1e-5)
    assert fit.converged and not fit.at_bound and fit.passes <= 4
    at_fit = torch.nn.functional.cross_entropy(logits * factor / fit.temperature, target).item()
    assert fit.nll == pytest.approx(at_fit, abs=1e-9)
    assert fit.nll_before == pytest.approx(torch.nn.functional.cross_entropy(logits * factor, target).item(), abs=1e-9)


def test_fit_temperature_leaves_ignored_tokens_and_padding_out():
    logits, target = make(500, 30)
    expected = fit_temperature(logits, target).temperature
    padded = torch.cat([logits, torch.full((500, 3), 50.0, dtype=logits.dtype)], -1)
    padded = torch.cat([padded, padded[:50] * 3])
    with_ignored = torch.cat([target, torch.full((50,), -100)])
    assert fit_temperature(padded, with_ignored, vocab_size=30).temperature == pytest.approx(expected, rel=1e-9)


def test_sums_leave_out_a_padding_id_that_the_statistics_did_not_know_of():
    logits, target = make(40, 8)
    kept = target != 0
    stats = fastcalib.statistics(logits, target, TEMPERATURES)
    sums = NLLSums.from_statistics(stats, target, TEMPERATURES, ignore_index=0)
    some = fastcalib.statistics(logits[kept], target[kept], TEMPERATURES)
    expected = NLLSums.from_statistics(some, target[kept], TEMPERATURES)
    assert 0 < kept.sum() < 40
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(sums, expected))


def test_fit_reports_the_bound():
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0]])
    always_right = fit_temperature(logits, torch.tensor([0, 0]))
    assert always_right.at_bound and always_right.temperature == pytest.approx(0.05)
    always_wrong = fit_temperature(logits, torch.tensor([1, 1]), bounds=(0.2, 8.0))
    assert always_wrong.at_bound and always_wrong.temperature == pytest.approx(8.0)


def test_fit_says_when_it_cannot():
    with pytest.raises(ValueError, match="ignore_index"):
        fit_temperature(torch.zeros(2, 3), torch.tensor([-100, -100]))
    with pytest.raises(ValueError, match="probability zero"):
        fit_temperature(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"^target\[1\] is 3, outside \[0, 3\)"):
        fit_temperature(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="bounds"):
        fit_temperature_from(lambda ts: None, bounds=(2.0, 1.0))  # type: ignore[arg-type, return-value]


def test_flat_nll_keeps_temperature_one():
    fit = fit_temperature(torch.zeros(4, 6), torch.tensor([0, 1, 2, 3]))
    assert fit.temperature == 1.0 and not fit.at_bound and fit.nll == pytest.approx(math.log(6))


def test_fit_of_streamed_batches_equals_the_fit_at_once():
    logits, target = make(900, 30, seed=5)
    reads = []

    def evaluate(temperatures):
        reads.append(len(temperatures))
        total = None
        for z, y in zip(logits.split(200), target.split(200)):
            part = NLLSums.from_statistics(fastcalib.statistics(z, y, temperatures), y, temperatures)
            total = part if total is None else total + part
        return total

    fit = fit_temperature_from(evaluate)
    assert fit.temperature == pytest.approx(fit_temperature(logits, target).temperature, rel=1e-6)
    assert fit.passes == len(reads) <= 4


def test_interpolated_fit_needs_no_second_read():
    logits, target = make(2000, 30, seed=2)
    betas = [2.0 - 0.125 * i for i in range(13)]
    state = state_of(logits, target, [1 / b for b in betas])
    fit, exact = interpolate_temperature(state), fit_temperature(logits, target)
    assert fit.temperature == pytest.approx(exact.temperature, rel=1e-4)
    assert fit.nll == pytest.approx(exact.nll, abs=1e-7) and fit.nll_before == pytest.approx(exact.nll_before, abs=1e-7)
    # entropy equals NLL exactly where NLL is least
    there = state_of(logits, target, [exact.temperature])
    assert abs(there.entropy_gap.item()) < 1e-6


def test_interpolated_fit_reports_the_bound():
    state = state_of(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
    fit = interpolate_temperature(state)
    assert fit.at_bound and fit.temperature == 0.5
