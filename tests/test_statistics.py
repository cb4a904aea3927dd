"""statistics, forward: every field against float64, over dtypes, vocabularies, layouts and hostile rows."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import cases, reference
from .cases import BLOCK_EDGES, DTYPES, LAYOUTS, TEMPERATURES, VOCABULARIES, random_logits, random_sets
from .checks import assert_statistics, assert_within


def check(logits, index, temperature, backend, what, *, vocab_size=None, want=None, names=None):
    """One call with a list of temperatures and ValidSets, against the reference. logits (N, V)."""
    before = logits.clone()
    sets = ValidSets.from_lists(index) if any(index) else None
    got = fastcalib.statistics(logits, sets, temperature, vocab_size=vocab_size, backend=backend)
    want = want or reference.statistics(logits, temperature, index, vocab_size=vocab_size)
    assert_statistics(got, want, logits.dtype, what, names=names)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num()), f"{what}: the logits were written to"
    return got


@cache
def ordinary(v: int, dtype: torch.dtype) -> tuple:
    """One flat row and one peaked one, and their reference: worked out once for all backends."""
    logits = torch.cat([random_logits(1, v, dtype=dtype, scale=scale, seed=v) for scale in (3.0, 5.0)])
    index = random_sets(2, v, [3, 17])
    return logits, index, reference.statistics(logits, [1.0, 0.6], index)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_vocabularies_of_real_models(backend, v, dtype):
    logits, index, want = ordinary(v, dtype)
    check(logits, index, [1.0, 0.6], backend, f"V={v}", want=want)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", BLOCK_EDGES)
def test_sizes_around_blocks(backend, v, dtype):
    logits = random_logits(3, v, dtype=dtype, seed=v)
    logits[:, -1] = (
        logits[:, :-1].amax(-1) + 3
    )  # the largest is the very last: a tail that is dropped shows in every field
    logits[0, 0], logits[0, -1] = logits[0, -1].clone(), logits[0, 0].clone()
    got = check(logits, [[0, v - 1]] * 3, [1.0], backend, f"V={v}")
    assert got.argmax.tolist() == [0, v - 1, v - 1]


@pytest.mark.parametrize("v", range(1, 80))
def test_every_small_size(backend, v):
    check(random_logits(2, v, seed=v), [[0], [v - 1]], [1.0, 2.0], backend, f"V={v}")


@cache
def hostile(v: int, dtype: torch.dtype) -> tuple:
    rows = cases.defined_rows(v, dtype)
    logits = torch.stack(list(rows.values()))
    lowest = torch.finfo(dtype).min
    index = [sorted({0, v // 2, v - 1, int(r.nan_to_num(neginf=lowest).argmax())}) for r in logits]
    return list(rows), logits, index, reference.statistics(logits, TEMPERATURES, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 2, 31, 2_049, 40_000])
def test_hostile_rows(backend, v, dtype):
    names, logits, index, want = hostile(v, dtype)
    check(logits, index, TEMPERATURES, backend, f"V={v}", want=want, names=names)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 2, 130, 40_000])
def test_rows_without_a_softmax_are_nan_and_alone_in_it(backend, v, dtype):
    hostile = cases.undefined_rows(v, dtype)
    good = random_logits(len(hostile) + 1, v, dtype=dtype)
    mixed = torch.stack([r for pair in zip(good, hostile.values()) for r in pair] + [good[-1]])
    ids = torch.full((mixed.shape[0],), v - 1)
    got = fastcalib.statistics(mixed, ids, [1.0, 0.3], backend=backend)
    alone = fastcalib.statistics(good, ids[: len(good)], [1.0, 0.3], backend=backend)
    for name in (*reference.SMOOTH, "max_logit"):
        value = getattr(got, name)
        for row, case in zip(value[1::2], hostile):
            assert row.isnan().all(), f"{name} of a row with {case}: {row}"
        assert torch.equal(value[::2], getattr(alone, name)), f"{name}: a row changed because of its neighbour"
    assert (got.argmax[1::2] == -1).all()
    assert torch.equal(got.argmax[::2], alone.argmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, layout, dtype):
    logits = random_logits(3, 4, 333, dtype=dtype)
    view = LAYOUTS[layout](logits)
    assert torch.equal(view, logits)
    ids = torch.arange(12).reshape(3, 4) * 20
    got = fastcalib.statistics(view, ids, 0.8, backend=backend)
    want = fastcalib.statistics(logits, ids, 0.8, backend=backend)
    exact = reference.statistics(logits.reshape(12, 333), 0.8, ids.reshape(12, 1).tolist())
    assert_within(got.entropy.flatten(), exact.entropy[:, 0], 1e-5, f"entropy, {layout}")
    assert_within(
        got.log_prob.flatten(), exact.log_prob[:, 0], 1e-5 * exact.log_prob[:, 0].abs(), f"log_prob, {layout}"
    )
    for name, value in got._asdict().items():
        if value is not None:
            assert torch.equal(value, getattr(want, name)), f"{name} depends on the memory layout: {layout}"


def test_expanded_rows(backend):
    row = random_logits(1, 1, 500)
    got = fastcalib.statistics(row.expand(4, 3, 500), torch.arange(12).reshape(4, 3), backend=backend)
    want = fastcalib.statistics(row.expand(4, 3, 500).contiguous(), torch.arange(12).reshape(4, 3), backend=backend)
    assert torch.equal(got.entropy, want.entropy) and torch.equal(got.log_prob, want.log_prob)
    assert got.entropy.unique().numel() == 1


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("m", [None, 1, 4, 0])
def test_shapes(backend, leading, m):
    logits = random_logits(*leading, 40)
    shape = leading if m is None else (*leading, m)
    ids = torch.randint(0, 40, shape)
    for temperature, axis in ((0.7, ()), ([0.7], (1,)), ((0.5, 1.0, 2.0), (3,)), (torch.full(leading, 0.7), ())):
        s = fastcalib.statistics(logits, ids, temperature, backend=backend)
        assert s.entropy.shape == s.logsumexp.shape == s.var_logit.shape == (*leading, *axis)
        assert s.argmax.shape == s.sum_logits.shape == s.std_logits.shape == s.max_logit.shape == leading
        assert s.log_prob.shape == (*shape, *axis)
        assert s.n_greater is None and s.n_equal is None and s.mass_greater is None
        assert s.argmax.dtype == torch.int64
    s = fastcalib.statistics(logits, backend=backend)
    assert s.log_prob is None
    flat = logits.reshape(-1, 40)
    if flat.shape[0]:
        s = fastcalib.statistics(logits, ids, [0.7, 1.3], backend=backend)
        want = reference.statistics(flat, [0.7, 1.3], ids.reshape(flat.shape[0], -1).tolist())
        assert_within(s.entropy.reshape(-1, 2), want.entropy, 1e-5, "entropy")
        assert_within(s.log_prob.reshape(-1, 2), want.log_prob, 1e-5 * (1 + want.log_prob.abs()), "log_prob")


def test_ragged_sets_keep_their_order(backend):
    logits = random_logits(2, 3, 50)
    lists = [[4, 3], [], [49, 0, 7], [1], [], [2, 8]]
    got = fastcalib.statistics(logits, ValidSets.from_lists(lists), [1.0, 3.0], backend=backend)
    want = reference.statistics(logits.reshape(6, 50), [1.0, 3.0], lists)
    assert got.log_prob.shape == (8, 2)
    assert_within(got.log_prob, want.log_prob, 1e-5 * (1 + want.log_prob.abs()), "log_prob")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33])
def test_many_temperatures(backend, k, dtype):
    logits = random_logits(3, 2_100, dtype=dtype)
    arbitrary = (0.3 + 2 * torch.rand(k, generator=cases.generator(k))).tolist()
    check(logits, random_sets(3, 2_100, [5, 0, 1]), arbitrary, backend, f"K={k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize(
    "first, step, k", [(0.5, 0.25, 8), (1.0, -0.1, 9), (0.01, 0.01, 16), (4.0, 2.0, 5), (20.0, 5.0, 8)]
)
def test_evenly_spaced_inverse_temperatures(backend, first, step, k, dtype):
    """1/T = b0 + k d is where e_k may be had from e_(k-1): errors must not pile up, also where exp underflows early."""
    temperatures = [1 / (first + i * step) for i in range(k)]
    rows = cases.defined_rows(3_000, dtype)
    logits = torch.stack(
        [rows[n] for n in ("random", "offset +1e4", "one-hot +50", "some -inf", "huge steps up", "equal")]
    )
    check(logits, random_sets(len(logits), 3_000, [4]), temperatures, backend, f"1/T from {first} by {step}")


@pytest.mark.parametrize(
    "temperatures",
    [
        [1e-3, 1.0, 1e3],
        [1e-30, 1.0, 1e15],
        [1.0, 1e-30, 1e-12, 1e15, 0.5],
        [1e15, 1e-15, 1e-14, 0.05],
        [1e8, 1.0, 0.3, 0.1],
        [1e15, 1 / (1e-15 + 5), 1 / (1e-15 + 10), 1 / (1e-15 + 15)],  # evenly spaced 1/T
    ],
)
def test_temperatures_do_not_disturb_each_other(backend, temperatures):
    """A cold temperature beside a hot one: as accurate as alone (that is, not more than rounding away)."""
    logits = random_logits(4, 5_000)
    logits[:, ::7] = -torch.inf
    together = fastcalib.statistics(logits, temperature=temperatures, backend=backend)
    for i, t in enumerate(temperatures):
        alone = fastcalib.statistics(logits, temperature=t, backend=backend)
        torch.testing.assert_close(together.entropy[:, i], alone.entropy, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(together.collision[:, i], alone.collision, rtol=1e-5, atol=0)
        torch.testing.assert_close(together.var_logit[:, i], alone.var_logit, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 4), (3, 4)])
def test_temperature_tensors(backend, shape):
    logits = random_logits(3, 4, 200)
    t = 0.4 + torch.rand(shape)
    ids = torch.randint(0, 200, (3, 4))
    got = fastcalib.statistics(logits, ids, t, backend=backend)
    per_row = t.expand(3, 4).reshape(12)
    want = reference.statistics(logits.reshape(12, 200), per_row, ids.reshape(12, 1).tolist())
    assert_within(got.entropy.flatten(), want.entropy[:, 0], 1e-5, "entropy")
    assert_within(got.log_prob.flatten(), want.log_prob[:, 0], 1e-5 * (1 + want.log_prob[:, 0].abs()), "log_prob")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("padding", [1, 37, 5_000])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 5.0])
def test_padded_columns_take_no_part(backend, dtype, padding, poison):
    logits = random_logits(2, 3_000, dtype=dtype)
    padded = torch.cat([logits, torch.full((2, padding), poison, dtype=dtype)], -1)
    ids = torch.tensor([[0, 2_999], [5, 17]])
    got = fastcalib.statistics(padded, ids, [0.5, 1.0], vocab_size=3_000, ranks=True, backend=backend)
    want = fastcalib.statistics(logits, ids, [0.5, 1.0], ranks=True, backend=backend)
    for name, value in got._asdict().items():
        assert torch.equal(value, getattr(want, name)), f"{name}: padding of {poison} entered"


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 15, 16])
def test_ranks_of_selected_tokens_in_the_same_read(backend, m, dtype):
    logits = (random_logits(5, 2_500, dtype=dtype) * 4).round() / 4  # ties in every dtype
    logits[1, ::3] = -torch.inf
    ids = torch.stack([torch.randperm(2_500)[:m] for _ in range(5)])
    ids[3, 0] = -100
    got = fastcalib.statistics(logits, ids, [0.5, 1.0, 2.0], ranks=True, backend=backend)
    picked = [logits[r, ids[r].clamp(min=0)] for r in range(5)]
    greater, equal, mass = reference.counts(logits, picked, [0.5, 1.0, 2.0])
    ignored = (ids == -100).reshape(-1)
    greater[ignored], equal[ignored], mass[ignored] = 0, 1, 0.0
    assert torch.equal(got.n_greater.flatten(), greater)
    assert torch.equal(got.n_equal.flatten(), equal - 1)
    assert_within(got.mass_greater.reshape(-1, 3), mass, 1e-5 * mass + 1e-12, "mass_greater")
    plain = fastcalib.statistics(logits, ids, [0.5, 1.0, 2.0], backend=backend)
    assert torch.equal(got.log_prob, plain.log_prob) and torch.equal(got.entropy, plain.entropy)


def test_ranks_of_ragged_sets_in_the_same_read(backend):
    logits = random_logits(4, 800, dtype=torch.bfloat16)
    lists = [[3, 5], [], list(range(16)), [799]]
    got = fastcalib.statistics(logits, ValidSets.from_lists(lists), ranks=True, backend=backend)
    greater, equal, mass = reference.counts(logits, [logits[r, ids] for r, ids in enumerate(lists)], 1.0)
    assert torch.equal(got.n_greater, greater) and torch.equal(got.n_equal, equal - 1)
    assert_within(got.mass_greater, mass[:, 0], 1e-5 * mass[:, 0] + 1e-12, "mass_greater")
