"""The kernels on tensors that live on a GPU: the grid of the CPU tests against float64. Not yet run on a GPU.

With a GPU there, the tests of each operation (test_statistics.py and its neighbours, conftest.GPU_GRID) run on it
too; these see what those cannot: the device's own dispatch, its memory layouts, the
sizes that only a GPU is fast enough for.
"""

from __future__ import annotations

import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import cases, reference, test_softmax
from .cases import LAYOUTS, TEMPERATURES, VOCABULARIES, random_logits, random_sets
from .checks import assert_statistics, assert_within, check_gradient
from .test_ranks import check_mass
from .test_statistics import hostile, ordinary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
every_vocabulary = pytest.mark.parametrize("v", VOCABULARIES)


def home(result):
    """A named tuple of results on the CPU."""
    return type(result)(*(None if t is None else t.detach().cpu() for t in result))


def check_statistics(gpu, logits, index, temperature, want, what, names=None):
    z = gpu.put(logits)
    got = fastcalib.statistics(
        z, ValidSets.from_lists(index).to(gpu.device), temperature, backend=gpu.backend, validate=True
    )
    assert all(t is None or t.device == gpu.device for t in got), f"{what}: a result is elsewhere"
    assert_statistics(home(got), want, logits.dtype, what, names=names)
    assert torch.equal(z.cpu().nan_to_num(), logits.nan_to_num()), f"{what}: the logits were written to"


@every_dtype
@every_vocabulary
def test_statistics_at_vocabularies_of_real_models(gpu, v, dtype):
    logits, index, want = ordinary(v, dtype)
    check_statistics(gpu, logits, index, [1.0, 0.6], want, f"V={v}")


@every_dtype
@pytest.mark.parametrize("v", [1, 2, 31, 2_049, 40_000])
def test_statistics_of_hostile_rows(gpu, v, dtype):
    names, logits, index, want = hostile(v, dtype)
    check_statistics(gpu, logits, index, TEMPERATURES, want, f"V={v}", names)


@every_dtype
@pytest.mark.parametrize("v", [1, 2, 130, 40_000])
def test_rows_without_a_softmax_are_nan_and_alone_in_it(gpu, v, dtype):
    bad = cases.undefined_rows(v, dtype)
    good = random_logits(len(bad), v, dtype=dtype)
    mixed = torch.stack([row for pair in zip(good, bad.values()) for row in pair])
    fields = reference.SMOOTH
    results = []
    for rows in (mixed, good):
        z = gpu.put(rows).requires_grad_()
        ids = torch.full((len(rows),), v - 1, device=gpu.device)
        s = fastcalib.statistics(z, ids, [1.0, 0.3], backend=gpu.backend)
        smooth = [getattr(s, n) for n in fields]
        (gradient,) = torch.autograd.grad(smooth, z, [torch.ones_like(t) for t in smooth])
        results.append(({n: t.detach().cpu() for n, t in zip(fields, smooth)}, s.argmax.cpu(), gradient.cpu()))
    (values, argmax, gradient), (alone, argmax_alone, gradient_alone) = results
    for name in fields:
        for row, case in zip(values[name][1::2], bad):
            assert row.isnan().all(), f"{name} of a row with {case}: {row}"
        assert torch.equal(values[name][::2], alone[name]), f"{name}: a row changed because of its neighbour"
    assert (argmax[1::2] == -1).all() and torch.equal(argmax[::2], argmax_alone)
    assert torch.equal(gradient[::2], gradient_alone)
    assert (gradient[1::2][list(bad).index("all -inf")] == 0).all()


@every_dtype
@every_vocabulary
def test_gradient_of_every_smooth_field(gpu, v, dtype):
    logits = random_logits(2, v, dtype=dtype, seed=v)
    check_gradient(logits, random_sets(2, v, [1, 9]), 0.9, gpu.backend, f"V={v}", device=gpu.device)


@every_dtype
@pytest.mark.parametrize("k", [1, 3, 8])
def test_temperatures(gpu, k, dtype):
    logits = random_logits(3, 3_001, dtype=dtype, seed=k)
    index = random_sets(3, 3_001, [0, 40, 2])
    temperatures = (0.3 + 2 * torch.rand(k, generator=cases.generator(k))).tolist()
    want = reference.statistics(logits, temperatures, index)
    check_statistics(gpu, logits, index, temperatures, want, f"K={k}")
    check_gradient(logits, index, temperatures, gpu.backend, f"K={k}", device=gpu.device)


