"""cutoffs at the sizes of real vocabularies, on rows meant to break it, in every layout; and by search."""

from __future__ import annotations

import os

import pytest
import torch
from torch.library import opcheck

from fastcalib import ValidSets
from fastcalib.decoding import (
    Epsilon,
    Eta,
    TopNSigma,
    TopP,
    cutoffs,
    paper_rules,
)  # fmt: skip
from fastcalib.ops._cutoff_search import key_of, search, value_of

from . import cases
from .cases import DTYPES, LAYOUTS, random_logits
from .checks import assert_within
from .conftest import CPP_IS_LIVE
from .test_decoding import check_rows

NAN, INF = torch.nan, torch.inf
RULES = [*paper_rules(), TopP(0.9999), Epsilon(3e-4), Eta(3e-4), TopNSigma(1.0)]
# The float32 result's own rounding, twice; sums in double add nothing to that. float64: their error, 1e-11 promised.
MASS = {torch.float64: 1e-11}


def assert_like_eager(logits, temperatures, sets, backend, what, **options):
    """Every field as the reference has it: thresholds and counts exactly, masses to their rounding."""
    got = cutoffs(logits, RULES, temperatures, sets=sets, backend=backend, **options)
    want = cutoffs(logits, RULES, temperatures, sets=sets, backend="eager", **options)
    for name in ("threshold", "kept", "keeps", "kept_valid", "precision", "recall", "token_recall"):
        a, b = getattr(got, name), getattr(want, name)
        if not torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)):
            at = (a.nan_to_num(-7.0) != b.nan_to_num(-7.0)).nonzero()[0].tolist()
            raise AssertionError(f"{what} {name}{at} {RULES[at[-1]]}: {a[tuple(at)]}, expected {b[tuple(at)]}")
    unit = MASS.get(logits.dtype, 1.3e-7)
    assert_within(got.kept_mass, want.kept_mass, unit * want.kept_mass.nan_to_num(), f"{what} mass")
    # the reference takes valid masses from float32 statistics, and flushes what is below the smallest number
    slack = 4e-6 if logits.dtype != torch.float64 else 1e-11
    assert_within(got.valid_mass, want.valid_mass, slack * want.valid_mass.nan_to_num() + 1e-30, f"{what} valid mass")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [16_384, 32_000, 151_936])
def test_vocabularies_of_real_models(cpp_backend, v, dtype):
    if v > 100_000 and dtype == torch.float64:
        pytest.skip("the code of float32 in another type; 32,000 tell")
    logits = random_logits(2, v, dtype=dtype, seed=v)
    logits[1] = torch.where(random_logits(v, seed=1) > 6, -INF, logits[1].double() / 4 + 30).to(dtype)
    sets = ValidSets.from_lists(cases.random_sets(2, v, [50, 3_000]))
    temperatures = [0.01, 3.0] if v > 100_000 else [0.01, 0.3, 1.0, 3.0]
    assert_like_eager(logits, temperatures, sets, cpp_backend, f"V={v}")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
# Not a multiple of 10: a row of denormals is uniform, and p would lie on a border to the last bit.
@pytest.mark.parametrize("v", [701, 17_003])
def test_hostile_rows(cpp_backend, v, dtype):
    rows = cases.defined_rows(v, dtype)
    logits = torch.stack(list(rows.values()))
    sets = ValidSets.from_lists(cases.random_sets(len(rows), v, [9]))
    for temperatures in ([0.05, 1.0, 30.0], [1e-3]):
        assert_like_eager(logits, temperatures, sets, cpp_backend, "hostile")
    undefined = torch.stack(list(cases.undefined_rows(v, dtype).values()))
    sets = ValidSets.from_lists(cases.random_sets(len(undefined), v, [9]))
    c = cutoffs(undefined, RULES, [1.0], sets=sets, backend=cpp_backend)
    assert (c.kept == 0).all() and (c.kept_valid == 0).all() and not c.keeps.any()
    for name in ("threshold", "kept_mass", "valid_mass", "precision", "recall", "token_recall"):
        assert getattr(c, name).isnan().all(), name


