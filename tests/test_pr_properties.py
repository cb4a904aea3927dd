"""Laws of precision and recall for any two distributions, and the temperature theory of spec section 4."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

import fastcalib
from fastcalib import ValidSets

from . import pr_reference
from .cases import random_logits
from .checks import assert_within
from .test_properties import masked, number, rows
from .test_properties import quick as thorough

INF = math.inf
DOUBLE = torch.float64
quick = settings(thorough, max_examples=15)  # on each of the backends


@st.composite
def pairs(draw, element=number):
    """Two (N, V) of float64, not too far apart for anything to be shared."""
    z = draw(rows(element)).double().clamp(max=60)
    w = torch.tensor([draw(st.lists(st.floats(-20, 20), min_size=z.shape[1], max_size=z.shape[1])) for _ in z]).double()
    return (z if draw(st.booleans()) else z.clamp(-20, 20)), w


GRID = fastcalib.angles(41)


@quick
@given(pair=pairs(masked))
def test_alpha_rises_concavely_between_its_bounds(backend, pair):
    z, w = pair
    d = fastcalib.pr_divergence(z, w, GRID, backend=backend)
    some = (z > -INF).any(-1)
    alpha, beta = d.alpha[some], d.beta[some]
    slack = 1e-12
    assert (alpha >= 0).all() and (alpha <= GRID.clamp(max=1) + slack).all()
    assert (beta >= 0).all() and (beta <= 1 + slack).all()
    assert (alpha.diff(dim=-1) >= -slack).all() and (beta.diff(dim=-1) <= slack).all()
    inner = slice(0, -1)  # the last lam is infinite
    slope = alpha[:, inner].diff(dim=-1) / GRID[inner].diff()
    assert (slope.diff(dim=-1) <= 1e-9).all(), "concave"
    torch.testing.assert_close(alpha[:, 1:-1], beta[:, 1:-1] * GRID[1:-1], rtol=1e-12, atol=0)


@quick
@given(pair=pairs(), lam=st.floats(1e-4, 1e4))
def test_exchanging_the_two_turns_lambda_over(backend, pair, lam):
    """alpha_lam(P, Q) = lam alpha_(1/lam)(Q, P): precision of one is recall of the other."""
    z, w = pair
    d, e = fastcalib.pr_divergence(z, w, lam, backend=backend), fastcalib.pr_divergence(w, z, 1 / lam, backend=backend)
    torch.testing.assert_close(d.alpha, lam * e.alpha, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(d.beta, e.alpha, rtol=1e-11, atol=1e-300)


@quick
@given(pair=pairs(masked), data=st.data(), shift=st.sampled_from([-256.0, 4.0, 1024.0]))
def test_neither_shift_nor_order_matters(backend, pair, data, shift):
    z, w = pair
    order = torch.tensor(data.draw(st.permutations(range(z.shape[1]))))
    want = fastcalib.pr_divergence(z, w, GRID, backend=backend)
    for a, b in ((z[:, order], w[:, order]), (z + shift, w), (z, w - shift)):
        got = fastcalib.pr_divergence(a, b, GRID, backend=backend)
        # a shift rounds a logit of 1e4 by 1e-12; a token near a tie then changes sides, which alpha does not see
        torch.testing.assert_close(got.alpha, want.alpha, rtol=1e-9, atol=1e-12, equal_nan=True)


@quick
@given(pair=pairs())
def test_lambda_one_is_one_minus_total_variation(backend, pair):
    z, w = pair
    d = fastcalib.pr_divergence(z, w, 1.0, backend=backend)
    variation = 0.5 * (torch.softmax(z, -1) - torch.softmax(w, -1)).abs().sum(-1)
    torch.testing.assert_close(1 - d.alpha, variation, rtol=1e-9, atol=1e-12)


@quick
@given(pair=pairs(), lam=st.floats(1e-3, 1e3))
def test_it_is_an_f_divergence(backend, pair, lam):
    """min(1, lam) - alpha = sum P f(Q / P), f(u) = min(1, lam) - min(lam, u): convex, f(1) = 0.

    The other way round, as Verine et al. 2023 write it: sum Q f(P / Q) with f(u) = max(lam u, 1) - max(lam, 1)."""
    z, w = pair
    z = z.clamp(-60, 60)  # or Q is 0 and the quotient is not
    q, p = torch.softmax(z, -1), torch.softmax(w, -1)
    d = min(1.0, lam) - fastcalib.pr_divergence(z, w, lam, backend=backend).alpha
    first = (p * (min(1.0, lam) - (q / p).clamp(max=lam))).sum(-1)
    second = (q * ((lam * p / q).clamp(min=1) - max(1.0, lam))).sum(-1)
    torch.testing.assert_close(d, first, rtol=1e-9, atol=1e-10 * max(1, lam))
    torch.testing.assert_close(d, second, rtol=1e-9, atol=1e-10 * max(1, lam))


@quick
@given(pair=pairs(masked), data=st.data())
def test_a_sparse_target_is_a_dense_one_with_masks(backend, pair, data):
    z, w = pair
    v = z.shape[1]
    lists = [data.draw(st.lists(st.integers(0, v - 1), unique=True, min_size=1)) for _ in z]
    t, u = data.draw(st.floats(0.3, 3)), data.draw(st.floats(0.3, 3))
    sets = ValidSets.from_lists(lists)
    dense = torch.full_like(w, -INF)
    for r, ids in enumerate(lists):
        dense[r, ids] = w[r, ids]
    weights = torch.cat([w[r, ids].exp() for r, ids in enumerate(lists)])
    grads = []
    for teacher, more in ((sets, {"weights": weights}), (dense, {})):
        x, temperature = z.clone().requires_grad_(), torch.tensor(t, dtype=DOUBLE, requires_grad=True)
        d = fastcalib.pr_divergence(
            x, teacher, GRID, temperature=temperature, teacher_temperature=u, backend=backend, **more
        )
        upstream = torch.linspace(-1, 2, 41, dtype=DOUBLE).expand_as(d.alpha)
        grads.append((*d, *torch.autograd.grad(d.alpha, (x, temperature), upstream, retain_graph=True)))
    for name, a, b in zip(("alpha", "beta", "logits", "temperature"), *grads):
        if name in ("alpha", "beta"):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)
        elif (z > -INF).all() and len(lists) and not _near_tie(z, dense, t, u):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def _near_tie(z, w, t, u):
    ratio = torch.log_softmax(z / t, -1) - torch.log_softmax(w / u, -1)
    return bool(((ratio[..., None] - GRID.log()).abs() < 1e-9).any())


def test_sparse_targets_of_every_kind(backend):
    z = random_logits(6, 50)
    z[4] = -INF
    z[0, 3] = -INF
    lists = [[3, 4], [], [7], list(range(50)), [1, 2], [9, 8]]
    sets = ValidSets.from_lists(lists)
    x = z.clone().requires_grad_()
    ignored = torch.tensor([False] * 5 + [True])
    lam = [0.0, 0.2, 1.0, 5.0, INF]
    d = fastcalib.pr_divergence(x, sets, lam, ignored=ignored, backend=backend)
    for r in (0, 2, 3):
        w = torch.full((1, 50), -INF)
        w[0, lists[r]] = 0.0
        alpha, beta = pr_reference.pr_divergence(z[r : r + 1], w, lam)
        assert_within(d.alpha[r], alpha[0], 4e-6 * alpha[0], f"alpha {r}")
        assert_within(d.beta[r], beta[0], 4e-6 * beta[0], f"beta {r}")
    assert d.alpha[1].isnan().all() and d.alpha[4].isnan().all() and (d.alpha[5] == 0).all()
    d.alpha.nansum().backward()
    assert x.grad.isfinite().all() and (x.grad[[1, 4, 5]] == 0).all() and (x.grad[0, 3] == 0)
    # weights of 0 are no support: precision is that of the others
    weighted = fastcalib.pr_divergence(
        z[3:4], ValidSets.from_lists([[1, 2, 3]]), lam, weights=torch.tensor([2, 0, 6]), backend=backend
    )
    w = torch.full((1, 50), -INF)
    w[0, [1, 3]] = torch.tensor([2.0, 6.0]).log()
    alpha, _ = pr_reference.pr_divergence(z[3:4], w, lam)
    assert_within(weighted.alpha, alpha, 4e-6 * alpha, "weights")


def test_a_sparse_target_keeps_nothing_for_each_token_and_lambda():
    """(nnz, L) float64 temporaries made 16 lambda slower than eager."""
    tokens, count = 64, 5_000
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else (out,)
            largest = max([largest, *(t.untyped_storage().nbytes() for t in made if isinstance(t, torch.Tensor))])
            return out

    z = random_logits(2, 300).requires_grad_()
    sets = ValidSets.from_lists([range(tokens), range(100, 100 + tokens)])
    with Watch():
        fastcalib.pr_divergence(z, sets, fastcalib.angles(count), backend="eager").alpha.sum().backward()
    assert 0 < largest <= 4 * 8 * 2 * (count + 1) < 2 * tokens * count  # four float64 (N, L) at once, say


def test_bits_of_a_sparse_row_do_not_depend_on_its_batch(backend):
    z = random_logits(40, 900)
    lists = [torch.randperm(900)[: 1 + 37 * r % 300].tolist() for r in range(40)]
    every = fastcalib.pr_divergence(z, ValidSets.from_lists(lists), GRID, backend=backend)
    torch.set_num_threads(2)
    for part in (slice(7, 8), slice(3, 31)):
        some = fastcalib.pr_divergence(z[part], ValidSets.from_lists(lists[part]), GRID, backend=backend)
        if backend != "eager":  # whose normaliser is torch's own sum
            assert torch.equal(some.alpha, every.alpha[part]) and torch.equal(some.beta, every.beta[part])


def heated(q, t):
    return torch.softmax(q.log() / t, -1)


def test_precision_under_temperature(backend):
    """dQ_t(A)/dt = t^-2 Q_t(A) (E[s | A] - E[s]) with s = -log Q: raising t lowers precision iff the tokens on the
    support are less surprising than average. alpha at lam = inf is Q_t(A)."""
    g = torch.Generator().manual_seed(3)
    for seed in range(4):
        z = random_logits(1, 60, dtype=DOUBLE, seed=seed)
        q = torch.softmax(z, -1)
        inside = torch.rand(60, generator=g) < 0.4
        w = torch.where(inside, 0.0, -INF).double()[None]
        for t in (0.6, 1.0, 2.5):
            qt, s = heated(q, t), -q.log()
            mass = qt[:, inside].sum()
            formula = mass / t**2 * ((qt * s)[:, inside].sum() / mass - (qt * s).sum())
            x = torch.tensor(t, dtype=DOUBLE, requires_grad=True)
            (got,) = torch.autograd.grad(
                fastcalib.pr_divergence(z, w, INF, temperature=x, backend=backend).alpha.sum(), x
            )
            low, high = (
                fastcalib.pr_divergence(z, w, INF, temperature=t + h, backend=backend).alpha.item()
                for h in (-1e-5, 1e-5)
            )
            # central differences: h^2 f''' / 6 is some 1e-10, rounding 1e-16 / h is 1e-11
            torch.testing.assert_close(got, formula, rtol=1e-10, atol=1e-13)
            assert abs((high - low) / 2e-5 - formula.item()) < 1e-8


def test_recall_under_temperature(backend):
    """d beta_lam/dt = (1 / (lam t^2)) sum_{i in U} q_t(i) (s_i - E[s]), U = {q_t < lam p}: recall rises iff the
    under-covered tokens lie above mean surprisal."""
    for seed in range(4):
        z, w = random_logits(1, 60, dtype=DOUBLE, seed=seed), random_logits(1, 60, dtype=DOUBLE, seed=seed + 50)
        q, p = torch.softmax(z, -1), torch.softmax(w, -1)
        for t in (0.6, 1.0, 2.5):
            for lam in (0.3, 1.0, 4.0):
                qt, s = heated(q, t), -q.log()
                under = qt < lam * p
                formula = (torch.where(under, qt * (s - (qt * s).sum()), 0.0)).sum() / (lam * t**2)
                x = torch.tensor(t, dtype=DOUBLE, requires_grad=True)
                beta = fastcalib.pr_divergence(z, w, lam, temperature=x, backend=backend).beta.sum()
                (got,) = torch.autograd.grad(beta, x)
                low, high = (
                    fastcalib.pr_divergence(z, w, lam, temperature=t + h, backend=backend).beta.item()
                    for h in (-1e-6, 1e-6)
                )
                torch.testing.assert_close(got, formula, rtol=1e-10, atol=1e-13)
                # a token that crosses its threshold within h bends the curve: none does here
                assert abs((high - low) / 2e-6 - formula.item()) < 1e-7


@pytest.mark.parametrize("k, v", [(1, 2), (3, 10), (50, 50_000)])
def test_uniform_on_k_of_v(backend, k, v):
    """P uniform on K of V tokens, Q with logit a on them and 0 elsewhere: precision is Q(A), alpha = min(lam, Q(A)).

    At t its precision is 1 / (1 + (V - K) / K exp(-a / t)): heat only lowers it, and nothing it does raises recall."""
    z = torch.zeros(1, v, dtype=DOUBLE)
    z[0, :k] = 8.0
    sets = ValidSets.from_lists([range(k)])
    w = torch.full((1, v), -INF, dtype=DOUBLE)
    w[0, :k] = 0.0
    before = 2.0
    for t in (0.5, 1.0, 2.0, 4.0):
        mass = 1 / (1 + (v - k) / k * math.exp(-8 / t))
        assert mass < before
        before = mass
        for target in (sets, w):
            d = fastcalib.pr_divergence(z, target, [0.0, 0.1, 0.9, 7.0, INF], temperature=t, backend=backend)
            want = torch.tensor([[0.0, min(0.1, mass), min(0.9, mass), mass, mass]], dtype=DOUBLE)
            torch.testing.assert_close(d.alpha, want, rtol=1e-9, atol=1e-300)
            assert abs(d.beta[0, 0].item() - 1) < 1e-12


def test_curves():
    same = random_logits(2, 100, dtype=DOUBLE)
    assert fastcalib.angles(2).tolist() == [0.0, INF] and fastcalib.angles(4)[1] == pytest.approx(1 / math.sqrt(3))
    lam = fastcalib.angles(101)
    torch.testing.assert_close((lam * lam.flip(0))[1:-1], torch.ones(99, dtype=DOUBLE))
    curve = fastcalib.pr_curve(*fastcalib.pr_divergence(same, same, lam))
    torch.testing.assert_close(curve.area, torch.ones(2, dtype=DOUBLE), rtol=1e-12, atol=0)
    # Q uniform on half of P's tokens: precision 1 up to recall 1/2, a rectangle
    z = torch.zeros(1, 4, dtype=DOUBLE)
    q = torch.tensor([[0.0, 0.0, -INF, -INF]], dtype=DOUBLE)
    lam = torch.cat((lam, torch.tensor([2.0], dtype=DOUBLE))).sort().values  # its corner
    area = fastcalib.pr_curve(*fastcalib.pr_divergence(q, z, lam)).area
    torch.testing.assert_close(area, torch.tensor([0.5], dtype=DOUBLE), rtol=1e-12, atol=0)
    down = fastcalib.pr_curve(*fastcalib.pr_divergence(q, z, lam.flip(0))).area
    torch.testing.assert_close(down, area)
    # the area as an integral over angles: 1/2 int (alpha^2 + beta^2) dtheta, by the midpoint rule
    teacher = random_logits(1, 500, dtype=DOUBLE)
    student = teacher + random_logits(
        1, 500, dtype=DOUBLE, scale=0.5, seed=1
    )  # ratios of 5, or the ends are not smooth
    area = fastcalib.pr_curve(*fastcalib.pr_divergence(student, teacher, fastcalib.angles(2_001))).area
    middle = torch.tan((torch.arange(2_000, dtype=DOUBLE) + 0.5) * (math.pi / 4_000))
    d = fastcalib.pr_divergence(student, teacher, middle)
    integral = 0.5 * (d.alpha**2 + d.beta**2).sum(-1) * (math.pi / 4_000)
    torch.testing.assert_close(area, integral, rtol=1e-5, atol=0)


def test_f_beta():
    a = torch.tensor([0.5, 0.0, 1.0, torch.nan], requires_grad=True)
    b = torch.tensor([0.25, 0.0, 1.0, 1.0])
    f = fastcalib.f_beta(a, b, 2.0)
    torch.testing.assert_close(f.detach(), torch.tensor([5 * 0.125 / 2.25, 0.0, 1.0, torch.nan]), equal_nan=True)
    f[:3].sum().backward()
    assert a.grad[:3].isfinite().all()
    curve = fastcalib.pr_curve(torch.tensor([0.0, 0.6, 0.8]), torch.tensor([0.9, 0.6, 0.0]))
    assert fastcalib.f_beta(curve.precision, curve.recall).max().item() == pytest.approx(0.6)