@every_dtype
def test_a_temperature_for_each_row(gpu, dtype):
    logits = random_logits(6, 1_000, dtype=dtype)
    t = torch.tensor([0.1, 0.5, 1.0, 1.5, 3.0, 100.0])
    sets = random_sets(6, 1_000, [3])
    check_gradient(logits, sets, t, gpu.backend, "per row", skip=("var_logit",), device=gpu.device)
    exact, given = t.double().requires_grad_(), gpu.put(t).requires_grad_()
    fastcalib.statistics(gpu.put(logits), temperature=given, backend=gpu.backend).entropy.sum().backward()
    reference.statistics(logits, exact).entropy.sum().backward()
    # var / T^3 of float32 moments: two roundings of what the promise of 2e-6 covers, and the promise itself
    assert_within(given.grad.cpu(), exact.grad, 2e-5 * exact.grad.abs() + 1e-6, "gradient to the temperature")


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(gpu, layout, dtype):
    host = random_logits(3, 4, 333, dtype=dtype)
    ids = torch.arange(24).reshape(3, 4, 2).to(gpu.device) * 13
    results = []
    for z in (host, LAYOUTS[layout](host)):
        z = gpu.put(z).requires_grad_()
        version = z._version
        s = fastcalib.statistics(z, ids, [0.8, 1.2], ranks=True, backend=gpu.backend)
        r = fastcalib.ranks(z, ids, temperature=1.0, backend=gpu.backend)
        weight = torch.linspace(-1, 1, s.entropy.numel(), device=gpu.device).reshape(s.entropy.shape)
        (s.entropy * weight + s.logsumexp * weight.flip(0) + s.log_prob.sum(2)).sum().backward()
        assert torch.equal(z.detach().cpu(), host) and z._version == version, "the logits were written to"
        results.append((z.grad, *s, *r))
    for name, a, b in zip(("gradient", *fastcalib.TokenStatistics._fields, "", "", ""), *results):
        assert torch.equal(a, b), f"{name} depends on the memory layout: {layout}"


@every_dtype
@every_vocabulary
@pytest.mark.parametrize("m", [1, 16, 300, 4_096])
def test_ranks_of_sets_of_any_size(gpu, m, v, dtype):
    logits = random_logits(2, v, dtype=dtype, seed=v)  # half types: many ties
    ids = torch.stack([torch.randperm(v, generator=cases.generator(r))[: min(m, v)] for r in range(2)])
    got = home(fastcalib.ranks(gpu.put(logits), ids.to(gpu.device), temperature=[1.0, 0.3], backend=gpu.backend))
    greater, equal, mass = reference.counts(logits, [z[i] for z, i in zip(logits, ids)], [1.0, 0.3])
    assert torch.equal(got.n_greater.flatten(), greater) and torch.equal(got.n_equal.flatten(), equal - 1)
    check_mass(got.mass_greater.reshape(mass.shape), mass, f"V={v} M={m}")


@every_dtype
def test_ranks_of_ragged_sets(gpu, dtype):
    sizes = [0, 1, 300, 17, 0, 0, 16, 2_500, 5, 0]
    logits = random_logits(10, 2_500, dtype=dtype)
    lists = cases.random_sets(10, 2_500, sizes)
    sets = ValidSets.from_lists(lists).to(gpu.device)
    got = home(fastcalib.ranks(gpu.put(logits), sets, temperature=[1.0, 2.0], backend=gpu.backend))
    greater, equal, mass = reference.counts(logits, [z[ids] for z, ids in zip(logits, lists)], [1.0, 2.0])
    assert torch.equal(got.n_greater, greater) and torch.equal(got.n_equal, equal - 1)
    check_mass(got.mass_greater, mass, "ragged")


@every_dtype
@pytest.mark.parametrize("m", [1, 40, 700])
def test_thresholds_of_hostile_rows(gpu, m, dtype):
    rows = cases.defined_rows(700, dtype) | cases.undefined_rows(700, dtype)
    logits = torch.stack(list(rows.values()))
    t = logits.float()[:, torch.randperm(700, generator=cases.generator(0))[:m]]
    t[:, 0] = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0]).repeat(len(t))[: len(t)]
    got = home(fastcalib.ranks(gpu.put(logits), thresholds=gpu.put(t), temperature=[1.0], backend=gpu.backend))
    greater, equal, mass = reference.counts(logits, list(t), [1.0])
    assert torch.equal(got.n_greater.flatten(), greater) and torch.equal(got.n_equal.flatten(), equal)
    check_mass(got.mass_greater.reshape(mass.shape), mass, f"M={m}")


