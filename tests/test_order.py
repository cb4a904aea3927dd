"""order: every number against a loop over all cutoffs in plain Python, and against scikit-learn where it has it too."""

from __future__ import annotations

import math

import pytest
import torch

import fastcalib
from fastcalib import ValidSets
from fastcalib.diagnostics import order, order_from_ranks

from . import cases
from .cases import DTYPES, random_logits
from .checks import assert_within

NAN, INF = torch.nan, torch.inf
# numbers up to 1 (ranks are exact), float64 sums of up to a hundred terms in another order
CLOSE = 1e-13
NUMBERS = (
    "area",
    "token_area",
    "recall_at_precision",
    "token_recall_at_precision",
    "r_precision",
    "average_precision",
    "auroc",
)


def by_hand(logits, valid, counts, least):
    """The same from the definitions: all cutoffs, all pairs."""
    z = [float(x) for x in logits]
    v, n = len(z), len(valid)
    weight = dict(zip(valid, counts if counts is not None else [1.0] * n))
    total = sum(weight.values())
    points = {}
    for border in {z[i] for i in valid}:
        kept = [i for i in range(v) if z[i] >= border]
        right = [i for i in kept if i in weight]
        points[border] = (len(right) / len(kept), sum(weight[i] for i in right) / total, len(right) / n, len(kept))
    in_order = sorted(range(n), key=lambda i: (-z[valid[i]], i))
    frontier = [points[z[valid[i]]] for i in in_order]
    result = {"frontier": frontier, "token": [valid[i] for i in in_order]}
    for name, column in (("", 1), ("token_", 2)):
        area, before = 0.0, 0.0
        for border in sorted(points, reverse=True):  # for each recall the best precision that reaches it
            recall = points[border][column]
            area += (recall - before) * max(p[0] for p in points.values() if p[column] >= recall)
            before = recall
        result[name + "area"] = area
        result[name + "recall_at_precision"] = max([p[column] for p in points.values() if p[0] >= least], default=0.0)
    # the size oracle: the top n, ties at the border in every order alike
    border = sorted(z, reverse=True)[n - 1]
    sure = [i for i in range(v) if z[i] > border]
    tied = [i for i in range(v) if z[i] == border]
    share = (n - len(sure)) / len(tied)
    result["r_precision"] = (sum(i in weight for i in sure) + share * sum(i in weight for i in tied)) / n
    result["average_precision"] = sum(p[0] for p in frontier) / n
    invalid = [i for i in range(v) if i not in weight]
    pairs = [(z[i] > z[j]) + (z[i] == z[j]) / 2 for i in valid for j in invalid]
    result["auroc"] = sum(pairs) / len(pairs) if pairs else NAN
    result["order_calibrated"] = all(z[i] >= z[j] for i in valid for j in invalid)
    return result


def check(o, row, want, what):
    part = slice(int(o.offsets[row]), int(o.offsets[row + 1]))
    assert o.token[part].tolist() == want["token"], what
    for column, name in enumerate(("precision", "recall", "token_recall", "rank")):
        expected = torch.tensor([p[column] for p in want["frontier"]], dtype=getattr(o, name).dtype)
        assert_within(getattr(o, name)[part], expected, CLOSE, f"{what} {name}")
    for name in NUMBERS:
        expected = torch.tensor(want[name], dtype=torch.float64)
        assert_within(getattr(o, name)[row], expected, CLOSE, f"{what} {name}")
    assert o.order_calibrated[row].item() is want["order_calibrated"], what


