"""Cutoff rules: every kept set against its definition and against transformers' own warpers."""

from __future__ import annotations

import pytest
import torch

from fastcalib import ValidSets
from fastcalib.decoding import (
    PAPER_TEMPERATURES,
    Epsilon,
    Eta,
    KeepAll,
    MinP,
    SizeOracle,
    TopK,
    TopNSigma,
    TopP,
    cutoffs,
    paper_rules,
    parse_rule,
    thresholds,
)

from . import cases, cutoff_reference
from .cases import DTYPES, random_logits
from .checks import assert_within

NAN, INF = torch.nan, torch.inf
RULES = [
    *paper_rules(), TopK(1), TopK(10**9), TopP(0.0), TopP(1.0), TopP(0.999999), MinP(0.0), MinP(1.0),
    Epsilon(3e-4), Epsilon(0.3), Eta(3e-4), Eta(0.02), TopNSigma(0.0), TopNSigma(1.0), TopNSigma(2.5),
]  # fmt: skip
COLD_TO_HOT = [0.01, 0.7, 1.0, 3.0]
# A kept set may differ only by tokens this close to their border: what adding up V probabilities in float64 loses.
EXACT = 1e-11


def check_rows(logits, rules, temperatures, found, sizes, what, *, last=False, close=EXACT, mass_error=2e-6):
    """Thresholds, counts and masses of rows (N, V) that have a softmax, from the definitions."""
    for n, z in enumerate(logits):
        wide = z.to(found.threshold.dtype)
        for k, t in enumerate(temperatures):
            p = cutoff_reference.probabilities(z, t)
            for r, rule in enumerate(rules):
                name = f"{what} row {n} {rule} T={t}"
                keep, distance = cutoff_reference.keeps(z, rule, 1.0 if last else t, sizes[n])
                threshold = found.threshold[n, k, r]
                got = (wide >= threshold) & (z > -INF)
                wrong = got != keep
                assert (distance[wrong] < close).all(), f"{name}: {wrong.sum()} tokens, {distance[wrong].min()} off"
                assert threshold == (-INF if isinstance(rule, KeepAll) else wide[got].min()), f"{name}: threshold"
                assert found.kept[n, k, r] == got.sum(), f"{name}: kept"
                mass = p[got].sum()
                bound = mass_error * mass + 1e-12
                assert_within(found.kept_mass[n, k, r], mass, bound, f"{name}: mass")


def run(logits, rules, temperatures, sets, backend, **options):
    return cutoffs(logits, rules, temperatures, sets=sets, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 2, 31, 700])