@every_dtype
@every_vocabulary
@pytest.mark.parametrize("function", test_softmax.BOTH)
def test_dense_softmax_and_its_gradient(gpu, function, v, dtype):
    logits, t = random_logits(3, v, dtype=dtype, seed=v), torch.tensor([0.5, 1.0, 2.5])
    upstream = torch.randn(3, v, generator=cases.generator(1)).to(dtype)
    z, given = gpu.put(logits).requires_grad_(), gpu.put(t).requires_grad_()
    out = function(z, given, backend=gpu.backend)
    gradients = torch.autograd.grad(out, (z, given), gpu.put(upstream))
    precise, exact_t = logits.double().requires_grad_(), t.double().requires_grad_()
    want = test_softmax.exact(function, precise, exact_t)
    wanted = torch.autograd.grad(want, (precise, exact_t), upstream.double())
    assert_within(out.cpu(), want, test_softmax.tolerance(function, want, dtype), f"V={v}")
    assert out.dtype == gradients[0].dtype == dtype
    # dz = b (p or 1) (g - sum): as many float32 terms as V, whose sizes add up to `size`; p is rounded to its dtype
    # before the backward reads it, and dz once more
    p = want.detach() if function is fastcalib.softmax else want.detach().exp()
    store = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    g = upstream.double().abs()
    total = (g * p).sum(-1, keepdim=True) if function is fastcalib.softmax else g.sum(-1, keepdim=True)
    size = (p * (g + total) if function is fastcalib.softmax else g + p * total) / t[:, None].double()
    tiny = 2**-24 if dtype == torch.float16 else 1e-37
    assert_within(gradients[0].cpu(), wanted[0], (2e-5 + 4 * store) * size + tiny, f"V={v}: gradient")
    # dT = -b sum z dz, about the maximum of the row
    far = (logits.double() - logits.double().amax(-1, keepdim=True)).abs()
    bound = (2e-5 + 4 * store) * (far * size).sum(-1) / t.double() + v * tiny
    assert_within(gradients[1].cpu(), wanted[1], bound, f"V={v}: gradient to T")


def test_bad_ids_are_marked_and_do_no_harm(gpu):
    host = random_logits(5, 700)
    z = gpu.put(host).requires_grad_()
    ids = torch.tensor([[3, 5], [700, 5], [-1, 5], [2**40, 5], [-100, 5]]).to(gpu.device)
    bad = torch.tensor([[0, 0], [1, 0], [1, 0], [1, 0], [0, 0]]).bool()
    s = fastcalib.statistics(z, ids, ranks=True, backend=gpu.backend)
    r = fastcalib.ranks(z, ids, temperature=1.0, backend=gpu.backend)
    assert torch.equal(s.log_prob.isnan().cpu(), bad)
    for counts in (s.n_greater, s.n_equal, r.n_greater, r.n_equal):
        assert torch.equal((counts == -1).cpu(), bad)
    (gradient,) = torch.autograd.grad(s.log_prob[:, 1].sum() + s.entropy.sum(), z)
    fine = gpu.put(host).requires_grad_()
    # row 0 keeps its valid token 3: a selected token's gradient is formed apart, which may round it differently
    others = torch.tensor([[3, 5], [5, 5], [5, 5], [5, 5], [5, 5]]).to(gpu.device)
    alone = fastcalib.statistics(fine, others, backend=gpu.backend)
    (want,) = torch.autograd.grad(alone.log_prob[:, 1].sum() + alone.entropy.sum(), fine)
    assert torch.equal(gradient, want) and torch.equal(s.entropy, alone.entropy)
    for function in (fastcalib.statistics, fastcalib.ranks):
        with pytest.raises(ValueError, match=r"index\[1, 0\] is 700, outside \[0, 700\)"):
            function(z, ids, backend=gpu.backend, validate=True)


@every_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 5.0])
def test_padded_columns_take_no_part(gpu, dtype, poison):
    logits = torch.cat([random_logits(2, 3_000, dtype=dtype), torch.full((2, 37), poison, dtype=dtype)], -1)
    check_gradient(logits, [[0, 2_999], [7]], [0.5, 1.5], gpu.backend, f"padding of {poison}", vocab_size=3_000,
                   device=gpu.device)  # fmt: skip
