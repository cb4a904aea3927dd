"""statistics, backward: gradcheck of every smooth field, and any upstream gradients at full size against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import gradcheck

import fastcalib
from fastcalib import ValidSets

from . import cases, reference
from .cases import DTYPES, LAYOUTS, random_logits, random_sets
from .checks import assert_gradient, assert_within, check_gradient, pull_back, random_upstream

DOUBLE = torch.float64


def fields_of(names, temperature, index=None, **kwargs):
    """A function of the logits (and of a temperature tensor, if that is None) that returns the named fields."""

    def call(logits, *t):
        s = fastcalib.statistics(logits, index, t[0] if t else temperature, **kwargs)
        return tuple(getattr(s, n) for n in names)

    return call


@pytest.mark.parametrize("field", reference.SMOOTH)
def test_gradcheck_to_logits_and_temperature(backend, field):
    logits = random_logits(2, 2, 9, dtype=DOUBLE).requires_grad_()
    index = torch.tensor([[[1, 1, 8], [0, 2, 4]], [[5, -100, 5], [3, 3, 3]]])  # duplicates add up
    t = 0.5 + torch.rand(2, 2, dtype=DOUBLE)
    call = fields_of([field], None, index, backend=backend)
    assert gradcheck(call, (logits, t.requires_grad_()))
    assert gradcheck(call, (logits, torch.tensor(0.8, dtype=DOUBLE, requires_grad=True)))
    assert gradcheck(call, (logits, torch.tensor([[1.3], [0.6]], dtype=DOUBLE, requires_grad=True)))
    assert gradcheck(fields_of([field], [0.4, 1.0, 2.5], index, backend=backend), (logits,))


@pytest.mark.parametrize("index", [torch.tensor([2, 6, 0]), ValidSets.from_lists([[6, 0, 3], [], [1]]), None])
def test_gradcheck_of_all_fields_at_once(backend, index):
    logits = random_logits(3, 7, dtype=DOUBLE).requires_grad_()
    names = [n for n in reference.SMOOTH if index is not None or n != "log_prob"]
    assert gradcheck(fields_of(names, [0.7, 1.9], index, backend=backend), (logits,))
    t = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE, requires_grad=True)
    assert gradcheck(fields_of(names, None, index, backend=backend), (logits, t))


def test_gradcheck_with_masked_and_padded_tokens(backend):
    def call(z, t):
        masked = torch.where(torch.arange(9) % 4 == 3, -torch.inf, z)
        s = fastcalib.statistics(masked, torch.tensor([[0, 5], [1, 1]]), t, vocab_size=8, backend=backend)
        return s.logsumexp, s.entropy, s.max_prob, s.collision, s.mean_logit, s.var_logit, s.std_logits, s.log_prob

    logits = random_logits(2, 9, dtype=DOUBLE).requires_grad_()
    assert gradcheck(call, (logits, torch.tensor([0.8, 1.5], dtype=DOUBLE, requires_grad=True)))


@pytest.mark.parametrize("t", [0.02, 50.0])
def test_gradcheck_cold_and_hot(backend, t):
    logits = (random_logits(2, 6, dtype=DOUBLE) * t / 3).requires_grad_()
    temperature = torch.tensor(t, dtype=DOUBLE, requires_grad=True)
    names = ["logsumexp", "entropy", "max_prob", "collision", "mean_logit", "log_prob"]
    call = fields_of(names, None, torch.tensor([0, 5]), backend=backend)
    assert gradcheck(call, (logits, temperature), eps=1e-6 * t, atol=1e-5 / t)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 2, 31, 64, 2_049, 50_257, 262_144])
def test_any_upstream_at_full_size(backend, v, dtype):
    logits = random_logits(2, v, dtype=dtype, seed=v)
    check_gradient(logits, random_sets(2, v, [1, 9]), 0.9, backend, f"V={v}")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9])
def test_several_temperatures(backend, k, dtype):
    logits = random_logits(3, 3_001, dtype=dtype, seed=k)
    temperatures = (0.3 + 2 * torch.rand(k, generator=cases.generator(k))).tolist()
    check_gradient(logits, random_sets(3, 3_001, [0, 40, 2]), temperatures, backend, f"K={k}")


@pytest.mark.parametrize("field", reference.SMOOTH)
def test_one_upstream_alone(backend, field):
    """The other upstreams are zero, or None: a fast path that leaves terms out must leave out the right ones."""
    logits = random_logits(3, 700, seed=5)
    skip = tuple(n for n in reference.SMOOTH if n != field)
    for temperature in (0.7, [0.7, 1.6, 2.0]):
        check_gradient(logits, [[3, 4], [699], []], temperature, backend, f"{field} alone", skip=skip)
        z = logits.clone().requires_grad_()
        s = fastcalib.statistics(z, torch.tensor([3, 3, 9]), temperature, backend=backend)
        with_zeros = sum(getattr(s, n).sum() * (1.0 if n == field else 0.0) for n in reference.SMOOTH)
        only = fastcalib.statistics(z, torch.tensor([3, 3, 9]), temperature, backend=backend)
        (a,) = torch.autograd.grad(with_zeros, z)
        (b,) = torch.autograd.grad(getattr(only, field).sum(), z)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_per_row_temperatures(backend, dtype):
    logits = random_logits(6, 1_000, dtype=dtype)
    t = torch.tensor([0.1, 0.5, 1.0, 1.5, 3.0, 100.0])
    check_gradient(logits, random_sets(6, 1_000, [3]), t, backend, "per-row temperatures", skip=("var_logit",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_gradient_to_temperature_at_full_size(backend, dtype):
    logits, index = random_logits(4, 32_000, dtype=dtype), random_sets(4, 32_000, [2, 5])
    t = torch.tensor([0.3, 0.8, 1.0, 2.0])
    exact = t.double().requires_grad_()
    want = reference.statistics(logits, exact, index)
    given = t.clone().requires_grad_()
    got = fastcalib.statistics(logits, ValidSets.from_lists(index), given, backend=backend)
    for name in (*reference.OVER_TEMPERATURES, "log_prob"):
        upstream = {name: random_upstream(want, 1)[name]}
        (a,) = torch.autograd.grad(getattr(got, name), given, upstream[name].reshape(getattr(got, name).shape).float(),
                                   retain_graph=True)  # fmt: skip
        (b,) = torch.autograd.grad(getattr(want, name), exact, upstream[name], retain_graph=True)
        # Moments of order 2 and 3 about the maximum, in float32, where the mass lies within 12 of it.
        torch.testing.assert_close(
            a.double(), b, rtol=2e-5, atol=2e-5 * b.abs().max().item(), msg=f"{name}: {a} for {b}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 2, 65, 3_000])
def test_hostile_rows(backend, v, dtype):
    rows = cases.defined_rows(v, dtype)
    for name, row in rows.items():
        # Equal logits have no standard deviation to speak of; beyond float32 range neither sum means anything.
        skip = ("std_logits", "sum_logits") if "finfo.min" in name or row.unique().numel() == 1 else ("std_logits",)
        index = [[0, v // 2, v - 1, 0]]
        index = [list(dict.fromkeys(index[0]))]
        check_gradient(row[None], index, [0.05, 1.0, 30.0], backend, f"{name}, V={v}", skip=skip)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_rows_without_a_softmax_leave_their_neighbours_alone(backend, dtype):
    hostile = cases.undefined_rows(300, dtype)
    good = random_logits(len(hostile) + 1, 300, dtype=dtype)
    mixed = torch.stack([r for pair in zip(good, hostile.values()) for r in pair] + [good[-1]])

    def gradient(z):
        z = z.clone().requires_grad_()
        s = fastcalib.statistics(z, torch.full((z.shape[0],), 7), [0.5, 1.0], backend=backend)
        outputs = [getattr(s, n) for n in reference.SMOOTH]
        return torch.autograd.grad(outputs, z, [torch.ones_like(o) for o in outputs])[0]

    assert torch.equal(gradient(mixed)[::2], gradient(good))
    dead = list(hostile).index("all -inf")
    assert (gradient(mixed)[1::2][dead] == 0).all(), "a row of -inf has gradient 0, not NaN"


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, layout, dtype):
    logits = random_logits(3, 4, 333, dtype=dtype)
    ids = torch.arange(24).reshape(3, 4, 2) * 13
    gradients = []
    for z in (logits, LAYOUTS[layout](logits)):
        z = z.detach().requires_grad_()
        before, version = z.detach().clone(), z._version
        s = fastcalib.statistics(z, ids, [0.8, 1.2], backend=backend)
        weight = torch.linspace(-1, 1, s.entropy.numel()).reshape(s.entropy.shape).to(s.entropy.dtype)
        (s.entropy * weight + s.logsumexp * weight.flip(0) + s.log_prob.sum(2)).sum().backward()
        assert torch.equal(z.detach(), before) and z._version == version, "the logits were written to"
        gradients.append(z.grad)
    assert torch.equal(*gradients), f"the gradient depends on the memory layout: {layout}"


def test_expanded_rows_add_up(backend):
    row = random_logits(1, 400).requires_grad_()
    ids = torch.arange(6)
    fastcalib.statistics(row.expand(6, 400), ids, backend=backend).log_prob.sum().backward()
    exact = row.detach().double().requires_grad_()
    reference.statistics(exact.expand(6, 400), 1.0, ids[:, None].tolist()).log_prob.sum().backward()
    assert_within(row.grad, exact.grad, 1e-5, "gradient of an expanded row")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3.0])
def test_padding_has_no_gradient(backend, dtype, poison):
    logits = torch.cat([random_logits(2, 500, dtype=dtype), torch.full((2, 60), poison, dtype=dtype)], -1)
    check_gradient(logits, [[0, 499], [7]], [0.5, 1.5], backend, f"padding of {poison}", vocab_size=500)


def test_ignored_rows_have_no_gradient_and_no_influence(backend):
    logits = random_logits(5, 600)
    logits[1] = torch.nan  # not even then
    logits[3] = -torch.inf
    z = logits.clone().requires_grad_()
    ids = torch.tensor([4, -100, 9, -100, 599])
    s = fastcalib.statistics(z, ids, [1.0, 0.5], backend=backend)
    outputs = [getattr(s, n) for n in reference.SMOOTH]
    for name, value in zip(reference.SMOOTH, outputs):
        assert (value[[1, 3]] == 0).all(), f"{name} of an ignored row is {value[[1, 3]]}"
    (gradient,) = torch.autograd.grad(outputs, z, [torch.randn_like(o) for o in outputs])
    assert (gradient[[1, 3]] == 0).all() and gradient[[0, 2, 4]].isfinite().all()
    assert s.argmax.tolist()[1] == s.argmax.tolist()[3] == -1
    assert (s.max_logit[[1, 3]] == 0).all()


def test_ignored_entries_among_others(backend):
    logits = random_logits(3, 50)
    z = logits.clone().requires_grad_()
    ids = torch.tensor([[4, -1, 9], [-1, -1, -1], [0, 1, -1]])
    s = fastcalib.statistics(z, ids, ignore_index=-1, ranks=True, backend=backend)
    for value in (s.log_prob, s.n_greater, s.n_equal, s.mass_greater):
        assert (value[ids == -1] == 0).all()
    assert (s.entropy[1] == 0) and (s.entropy[[0, 2]] > 0).all()
    (s.log_prob * torch.randn(3, 3)).sum().backward()
    assert (z.grad[1] == 0).all()
    masked = z.grad.clone()
    t = logits.clone().requires_grad_()
    full = fastcalib.statistics(t, ids.clamp(min=0), backend=backend).log_prob
    torch.testing.assert_close(s.log_prob[ids >= 0], full[ids >= 0], rtol=0, atol=0)
    assert masked.isfinite().all()


@pytest.mark.parametrize("n", [0, 1])
def test_empty_batch(backend, n):
    z = torch.randn(n, 30, requires_grad=True)
    s = fastcalib.statistics(z, torch.zeros(n, 2, dtype=torch.long), [1.0, 2.0], ranks=True, backend=backend)
    assert s.entropy.shape == (n, 2) and s.log_prob.shape == (n, 2, 2) and s.n_greater.shape == (n, 2)
    (s.entropy.sum() + s.log_prob.sum()).backward()
    assert z.grad.shape == (n, 30)
    t = torch.ones(n, requires_grad=True)
    fastcalib.statistics(torch.randn(n, 30), temperature=t, backend=backend).entropy.sum().backward()
    assert t.grad.shape == (n,)


def test_the_graph_can_be_used_twice_and_accumulates(backend):
    z = random_logits(3, 80).requires_grad_()
    s = fastcalib.statistics(z, torch.tensor([1, 2, 3]), backend=backend)
    s.log_prob.sum().backward(retain_graph=True)
    once = z.grad.clone()
    s.log_prob.sum().backward()
    torch.testing.assert_close(z.grad, 2 * once)


def test_upstream_of_any_layout(backend):
    """An expanded upstream (what .sum() gives) and a strided one are the same numbers."""
    z = random_logits(4, 90).requires_grad_()
    s = fastcalib.statistics(z, temperature=[1.0, 2.0, 3.0], backend=backend)
    g = torch.randn(3, 4)
    (a,) = torch.autograd.grad(s.entropy, z, g.t(), retain_graph=True)
    (b,) = torch.autograd.grad(s.entropy, z, g.t().contiguous(), retain_graph=True)
    (c,) = torch.autograd.grad(s.entropy, z, torch.ones(()).expand(4, 3), retain_graph=True)
    (d,) = torch.autograd.grad(s.entropy.sum(), z)
    assert torch.equal(a, b) and torch.equal(c, d)


def test_logits_changed_in_place_before_backward_are_noticed(cpp_backend):
    """The kernel reads the logits again in backward; PyTorch's own operations keep what they need instead."""
    z = random_logits(3, 80).requires_grad_()
    x = z * 1.0
    loss = fastcalib.statistics(x, torch.tensor([1, 2, 3]), backend=cpp_backend).entropy.sum()
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_graph_without_need(backend):
    z = random_logits(3, 80)
    assert not fastcalib.statistics(z, backend=backend).entropy.requires_grad
    with torch.no_grad():
        assert not fastcalib.statistics(z.requires_grad_(), backend=backend).entropy.requires_grad
    with torch.inference_mode():
        assert fastcalib.statistics(z, torch.tensor([1, 2, 3]), backend=backend).log_prob.isfinite().all()
    s = fastcalib.statistics(z, torch.tensor([1, 2, 3]), ranks=True, backend=backend)
    for name in ("argmax", "max_logit", "n_greater", "n_equal", "mass_greater"):
        assert not getattr(s, name).requires_grad, f"{name} claims to have a gradient"
    detached = copy.deepcopy(fastcalib.TokenStatistics(*(None if x is None else x.detach() for x in s)))
    assert torch.equal(detached.entropy, s.entropy)


