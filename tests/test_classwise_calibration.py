"""Classwise ECE against loops over all pairs in float64, and smooth ECE against its definition on a fine mesh."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcalib.calibration import ClasswiseCalibrationState, classwise, smooth_ece

from .cases import LAYOUTS, random_logits
from .test_calibration import make

TEMPERATURES = [0.5, 1.0, 2.0]


def brute(p: np.ndarray, target: np.ndarray, n_bins: int) -> np.ndarray:
    """The error of each class, every pair by itself, bins (low, high] with the first one closed."""
    n, classes = p.shape
    out = np.zeros(classes)
    for c in range(classes):
        hit = target == c
        for i in range(n_bins):
            inside = (p[:, c] > i / n_bins) & (p[:, c] <= (i + 1) / n_bins) | ((p[:, c] == 0) & (i == 0))
            if inside.any():
                out[c] += inside.sum() / n * abs(hit[inside].mean() - p[inside, c].mean())
    return out


def state_of(
    logits: Tensor, target: Tensor, temperatures: list[float] = TEMPERATURES, n_bins: int = 15, **kwargs
) -> ClasswiseCalibrationState:
    state = ClasswiseCalibrationState(logits.shape[-1], temperatures, n_bins=n_bins)
    state.update(logits, target, **kwargs)
    return state


def same(a: ClasswiseCalibrationState, b: ClasswiseCalibrationState) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_equals_the_loop_over_classes_and_bins(n_bins: int, backend: str) -> None:
    logits, target = make()
    state = state_of(logits, target, n_bins=n_bins, backend=backend)
    for k, t in enumerate(TEMPERATURES):
        want = brute((logits / t).softmax(-1).numpy(), target.numpy(), n_bins)
        # float32 probabilities on the other side, off by 1e-7 of themselves; those at an edge would show as 1e-3.
        np.testing.assert_allclose(state.per_class()[k].numpy(), want, rtol=1e-5, atol=1e-8)
        assert state.classwise_ece()[k].item() == pytest.approx(want.mean(), rel=1e-5)


def test_edges_belong_to_the_bin_below(backend: str) -> None:
    """Exactly 0, 1/4, 1/2 and 1 with four bins, in the first class; the others only complete the rows."""
    inf = torch.inf
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -inf, -inf], [0.0, -inf, -inf, -inf], [-inf, -inf, 0.0, 0.0]]
    )
    state = state_of(logits, torch.tensor([0, 1, 0, 0]), [1.0], n_bins=4, backend=backend)
    unit = classwise.UNIT
    # (1/4, hit) and (0, hit) share the first bin; 1/2 is a miss; 1 is a hit.
    assert (state.gap[0, 0] / unit).tolist() == [2 - 0.25, -0.5, 0.0, 0.0]
    assert state.per_class()[0, 0].item() == (1.75 + 0.5) / 4


def test_classes_do_not_make_up_for_each_other() -> None:
    """Two classes, one predicted too often by what the other lacks: full ECE with one bin sees nothing."""
    logits = torch.tensor([[0.75, 0.25]]).log().expand(4, 2)
    state = state_of(logits, torch.tensor([0, 1, 0, 1]), [1.0], n_bins=1)
    assert state.per_class()[0].tolist() == pytest.approx([0.25, 0.25], abs=1e-7)
    state = state_of(logits, torch.tensor([0, 1, 0, 0]), [1.0], n_bins=1)
    assert state.per_class()[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_nothing_the_worst_and_too_many() -> None:
    assert ClasswiseCalibrationState(3).classwise_ece().isnan().all()
    logits = torch.full((5, 6), -torch.inf)
    logits[:, 3] = 0.0
    assert state_of(logits, torch.full((5,), 2)).classwise_ece().tolist() == [2.0 / 6] * 3
    state = state_of(logits, torch.full((5,), 3))
    assert state.classwise_ece().tolist() == [0.0] * 3
    state.n_tokens += classwise.MOST_TOKENS - 5
    assert state.classwise_ece().tolist() == [0.0] * 3
    state.n_tokens += 1
    with pytest.raises(OverflowError, match="134217729 tokens are more than the 134217728"):
        state.classwise_ece()


def test_any_order_grouping_and_chunk_gives_the_same_bits(cpp_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = random_logits(40, 300), torch.arange(40)
    whole = state_of(logits, target, backend=cpp_backend)
    parts = [state_of(z, y, backend=cpp_backend) for z, y in zip(logits.split(7), target.split(7))]
    left, right = parts[0], parts[-1]
    for part in parts[1:]:
        left = left.merge(part)
    for part in parts[-2::-1]:
        right = part.merge(right)
    assert same(whole, left) and same(whole, right)
    assert same(ClasswiseCalibrationState.from_state_dict(whole.state_dict()), whole)
    for elements in (1, 900, 1 << 30):
        monkeypatch.setattr(classwise, "CHUNK_ELEMENTS", elements)
        assert same(state_of(logits, target, backend=cpp_backend), whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, cpp_backend: str) -> None:
    logits = random_logits(2, 5, 33)
    target = torch.arange(10).view(2, 5)
    got = state_of(LAYOUTS[layout](logits), target, backend=cpp_backend)
    assert same(got, state_of(logits.reshape(10, 33), target.flatten(), backend=cpp_backend))


def test_what_counts_for_nothing(cpp_backend: str) -> None:
    """Ignored and undefined rows and padded columns: as if they were not there; the undefined are told."""
    logits, target = random_logits(9, 50), torch.arange(9)
    want = state_of(logits[3:], target[3:], backend=cpp_backend)
    spoilt, ids = torch.nn.functional.pad(logits, (0, 3), value=99.0), target.clone()
    ids[0] = -1
    spoilt[0] = torch.nan  # ignored, so not even counted as undefined
    spoilt[1, 7], spoilt[2] = torch.inf, -torch.inf
    got = ClasswiseCalibrationState(50, TEMPERATURES)
    got.update(spoilt, ids, ignore_index=-1, backend=cpp_backend)
    assert torch.equal(got.gap, want.gap) and got.n_tokens == 6 and got.n_undefined == 2


def test_mistakes_are_told_in_words() -> None:
    logits, target = random_logits(4, 9), torch.arange(4)
    state = ClasswiseCalibrationState(9)
    with pytest.raises(ValueError, match="vocab_size must be an int, at least 1, got 0"):
        ClasswiseCalibrationState(0)
    with pytest.raises(ValueError, match="n_bins must be"):
        ClasswiseCalibrationState(9, n_bins=0)
    with pytest.raises(ValueError, match="temperatures must be"):
        ClasswiseCalibrationState(9, 0.0)
    with pytest.raises(ValueError, match=r"target\[2\] is 9"):
        state.update(logits, torch.tensor([0, 1, 9, 3]))
    with pytest.raises(ValueError, match=r"vocab_size must lie in \[1, 8\]"):
        state.update(logits[:, :8], target)
    with pytest.raises(TypeError, match="needs another ClasswiseCalibrationState, got int"):
        state.merge(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must agree in temperatures, classes and bins"):
        state.merge(ClasswiseCalibrationState(9, n_bins=3))
    with pytest.raises(ValueError, match="missing gap"):
        ClasswiseCalibrationState.from_state_dict({k: v for k, v in state.state_dict().items() if k != "gap"})
    assert state.n_tokens == 0 and not state.gap.any()


def smooth_by_definition(f: np.ndarray, y: np.ndarray) -> float:
    """sigma with smECE_sigma = sigma: the integral over t of |mean of K_sigma(t, f) (y - f)|, K the Gaussian reflected
    at 0 and 1 (Błasiok & Nakkiran 2023, definitions 3 and 4), by the midpoint rule and bisection."""
    t = (np.arange(500) + 0.5) / 500

    def at(sigma: float) -> float:
        images = [2 * j + sign * f for j in range(-2, 3) for sign in (1, -1)]
        kernel = sum(np.exp(-0.5 * ((t[:, None] - image) / sigma) ** 2) for image in images)
        return float(np.abs((kernel / (sigma * np.sqrt(2 * np.pi)) * (y - f)).mean(1)).mean())

    low, high = 1e-3, 0.5
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle) < middle else (middle, high)
    return (low + high) / 2


def test_smooth_ece_equals_its_definition() -> None:
    pytest.importorskip("relplot")
    generator = np.random.default_rng(5)
    f = generator.uniform(0.05, 0.95, 200)
    for bias in (0.0, 0.25, -0.15):
        y = generator.uniform(size=200) < np.clip(f + bias * np.sin(6 * f), 0, 1)
        got = smooth_ece(torch.tensor(f), torch.tensor(y))
        # relplot rounds to a mesh of 200 points and stops the search for sigma at 2^-10 of 1.
        assert got == pytest.approx(smooth_by_definition(f, y.astype(float)), abs=2e-3)
    # One confidence: smoothing moves |accuracy - confidence| about and takes nothing off it.
    assert smooth_ece(torch.full((10,), 0.8), torch.arange(10) < 5) == pytest.approx(0.3, abs=1e-3)
    assert np.isnan(smooth_ece(torch.zeros(0), torch.zeros(0)))


def test_smooth_ece_refuses_what_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(2,\)"):
        smooth_ece(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], got 1.5 at place 1"):
        smooth_ece(torch.tensor([0.5, 1.5]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"confidence must be .* got nan"):
        smooth_ece(torch.tensor([torch.nan]), torch.zeros(1))
    with pytest.raises(ValueError, match=r"hit must be 0 or 1, got 2.0 at place 0"):
        smooth_ece(torch.zeros(1), torch.tensor([2]))
    present = builtins.__import__

    def absent(name: str, *rest: object, **keywords: object) -> object:
        if name == "relplot":
            raise ImportError("No module named 'relplot'")
        return present(name, *rest, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"fastcalib\[smooth\]"):
        smooth_ece(torch.zeros(1), torch.zeros(1))
