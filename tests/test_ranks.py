"""ranks: counts are exact by any route (few thresholds, many, ragged, clustered, tied); masses against float64."""

from __future__ import annotations

import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import cases, reference
from .cases import BLOCK_EDGES, DTYPES, LAYOUTS, VOCABULARIES, random_logits
from .checks import assert_within

INF, NAN = torch.inf, torch.nan
# One, an odd few, either side of where brute force ends (16, 24), a table, a large table.
SET_SIZES = (1, 2, 3, 7, 15, 16, 17, 24, 25, 31, 32, 33, 63, 256, 1_025, 2_500)


def check_mass(got, want, what):
    """float32 sums of p: 2e-6 relative as s0, and of the same order for a sum by differences of a total of 1."""
    assert_within(got, want, 4e-6 * want.abs().nan_to_num() + 1e-7, what)


def check_index(logits, ids, temperature, backend, what):
    """ids (N, M) without ignored entries, temperature None or a list."""
    got = fastcalib.ranks(logits, ids, temperature=temperature, backend=backend)
    picked = [logits[r, ids[r]] for r in range(len(logits))]
    greater, equal, mass = reference.counts(logits, picked, temperature)
    equal = equal - torch.cat([~p.isnan() for p in picked]).long() if picked else equal
    assert torch.equal(got.n_greater.flatten(), greater), f"{what}: n_greater"
    assert torch.equal(got.n_equal.flatten(), equal), f"{what}: n_equal"
    assert got.n_greater.dtype == got.n_equal.dtype == torch.int64
    if temperature is None:
        assert got.mass_greater is None
    else:
        check_mass(got.mass_greater.reshape(mass.shape), mass, f"{what}: mass_greater")


def check_thresholds(logits, thresholds, temperature, backend, what):
    got = fastcalib.ranks(logits, thresholds=thresholds, temperature=temperature, backend=backend)
    greater, equal, mass = reference.counts(logits, list(thresholds.reshape(len(logits), -1)), temperature)
    assert torch.equal(got.n_greater.flatten(), greater), f"{what}: n_greater"
    assert torch.equal(got.n_equal.flatten(), equal), f"{what}: n_equal"
    if temperature is not None:
        check_mass(got.mass_greater.reshape(mass.shape), mass, f"{what}: mass_greater")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("m", SET_SIZES)
