"""Validity, diversity and compounding of whole answers against an enumeration of all outputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcalib
from fastcalib.answer_trie import AnswerTrie
from fastcalib.diagnostics.sequence import (
    answer_log_probs,
    at_nodes,
    at_prefixes,
    compounding,
    log_valid_mass,
    sequence,
    truncated_log_prob,
)

from .trie_reference import END, answer_sets, exp_entropy, prefixes_of, walk

VOCABULARY = [0, 1, 2, 3, END]
# float64 sums of a few dozen terms in another order
EXACT = {"rtol": 1e-11, "atol": 1e-14}


def close(got, want):
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64), **EXACT
    )


@st.composite
def models(draw):
    """Answers, and at every prefix a distribution over the vocabulary and a kept set."""
    answers = [(*a, END) for a in draw(answer_sets())]
    tables, kept = {}, {}
    for prefix in prefixes_of(answers):
        if prefix not in answers:
            weights = draw(st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(any))
            tables[prefix] = {t: w / sum(weights) for t, w in zip(VOCABULARY, weights) if w}
            kept[prefix] = draw(st.sets(st.sampled_from(VOCABULARY)))
    return answers, tables, kept


def node_columns(trie, tables, kept):
    """Node-aligned log p, kept tokens, kept counts and kept masses."""
    log_prob, keeps = torch.zeros(len(trie), dtype=torch.float64), torch.ones(len(trie), dtype=torch.bool)
    count, mass = torch.zeros(len(trie), dtype=torch.int64), torch.zeros(len(trie), dtype=torch.float64)
    for node in range(len(trie)):
        prefix = tuple(trie.prefix(node))
        if node:
            p = tables[prefix[:-1]].get(prefix[-1], 0.0)
            log_prob[node] = math.log(p) if p else -math.inf
            keeps[node] = prefix[-1] in kept[prefix[:-1]]
        if prefix in kept:
            count[node] = len(kept[prefix])
            mass[node] = sum(tables[prefix].get(t, 0.0) for t in kept[prefix])
    return log_prob, keeps, count, mass


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(models())
def test_against_every_output(model):
    answers, tables, kept = model
    trie = AnswerTrie.from_token_ids(answers)
    log_prob, keeps, _, mass = node_columns(trie, tables, kept)
    depth = trie.max_depth
    outputs = dict(walk(tables, depth))
    check_sequence(trie, log_prob, [outputs.get(a, 0.0) for a in answers])

    for node, log_mass in enumerate(log_valid_mass(trie, log_prob).tolist()):
        prefix = tuple(trie.prefix(node))
        onward = {p[len(prefix) :]: t for p, t in tables.items() if p[: len(prefix)] == prefix}
        after = dict(walk(onward, depth))
        close(math.exp(log_mass), sum(after.get(a[len(prefix) :], 0.0) for a in answers if a[: len(prefix)] == prefix))

    # The model under the rule draws from the kept tokens alone, renormalised; where none has mass it ends, invalid.
    cut = {
        p: {t: q / sum(t_[k] for k in kept[p] if k in t_) for t, q in t_.items() if t in kept[p]}
        for p, t_ in tables.items()
    }
    outputs = dict(walk(cut, depth))
    check_sequence(trie, truncated_log_prob(trie, log_prob, keeps, mass), [outputs.get(a, 0.0) for a in answers])


def check_sequence(trie, log_prob, probabilities):
    result = sequence(trie, log_prob)
    close(answer_log_probs(trie, log_prob).exp(), probabilities)
    total = math.fsum(probabilities)
    close(result.validity, total)
    if total:
        close(result.log_validity, math.log(total))
        close(result.diversity, exp_entropy(probabilities) / len(probabilities))
        close(result.entropy, math.log(exp_entropy(probabilities)))
    else:
        assert result.log_validity == -math.inf and result.diversity.isnan() and result.entropy.isnan()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(models())
def test_compounding_against_every_output(model):
    """Theorem E.1, each side by enumeration: draws from the kept sets, and answers whose tokens are all kept."""
    answers, tables, kept = model
    trie = AnswerTrie.from_token_ids(answers)
    _, keeps, count, _ = node_columns(trie, tables, kept)
    result = compounding(trie, keeps, count)
    evenly = {prefix: {t: 1 / len(s) for t in s} for prefix, s in kept.items()}
    beginnings = {a[:n] for a in answers for n in range(len(a) + 1)}
    valid, whole = [1.0], [1.0]
    for depth in range(1, trie.max_depth + 1):
        # Valid so far: after `depth` tokens an answer, or a beginning of one that has so many tokens.
        reached = [(p, q) for p, q in walk(evenly, depth) if p in answers or (p in beginnings and len(p) == depth)]
        valid.append(sum(q for _, q in reached))
        whole.append(sum(all(a[n] in kept[a[:n]] for n in range(min(depth, len(a)))) for a in answers) / len(answers))
    for factors, share, product in ((result.alpha, valid, result.precision), (result.beta, whole, result.recall)):
        for depth, factor in enumerate(factors.tolist()):
            if share[depth] == 0:
                assert math.isnan(factor)
            else:
                close(factor, share[depth + 1] / share[depth])
        close(product, share[-1])


def test_renormalising_over_the_valid_tokens_is_wrong():
    """Two answers begin with 0 and end badly, one with 1: most outputs that begin with 0 are invalid."""
    trie = AnswerTrie.from_token_ids([[0, 0], [0, 1], [1, 0]])
    p = torch.tensor([1.0, 0.5, 0.5, 0.05, 0.05, 1.0], dtype=torch.float64)
    result = sequence(trie, p.log())
    close(result.validity, 0.55)
    close(result.diversity, exp_entropy([0.025, 0.025, 0.5]) / 3)
    first = p / torch.tensor(
        [1, 1, 1, 0.1, 0.1, 1.0], dtype=torch.float64
    )  # over the valid tokens of each prefix alone: 1/4, 1/4, 1/2
    wrong = sequence(trie, first.log())
    close(wrong.validity, 1.0)
    assert wrong.diversity > result.diversity + 0.3
    # With the same mass below all siblings it is right.
    even = torch.tensor([1.0, 0.5, 0.25, 0.2, 0.1, 0.3], dtype=torch.float64)
    over = even / torch.tensor([1, 0.75, 0.75, 0.3, 0.3, 0.3], dtype=torch.float64)
    close(sequence(trie, over.log()).diversity, sequence(trie, even.log()).diversity)


def test_tokenisations_of_one_answer_are_one_answer():
    two = AnswerTrie.from_token_ids([[1, 2], [3], [4]], answer_index=[0, 0, 1])
    p = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.4], dtype=torch.float64)  # root, 1, 3, 4, 1 2
    close(answer_log_probs(two, p.log()).exp(), [0.4, 0.1])
    result = sequence(two, p.log())
    close(result.diversity, exp_entropy([0.4, 0.1]) / 2)
    # An index need not begin at 0 or have no gaps; the results come in its order.
    gaps = AnswerTrie.from_token_ids([[1, 2], [3], [4]], answer_index=[9, 9, 2])
    close(answer_log_probs(gaps, p.log()).exp(), [0.1, 0.4])
    nothing = p.log()
    nothing[2] = -math.inf
    close(answer_log_probs(two, nothing).exp(), [0.2, 0.1])
    nothing[4] = -math.inf
    close(answer_log_probs(two, nothing).exp(), [0.0, 0.1])


def small_trie():
    return AnswerTrie.from_token_ids([[5, 1], [5, 2], [7, 1], [8]])


def test_trailing_axes_are_carried():
    trie = small_trie()
    log_prob = -torch.rand(len(trie), 3, 2, dtype=torch.float64) * 4
    log_prob[4, 1] = -math.inf
    keeps = torch.rand(len(trie), 3, 2) < 0.7
    kept = torch.randint(3, 9, (len(trie), 3, 2))
    whole, both, mass = sequence(trie, log_prob), compounding(trie, keeps, kept), log_valid_mass(trie, log_prob)
    for k in range(3):
        for r in range(2):
            one, factors = sequence(trie, log_prob[:, k, r]), compounding(trie, keeps[:, k, r], kept[:, k, r])
            for name in ("validity", "log_validity", "diversity", "entropy"):
                close(getattr(whole, name)[k, r], getattr(one, name))
            for name in ("alpha", "beta"):
                torch.testing.assert_close(
                    getattr(both, name)[:, k, r], getattr(factors, name), equal_nan=True, **EXACT
                )
            close(both.precision[k, r], factors.precision), close(both.recall[k, r], factors.recall)
            close(mass[:, k, r], log_valid_mass(trie, log_prob[:, k, r]))
    assert both.alpha.shape == (2, 3, 2) and whole.validity.shape == (3, 2) and mass.shape == (7, 3, 2)
    # A rule's axis that the model does not have
    cut = truncated_log_prob(trie, log_prob[..., 0], keeps, torch.full((len(trie), 3, 2), 0.5))
    close(cut[1:][keeps[1:]], (log_prob[..., :1].expand_as(cut) + math.log(2))[1:][keeps[1:]])
    assert (cut[1:][~keeps[1:]] == -math.inf).all() and (cut[0] == 0).all()


def test_the_root_is_not_read():
    trie = small_trie()
    log_prob = -torch.rand(len(trie), dtype=torch.float64)
    other = log_prob.clone()
    other[0] = math.nan
    assert sequence(trie, other).validity == sequence(trie, log_prob).validity
    assert torch.equal(log_valid_mass(trie, other), log_valid_mass(trie, log_prob))
    keeps, kept = torch.ones(len(trie), dtype=torch.bool), torch.full((len(trie),), 4)
    want = compounding(trie, keeps, kept)
    keeps[0], kept[trie.leaves()] = False, -1
    got = compounding(trie, keeps, kept)
    assert torch.equal(got.alpha, want.alpha) and torch.equal(got.beta, want.beta)
    cut = truncated_log_prob(trie, log_prob, keeps, torch.ones(len(trie)))
    close(cut[1:], log_prob[1:])


def test_nan_and_dropped_columns_leave_the_others_alone():
    trie = small_trie()
    base = -torch.rand(len(trie), dtype=torch.float64) - 0.5
    columns = base[:, None].repeat(1, 4)
    columns[1, 1] = math.nan
    columns[[1, 2, 3], 2] = -math.inf  # every first token: no answer can come
    columns[4, 3] = -math.inf
    columns.requires_grad_()
    result = sequence(trie, columns)
    assert result.validity[1].isnan() and result.diversity[1].isnan()
    assert result.validity[2] == 0 and result.log_validity[2] == -math.inf and result.diversity[2].isnan()
    close(result.validity[0], sequence(trie, base).validity)
    # As a loss: the columns that have one get their gradients, a dropped token and a dead column exactly 0.
    (result.log_validity[[0, 3]].sum() + result.diversity[[0, 3]].sum() + result.validity[2]).backward()
    grad = columns.grad
    assert grad[:, [0, 2, 3]].isfinite().all() and (grad[:, 2] == 0).all() and grad[4, 3] == 0
    assert (grad[1:, 0] != 0).all()
    columns.grad = None
    log_valid_mass(trie, columns)[0, [0, 3]].sum().backward()
    assert columns.grad[:, [0, 2, 3]].isfinite().all() and columns.grad[4, 3] == 0


def test_gradients():
    trie = AnswerTrie.from_token_ids([[5, 1], [5, 2], [7, 1], [8]], answer_index=[0, 1, 1, 2])
    log_prob = (-torch.rand(len(trie), 2, dtype=torch.float64) - 0.1).requires_grad_()
    dropped = torch.zeros(len(trie), 2, dtype=torch.bool)
    dropped[5, 1] = True

    def results(x):
        result = sequence(trie, x.masked_fill(dropped, -math.inf))
        masses = log_valid_mass(trie, x.masked_fill(dropped, -math.inf))
        return result.validity, result.log_validity, result.diversity, result.entropy, masses[:2]

    assert torch.autograd.gradcheck(results, log_prob)
    keeps = torch.tensor([True, True, False, True, True, False, True])
    mass = torch.rand(len(trie), dtype=torch.float64).requires_grad_()

    def truncated(x, m):
        return sequence(trie, truncated_log_prob(trie, x[:, 0], keeps, m)).log_validity

    assert torch.autograd.gradcheck(truncated, (log_prob, mass))
    empty = torch.zeros(len(trie), dtype=torch.float64).requires_grad_()  # a prefix that keeps nothing has no mass
    truncated_log_prob(trie, log_prob[:, 0], torch.zeros_like(keeps), empty)[0].backward()
    assert (empty.grad == 0).all()


def test_nothing_underflows():
    """60 tokens at exp(-30): a probability of exp(-1800) is 0 in float64, its logarithm and the diversity are exact."""
    deep = AnswerTrie.from_token_ids([[*[0] * 60, last] for last in range(4)])
    log_prob = torch.full((len(deep),), -30.0, dtype=torch.float64)
    log_prob[-4:] = torch.tensor([0.4, 0.3, 0.2, 0.05], dtype=torch.float64).log()
    result = sequence(deep, log_prob)
    assert result.validity == 0
    close(result.log_validity, -1800 + math.log(0.95))
    close(result.diversity, exp_entropy([0.4, 0.3, 0.2, 0.05]) / 4)
    close(log_valid_mass(deep, log_prob)[0], -1800 + math.log(0.95))
    # Even draws from kept sets of a million: alpha_t of the last step would be 0 / 0 without scaling.
    keeps, kept = torch.ones(len(deep), dtype=torch.bool), torch.full((len(deep),), 1_000_000)
    factors = compounding(deep, keeps, kept)
    close(factors.alpha, [1e-6] * 60 + [4e-6])
    assert factors.precision == 0 and factors.recall == 1


def test_compounding_by_hand():
    """Answers of one, two and three tokens; in halves and thirds."""
    trie = AnswerTrie.from_token_ids([[8], [5, 1], [5, 2], [7, 1, 1]])
    #                    root   5     7      8     5 1    5 2   7 1   7 1 1
    keeps = torch.tensor([True, True, True, True, True, False, True, True])
    kept = torch.tensor([4, 2, 3, 0, 0, 0, 1, 0])
    result = compounding(trie, keeps, kept)
    # After one token 5, 7 and 8 are each 1/4; then 5 1 is 1/8, 7 1 is 1/12 and 8 has ended; then nothing is lost.
    close(result.alpha, [3 / 4, (1 / 4 + 1 / 8 + 1 / 12) / (3 / 4), 1.0])
    close(result.beta, [1.0, 3 / 4, 1.0])
    close(result.precision, 11 / 24), close(result.recall, 3 / 4)
    weighted = AnswerTrie.from_token_ids([[8], [5, 1], [5, 2], [7, 1, 1]], weights=[1, 2, 3, 4])
    close(compounding(weighted, keeps, kept, counts=weighted.weight).beta, [1.0, 7 / 10, 1.0])
    nothing = compounding(trie, torch.zeros_like(keeps), kept)
    assert nothing.alpha[0] == 0 and nothing.beta[0] == 0 and nothing.precision == 0 and nothing.recall == 0
    assert nothing.alpha[1:].isnan().all() and nothing.beta[1:].isnan().all()


def test_with_the_primitives():
    """Logits to validity: statistics at the trie's sets line up with its nodes."""
    trie = AnswerTrie.from_token_ids([[3, 1], [3, 2], [4, 1], [0]])
    logits = torch.randn(trie.inner().numel(), 50)
    stats = fastcalib.statistics(logits, trie.valid_sets(), (0.5, 1.0))
    log_prob = at_nodes(trie, stats.log_prob)
    assert log_prob.shape == (len(trie), 2) and log_prob.dtype == torch.float32
    p = torch.stack([(logits.double() / t).softmax(-1) for t in (0.5, 1.0)], -1)  # rows: root, 3, 4
    want = p[0, 3] * (p[1, 1] + p[1, 2]) + p[0, 4] * p[2, 1] + p[0, 0]
    torch.testing.assert_close(sequence(trie, log_prob).validity, want, rtol=1e-6, atol=0)  # float32 statistics
    assert sequence(trie, log_prob).validity.dtype == torch.float64

    kept = torch.tensor([[7, 8], [9, 10], [11, 12]])
    at = at_prefixes(trie, kept)
    assert at.shape == (len(trie), 2) and at[trie.inner()].tolist() == kept.tolist() and at[trie.leaves()].sum() == 0
    keeps = at_nodes(trie, torch.tensor([True, False, True, True, False, True]))
    assert keeps.tolist() == [True, True, False, True, True, False, True]
    # The gradient reaches the logits, and a step along it makes answers likelier.
    logits.requires_grad_()

    def log_validity(x):
        return sequence(trie, at_nodes(trie, fastcalib.statistics(x, trie.valid_sets()).log_prob)).log_validity

    before = log_validity(logits)
    (slope,) = torch.autograd.grad(before, logits)
    assert log_validity(logits + 0.1 * slope) > before


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda t, n: sequence(t, torch.zeros(n - 1)), ValueError, r"one row for each of the 7 nodes.*at_nodes\(trie"),
        (lambda t, n: sequence(t, torch.zeros(3)), ValueError, r"7 nodes of the trie, got shape \(3,\)$"),
        (lambda t, n: sequence(t, [0.0] * n), ValueError, "got list"),
        (lambda t, n: log_valid_mass(t, torch.tensor(0.0)), ValueError, r"got shape \(\)"),
        (lambda t, n: at_nodes(t, torch.zeros(n)), ValueError, r"must have 6 rows.*\(7,\)"),
        (lambda t, n: at_prefixes(t, torch.zeros(n)), ValueError, r"must have 3 rows.*trie.inner\(\)"),
        (lambda t, n: compounding(t, torch.ones(n), torch.ones(n).long()), TypeError, "keeps must be bool.*float32"),
        (lambda t, n: compounding(t, torch.ones(n) > 0, torch.ones(n)), TypeError, "kept integers.*float32"),
        (
            lambda t, n: compounding(t, torch.ones(n, 2) > 0, torch.ones(n).long()),
            ValueError,
            r"\(7, 2\) and kept \(7,\)",
        ),
        (
            lambda t, n: compounding(t, torch.ones(n) > 0, torch.ones(n).long()),
            ValueError,
            "node 0 keeps 3 valid.* but 1",
        ),
        (
            lambda t, n: compounding(t, torch.ones(n) > 0, torch.full((n,), 9), counts=torch.ones(n)),
            ValueError,
            "children must add up",
        ),
        (
            lambda t, n: compounding(t, torch.ones(n) > 0, torch.full((n,), 9), counts=torch.ones(3)),
            ValueError,
            r"counts must be \(7,\)",
        ),
        (
            lambda t, n: truncated_log_prob(t, torch.zeros(n, 3), torch.ones(n, 2) > 0, torch.ones(n, 2)),
            ValueError,
            r"got torch.bool \(7, 2\), \(7, 2\) and \(7, 3\)",
        ),
    ],
)
def test_what_does_not_fit(call, error, words):
    with pytest.raises(error, match=words):
        call(small_trie(), 7)
