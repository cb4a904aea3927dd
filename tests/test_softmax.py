"""softmax and log_softmax: forward, gradients to logits and temperature, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import fastcalib

from . import cases
from .cases import BLOCK_EDGES, DTYPES, LAYOUTS, VOCABULARIES, random_logits
from .checks import assert_within

BOTH = [fastcalib.softmax, fastcalib.log_softmax]
INF, NAN = torch.inf, torch.nan


def exact(function, logits, temperature):
    """torch in float64, shifted by the maximum so that z / T cannot round at T = 1e-3."""
    z = logits.double()
    t = torch.as_tensor(temperature, dtype=torch.float64)
    x = (z - z.detach().amax(-1, keepdim=True)) / (t[..., None] if t.dim() else t)
    return torch.softmax(x, -1) if function is fastcalib.softmax else torch.log_softmax(x, -1)


def tolerance(function, want, dtype):
    """float32 inside: 2e-6 relative, for a log-probability absolute below 1; then one rounding to the result's dtype.

    A probability is an exponential of a rounded number: half a unit in the last place of log p, twice (1/T, product).
    """
    u = 1e-12 if dtype == torch.float64 else 2e-6
    store = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    size = want.detach().abs().nan_to_num(posinf=0.0)
    if function is fastcalib.softmax:
        log_p = size.log().abs().clamp(max=800.0)
        return (u * (1 + log_p / 16) + store) * size + (
            2**-24 if dtype == torch.float16 else 1.2e-38
        )  # smaller ones are flushed to 0
    return u * size.clamp(min=1.0) + store * size


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [*VOCABULARIES, *BLOCK_EDGES])
def test_forward(backend, function, v, dtype):
    logits = random_logits(2, v, dtype=dtype, seed=v)
    got, want = function(logits, 0.9, backend=backend), exact(function, logits, 0.9)
    assert got.dtype == dtype and got.shape == logits.shape
    assert_within(got, want, tolerance(function, want, dtype), f"V={v}")
    if function is fastcalib.softmax and dtype in (torch.float32, torch.float64):
        assert_within(got.double().sum(-1), torch.ones(2), 1e-6, "sum of a row")


def check_hostile_rows(function, v, dtype, t, backend):
    rows = cases.defined_rows(v, dtype)
    logits = torch.stack(list(rows.values()))
    want = exact(function, logits, t)
    if dtype == torch.float16:  # log-probabilities beyond 65,504 are -inf
        want = want.to(dtype).double()
    elif dtype != torch.float64:
        want = want.float().double() if dtype == torch.float32 else want.float().to(dtype).double()
    got = function(logits, t, backend=backend)
    assert_within(got, want, tolerance(function, want, dtype), f"V={v}", list(rows))
    if function is fastcalib.softmax:
        sums = got.double().sum(-1)
        # float32 promises 1e-6; a half type rounds each of up to V probabilities
        slack = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11 + v * 2**-25}
        assert_within(sums, torch.ones_like(sums), slack[dtype], "sum of a row", list(rows))
        assert (got[logits == -INF] == 0).all()
    else:
        assert (got[logits == -INF] == -INF).all()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 2, 31, 3_000])
@pytest.mark.parametrize("t", [1e-3, 1.0, 1e3])
def test_hostile_rows(backend, function, v, dtype, t):
    check_hostile_rows(function, v, dtype, t, backend)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_rows_without_a_softmax_are_nan_and_alone_in_it(backend, function, dtype):
    hostile = cases.undefined_rows(200, dtype)
    good = random_logits(len(hostile), 200, dtype=dtype)
    mixed = torch.stack([r for pair in zip(good, hostile.values()) for r in pair]).requires_grad_()
    got = function(mixed, 0.7, backend=backend)
    alone = good.clone().requires_grad_()
    want = function(alone, 0.7, backend=backend)
    assert torch.equal(got[::2], want)
    for row, name in zip(got[1::2], hostile):
        visible = row[hostile[name] != -INF] if name not in ("all -inf",) else row
        assert visible.isnan().all(), f"{name}: {row}"
    upstream = torch.randn(len(hostile), 200).to(dtype)
    (a,) = torch.autograd.grad(got, mixed, upstream.repeat_interleave(2, 0))
    (b,) = torch.autograd.grad(want, alone, upstream)
    assert torch.equal(a[::2], b)
    assert (a[1::2][list(hostile).index("all -inf")] == 0).all(), "a row of -inf has gradient 0"


def check_gradients(function, logits, t, upstream, backend, what):
    """Gradients to logits (N, V) and to temperatures (N,); returns the result and both."""
    dtype = logits.dtype
    z, given = logits.clone().requires_grad_(), t.clone().requires_grad_()
    precise, exact_t = logits.double().requires_grad_(), t.double().requires_grad_()
    out = function(z, given, backend=backend)
    gz, gt = torch.autograd.grad(out, (z, given), upstream)
    wz, wt = torch.autograd.grad(exact(function, precise, exact_t), (precise, exact_t), upstream.double())
    # The gradient is made from the stored result, so its rounding enters: half a unit of p (or of log p, of which p is
    # the exponential) in each term of p (|g| + sum p |g|), or of p |sum g|.
    p = exact(fastcalib.softmax, logits, t)
    g = upstream.double().abs()
    half = dtype in (torch.bfloat16, torch.float16)
    eps = torch.finfo(dtype).eps if half else (1e-12 if dtype == torch.float64 else 4e-6)
    b = (1 / t.double())[:, None]
    if function is fastcalib.softmax:
        least = 2**-24 if dtype == torch.float16 else 0.0  # spacing of the float16 denormals that small p become
        mean = (p * g).sum(-1, keepdim=True)
        bound = b * (2 * eps * p + least) * (g + mean) + b * p * least * g.sum(-1, keepdim=True)
    else:
        log_p = exact(fastcalib.log_softmax, logits, t)
        bound = (
            eps
            * b
            * (
                g
                + p * (upstream.double().sum(-1, keepdim=True).abs() * (1 + log_p.abs()))
                + p * g.sum(-1, keepdim=True)
            )
        )
    assert gz.dtype == dtype
    assert_within(gz, wz, bound + (2**-24 if dtype == torch.float16 else 1e-37), what)
    y = (logits.double() - logits.double().amax(-1, keepdim=True)).abs()
    assert_within(
        gt,
        wt,
        (b[:, 0] * (y * (bound + eps * wz.abs())).sum(-1)) + 2e-6 * wt.abs(),
        f"{what}: gradient of the temperature",
    )
    return out, gz, gt


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 2, 65, 2_049, 128_256])
def test_backward(backend, function, v, dtype):
    logits = random_logits(3, v, dtype=dtype, seed=v)
    upstream = torch.randn(3, v, generator=cases.generator(1)).to(dtype)
    check_gradients(function, logits, torch.tensor([0.5, 1.0, 2.5]), upstream, backend, f"V={v}")


@pytest.mark.parametrize("function", BOTH)
def test_gradcheck(backend, function):
    logits = random_logits(2, 3, 6, dtype=torch.float64).requires_grad_()
    for t in (torch.tensor(0.7), torch.tensor([[0.5], [2.0]]), 0.3 + torch.rand(2, 3)):
        t = t.double().requires_grad_()
        assert gradcheck(lambda z, s: function(z, s, backend=backend), (logits, t))

    def masked(z, s):
        z = torch.where(torch.arange(6) == 2, -INF, z)
        out = function(z, s, vocab_size=5, backend=backend)
        return out[..., [0, 1, 3, 4]]

    assert gradcheck(masked, (logits, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_masked_and_padded_columns(backend, function, dtype):
    base = random_logits(3, 400, dtype=dtype)
    base[:, ::3] = -INF
    padded = torch.cat([base, torch.full((3, 30), NAN, dtype=dtype)], -1).requires_grad_()
    got = function(padded, 0.8, vocab_size=400, backend=backend)
    assert (got[:, 400:] == (0.0 if function is fastcalib.softmax else -INF)).all()
    assert torch.equal(got[:, :400], function(base, 0.8, backend=backend))
    upstream = torch.randn(3, 430, generator=cases.generator(0)).to(dtype)
    (g,) = torch.autograd.grad(got, padded, upstream)
    assert (g[:, 400:] == 0).all() and (g[:, :400:3] == 0).all() and g.isfinite().all()
    only = base.clone().requires_grad_()
    (w,) = torch.autograd.grad(function(only, 0.8, backend=backend), only, upstream[:, :400])
    torch.testing.assert_close(g[:, :400], w, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, function, layout, dtype):
    logits = random_logits(3, 4, 333, dtype=dtype)
    upstream = torch.randn(3, 4, 333, generator=cases.generator(2)).to(dtype)
    results = []
    for z, g in ((logits, upstream), (LAYOUTS[layout](logits), LAYOUTS[layout](upstream))):
        z = z.detach().requires_grad_()
        before, version = z.detach().clone(), z._version
        out = function(z, torch.full((3, 1), 0.8), backend=backend)
        results.append((out, *torch.autograd.grad(out, z, g)))
        assert torch.equal(z.detach(), before) and z._version == version, "the logits were written to"
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("shape", [(0, 5), (5,), (2, 0, 5), (1, 1), (2, 3, 5)])
def test_shapes(backend, function, shape):
    z = torch.randn(shape, requires_grad=True)
    t = torch.ones(shape[:-1], requires_grad=True)
    out = function(z, t, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert z.grad.shape == shape and t.grad.shape == shape[:-1]


@pytest.mark.parametrize("function", BOTH)
def test_expanded_upstream_and_second_use(backend, function):
    z = random_logits(3, 50).requires_grad_()
    out = function(z, backend=backend)
    (a,) = torch.autograd.grad(out, z, torch.ones(()).expand(3, 50), retain_graph=True)
    (b,) = torch.autograd.grad(out, z, torch.ones(3, 50))
    assert torch.equal(a, b)
