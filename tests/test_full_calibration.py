"""Full-ECE: against loops over all pairs in float64; edges of bins; merging, chunks, layouts; what is left out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcalib.calibration import FullCalibrationState, full

from .cases import LAYOUTS, dtype_id, random_logits
from .test_calibration import make

TEMPERATURES = [0.5, 1.0, 2.0]


def brute(p: np.ndarray, target: np.ndarray, n_bins: int) -> float:
    """Every pair by itself, bins (low, high] with the first one closed, Liu et al. 2024."""
    total = 0.0
    hit = np.arange(p.shape[1]) == target[:, None]
    for i in range(n_bins):
        low, high = i / n_bins, (i + 1) / n_bins
        inside = (p > low) & (p <= high) | ((p == 0) & (i == 0))
        if inside.any():
            accuracy, confidence = hit[inside].mean(), p[inside].mean()
            total += inside.sum() / len(p) * abs(accuracy - confidence)
    return float(total)


def state_of(
    logits: Tensor, target: Tensor, temperatures: list[float] = TEMPERATURES, **kwargs
) -> FullCalibrationState:
    state = FullCalibrationState(temperatures)
    state.update(logits, target, **kwargs)
    return state


def same(a: FullCalibrationState, b: FullCalibrationState) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three rows at a time at the default number of cells."""
    monkeypatch.setattr(full, "CHUNK_ELEMENTS", 3 * 3840)
    yield


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_equals_the_loop_over_pairs(n_bins: int, backend: str) -> None:
    logits, target = make()
    state = state_of(logits, target, backend=backend)
    for k, t in enumerate(TEMPERATURES):
        want = brute((logits / t).softmax(-1).numpy(), target.numpy(), n_bins)
        # A row's sum in a cell is rounded to 2^-24, and 15 bins of up to 256 cells each may be off one way.
        assert state.full_ece(n_bins)[k].item() == pytest.approx(want, abs=1e-6)
    assert (state.cell_count.sum(1) == logits.numel()).all() and (state.cell_hits.sum(1) == len(logits)).all()
    torch.testing.assert_close(state.cell_confidence.sum(1) / len(logits), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_half_logits_are_not_rounded_again(dtype: torch.dtype, backend: str) -> None:
    logits, target = random_logits(50, 400, dtype=dtype), torch.arange(50)
    state = state_of(logits, target, [1.0], backend=backend)
    want = brute(logits.double().softmax(-1).numpy(), target.numpy(), 15)
    # float32 may carry a probability across the edge of a bin, where gaps of two bins differ by what it weighs.
    assert state.full_ece(15).item() == pytest.approx(want, abs=2e-3 / 50)


def test_edges_belong_to_the_bin_below(backend: str) -> None:
    """Exactly 0, 1/4, 1/2 and 1 with four bins: the first is closed, the others open on the left."""
    inf = torch.inf
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -inf, -inf], [0.0, -inf, -inf, -inf], [-inf, -inf, 0.0, 0.0]]
    )
    state = state_of(logits, torch.tensor([0, 1, 0, 0]), [1.0], backend=backend)
    diagram = state.reliability(4)
    assert diagram.count.tolist() == [[4 + 2 + 3 + 2, 2 + 2, 0, 1]]
    assert diagram.confidence[0, [0, 1, 3]].tolist() == [1 / 11, 0.5, 1.0]
    assert diagram.accuracy[0, [0, 1, 3]].tolist() == [2 / 11, 0.25, 1.0]  # the last target has probability 0
    assert state.full_ece(4).item() == (abs(2 - 1) + abs(1 - 2) + 0) / 4
    assert state.full_ece(1).item() == 0.0  # as many targets as probability, always


def test_nothing_and_the_worst() -> None:
    assert FullCalibrationState().full_ece().isnan().all()
    logits = torch.full((5, 6), -torch.inf)
    logits[:, 3] = 0.0
    assert state_of(logits, torch.full((5,), 2)).full_ece().tolist() == [2.0] * 3
    assert state_of(logits, torch.full((5,), 3)).full_ece().tolist() == [0.0] * 3