SIZES = [1, 3, 17, 40, 2, 60, 5, 33]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("weighted", ["tokens", "counts", "weights"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_every_number_by_hand(backend, dtype, weighted, ties):
    logits = random_logits(2, 4, 60, dtype=dtype, seed=int(ties))
    if ties:
        logits = (logits / 2).round()
    lists = cases.random_sets(8, 60, SIZES, seed=3)
    sets = ValidSets.from_lists(lists)
    counts = None
    if weighted != "tokens":
        counts = torch.randint(1, 50, sets.values.shape)
        counts[2] = 0
        counts = counts if weighted == "counts" else counts / 7.0
    for precision in (0.8, 0.3, 1.0):
        o = order(logits, sets, counts=counts, precision=precision, backend=backend)
        assert len(o) == 8
        for row, valid in enumerate(lists):
            part = slice(int(sets.offsets[row]), int(sets.offsets[row + 1]))
            given = None if counts is None else [float(c) for c in counts[part]]
            check(o, row, by_hand(logits.reshape(8, 60)[row].float(), valid, given, precision), f"set {row}")


def test_scikit_learn_agrees():
    metrics = pytest.importorskip("sklearn.metrics")
    logits = (random_logits(6, 400, seed=5) * 3).round() / 3
    lists = cases.random_sets(6, 400, [1, 5, 50, 200, 399, 20])
    o = order(logits, ValidSets.from_lists(lists))
    for row, valid in enumerate(lists):
        label = [int(i in set(valid)) for i in range(400)]
        assert o.average_precision[row].item() == pytest.approx(
            metrics.average_precision_score(label, logits[row]), rel=1e-12
        )
        assert o.auroc[row].item() == pytest.approx(metrics.roc_auc_score(label, logits[row]), rel=1e-12)


def test_convention_for_ties_in_small():
    """Logits 3 2 2 2 1, valid are the 3 and one of the 2s: the cutoff at 2 keeps four tokens, two of them valid."""
    o = order(torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]), ValidSets.from_lists([[2, 0]]))
    assert o.rank.tolist() == [1, 4] and o.precision.tolist() == [1.0, 0.5]
    assert o.r_precision.item() == pytest.approx((1 + 1 / 3) / 2)  # the second place goes to one of three
    assert o.auroc.item() == pytest.approx((3 + 2 * 0.5 + 1) / 6)
    # the two invalid 2s do not lie above the valid 2: "at or above" holds
    assert o.order_calibrated.item()
    assert o.recall_at_precision.item() == 0.5


def test_frontier_is_the_best_precision_that_reaches_a_recall():
    """i v v v: precision 0, 1/2, 2/3, 3/4: the frontier is flat at 3/4, average precision is not."""
    o = order(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), ValidSets.from_lists([[1, 2, 3]]), precision=0.7)
    assert o.area.item() == pytest.approx(0.75) and o.recall_at_precision.item() == 1.0
    assert o.average_precision.item() == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)


def test_empty_whole_and_perfect_sets(backend):
    logits = random_logits(4, 5)
    top = logits[2].topk(2).indices.tolist()
    o = order(logits, ValidSets.from_lists([[], [4, 3, 2, 1, 0], top, []]), backend=backend)
    for name in NUMBERS:
        value = getattr(o, name)
        assert value[[0, 3]].isnan().all(), name
        assert value[2] == 1, name
        assert math.isnan(value[1]) if name == "auroc" else value[1] == 1, name
    assert o.order_calibrated.all()
    assert (o.precision == 1).all() and o.rank[:5].tolist() == [1, 2, 3, 4, 5]
    nothing = order(logits[:0], ValidSets.from_lists([]), backend=backend)
    assert len(nothing) == 0 and nothing.area.shape == (0,)
    only_empty = order(logits, ValidSets.from_lists([[], [], [], []]), backend=backend)
    assert only_empty.area.isnan().all() and only_empty.precision.shape == (0,) and only_empty.order_calibrated.all()


def test_rows_without_an_order(backend):
    """A NaN compares false with everything: without a check it would pass for a token of the lowest rank."""
    logits = random_logits(5, 300)
    logits[0, 7] = NAN  # not a valid token
    logits[1, 0] = NAN  # a valid one
    logits[2, ::2] = -INF  # these have an order
    logits[3, 9] = INF
    lists = [[0, 2, 4]] * 5
    o = order(logits, ValidSets.from_lists(lists), backend=backend)
    for row in (0, 1):
        assert all(getattr(o, name)[row].isnan() for name in NUMBERS) and not o.order_calibrated[row]
    assert o.precision[:6].isnan().all() and (o.rank[:6] == -1).all() and o.recall[:6].isnan().all()
    for row in (2, 3, 4):
        check(o, row, by_hand(logits[row], lists[row], None, 0.8), f"row {row}")