def test_undefined_rows_of_the_reference():
    undefined = torch.stack(list(cases.undefined_rows(300, torch.float32).values()))
    sets = ValidSets.from_lists(cases.random_sets(len(undefined), 300, [9]))
    c = cutoffs(undefined, RULES, [1.0], sets=sets, backend="eager")
    assert (c.kept == 0).all() and c.threshold.isnan().all() and c.precision.isnan().all() and not c.keeps.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_borders_among_a_million_ties(cpp_backend, dtype):
    """Two values, and all but one equal: one group holds nearly the whole row."""
    logits = torch.full((3, 40_000), -2.0, dtype=dtype)
    logits[0, ::3] = 1.0
    logits[1, 17] = 5.0
    sets = ValidSets.from_lists([[0, 1], [17, 18], [5]])
    assert_like_eager(logits, [0.01, 1.0, 3.0], sets, cpp_backend, "ties")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=cases.dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(cpp_backend, layout, dtype):
    logits = random_logits(3, 4, 333, dtype=dtype)
    sets = ValidSets.from_lists(cases.random_sets(12, 333, [5, 0, 40]))
    a, b = (cutoffs(z, RULES, [0.7], sets=sets, backend=cpp_backend) for z in (LAYOUTS[layout](logits), logits))
    assert all(torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) for x, y in zip(vars(a).values(), vars(b).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_same_bits_alone_in_company_and_on_any_number_of_threads(cpp_backend, dtype):
    logits = random_logits(9, 20_000, dtype=dtype)
    lists = cases.random_sets(9, 20_000, [30])
    together = cutoffs(logits, RULES, [0.5, 2.0], sets=ValidSets.from_lists(lists), backend=cpp_backend)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = cutoffs(logits, RULES, [0.5, 2.0], sets=ValidSets.from_lists(lists), backend=cpp_backend)
        assert all(torch.equal(x, y) for x, y in zip(vars(together).values(), vars(again).values())), threads
    for n in (0, 5, 8):
        alone = cutoffs(logits[n], RULES, [0.5, 2.0], sets=ValidSets.from_lists([lists[n]]), backend=cpp_backend)
        for name in ("threshold", "kept", "kept_mass", "valid_mass", "recall"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[n]), name


def test_logits_are_not_written_to(cpp_backend):
    logits = random_logits(2, 3_000)
    before = logits.clone()
    c = cutoffs(logits.requires_grad_(), RULES, 1.0, sets=ValidSets.from_lists([[1], [2]]), backend=cpp_backend)
    assert torch.equal(logits, before) and not any(v.requires_grad for v in vars(c).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_search_finds_the_same(dtype):
    """What GPU backends run, here on the CPU's ranks and statistics, whose masses are float32 sums."""
    logits = random_logits(5, 600, dtype=dtype, seed=2)
    logits[1] = (logits[1] * 2).round() / 2
    logits[2, ::2] = -INF
    logits[3, 5] = NAN
    coded = [(rule.code, rule.value) for rule in RULES]
    sizes = torch.tensor([1, 5, 400, 9, 30])
    by_row = torch.tensor([0.01, 0.7, 1.0, 2.0, 3.0], dtype=torch.float64)
    for temperature, last in (([0.01, 0.7, 3.0], False), ([0.7, 3.0], True), (by_row, False)):
        got = search(logits, coded, temperature, sizes, last, "auto")
        assert got[0][3].isnan().all() and got[2][3].isnan().all() and (got[1][3] == 0).all()
        rows = [0, 1, 2, 4]
        for n in rows if isinstance(temperature, torch.Tensor) else [slice(None)]:
            chosen = rows if isinstance(n, slice) else [n]
            found = type("Found", (), {k: v[chosen] for k, v in zip(("threshold", "kept", "kept_mass"), got)})
            t = temperature if isinstance(n, slice) else [by_row[n].item()]
            close = 3e-6 if dtype != torch.float64 else 1e-11
            check_rows(logits[chosen], RULES, t, found, sizes[chosen].tolist(), "search", last=last, close=close)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_keys_are_in_the_order_of_the_numbers(dtype):
    big, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = torch.tensor([-INF, -big, -1.5, -1.0, -tiny, -0.0, 0.0, tiny, 1.0, big, INF], dtype=dtype)
    keys = key_of(values)
    assert (keys.diff() > 0).all() and torch.equal(value_of(keys, dtype), values)


@pytest.mark.skipif(not CPP_IS_LIVE, reason="the C++ extension is not built")
def test_opcheck():
    sets = ValidSets.from_lists([[4, 3], [], [39]])
    rules = torch.tensor([(int(r.code), r.value) for r in RULES], dtype=torch.float64)
    t = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    op = torch.ops.fastcalib.cutoffs.default
    counts = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    opcheck(op, (random_logits(3, 40).requires_grad_(), t, rules, False, sets.values, sets.offsets, counts, True, 40))
    opcheck(op, (random_logits(3, 40), t, rules, False, sets.values, sets.offsets, None, True, 40, True))
    opcheck(op, (random_logits(3, 40, dtype=torch.bfloat16), t, rules[1:2], True, None, None, None, False, 38))


@pytest.mark.skipif(not CPP_IS_LIVE, reason="the C++ extension is not built")
@pytest.mark.parametrize("bad", [-1, 40, -(2**40)])
def test_the_operation_reads_no_logit_of_a_bad_id(bad):
    """The door lets none in, but cannot look while it is being compiled. -1 used to pass, as an id to ignore."""
    rules = torch.tensor([(int(rule.code), rule.value) for rule in RULES], dtype=torch.float64)
    values, offsets = torch.tensor([4, bad]), torch.tensor([0, 1, 2])
    t = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^sets: entry 0 of set 1 \(values\[1\]\) is {bad}, outside \[0, 40\)"):
        torch.ops.fastcalib.cutoffs(random_logits(2, 40), t, rules, False, values, offsets, None, True, 40)


def test_memory_is_of_the_row_not_of_the_batch():
    """Beyond the results: one row in order and its groups for each thread, about a megabyte at V = 151,936."""
    resource = pytest.importorskip("resource")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer holds on to freed memory")
    logits = random_logits(4, 151_936).repeat(40, 1)
    cutoffs(logits[:2], RULES[:16], [1.0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cutoffs(logits, RULES[:16], [1.0])
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert extra < 0.05 * logits.nbytes, f"{extra / 1e6:.1f} MB"