def test_kept_sets_by_definition(backend, v, dtype):
    logits = random_logits(3, v, dtype=dtype, seed=v)
    logits[1] = (logits[1] * 2).round() / 2  # ties everywhere
    sizes = [min(s, v) for s in (1, 40, 7)]
    sets = ValidSets.from_lists(cases.random_sets(3, v, sizes))
    found = run(logits, RULES, COLD_TO_HOT, sets, backend)
    check_rows(logits, RULES, COLD_TO_HOT, found, sizes, f"V={v}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_what_is_kept_of_the_sets(backend, dtype):
    logits = random_logits(2, 3, 300, dtype=dtype)
    logits[0, 1, ::3] = -INF
    lists = cases.random_sets(6, 300, [5, 20, 0, 300, 1, 90])
    sets = ValidSets.from_lists(lists)
    weights = torch.rand(sets.values.shape, dtype=torch.float64)
    for counts in (None, torch.randint(0, 9, sets.values.shape), weights):
        c = run(logits, RULES, COLD_TO_HOT, sets, backend, counts=counts)
        flat = {name: value.flatten(0, 1) for name, value in vars(c).items() if name != "keeps"}
        for n, valid in enumerate(lists):
            part = slice(int(sets.offsets[n]), int(sets.offsets[n + 1]))
            weight = torch.ones(len(valid)) if counts is None else counts[part].double()
            z = logits.reshape(6, 300)[n, valid].to(c.threshold.dtype)
            for k, t in enumerate(COLD_TO_HOT):
                p = cutoff_reference.probabilities(logits.reshape(6, 300)[n], t)[valid]
                for r in range(len(RULES)):
                    what = f"set {n} {RULES[r]} T={t}"
                    kept = (z >= flat["threshold"][n, k, r]) & (z > -INF)
                    assert torch.equal(c.keeps[part, k, r], kept), what
                    assert flat["kept_valid"][n, k, r] == kept.sum(), what
                    assert_within(flat["valid_mass"][n, k, r], p[kept].sum(), 4e-6 * p[kept].sum() + 1e-30, what)
                    exact = torch.tensor(1e-13, dtype=torch.float64)  # float64 sums of up to 300 terms
                    assert flat["precision"][n, k, r] == kept.sum() / flat["kept"][n, k, r].double(), what
                    assert_within(flat["recall"][n, k, r], weight[kept].sum().double() / weight.sum(), exact, what)
                    assert_within(flat["token_recall"][n, k, r], kept.sum().double() / len(valid), exact, what)
        assert c.keeps.dtype == torch.bool and c.kept_valid.dtype == torch.int64
        assert c.precision.dtype == c.recall.dtype == c.token_recall.dtype == torch.float64


WARPERS = {
    "TopKLogitsWarper": [("top_k", TopK, 1), ("top_k", TopK, 7), ("top_k", TopK, 500), ("top_k", TopK, 10**6)],
    "TopPLogitsWarper": [("top_p", TopP, p) for p in (0.0, 0.1, 0.5, 0.9, 0.95)],
    "MinPLogitsWarper": [("min_p", MinP, p) for p in (0.0, 0.01, 0.1, 0.5, 1.0)],
    "EpsilonLogitsWarper": [("epsilon", Epsilon, e) for e in (3e-4, 0.02, 0.9)],
    "EtaLogitsWarper": [("epsilon", Eta, e) for e in (3e-4, 0.02, 0.9)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.dtype_id)
@pytest.mark.parametrize("warper", WARPERS)
def test_sets_are_those_of_transformers(backend, warper, dtype):
    """In float64 to the token; in float32, where transformers works, but for tokens its roundings move over the border.

    transformers takes scores in float32 (generate() casts them) and divides them by T; its top-p cuts through tied
    tokens.
    """
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(4, 1_500, dtype=dtype, seed=3)
    logits[1] = (logits[1] * 2).round() / 2
    logits[2, ::5] = -INF
    logits[3] = 0.25
    for name, rule_type, value in WARPERS[warper]:
        rule, warp = rule_type(value), getattr(logits_process, warper)(**{name: value})
        found = run(logits, [rule], COLD_TO_HOT, None, backend)
        for k, t in enumerate(COLD_TO_HOT):
            scores = logits.double() / t
            ours = (logits.to(found.threshold.dtype) >= found.threshold[:, k]) & (logits > -INF)
            distance = torch.stack([cutoff_reference.keeps(z, rule, t)[1] for z in logits])
            for precision, close in ((torch.float64, EXACT), (torch.float32, None)):
                theirs = warp(None, scores.to(precision)) > -INF
                # 6e-8 of a score for its own rounding, and float32's cumsum of 1,500 probabilities
                near = distance < (close or 1e-6 + 2e-7 * scores[scores > -INF].abs().max())
                different = (ours != theirs) & ~near
                if warper == "TopPLogitsWarper":
                    tied = logits.to(found.threshold.dtype) == found.threshold[:, k]
                    assert not (different & theirs).any(), f"{rule} T={t}: they keep more"
                    different &= ~tied
                assert not different.any(), f"{rule} T={t} {precision}: {different.nonzero()[:3].tolist()}"


def test_top_n_sigma_by_hand():
    """No class of transformers: Tang et al. 2024 (arXiv 2411.07641) keep max - n std and above, std as torch.std."""
    z = torch.tensor([[5.0, 4.0, 1.0, 0.0, -INF]])
    std = z[0, :4].std()
    for n, kept in ((0.4, 1), (0.5, 2), (1.6, 2), (1.7, 3), (9.0, 4)):
        assert cutoffs(z, [TopNSigma(n)], 0.3).kept.item() == kept, n
        assert kept == (z >= 5 - n * std).sum()


def test_temperature_last(backend):
    """The rule looks at softmax(z): the same tokens at every T, their masses at T."""
    logits = random_logits(3, 500)
    rules = [TopP(0.9), MinP(0.1), Epsilon(0.01), Eta(0.02), TopK(5), KeepAll()]
    found = cutoffs(logits, rules, COLD_TO_HOT, order="temperature-last", backend=backend)
    check_rows(logits, rules, COLD_TO_HOT, found, [0] * 3, "last", last=True)
    assert (found.threshold == found.threshold[:, :1]).all()
    first = cutoffs(logits, rules, 1.0, backend=backend)
    assert torch.equal(found.threshold[:, 2], first.threshold) and torch.equal(found.kept_mass[:, 2], first.kept_mass)


def test_shapes(backend):
    logits, rules = random_logits(2, 3, 40), [TopK(3), SizeOracle()]
    sets = ValidSets.from_lists(cases.random_sets(6, 40, [2, 5]))
    by_row = torch.rand(2, 3) + 0.5
    for temperature, axis in ((0.7, ()), ([0.7], (1,)), ([0.5, 2.0], (2,)), (by_row, ())):
        c = cutoffs(logits, rules, temperature, sets=sets, backend=backend)
        for name, value in vars(c).items():
            assert value.shape == ((21,) if name == "keeps" else (2, 3)) + axis + (2,), name
        for n in range(6):
            t = temperature if not isinstance(temperature, torch.Tensor) else temperature.flatten()[n].item()
            alone = cutoffs(logits.flatten(0, 1)[n], rules, t, sets=ValidSets.from_lists([sets.to_lists()[n]]))
            assert_within(c.kept_mass.flatten(0, 1)[n], alone.kept_mass, 1e-6, "mass")
    none = cutoffs(logits[:0], rules, [1.0], sets=ValidSets.from_lists([]), backend=backend)
    assert none.kept.shape == none.precision.shape == (0, 3, 1, 2) and none.keeps.shape == (0, 1, 2)
    empty = cutoffs(logits, rules, 1.0, sets=ValidSets.from_lists([[]] * 6), backend=backend)
    assert (empty.precision == 0).all() and empty.recall.isnan().all() and empty.token_recall.isnan().all()
    assert (empty.kept[..., 1] == 1).all() and (empty.valid_mass == 0).all()
    assert torch.equal(thresholds(logits, rules, 0.7, sets=sets, backend=backend), cutoffs(
        logits, rules, 0.7, sets=sets, backend=backend).threshold)  # fmt: skip


def test_padded_columns_are_not_kept(backend):
    logits = torch.cat([random_logits(2, 60), torch.tensor([[INF, 99.0], [NAN, 99.0]])], 1)
    sets = ValidSets.from_lists([[0, 59], [3]])
    rules = [KeepAll(), TopK(100), TopP(0.9), TopNSigma(1.0), SizeOracle()]
    a = cutoffs(logits, rules, [0.7], sets=sets, vocab_size=60, backend=backend)
    b = cutoffs(logits[:, :60].contiguous(), rules, [0.7], sets=sets, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))
    assert (a.kept[:, 0, :2] == 60).all()


def test_size_oracle_is_top_k_told_the_size(backend):
    logits = (random_logits(5, 90) * 2).round()
    lists = cases.random_sets(5, 90, [1, 4, 30, 90, 7])
    told = cutoffs(logits, [SizeOracle()], sets=ValidSets.from_lists(lists), backend=backend)
    for n, valid in enumerate(lists):
        assert told.threshold[n, 0] == cutoffs(logits[n], [TopK(len(valid))], backend=backend).threshold[0]
    assert (told.precision[3] == 1).all() and (told.recall[3] == 1).all()


@pytest.mark.parametrize(
    "rule", [*RULES, TopP(1 / 3), Epsilon(1e-12), TopNSigma(1e-300), SizeOracle(), KeepAll()], ids=str
)
def test_names_round_trip(rule):
    assert parse_rule(str(rule)) == rule and parse_rule(f" {str(rule).replace('=', ' = ')} ") == rule


def test_grid_of_the_paper():
    assert len(paper_rules()) == 17 and len(set(paper_rules())) == 17
    assert len(PAPER_TEMPERATURES) == 12 and sorted(PAPER_TEMPERATURES) == list(PAPER_TEMPERATURES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("top_q=3", "top_q=3' is no cutoff rule; there are top_k=NUMBER, .*none"),
        ("top_k", "no cutoff rule"),
        ("none=1", "no cutoff rule"),
        ("", "no cutoff rule"),
        ("top_k=2.5", "top_k=2.5"),
        ("top_k=0", "top_k must be a positive int, got 0"),
        ("top_p=1.5", r"top_p must be a number in \[0, 1\], got 1.5"),
        ("top_p=nan", "top_p must be"),
        ("min_p=-0.1", "min_p must be"),
        ("epsilon=0", "epsilon must be"),
        ("eta=1", "eta must be"),
        ("top_n_sigma=inf", "top_n_sigma must be a finite number"),
    ],
)
def test_names_that_are_none(text, words):
    with pytest.raises(ValueError, match=words):
        parse_rule(text)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rules": TopK(3)}, TypeError, r"put it in a list"),
        ({"rules": []}, ValueError, "rules is empty"),
        ({"rules": [KeepAll(), "top_k=3"]}, TypeError, r"rules\[1\] is 'top_k=3'"),
        ({"rules": [SizeOracle()]}, ValueError, "needs sets"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": [1.0, NAN]}, ValueError, "temperature must be positive"),
        ({"order": "first"}, ValueError, "temperature-first"),
        ({"sets": torch.tensor([0])}, TypeError, "sets must be a ValidSets"),
        ({"sets": ValidSets.from_lists([[0], [1]])}, ValueError, "sets holds 2 sets for 1 rows"),
        ({"sets": ValidSets.from_lists([[0, 9]])}, ValueError, "^sets: entry 1 of set 0 .* is 9, outside"),
        ({"counts": torch.ones(1)}, ValueError, "need sets"),
        ({"sets": ValidSets.from_lists([[0]]), "counts": torch.ones(2)}, ValueError, "counts must have shape"),
        ({"logits": [1.0]}, TypeError, "logits must be"),
        ({"vocab_size": 9}, ValueError, "vocab_size must lie"),
    ],
)
def test_errors(backend, change, error, words):
    arguments = {"logits": torch.zeros(1, 4), "rules": [KeepAll()], "backend": backend} | change
    with pytest.raises(error, match=words):
        cutoffs(**arguments)


def test_rules_check_their_numbers():
    for rule, value in ((TopK, 1.0), (TopK, True), (TopP, "0.9"), (MinP, None), (Epsilon, 0.0), (TopNSigma, -1.0)):
        with pytest.raises(ValueError, match="must be"):
            rule(value)