def test_sets_of_any_size(backend, m, dtype):
    if backend == "eager" and m > 300:
        pytest.skip("the plain comparison has one route for all sizes")
    logits = random_logits(3, 2_500, dtype=dtype, seed=m)
    ids = torch.stack([torch.randperm(2_500)[:m] for _ in range(3)])
    check_index(logits, ids, None, backend, f"M={m}")
    check_index(logits, ids, [1.0, 0.3], backend, f"M={m}")
    some = random_logits(3, m, scale=4.0, seed=m + 1).to(logits.dtype).to(torch.promote_types(dtype, torch.float32))
    check_thresholds(logits, some, [1.0], backend, f"M={m} thresholds")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_vocabularies_of_real_models(backend, v, dtype):
    logits = random_logits(2, v, dtype=dtype, seed=v)
    for m in (1, 16) if backend == "eager" else (1, 16, 40, 300):  # the plain comparison costs M times V
        ids = torch.stack([torch.randperm(v)[: min(m, v)] for _ in range(2)])
        check_index(logits, ids, [0.7] if m > 1 else None, backend, f"V={v} M={m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 2, 31, 2_049, 32_769])
def test_every_token_at_once(backend, v, dtype):
    if backend == "eager" and v > 10_000:
        pytest.skip("the plain comparison costs V^2")
    logits = random_logits(1, v, dtype=dtype, seed=v)
    ids = torch.arange(v)[None]
    check_index(logits, ids, [1.0], backend, f"M=V={v}")
    r = fastcalib.ranks(logits, ids, backend=backend)
    # each rank class is filled exactly: the sum of average ranks is that of 1..V
    assert r.rank("average").sum().item() == v * (v + 1) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", BLOCK_EDGES)
def test_sizes_around_blocks(backend, v, dtype):
    logits = random_logits(2, v, dtype=dtype, seed=v)
    logits[:, -1] = 40.0  # above everything, in the very last column
    for ids in ([[0, v - 1]] * 2, [list(range(0, v, max(1, v // 30)))] * 2):
        check_index(logits, torch.tensor(ids), [1.0], backend, f"V={v}")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("m", [1, 16, 24, 60, 300])
def test_hostile_rows(backend, m, dtype):
    rows = cases.defined_rows(700, dtype) | cases.undefined_rows(700, dtype)
    logits = torch.stack(list(rows.values()))
    ids = torch.stack([torch.randperm(700, generator=cases.generator(r))[:m] for r in range(len(rows))])
    ids[:, 0] = 699
    for r, name in enumerate(rows):
        check_index(logits[r : r + 1], ids[r : r + 1], [1.0, 0.05, 30.0], backend, f"{name}, M={m}")
    together = fastcalib.ranks(logits, ids, temperature=1.0, backend=backend)
    for r, name in enumerate(rows):
        alone = fastcalib.ranks(logits[r], ids[r], temperature=1.0, backend=backend)
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[r], b, rtol=0, atol=0, equal_nan=True, msg=f"{name} changes in company")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("m", [1, 5, 16, 20, 30, 200])
def test_thresholds_that_are_no_numbers_or_infinite(backend, m, dtype):
    logits = random_logits(6, 1_000, dtype=dtype)
    logits[1, ::2] = -INF
    logits[2, 7] = INF
    logits[3, 9] = NAN
    logits[4] = -INF
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    t = logits.to(wide)[:, torch.randperm(1_000)[:m]].nan_to_num(0.5)
    for special in ([-INF], [INF], [NAN], [-INF, INF, NAN], [-INF] * m, [NAN] * m, [0.0, -0.0]):
        hurt = t.clone()
        hurt[:, : len(special)] = torch.tensor(special[:m], dtype=wide)
        check_thresholds(logits, hurt, [1.0], backend, f"{special[:3]}, M={m}")
        check_thresholds(logits, hurt.flip(1), None, backend, f"{special[:3]} last, M={m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize(
    "thresholds",
    {
        # all in one bucket of any evenly spaced table, and the table as wide as can be
        "clustered with outliers": torch.cat(
            [1.5 + 1e-6 * torch.rand(3_998, generator=cases.generator(0)), torch.tensor([-3e4, 3e4])]
        ),
        "clustered, huge outliers": torch.cat(
            [0.5 + 1e-6 * torch.rand(998, generator=cases.generator(0)), torch.tensor([-3e38, 3e38])]
        ),
        "all equal": torch.full((700,), 1.5),
        "two values": torch.tensor([1.5, -2.25]).repeat(400),
        "duplicates among many": (torch.randn(2_000, generator=cases.generator(1)) * 4).round() / 2,
        "geometric": torch.cat([s * 2.0 ** torch.arange(-120, 120.0) for s in (1, -1)]),
        "increasing": torch.linspace(-15, 15, 1_000),
        "decreasing": torch.linspace(15, -15, 1_000),
        "all above everything": torch.full((300,), 1e5) + torch.arange(300),
        "all below everything": torch.full((300,), -1e5) - torch.arange(300),
        "next to each other": torch.tensor([1.0, 1.0 + 2**-23, 1.0 - 2**-24]).repeat(20),
        "denormal": torch.linspace(-1e-39, 1e-39, 101),
    }.items(),
    ids=lambda item: item[0],
)
def test_thresholds_meant_to_break_a_table(backend, thresholds, dtype):
    name, t = thresholds
    logits = random_logits(2, 1_500, dtype=dtype)
    logits[0, ::7] = t[torch.arange(0, 1_500, 7) % len(t)].clamp(-6e4, 6e4).to(dtype)  # logits among the thresholds
    logits[1, ::5] = (logits[1, ::5] * 2).round() / 2
    check_thresholds(logits, t.expand(2, -1), [1.0, 3.0], backend, name)
    check_thresholds(logits, t.flip(0).expand(2, -1), None, backend, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_thresholds_are_not_rounded_to_the_logits_dtype(backend, dtype):
    """A threshold just above a bf16 logit is above it, though it would round to it."""
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    t = torch.tensor([[2.0 - 1e-6, 2.0, 2.0 + 1e-6]], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    r = fastcalib.ranks(logits, thresholds=t, backend=backend)
    assert r.n_greater.tolist() == [[2, 1, 1]] and r.n_equal.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("m", [1, 16, 24, 100, 900])
def test_ties(backend, m, dtype):
    quantised = (random_logits(2, 2_000) * 2).round().div(2).to(dtype)
    quantised[1, ::2] = torch.where(quantised[1, ::2] == 0, -0.0, quantised[1, ::2])  # -0.0 equals 0.0
    ids = torch.stack([torch.randperm(2_000)[:m] for _ in range(2)])
    check_index(quantised, ids, [1.0], backend, f"M={m}")
    equal = torch.full((1, 2_000), -1.25, dtype=dtype)
    r = fastcalib.ranks(equal, ids[:1], temperature=1.0, backend=backend)
    assert (r.n_greater == 0).all() and (r.n_equal == 1_999).all() and (r.mass_greater == 0).all()
    assert (r.rank("max") == 2_000).all() and (r.rank("min") == 1).all() and (r.rank("average") == 1_000.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_ragged_sets(backend, dtype):
    sizes = [0, 1, 300, 17, 0, 0, 16, 2_500, 5, 0]
    logits = random_logits(2, 5, 2_500, dtype=dtype)
    lists = cases.random_sets(10, 2_500, sizes)
    got = fastcalib.ranks(logits, ValidSets.from_lists(lists), temperature=[1.0, 2.0], backend=backend)
    flat = logits.reshape(10, -1)
    greater, equal, mass = reference.counts(flat, [flat[r, ids] for r, ids in enumerate(lists)], [1.0, 2.0])
    assert got.n_greater.shape == (sum(sizes),)
    assert torch.equal(got.n_greater, greater) and torch.equal(got.n_equal, equal - 1)
    check_mass(got.mass_greater, mass, "ragged")


def test_only_empty_sets(backend):
    got = fastcalib.ranks(random_logits(3, 20), ValidSets.from_lists([[], [], []]), temperature=[1.0], backend=backend)
    assert got.n_greater.shape == (0,) and got.mass_greater.shape == (0, 1)


@pytest.mark.parametrize("temperature", [None, 0.7, [0.7], [0.5, 1.0, 2.0, 4.0, 8.0], torch.tensor([0.5, 1.0, 2.0])])
@pytest.mark.parametrize("m", [1, 16, 30, 600])
def test_masses_at_any_temperature(backend, temperature, m):
    logits = random_logits(3, 2_000)
    ids = torch.stack([torch.randperm(2_000)[:m] for _ in range(3)])
    got = fastcalib.ranks(logits, ids, temperature=temperature, backend=backend)
    if temperature is None:
        assert got.mass_greater is None
        return
    _, _, mass = reference.counts(logits, [logits[r, ids[r]] for r in range(3)], temperature)
    axis = (len(temperature),) if isinstance(temperature, list) else ()
    assert got.mass_greater.shape == (3, m, *axis)
    check_mass(got.mass_greater.reshape(mass.shape), mass, f"{temperature}")
    assert (got.mass_greater[got.n_greater == 0] == 0).all()


@pytest.mark.parametrize("m", [1, 16, 20, 64, 1_000])
def test_cold_and_hot_masses(backend, m):
    logits = random_logits(2, 3_000)
    ids = torch.stack([torch.randperm(3_000)[:m] for _ in range(2)])
    check_index(logits, ids, [1e-3, 0.05, 1e3], backend, f"M={m}")
    check_index(logits + 1e4, ids, [1e-3, 1.0], backend, f"M={m}, offset")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [2, 40])
def test_any_layout(backend, layout, dtype, m):
    logits = random_logits(3, 4, 333, dtype=dtype)
    view = LAYOUTS[layout](logits)
    ids = torch.randint(0, 333, (3, 4, m))
    got = fastcalib.ranks(view, ids, temperature=1.0, backend=backend)
    greater, equal, _ = reference.counts(
        logits.reshape(12, 333), [r[i] for r, i in zip(logits.reshape(12, 333), ids.reshape(12, m))]
    )
    assert torch.equal(got.n_greater.flatten(), greater) and torch.equal(got.n_equal.flatten(), equal - 1)
    assert torch.equal(got.mass_greater, fastcalib.ranks(logits, ids, temperature=1.0, backend=backend).mass_greater)


@pytest.mark.parametrize("m", [3, 40])
def test_ignored_and_padded(backend, m):
    logits = torch.cat([random_logits(4, 900), torch.full((4, 10), INF)], -1)
    ids = torch.stack([torch.randperm(900)[:m] for _ in range(4)])
    want = fastcalib.ranks(logits[:, :900].contiguous(), ids, temperature=[1.0], backend=backend)
    ids[1, 0] = ids[2] = torch.tensor(-7)
    got = fastcalib.ranks(logits, ids, temperature=[1.0], vocab_size=900, ignore_index=-7, backend=backend)
    ignored = ids == -7
    for a, b in zip(got, want):
        assert (a[ignored] == 0).all() and torch.equal(a[~ignored], b[~ignored])


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_shapes(backend, leading):
    logits = random_logits(*leading, 30)
    for shape in (leading, (*leading, 5), (*leading, 0)):
        r = fastcalib.ranks(logits, torch.randint(0, 30, shape), temperature=[1.0, 2.0], backend=backend)
        assert r.n_greater.shape == r.n_equal.shape == shape and r.mass_greater.shape == (*shape, 2)
        r = fastcalib.ranks(logits, thresholds=torch.randn(shape), temperature=1.0, backend=backend)
        assert r.n_greater.shape == r.mass_greater.shape == shape


def test_same_answers_as_statistics_and_no_gradient(backend):
    logits = random_logits(4, 700).requires_grad_()
    ids = torch.randint(0, 700, (4, 9))
    s = fastcalib.statistics(logits, ids, [0.8, 1.0], ranks=True, backend=backend)
    r = fastcalib.ranks(logits, ids, temperature=[0.8, 1.0], backend=backend)
    assert torch.equal(s.n_greater, r.n_greater) and torch.equal(s.n_equal, r.n_equal)
    torch.testing.assert_close(s.mass_greater, r.mass_greater, rtol=4e-6, atol=1e-7)
    assert not any(x.requires_grad for x in r)


def test_rank_names():
    r = fastcalib.ranks(torch.tensor([[3.0, 1.0, 3.0, 3.0, 0.0]]), torch.tensor([[0, 1, 4]]))
    assert r.rank("min").tolist() == [[1, 4, 5]] and r.rank("max").tolist() == [[3, 4, 5]]
    assert r.rank("average").tolist() == [[2.0, 4.0, 5.0]]
    with pytest.raises(ValueError, match=r"min.*max.*average.*dense"):
        r.rank("dense")
