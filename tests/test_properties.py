"""Laws that hold for any logits, looked for counter-examples by hypothesis."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import fastcalib

from . import reference
from .checks import assert_statistics, check_gradient

# The backend fixture lives as long as one test function; every example of it uses the same backend, as meant.
quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # rows are small as they are; to make them smaller takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
number = st.one_of(
    st.floats(-60, 60, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 1.0, -3.5, 88.0, -104.0, 1e4, -1e4]),
    st.floats(-1e4, 1e4, width=16),
)
masked = st.one_of(number, st.just(-math.inf))
temperature = st.floats(0.02, 50)


@st.composite
def rows(draw, element=number, n=3):
    v = draw(st.integers(1, 150))
    return torch.tensor([draw(st.lists(element, min_size=v, max_size=v)) for _ in range(draw(st.integers(1, n)))])


@quick
@given(logits=rows(masked), t=st.lists(temperature, min_size=1, max_size=4), data=st.data())
def test_statistics_are_those_of_the_reference(backend, logits, t, data):
    v = logits.shape[1]
    ids = [[data.draw(st.integers(0, v - 1))] for _ in logits]
    got = fastcalib.statistics(logits, torch.tensor(ids), t, backend=backend)
    assert_statistics(got, reference.statistics(logits, t, ids), logits.dtype, "drawn")


@quick
@given(logits=rows(masked), t=st.lists(st.floats(0.2, 20), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_gradients_are_those_of_the_reference(backend, logits, t, seed):
    ids = [[int(r.argmax())] for r in logits]
    check_gradient(logits, ids, t, backend, "drawn", skip=("std_logits",), seed=seed)


@quick
@given(logits=rows(), t=temperature, shift=st.sampled_from([-256.0, -1.0, 4.0, 1024.0]))
def test_a_common_shift_changes_nothing_but_the_level(backend, logits, t, shift):
    logits = logits.double()
    a = fastcalib.statistics(logits, torch.zeros(len(logits), dtype=torch.long), t, backend=backend)
    b = fastcalib.statistics(logits + shift, torch.zeros(len(logits), dtype=torch.long), t, backend=backend)
    # float64: shifting a logit of 1e4 loses 1e-12 of it, magnified by 1/T
    near = {"rtol": 1e-9, "atol": 1e-9}
    for name in ("entropy", "max_prob", "collision", "log_prob"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **near)
    torch.testing.assert_close(a.logsumexp + shift / t, b.logsumexp, **near)
    torch.testing.assert_close(a.mean_logit + shift, b.mean_logit, **near)


@quick
@given(logits=rows(masked), t=temperature, data=st.data())
def test_the_order_of_tokens_does_not_matter(backend, logits, t, data):
    order = torch.tensor(data.draw(st.permutations(range(logits.shape[1]))))
    a = fastcalib.statistics(logits, temperature=t, backend=backend)
    b = fastcalib.statistics(logits[:, order], temperature=t, backend=backend)
    for name in ("logsumexp", "entropy", "max_prob", "collision", "max_logit"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5, equal_nan=True)
    every = torch.arange(logits.shape[1]).expand_as(logits)
    ra = fastcalib.ranks(logits, every, backend=backend)
    rb = fastcalib.ranks(logits[:, order], every, backend=backend)
    assert torch.equal(ra.n_greater[:, order], rb.n_greater) and torch.equal(ra.n_equal[:, order], rb.n_equal)


@quick
@given(logits=rows(masked), t=temperature)
def test_bounds(backend, logits, t):
    s = fastcalib.statistics(logits, logits.argmax(-1), t, backend=backend)
    n = (logits > -math.inf).sum(-1)
    ok = n > 0
    entropy, top, collision = s.entropy[ok], s.max_prob[ok], s.collision[ok]
    n = n[ok].float()
    slack = 1 + 1e-5
    assert (entropy >= 0).all() and (entropy <= n.log() * slack + 1e-6).all()
    assert (top <= 1).all() and (top * slack >= 1 / n).all()
    # max p <= sqrt(sum p^2), and sum p^2 <= max p
    assert (
        (collision <= top * slack).all() and (collision * slack >= top**2).all() and (collision * slack >= 1 / n).all()
    )
    assert (s.var_logit[ok] >= 0).all()
    assert (entropy >= -top.log() - 1e-5 * (1 + entropy)).all()  # Shannon is at least the min-entropy
    assert (entropy >= -collision.log() - 1e-5 * (1 + entropy)).all()  # and at least Renyi's of order 2
    torch.testing.assert_close(s.log_prob[ok].exp(), top, rtol=1e-5, atol=0)
    assert (s.mean_logit[ok] <= s.max_logit[ok] + 1e-5 * s.max_logit[ok].abs()).all()


@quick
@given(logits=rows(), cold=st.floats(0.1, 5), factor=st.floats(1.1, 10))
def test_heating_spreads(backend, logits, cold, factor):
    s = fastcalib.statistics(logits, temperature=[cold, cold * factor], backend=backend)
    slack = 1e-5
    assert (s.entropy[:, 1] >= s.entropy[:, 0] * (1 - slack) - slack).all()
    assert (s.max_prob[:, 1] <= s.max_prob[:, 0] * (1 + slack)).all()
    assert (s.collision[:, 1] <= s.collision[:, 0] * (1 + slack)).all()
    assert (s.mean_logit[:, 1] <= s.mean_logit[:, 0] + slack * (1 + logits.abs().amax(-1))).all()


@quick
@given(logits=rows(masked), t=temperature)
def test_softmax_sums_to_one_and_is_monotone(backend, logits, t):
    p = fastcalib.softmax(logits, t, backend=backend)
    log_p = fastcalib.log_softmax(logits, t, backend=backend)
    for row, log_row, z in zip(p, log_p, logits):
        if (z == -math.inf).all():
            assert row.isnan().all() and log_row.isnan().all()
            continue
        assert abs(row.double().sum().item() - 1) <= 1e-6
        order = z.argsort()
        rise, log_rise = row[order].diff(), log_row[order].diff().nan_to_num(0.0)
        # exp by a polynomial may step back by its own error where two logits are neighbours
        assert (rise >= -1e-6 * row[order][1:]).all() and (
            log_rise >= -1e-6 * log_row[order][1:].abs().nan_to_num()
        ).all()


@quick
@given(logits=rows(masked), thresholds=st.lists(masked, min_size=1, max_size=60), t=temperature)
def test_counts_and_masses_fall_as_thresholds_rise(backend, logits, thresholds, t):
    thresholds = torch.tensor(sorted(thresholds)).expand(len(logits), -1)
    r = fastcalib.ranks(logits, thresholds=thresholds, temperature=t, backend=backend)
    assert (r.n_greater.diff(dim=-1) <= 0).all()
    assert ((r.n_greater >= 0) & (r.n_greater + r.n_equal <= logits.shape[1])).all()
    mass = r.mass_greater[(logits > -math.inf).any(-1)]
    assert (mass.diff(dim=-1) <= 1e-6).all() and ((mass >= 0) & (mass <= 1 + 1e-6)).all()
    greater, equal, _ = reference.counts(logits, list(thresholds))
    assert torch.equal(r.n_greater.flatten(), greater) and torch.equal(r.n_equal.flatten(), equal)


@quick
@given(logits=rows(masked, n=2))
def test_ranks_are_a_ranking(backend, logits):
    v = logits.shape[1]
    r = fastcalib.ranks(logits, torch.arange(v).expand_as(logits), backend=backend)
    scipy_stats = pytest.importorskip("scipy.stats")
    for i, row in enumerate(logits):
        for method in ("min", "max", "average"):
            want = scipy_stats.rankdata((-row.double()).numpy(), method=method)
            assert r.rank(method)[i].tolist() == want.tolist(), method