def test_through_a_layer_in_bfloat16(backend):
    """As a training step uses it: hidden states, a head, per-token weights, a gradient in the weights."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 500, bias=False).bfloat16()
    hidden = torch.randn(2, 7, 16).bfloat16()
    ids, weight = torch.randint(0, 500, (2, 6)), torch.rand(2, 6)
    logits = head(hidden)
    s = fastcalib.statistics(logits[:, :-1], ids, backend=backend)
    (weight * (-s.log_prob + 0.1 * s.entropy)).sum().backward()
    logits.retain_grad()
    exact = (hidden.double() @ head.weight.detach().double().T).to(torch.bfloat16).double()
    exact = torch.where(torch.tensor(True), logits.detach().double(), exact).requires_grad_()
    want = reference.statistics(exact[:, :-1].reshape(12, 500), 1.0, ids.reshape(12, 1).tolist())
    (weight.reshape(12, 1) * (-want.log_prob + 0.1 * want.entropy)).sum().backward()
    dw = torch.einsum("bsv,bsd->vd", exact.grad, hidden.double())
    # one bf16 rounding of each of the 14 terms and one of the sum
    scale = torch.einsum("bsv,bsd->vd", exact.grad.abs(), hidden.double().abs())
    assert_within(head.weight.grad, dw, 2**-8 * (scale + dw.abs()), "gradient of the head")


def test_ranks_do_not_change_the_gradient(backend):
    z = random_logits(4, 300).requires_grad_()
    ids = torch.randint(0, 300, (4, 16))
    gradients = []
    for flag in (False, True):
        s = fastcalib.statistics(z, ids, ranks=flag, backend=backend)
        gradients.append(torch.autograd.grad(s.log_prob.sum() + s.entropy.sum(), z)[0])
    assert torch.equal(*gradients)


def test_unused_helpers_agree():
    """pull_back on two references gives the same: the check itself is sound."""
    z = random_logits(2, 5, dtype=DOUBLE).requires_grad_()
    want = reference.statistics(z, 1.0, [[0], [1]])
    upstream = random_upstream(want, 0)
    (a,) = pull_back(want, [z], upstream)
    scale = reference.gradient_scale(z.detach(), 1.0, [[0], [1]], upstream)
    assert (scale * 1.001 >= a.abs()).all(), "the scale of a gradient bounds it"
    assert_gradient(a, a, scale, DOUBLE, "itself")