def test_any_order_and_grouping_gives_the_same_bits(cpp_backend: str, small_chunks: None) -> None:
    logits, target = random_logits(40, 300), torch.arange(40)
    whole = state_of(logits, target, backend=cpp_backend)
    parts = [state_of(z, y, backend=cpp_backend) for z, y in zip(logits.split(7), target.split(7))]
    left, right = parts[0], parts[-1]
    for part in parts[1:]:
        left = left.merge(part)
    for part in parts[-2::-1]:
        right = part.merge(right)
    one_by_one, order = FullCalibrationState(TEMPERATURES), torch.randperm(40)
    for i in order:
        one_by_one.update(logits[i], target[i], backend=cpp_backend)
    sums = whole.cell_confidence * 2**24  # whole numbers: exact also where there are too many tokens to try
    assert torch.equal(sums, sums.round())
    assert same(whole, left) and same(whole, right) and same(whole, one_by_one)
    assert same(FullCalibrationState.from_state_dict(whole.state_dict()), whole)
    assert same(whole.select([2]), state_of(logits, target, TEMPERATURES[2:], backend=cpp_backend))


def test_chunks_do_not_show(cpp_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = random_logits(40, 300), torch.arange(40)
    whole = state_of(logits, target, backend=cpp_backend)
    for elements in (1, 5 * 3840, 1 << 30):
        monkeypatch.setattr(full, "CHUNK_ELEMENTS", elements)
        assert same(state_of(logits, target, backend=cpp_backend), whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, cpp_backend: str, small_chunks: None) -> None:
    logits = random_logits(2, 5, 33)
    target = torch.arange(10).view(2, 5)
    got = state_of(LAYOUTS[layout](logits), target, backend=cpp_backend)
    assert same(got, state_of(logits.reshape(10, 33), target.flatten(), backend=cpp_backend))


def test_what_counts_for_nothing(cpp_backend: str, small_chunks: None) -> None:
    """Ignored and undefined rows and padded columns: as if they were not there; the undefined are told."""
    logits, target = random_logits(9, 50), torch.arange(9)
    want = state_of(logits[3:], target[3:], backend=cpp_backend)
    spoilt, ids = torch.nn.functional.pad(logits, (0, 3), value=99.0), target.clone()
    ids[0] = -1
    spoilt[0] = torch.nan  # ignored, so not even counted as undefined
    spoilt[1, 7], spoilt[2] = torch.inf, -torch.inf
    got = state_of(spoilt, ids, ignore_index=-1, vocab_size=50, backend=cpp_backend)
    assert got.n_undefined == 2 and got.n_tokens == 6
    got.n_undefined.zero_()
    assert same(got, want)
    empty = state_of(logits[:0], target[:0], backend=cpp_backend)
    assert same(empty, FullCalibrationState(TEMPERATURES)) and same(empty.merge(want), want)


def test_memory_is_that_of_a_chunk(small_chunks: None) -> None:
    """Not of the batch: the largest tensor made on the way has the size of a chunk, (n, V) or (n, cells)."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(
                t.numel() for t in made if isinstance(t, Tensor) and t.untyped_storage().nbytes() and not t._is_view()
            )
            return out

    logits, target = random_logits(200, 3840), torch.arange(200)
    with Watch():
        state_of(logits, target)
    assert max(sizes) == 3 * 3840


def test_errors_say_what_is_wrong() -> None:
    logits, target = random_logits(4, 9), torch.tensor([0, 1, 2, 9])
    state = FullCalibrationState()
    with pytest.raises(ValueError, match=r"^target\[3\] is 9, outside \[0, 9\)"):
        state.update(logits, target)
    assert state.n_tokens == 0  # nothing of the batch was counted
    with pytest.raises(ValueError, match=r"^FullCalibrationState\.update: target must have"):
        state.update(logits, target[:2])
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        state.update(logits, target, ignore_index=None)
    with pytest.raises(ValueError, match=r"^FullCalibrationState: temperatures must be a positive"):
        FullCalibrationState([1.0, -1.0])
    with pytest.raises(TypeError, match="needs another FullCalibrationState, got CalibrationState"):
        from fastcalib import CalibrationState

        state.merge(CalibrationState())
    with pytest.raises(ValueError, match="n_bins must divide"):
        state.full_ece(7)