def test_padded_columns_are_not_ranked(backend):
    logits = torch.cat([random_logits(3, 50), torch.full((3, 6), INF)], 1)
    logits[1, 52] = NAN
    sets = ValidSets.from_lists(cases.random_sets(3, 50, [4]))
    a, b = order(logits, sets, vocab_size=50, backend=backend), order(logits[:, :50], sets, backend=backend)
    for name in NUMBERS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_set_does_not_depend_on_its_company():
    """Huge weights before it would cost a later set its digits in a running sum over all."""
    n = 400
    logits = (random_logits(n, 200) * 2).round()
    lists = cases.random_sets(n, 200, [1, 2, 9, 30, 0, 77])
    sets = ValidSets.from_lists(lists)
    counts = torch.rand(sets.values.shape, dtype=torch.float64) * 10.0 ** torch.randint(-12, 18, (n,))[sets.rows()]
    together = order(logits, sets, counts=counts)
    for row in range(0, n, 23):
        part = slice(int(sets.offsets[row]), int(sets.offsets[row + 1]))
        alone = order(logits[row], ValidSets.from_lists([lists[row]]), counts=counts[part])
        for name in NUMBERS:
            assert torch.equal(getattr(together, name)[row].nan_to_num(-1), getattr(alone, name)[0].nan_to_num(-1)), (
                name
            )
        assert torch.equal(together.recall[part], alone.recall)


def test_from_ranks_is_the_same():
    logits = random_logits(7, 90)
    sets = ValidSets.from_lists(cases.random_sets(7, 90, [3, 8, 20]))
    r = fastcalib.ranks(logits, sets)
    a, b = order(logits, sets), order_from_ranks(r.n_greater, r.n_equal, sets, vocab_size=90)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in (*NUMBERS, "precision", "rank", "token"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sets": torch.tensor([0])}, TypeError, "sets must be a ValidSets"),
        ({"counts": [1, 2]}, TypeError, "counts must be a tensor"),
        ({"counts": torch.ones(3)}, ValueError, r"counts must have shape \(2,\)"),
        ({"counts": torch.tensor([1.0, -1.0])}, ValueError, r"counts\[1\] is -1"),
        ({"counts": torch.tensor([1.0, NAN])}, ValueError, r"counts\[1\] is nan"),
        ({"counts": torch.tensor([True, True])}, TypeError, "integers or floating point"),
        ({"precision": 0}, ValueError, "precision must lie in"),
        ({"precision": 80}, ValueError, "precision must lie in .* 80"),
        ({"sets": ValidSets.from_lists([[0], [1]])}, ValueError, "^sets holds 2 sets for 1 rows"),
        ({"sets": ValidSets.from_lists([[5]])}, ValueError, r"^sets: entry 0 of set 0 .* is 5, outside \[0, 4\)"),
    ],
)
def test_errors(change, error, words):
    arguments = {"logits": torch.zeros(1, 4), "sets": ValidSets.from_lists([[0, 1]])} | change
    with pytest.raises(error, match=words):
        order(arguments.pop("logits"), arguments.pop("sets"), **arguments)


def test_errors_of_ranks():
    sets = ValidSets.from_lists([[0, 1]])
    good = torch.tensor([0, 1])
    with pytest.raises(TypeError, match="n_greater must be an integer tensor"):
        order_from_ranks(good.float(), good, sets, vocab_size=3)
    with pytest.raises(ValueError, match="n_equal must have shape"):
        order_from_ranks(good, good[:1], sets, vocab_size=3)
    with pytest.raises(ValueError, match="vocab_size must be a positive int"):
        order_from_ranks(good, good, sets, vocab_size=0)
