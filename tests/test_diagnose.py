"""diagnose: what order, cutoffs and shape find one by one, and plain float64 where these are themselves rounded."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch

from fastcalib import ValidSets
from fastcalib.decoding import Epsilon, Eta, TopNSigma, TopP, cutoffs, paper_rules
from fastcalib.diagnostics import diagnose, order, shape

from . import cases
from .cases import DTYPES, LAYOUTS, random_logits
from .checks import assert_within

NAN, INF = torch.nan, torch.inf
RULES = [*paper_rules(), Epsilon(3e-4), Eta(3e-4), TopNSigma(1.0)]
PARTS = ("order", "cutoffs", "shape")
OF_TOKENS = ("n_greater", "n_equal", "log_prob")


def fields(d):
    found = {(p, f.name): getattr(getattr(d, p), f.name) for p in PARTS for f in dataclasses.fields(getattr(d, p))}
    return found | {("tokens", name): getattr(d, name) for name in OF_TOKENS}


def assert_same_bits(a, b, what):
    for name, x in fields(a).items():
        y = fields(b)[name]
        assert x.shape == y.shape and torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)), f"{what} {name}"


def check(logits, sets, rules, temperature, what, *, counts=None, vocab_size=None, **options):
    """Ranks and cutoffs bit for bit; shape as far as the float32 statistics behind `shape` go."""
    got = diagnose(logits, sets, rules, temperature, counts=counts, vocab_size=vocab_size, **options)
    common = {"counts": counts, "vocab_size": vocab_size, "backend": options.get("backend", "auto")}
    rule_order = options.get("order", "temperature-first")
    parts = (
        order(logits, sets, precision=options.get("precision", 0.8), **common),
        cutoffs(logits, rules, temperature, sets=sets, order=rule_order, **common),
        shape(logits, sets, temperature=temperature, draws=options.get("draws"), **common),
    )
    for part, want in zip(PARTS[:2], parts):
        for f in dataclasses.fields(want):
            a, b = getattr(getattr(got, part), f.name), getattr(want, f.name)
            assert a.shape == b.shape and a.dtype == b.dtype, f"{what} {part}.{f.name}: {a.shape}, {a.dtype}"
            if part == "order" and f.name in ("rank", "token"):
                b = torch.where(torch.isnan(want.precision), a, b)  # of rows without an order, as they happen to be
            assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)), f"{what} {part}.{f.name}"
    # 2e-6 is the promise for a log-probability of ordinary size. Groups: a mass to 0.016^5 / 5! = 9e-12, an entropy, a
    # derivative of it, to 0.016^5 / 4! = 4.4e-11 (kSeriesLimit in csrc/cpu/grouped.h).
    rtol, atol = (1e-10, 5e-11) if logits.dtype == torch.float64 else (2e-5, 2e-6)
    for f in dataclasses.fields(parts[2]):
        a, b = getattr(got.shape, f.name), getattr(parts[2], f.name)
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, f=f: f"{what} {f.name}: {m}"
        )
    check_tokens(got, logits[..., :vocab_size], sets, temperature, common["backend"], what)
    return got


def check_tokens(got, logits, sets, temperature, backend, what):
    """What is known of each valid token, against plain float64. No NaN among the logits."""
    flat, ids = logits.flatten(0, -2).double(), sets.values
    several = isinstance(temperature, list)
    t = torch.as_tensor(temperature, dtype=torch.float64)
    t = t.expand(len(flat), -1) if several else t.reshape(-1, 1).expand(len(flat), 1)
    for row, z in enumerate(flat):
        part = slice(int(sets.offsets[row]), int(sets.offsets[row + 1]))
        chosen = z[ids[part], None]
        assert torch.equal(got.n_greater[part], (z > chosen).sum(1)), f"{what} n_greater of row {row}"
        assert torch.equal(got.n_equal[part], (z == chosen).sum(1) - 1), f"{what} n_equal of row {row}"
        want = (z / t[row, :, None]).log_softmax(-1)[:, ids[part]].T
        # As above, but no sum of them: the logarithm of a mass on the C++ backend, elsewhere the promise of statistics.
        bound = 5e-11 + 1e-14 * want.abs()
        if backend != "cpp" and logits.dtype != torch.float64:
            bound = 2e-6 * want.abs().clamp(min=1.0)
        found = got.log_prob[part] if several else got.log_prob[part, None]
        assert found.dtype == torch.float64
        assert_within(found, want, bound, f"{what} log_prob of row {row}")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [50, 701, 20_000])
def test_the_three_functions_at_once(backend, v, dtype):
    if backend == "eager" and v > 701:
        pytest.skip("the same three calls")
    logits = random_logits(2, 3, v, dtype=dtype, seed=v)
    logits[0, 1] = (logits[0, 1] * 2).round() / 2  # ties
    logits[1, 1, ::2] = -INF
    sets = ValidSets.from_lists(cases.random_sets(6, v, [5, 0, 40, 1, 17, 30]))
    counts = torch.arange(1, sets.values.numel() + 1)
    check(logits, sets, RULES, [0.3, 1.0, 2.5], f"V={v}", backend=backend)
    check(
        logits, sets, RULES[:3], 0.7, "one temperature, weights", counts=counts, precision=0.5, draws=3, backend=backend
    )
    by_row = torch.rand(2, 3, dtype=torch.float64) + 0.5
    check(logits, sets, [TopP(0.9)], by_row, "by row", counts=counts.double() / 3, backend=backend)
    last = {"order": "temperature-last", "vocab_size": v - 1}
    if int(sets.values.max()) < v - 1:
        check(logits, sets, RULES, [0.3, 2.5], "last, padding", backend=backend, **last)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [701, 17_003])
def test_hostile_rows(cpp_backend, v, dtype):
    for rows in (cases.defined_rows(v, dtype), cases.undefined_rows(v, dtype)):
        logits = torch.stack(list(rows.values()))
        sets = ValidSets.from_lists(cases.random_sets(len(logits), v, [40]))  # more than a sort takes for a few
        got = diagnose(logits, sets, RULES, [0.7, 1.0], backend=cpp_backend)
        want = order(logits, sets, backend=cpp_backend)
        for name in ("rank", "token", "precision", "recall", "auroc", "order_calibrated"):
            a, b = getattr(got.order, name), getattr(want, name)
            if name == "token":
                a, b = (torch.where(want.precision.isnan(), 0, x) for x in (a, b))
            assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)), name
    assert got.log_prob.isnan().all()
    assert got.shape.entropy.isnan().all() and got.shape.kl.isnan().all() and (got.cutoffs.kept == 0).all()


def test_ranks_next_to_infinities_and_nan(cpp_backend):
    logits = torch.tensor(
        [[INF, 1.0, 1.0, -INF, -INF], [-INF] * 5, [NAN, 1.0, 2.0, 3.0, 4.0], [2.0, -INF, 1.0, 2.0, -INF]]
    )
    sets = ValidSets.from_lists([[0, 1, 3], [4, 2], [1, 0], [1, 3]])
    d = diagnose(logits, sets, RULES, backend=cpp_backend)
    assert d.order.rank.tolist() == [1, 3, 5, 5, 5, -1, -1, 2, 5]
    assert d.n_greater.tolist() == [0, 1, 3, 0, 0, -1, -1, 3, 0]  # in the order of the sets
    assert d.n_equal.tolist() == [0, 1, 1, 4, 4, 0, 0, 1, 1]
    assert d.log_prob[:7].isnan().all() and d.log_prob[7] == -INF
    assert d.order.order_calibrated.tolist() == [False, True, False, False]
    assert d.shape.kl.isnan().tolist() == [True, True, True, False] and d.shape.kl[3] == INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_ranks_among_a_million_ties(cpp_backend, dtype):
    """Two values, and all but one equal: one group holds nearly the whole row."""
    logits = torch.full((3, 40_000), -2.0, dtype=dtype)
    logits[0, ::3] = 1.0
    logits[1, 17] = 5.0
    check(logits, ValidSets.from_lists([[0, 1], [17, 18], [5]]), RULES, [0.5, 3.0], "ties", backend=cpp_backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_shape_is_exact_whatever_the_temperature(cpp_backend, dtype):
    """Log-probabilities in the thousands keep the digits that float32 statistics would have lost."""
    logits = random_logits(3, 20_000, dtype=dtype)
    lists = cases.random_sets(3, 20_000, [20])
    temperatures = [0.01, 0.3, 1.0, 3.0]
    got = diagnose(logits, ValidSets.from_lists(lists), RULES[:1], temperatures, backend=cpp_backend).shape
    for row, ids in enumerate(lists):
        for k, t in enumerate(temperatures):
            log_p = (logits[row].double() / t).log_softmax(-1)
            of_valid, q = log_p[ids], log_p[ids].log_softmax(-1)
            n = len(ids)
            want = {
                "kl": -math.log(n) - of_valid.mean(), "kl_valid": -math.log(n) - q.mean(),
                "valid_mass": of_valid.exp().sum(), "evenness": torch.special.entr(q.exp()).sum().exp() / n,
                "entropy": torch.special.entr(log_p.exp()).sum(),
                "expected_distinct": -torch.expm1(n * torch.log1p(-of_valid.exp())).sum(),
            }  # fmt: skip
            for name, value in want.items():
                # as in check(); of a sum of 20 masses, and what is in the thousands has it relatively
                close = pytest.approx(value.item(), rel=2e-10, abs=5e-11)
                assert getattr(got, name)[row, k].item() == close, (name, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=cases.dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(cpp_backend, layout, dtype):
    logits = random_logits(3, 4, 333, dtype=dtype)
    sets = ValidSets.from_lists(cases.random_sets(12, 333, [5, 0, 40]))
    a, b = (diagnose(z, sets, RULES, [0.7], backend=cpp_backend) for z in (LAYOUTS[layout](logits), logits))
    assert_same_bits(a, b, layout)


def test_same_bits_alone_in_company_and_on_any_number_of_threads(cpp_backend):
    logits, lists = random_logits(9, 20_000), cases.random_sets(9, 20_000, [30])
    together = diagnose(logits, ValidSets.from_lists(lists), RULES, [0.5, 2.0], backend=cpp_backend)
    torch.set_num_threads(3)
    again = diagnose(logits, ValidSets.from_lists(lists), RULES, [0.5, 2.0], backend=cpp_backend)
    assert_same_bits(together, again, "3 threads")
    for n in (0, 5, 8):
        alone = diagnose(logits[n], ValidSets.from_lists([lists[n]]), RULES, [0.5, 2.0], backend=cpp_backend)
        for part, name in (("order", "auroc"), ("cutoffs", "kept_mass"), ("shape", "kl"), ("shape", "entropy")):
            a, b = getattr(getattr(alone, part), name), getattr(getattr(together, part), name)[n]
            assert torch.equal(a.reshape(b.shape), b), name


@pytest.mark.parametrize("chunk", [1, 30, 100])
def test_blocks_of_sets_do_not_change_a_bit(cpp_backend, chunk, monkeypatch):
    logits, t = random_logits(8, 60), torch.rand(8, dtype=torch.float64) + 0.5
    sets = ValidSets.from_lists(cases.random_sets(8, 60, [5, 0, 40, 1, 0, 0, 17, 3]))
    counts = torch.arange(1, sets.values.numel() + 1)
    whole = [diagnose(logits, sets, RULES, x, counts=counts, backend=cpp_backend) for x in (t, [0.5, 1.0])]
    shapes = [shape(logits, sets, counts=counts, temperature=x, backend=cpp_backend) for x in (t, [0.5, 1.0])]
    monkeypatch.setattr(importlib.import_module("fastcalib.decoding"), "CHUNK", chunk)
    monkeypatch.setattr(importlib.import_module("fastcalib.diagnostics._segments"), "CHUNK", chunk)
    for x, want, alone in zip((t, [0.5, 1.0]), whole, shapes):
        assert_same_bits(
            diagnose(logits, sets, RULES, x, counts=counts, backend=cpp_backend), want, f"blocks of {chunk}"
        )
        again = shape(logits, sets, counts=counts, temperature=x, backend=cpp_backend)
        for f in dataclasses.fields(again):
            assert torch.equal(getattr(again, f.name).nan_to_num(-7.0), getattr(alone, f.name).nan_to_num(-7.0)), f.name


def test_nothing_to_diagnose(backend):
    d = diagnose(torch.zeros(0, 7), ValidSets.from_lists([]), RULES, [1.0, 2.0], backend=backend)
    assert d.log_prob.shape == (0, 2) and d.n_greater.shape == (0,)
    assert d.order.auroc.shape == (0,) and d.cutoffs.kept.shape == (0, 2, len(RULES)) and d.shape.kl.shape == (0, 2)
    logits = torch.randn(2, 7, requires_grad=True)
    d = diagnose(logits, ValidSets.from_lists([[], []]), RULES, backend=backend)
    assert (
        d.log_prob.shape == (0,) and d.shape.valid_mass.tolist() == [0, 0] and d.cutoffs.keeps.shape == (0, len(RULES))
    )
    assert not any(x.requires_grad for x in fields(d).values())


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"sets": [[1]]}, TypeError, "sets must be a ValidSets, got list"),
        ({"draws": 0}, ValueError, "draws must be an int >= 1"),
        ({"precision": 0}, ValueError, r"precision must lie in \(0, 1\]"),
        ({"counts": torch.ones(2)}, ValueError, r"shape \(3,\)"),
        ({"counts": torch.tensor([1.0, 1.0, 0.0])}, ValueError, "counts of set 1 add up to 0"),
        ({"sets": ValidSets.from_lists([[9], [0]])}, ValueError, r"^sets: entry 0 of set 0 .* is 9, outside \[0, 4\)"),
        ({"sets": ValidSets.from_lists([[0]])}, ValueError, "^sets holds 1 sets for 2 rows"),
        ({"rules": []}, ValueError, "rules is empty"),
        ({"order": "first"}, ValueError, "order must be"),
        ({"temperature": 0.0}, ValueError, "temperature"),
    ],
)
def test_mistakes_are_named(backend, arguments, error, words):
    call = {"logits": torch.zeros(2, 4), "sets": ValidSets.from_lists([[0, 1], [2]]), "rules": RULES} | arguments
    with pytest.raises(error, match=words):
        diagnose(**call, backend=backend)
