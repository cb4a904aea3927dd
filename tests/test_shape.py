"""Shape of a distribution on its valid tokens against plain float64, the fit of head and tail, and Theorem 5.2."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastcalib
from fastcalib import ValidSets
from fastcalib.diagnostics.shape import HeadTailFit, diversity_bound, diversity_loss, head_tail_fit, shape

FIELDS = ("kl", "kl_valid", "valid_mass", "evenness", "entropy", "expected_distinct")


def by_hand(z: torch.Tensor, ids: list[int], counts: list[float] | None, t: float, draws: int | None) -> list[float]:
    """The six scalars of one row by their definitions, in float64."""
    p = (z.double() / t).softmax(-1)
    g = p[ids]
    w = torch.tensor(counts if counts else [1.0] * len(ids), dtype=torch.float64)
    w, q = w / w.sum(), g / g.sum()
    some = w > 0
    return [
        float((w[some] * (w[some] / g[some]).log()).sum()) if ids else math.nan,
        float((w[some] * (w[some] / q[some]).log()).sum()) if ids else math.nan,
        float(g.sum()),
        math.exp(float(torch.special.entr(q).sum())) / len(ids) if ids else math.nan,
        float(torch.special.entr(p).sum()),
        float((1 - (1 - g) ** (draws or len(ids))).sum()),
    ]


SETS = [[3, 0], [], [5], list(range(40)), [7, 1, 9], [39, 38], [2, 4, 6, 8]]
COUNTS = [
    [1.0, 3.0],
    [],
    [2.0],
    [float(1 + i % 5) for i in range(40)],
    [0.0, 1.0, 2.0],
    [5.0, 5.0],
    [1.0, 2.0, 3.0, 4.0],
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draws", [None, 1, 10])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_scalar_by_its_definition(backend, dtype, draws, weighted):
    z = (3 * torch.randn(len(SETS), 40)).to(dtype)
    temperatures = [0.3, 1.0, 2.5]
    counts = torch.tensor(list(itertools.chain(*COUNTS))) if weighted else None
    got = shape(z, ValidSets.from_lists(SETS), counts=counts, temperature=temperatures, draws=draws, backend=backend)
    # The promise of the statistics is 2e-6 on a log-probability, of up to 40 here, and float64 has no such bound.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6 * 40
    for row, (ids, weights) in enumerate(zip(SETS, COUNTS)):
        for k, t in enumerate(temperatures):
            want = by_hand(z[row], ids, weights if weighted else None, t, draws)
            for name, value in zip(FIELDS, want):
                result = getattr(got, name)
                assert result.shape == (len(SETS), 3) and result.dtype == torch.float64
                assert result[row, k].item() == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), (
                    name, ids, t,
                )  # fmt: skip


def test_what_the_set_alone_decides_is_exact_at_a_low_temperature():
    """At T = 0.01 log-probabilities are in the thousands; shape within the set must not lose its digits to that."""
    z = torch.tensor([[30.0, 2.0, 2.003, 1.998, -5.0]])
    got = shape(z, ValidSets.from_lists([[1, 2, 3]]), temperature=0.01)
    q = (z[0, 1:4].double() / 0.01).softmax(-1)
    assert got.evenness.item() == pytest.approx(math.exp(torch.special.entr(q).sum()) / 3, rel=1e-12)
    assert got.kl_valid.item() == pytest.approx(-math.log(3) - q.log().mean().item(), rel=1e-12)
    assert got.kl.item() == pytest.approx(2800, rel=1e-3)


def test_leading_dimensions_strides_padding_and_a_temperature_a_row():
    whole = torch.randn(3, 5, 16)
    z = whole.transpose(0, 1)[:, ::2, 2:12]  # (5, 2, 10), no two strides alike
    sets = ValidSets.from_lists([[i % 8, 7 - i % 3 if i % 8 < 5 else 0] for i in range(10)])
    t = torch.rand(5, 2) + 0.5
    got = shape(z, sets, temperature=t, vocab_size=8)
    for row, ids in enumerate(sets.to_lists()):
        i, j = divmod(row, 2)
        want = by_hand(z[i, j, :8], ids, None, t[i, j].item(), None)
        for name, value in zip(FIELDS, want):
            assert getattr(got, name).shape == (5, 2)
            assert getattr(got, name)[i, j].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name
    single = shape(z[0, 0], ValidSets.from_lists([[1]]))
    assert single.kl.shape == () and single.evenness.item() == 1


def test_degenerate_rows_and_sets(backend):
    inf, nan = math.inf, math.nan
    z = torch.tensor(
        [
            [0.0, -inf, 1.0, 2.0],  # a valid token that cannot come
            [-inf, -inf, 1.0, 2.0],  # no valid token can
            [-inf] * 4,  # no softmax
            [0.0, nan, 0.0, 0.0],
            [nan, 0.0, 0.0, 0.0],  # no softmax, and no valid token either
            [0.0, -inf, -inf, -inf],  # all mass on one valid token
            [1e4, 1e4, 1e4, 1e4],
        ]
    )
    sets = ValidSets.from_lists([[0, 1], [0, 1], [0, 1], [0, 2], [], [0], [0, 1, 2, 3]])
    got = shape(z, sets, backend=backend)

    def near(*values: float) -> object:
        return pytest.approx(values, rel=1e-6, abs=1e-7, nan_ok=True)

    p = 1 / (1 + math.e + math.e**2)
    assert got.kl.tolist() == near(inf, inf, nan, nan, nan, 0, 0)
    assert got.kl_valid.tolist() == near(inf, nan, nan, nan, nan, 0, 0)
    assert got.valid_mass.tolist() == near(p, 0, nan, nan, nan, 1, 1)
    assert got.evenness.tolist() == near(0.5, nan, nan, nan, nan, 1, 1)
    assert got.expected_distinct.tolist() == near(1 - (1 - p) ** 2, 0, nan, nan, nan, 1, 4 * (1 - 0.75**4))
    assert got.entropy[-1].item() == pytest.approx(math.log(4))
    # With no weight on the token that cannot come, nothing is infinite.
    weighted = shape(z[:1], ValidSets.from_lists([[0, 1]]), counts=torch.tensor([1, 0]), backend=backend)
    assert weighted.kl.item() == pytest.approx(-math.log(p)) and weighted.kl_valid.item() == 0
    nothing = shape(torch.zeros(0, 4), ValidSets.from_lists([]), temperature=[1.0, 2.0], backend=backend)
    assert all(getattr(nothing, name).shape == (0, 2) for name in FIELDS)
    empty = shape(torch.zeros(2, 4), ValidSets.from_lists([[], []]), backend=backend)
    assert empty.valid_mass.tolist() == [0, 0] and empty.kl.isnan().all() and empty.entropy.isfinite().all()


def test_small_probabilities_keep_their_digits():
    z = torch.tensor([[0.0, -60.0]], dtype=torch.float64)
    got = shape(z, ValidSets.from_lists([[1]]), draws=1000)
    assert got.expected_distinct.item() == pytest.approx(1000 * math.exp(-60), rel=1e-12)


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_by_finite_differences(backend, name):
    z = torch.randn(3, 6, dtype=torch.float64)
    z[1, 2] = -math.inf  # outside the set of its row
    t = torch.tensor([0.7, 1.0, 1.8], dtype=torch.float64, requires_grad=True)
    sets = ValidSets.from_lists([[0, 3], [1, 4, 5], [2]])
    counts = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0, 1.0])
    finite = z.isfinite()

    def scalar(values: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        full = z.masked_scatter(finite, values)
        return getattr(shape(full, sets, counts=counts, temperature=t, backend=backend), name)

    assert torch.autograd.gradcheck(scalar, (z[finite].clone().requires_grad_(), t))


def test_gradient_is_zero_where_nothing_can_be_done_and_never_nan():
    z = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3, [0.0, 1.0, 2.0]], requires_grad=True)
    got = shape(z, ValidSets.from_lists([[0], [1], []]))
    (
        got.kl[0] + got.evenness[0] + got.valid_mass.nan_to_num().sum() + got.expected_distinct.nan_to_num().sum()
    ).backward()
    assert z.grad.isfinite().all() and z.grad[1:].eq(0).all() and z.grad[0, 1] == 0 and z.grad[0, 0] != 0


def test_training_on_kl_makes_the_model_calibrated():
    z = torch.randn(1, 12, requires_grad=True)
    sets, counts = ValidSets.from_lists([[2, 5, 7]]), torch.tensor([1.0, 2.0, 5.0])
    optimiser = torch.optim.Adam([z], lr=0.3)
    for _ in range(400):
        optimiser.zero_grad()
        shape(z, sets, counts=counts).kl.sum().backward()
        optimiser.step()
    p = z.detach().softmax(-1)[0, sets.values]
    assert p.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=0.02)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"sets": [[1]]}, TypeError, "ValidSets.from_lists"),
        ({"draws": 0}, ValueError, "draws must be an int >= 1"),
        ({"draws": 2.5}, ValueError, "got 2.5"),
        ({"counts": torch.ones(2)}, ValueError, r"shape \(3,\)"),
        ({"counts": [1, 2, 3]}, TypeError, "got list"),
        ({"counts": torch.tensor([1.0, -1.0, 1.0])}, ValueError, r"counts\[1\] is -1.0"),
        ({"counts": torch.tensor([1.0, math.nan, 1.0])}, ValueError, r"counts\[1\] is nan"),
        ({"counts": torch.tensor([1.0, 1.0, 0.0])}, ValueError, "counts of set 1 add up to 0"),
        ({"sets": ValidSets.from_lists([[9], [0]])}, ValueError, r"^sets: entry 0 of set 0 .* is 9, outside \[0, 4\)"),
        ({"sets": ValidSets.from_lists([[0]])}, ValueError, "^sets holds 1 sets for 2 rows"),
    ],
)
def test_mistakes_are_named(arguments, error, words):
    call = {"logits": torch.zeros(2, 4), "sets": ValidSets.from_lists([[0, 1], [2]])} | arguments
    with pytest.raises(error, match=words):
        shape(**call)


# Head and tail


def fit_by_hand(y: torch.Tensor, k: torch.Tensor, shifts: list[float]) -> tuple[float, int]:
    """Least squared error and its knee, one knee and one shift at a time, by lstsq."""
    best = (math.inf, -1)
    for c in range(2, len(y) - 2):
        for shift in shifts:
            error = 0.0
            for part, x in ((slice(0, c), k), (slice(c, None), (k + shift).log())):
                a = torch.stack([x[part], torch.ones_like(x[part])], 1)
                solution = torch.linalg.lstsq(a, y[part, None]).solution
                error += float(((a @ solution - y[part, None]) ** 2).sum())
            best = min(best, (error, c))
    return best


def test_fit_is_no_worse_than_one_by_brute_force():
    """Every knee and 60 shifts by lstsq; ours also refines the shift, so it may be better, never worse."""
    torch.manual_seed(3)
    y = (2 * torch.randn(4, 25, dtype=torch.float64)).sort(-1, descending=True).values
    k = torch.arange(1, 26, dtype=torch.float64)
    fit = head_tail_fit(y)
    shifts = [0.0, *torch.logspace(-1, math.log10(250), 60).tolist()]
    for row in range(4):
        error, _ = fit_by_hand(y[row], k, shifts)
        residual = ((fit(k.expand_as(y)) - y)[row] ** 2).sum().item()
        spread = ((y[row] - y[row].mean()) ** 2).sum().item()
        assert residual <= error * (1 + 1e-3)  # between two shifts of the grid the error has room for that
        assert fit.r_squared[row].item() == pytest.approx(1 - residual / spread, abs=1e-10)


@pytest.mark.parametrize("knee, shift", [(2, 0.0), (20, 4.0), (57, 130.0)])
def test_fit_recovers_what_was_put_in(knee, shift):
    k = torch.arange(1.0, 61.0, dtype=torch.float64)
    z = torch.where(k <= knee, 12 - 0.25 * k, 11 - 0.25 * knee - 3 * ((k + shift).log() - math.log(knee + shift)))
    fit = head_tail_fit(z)
    assert fit.knee.item() == knee and fit.slope.item() == pytest.approx(-0.25, rel=1e-9)
    assert fit.intercept.item() == pytest.approx(12, rel=1e-9)
    assert fit.r_squared.item() > 1 - 1e-9
    assert fit(k).tolist() == pytest.approx(z.tolist(), abs=1e-3)
    if knee == 20:
        assert fit.shift.item() == pytest.approx(shift, rel=1e-3) and fit.decay.item() == pytest.approx(-3, rel=1e-3)


def test_fit_of_given_ranks_ragged_rows_and_chunks(monkeypatch):
    """Rows of different lengths, ranks with gaps (valid tokens among others), in chunks of one row or all at once."""
    torch.manual_seed(4)
    y = torch.randn(5, 30).sort(-1, descending=True).values
    k = torch.rand(5, 30).mul(20).long().add(1).cumsum(-1)
    y[1, 10:] = -math.inf
    k[1, 10:] = 0  # no rank is needed where there is no logit
    y[2, 4:] = math.nan  # too few
    y[3] = 7.0
    whole = head_tail_fit(y.reshape(5, 1, 30), k.reshape(5, 1, 30))
    assert whole.knee.shape == (5, 1) and whole.knee[2] == -1 and whole.r_squared[2].isnan() and whole.shift[2].isnan()
    assert whole.r_squared[3] == 1 and whole.slope[3] == 0
    short = head_tail_fit(y[1, :10], k[1, :10])
    for name in vars(short):
        assert getattr(short, name).item() == pytest.approx(getattr(whole, name)[1].item(), rel=1e-9), name
    monkeypatch.setattr("fastcalib.diagnostics.head_tail.CHUNK", 1)
    parts = head_tail_fit(y, k)
    for name in vars(parts):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name)[:, 0], rtol=1e-9, atol=0, equal_nan=True)
    assert head_tail_fit(torch.zeros(0, 8)).knee.shape == (0,)
    assert head_tail_fit(torch.zeros(2, 0)).knee.tolist() == [-1, -1]


@pytest.mark.parametrize(
    "logits, rank, words",
    [
        (torch.tensor([1.0, 2.0]), None, "must fall"),
        (torch.tensor([2.0, 1.0]), torch.tensor([2, 2]), "rise"),
        (torch.tensor([2.0, 1.0]), torch.tensor([0, 1]), ">= 1"),
        (torch.tensor([2.0, 1.0]), torch.tensor([1]), "rank must have shape"),
        (torch.tensor([2, 1]), None, "floating-point"),
    ],
)
def test_fit_names_mistakes(logits, rank, words):
    with pytest.raises((TypeError, ValueError), match=words):
        head_tail_fit(logits, rank)


# Theorem 5.2


def test_check_values_of_the_paper():
    epsilon = torch.tensor([0.2, 0.1, 0.05, 0.01, 0.001], dtype=torch.float64)
    got = diversity_loss(2, -epsilon.log())
    assert [round(x, 4) for x in got.tolist()] == [0.0748, 0.1418, 0.2176, 0.3885, 0.5561]


def loss_by_hand(v: int, a: float) -> float:
    p = (-a * torch.arange(v, dtype=torch.float64) / v).softmax(-1)
    return math.log(v) - torch.special.entr(p).sum().item()


@pytest.mark.parametrize("v", [1, 2, 3, 10, 1000, 151_936])
@pytest.mark.parametrize("a", [0.0, 1e-6, 0.01, 0.0999999, 0.1, 1.0, 6.9, 50.0, 900.0])
def test_diversity_loss_by_its_definition(v, a):
    # by hand it is a difference of entropies: 2e-15 of ln v
    assert diversity_loss(v, a).item() == pytest.approx(loss_by_hand(v, a), rel=1e-10, abs=1e-13)


def test_the_series_meets_the_closed_form():
    below, above = diversity_loss(
        torch.tensor([2, 7, 5000]), torch.tensor([[0.1 - 1e-9], [0.1 + 1e-9]], dtype=torch.float64)
    )
    assert (above / below - 1).tolist() == pytest.approx([4e-8] * 3, rel=0.02)  # 2 da / a, and no jump beside it
    assert diversity_loss(3, 1e-5).item() == pytest.approx(1e-10 * (1 - 1 / 9) / 24, rel=1e-9)


def test_diversity_loss_has_gradients_and_limits():
    a = torch.tensor([0.02, 0.05, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: diversity_loss(torch.tensor([4, 4, 9, 2]), a), a)
    assert diversity_loss(5, math.inf).item() == pytest.approx(math.log(5))
    assert diversity_bound([5, 2], 0.0).item() == pytest.approx(0.1) and diversity_bound([5, 2], 1.0).item() == 1
    for bad in (lambda: diversity_loss(0, 1.0), lambda: diversity_loss(2, -1.0), lambda: diversity_bound([2], 1.5),
                lambda: diversity_bound(3, 0.1), lambda: diversity_loss(2, math.nan)):  # fmt: skip
        with pytest.raises(ValueError):
            bad()


@pytest.mark.parametrize("v", [2, 10, 50])
def test_the_bound_holds_and_is_reached_by_a_geometric_model(v):
    """A long vocabulary with even slope a / v, valid tokens first: validity 1 - e^-a, diversity exactly the bound."""
    for a in (0.5, 2.0, 5.0):
        z = -a / v * torch.arange(100 * v, dtype=torch.float64)[None]
        got = shape(z, ValidSets.from_lists([list(range(v))]))
        lacking = 1 - got.valid_mass.item()
        assert lacking == pytest.approx(math.exp(-a), rel=1e-9)
        assert got.evenness.item() == pytest.approx(diversity_bound([v], lacking).item(), rel=1e-9)
    steps = torch.tensor([[2, 3], [4, 1]])
    want = [math.exp(-loss_by_hand(2, 2.0) - loss_by_hand(3, 2.0)), math.exp(-loss_by_hand(4, 2.0))]
    assert diversity_bound(steps, math.exp(-2)).tolist() == pytest.approx(want)


def test_result_types_are_frozen():
    with pytest.raises(AttributeError):
        shape(torch.zeros(1, 2), ValidSets.from_lists([[0]])).kl = None
    assert HeadTailFit.__dataclass_params__.frozen and fastcalib.ValidSets is ValidSets
