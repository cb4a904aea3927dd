"""The operations as PyTorch sees them: schema, fake tensors, autograd, torch.compile, autocast."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

import fastcalib
from fastcalib import ValidSets

from . import cases, reference
from .cases import random_logits
from .conftest import CPP_IS_LIVE

needs_cpp = pytest.mark.skipif(not CPP_IS_LIVE, reason="the C++ extension is not built")
OPS = torch.ops.fastcalib


@pytest.fixture(params=["eager", pytest.param("cpp", marks=needs_cpp)])
def route(request):
    """Each backend once: what PyTorch sees does not depend on the instruction set."""
    return request.param


def temperature(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64).reshape(-1, len(values) if not grad else 1).requires_grad_(grad)


def statistics_inputs():
    logits = random_logits(3, 40)
    sets = ValidSets.from_lists([[4, 3], [], [39]])
    ids = torch.tensor([0, 5, 39, -100, 7, 8])
    yield "no index", (logits.requires_grad_(), temperature(1.0, 2.0), None, 0, None, 40, -100, False)
    yield (
        "index",
        (
            random_logits(3, 40).requires_grad_(),
            temperature(0.7, grad=True),
            ids.clamp(max=37),
            2,
            None,
            38,
            -100,
            False,
        ),
    )
    yield "ranks", (random_logits(3, 40).requires_grad_(), temperature(1.0, 2.0), ids, 2, None, 40, -100, True)
    yield "sets", (random_logits(3, 40), temperature(1.0), sets.values, 0, sets.offsets, 40, -100, False)
    per_row = temperature(0.5, 1.0, 2.0, grad=True)
    yield "per row, 3-D", (random_logits(3, 1, 40).requires_grad_(), per_row, ids, 2, None, 40, -100, False)
    yield (
        "bfloat16",
        (random_logits(3, 40, dtype=torch.bfloat16).requires_grad_(), temperature(1.0), ids, 2, None, 40, -100, True),
    )


@needs_cpp
@pytest.mark.parametrize("inputs", statistics_inputs(), ids=lambda i: i[0])
def test_opcheck_statistics(inputs):
    opcheck(OPS.statistics.default, inputs[1])


@needs_cpp
@pytest.mark.parametrize("inputs", statistics_inputs(), ids=lambda i: i[0])
def test_opcheck_statistics_backward(inputs):
    logits, t, index, per_row, offsets, width, ignore_index, _ = inputs[1]
    logits, t = logits.detach(), t.detach()
    rows, scalars, log_prob, *_, saved = OPS.statistics(logits, t, index, per_row, offsets, width, ignore_index, False)
    grads = [torch.randn_like(x) for x in (rows, scalars, log_prob)]
    opcheck(
        OPS.statistics_backward.default,
        (*grads, logits, t, index, per_row, offsets, rows, scalars, saved, width, ignore_index),
    )


@needs_cpp
def test_opcheck_ranks():
    logits, sets = random_logits(3, 40), ValidSets.from_lists([[4, 3], [], [39]])
    ids = torch.tensor([0, 5, 39, -100, 7, 8])
    bounds = torch.randn(6)
    opcheck(OPS.ranks.default, (logits, ids, None, 2, None, None, 40, -100))
    opcheck(OPS.ranks.default, (logits, None, bounds, 2, None, temperature(1.0, 2.0), 39, -100))
    opcheck(OPS.ranks.default, (logits.bfloat16(), sets.values, None, 0, sets.offsets, temperature(1.0), 40, -100))


@needs_cpp
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("t", [temperature(0.8), temperature(0.5, 1.0, 2.0, grad=True)])
def test_opcheck_softmax(log, t):
    logits = random_logits(3, 40)
    opcheck(OPS.softmax.default, (logits.clone().requires_grad_(), t, 40, log))
    opcheck(OPS.softmax.default, (random_logits(3, 1, 40, dtype=torch.bfloat16).requires_grad_(), t, 30, log))
    out, logsumexp = OPS.softmax(logits, t.detach(), 40, log)
    for temperature_grad in (False, True):
        opcheck(
            OPS.softmax_backward.default, (torch.randn(3, 40), out, logsumexp, t.detach(), 40, log, temperature_grad)
        )


def step(z, ids, t, route):
    """What a training step does, all three operations in one graph."""
    s = fastcalib.statistics(z[:, :-1], ids, t, ranks=True, backend=route)
    r = fastcalib.ranks(z[:, :-1].detach(), ids, temperature=0.7, backend=route)
    p = fastcalib.softmax(z[:, :-1], 0.9, backend=route)
    loss = (
        -(s.log_prob * torch.where(s.n_greater < 5, 1.0, 0.5)[..., None]).mean()
        + 0.1 * s.entropy.mean()
        + p.square().sum()
    )
    return loss, s.argmax, r.mass_greater


def both_ways(function, compiled, *args):
    out = []
    for f in (function, compiled):
        z = args[0].detach().clone().requires_grad_()
        loss, *rest = f(z, *args[1:])
        loss.backward()
        out.append((loss.detach(), z.grad, *rest))
    for a, b in zip(*out):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(route, compiler):
    if (compiler, route) == ("inductor", "eager") and CPP_IS_LIVE:
        pytest.skip("code generation for plain PyTorch is PyTorch's own, and takes a minute")
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    both_ways(step, compiled, random_logits(2, 6, 300), torch.randint(0, 300, (2, 5)), [0.5, 1.0], route)


def test_compiles_with_valid_sets_masks_and_padding(route):
    torch._dynamo.reset()

    def f(z, values, offsets, t):
        s = fastcalib.statistics(z, ValidSets(values, offsets), t, vocab_size=250, backend=route)
        return s.log_prob.sum() + s.collision.sum(), s.max_prob

    sets = ValidSets.from_lists([[1, 2, 3], [], [4]])
    z = random_logits(3, 260)
    z[:, 7] = -torch.inf
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    both_ways(f, compiled, z, sets.values, sets.offsets, torch.tensor([0.5, 1.0, 2.0]))


def test_a_set_made_outside_compiles(route):
    torch._dynamo.reset()
    sets = ValidSets.from_lists([[1, 2, 3], [], [4]])

    def f(z):
        s = fastcalib.statistics(z, sets, backend=route)
        return s.log_prob.sum(), s.max_prob

    both_ways(f, torch.compile(f, fullgraph=True, backend="aot_eager"), random_logits(3, 260))


def recompiles(function, calls):
    """Graphs that Dynamo made for a series of calls."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for args in calls:
        torch.testing.assert_close(compiled(*args), function(*args), rtol=1e-5, atol=1e-6)
    return counter.frame_count


def test_new_temperature_tensors_do_not_recompile(route):
    def f(z, t):
        return fastcalib.statistics(z, temperature=t, backend=route).entropy

    z = random_logits(3, 100)
    assert recompiles(f, [(z, torch.tensor(t)) for t in (0.5, 0.7, 1.0, 1.3)]) == 1
    assert recompiles(f, [(z, torch.full((3,), t)) for t in (0.5, 0.7, 1.0, 1.3)]) == 1


@pytest.mark.parametrize("function", [fastcalib.statistics, fastcalib.softmax])
def test_new_temperature_numbers_recompile_once_at_most(route, function):
    """Dynamo first takes a Python number for a constant, then for a variable; new values must not go on compiling."""

    def f(z, t):
        out = function(z, temperature=t, backend=route)
        return out.entropy if isinstance(out, tuple) else out

    z, values = random_logits(3, 100), (0.5, 0.7, 1.25, 1.3)
    assert recompiles(f, [(z, t) for t in values]) <= 2
    if function is fastcalib.statistics:
        assert recompiles(f, [(z, [t, t + 1.25]) for t in values]) <= 2


def test_new_batch_sizes_recompile_once_at_most(route):
    def f(z, ids):
        s = fastcalib.statistics(z, ids, backend=route)
        return s.entropy, s.log_prob

    calls = [(random_logits(n, 100), torch.randint(0, 100, (n,))) for n in (4, 5, 6, 9)]
    assert recompiles(f, calls) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(route, dtype):
    """Under autocast a layer gives half-precision logits; the statistics stay float32, the same as without."""
    layer, x = torch.nn.Linear(8, 200), torch.randn(4, 8)
    ids = torch.tensor([0, 3, 199, 7])
    with torch.autocast("cpu", dtype=dtype):
        logits = layer(x)
        assert logits.dtype == dtype
        s = fastcalib.statistics(logits, ids, backend=route)
        plain = fastcalib.statistics(layer.weight @ x[0], backend=route)
        r = fastcalib.ranks(logits, ids, temperature=1.0, backend=route)
        p = fastcalib.softmax(logits, backend=route)
    assert s.log_prob.dtype == s.entropy.dtype == plain.entropy.dtype == r.mass_greater.dtype == torch.float32
    assert p.dtype == dtype
    outside = fastcalib.statistics(logits, ids, backend=route)
    assert torch.equal(s.log_prob, outside.log_prob) and torch.equal(s.entropy, outside.entropy)
    (-s.log_prob + 0.1 * s.entropy).mean().backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().sum() > 0
    want = reference.statistics(logits.detach().double(), 1.0, ids[:, None].tolist())
    torch.testing.assert_close(s.log_prob.double(), want.log_prob[:, 0], rtol=2e-6, atol=2e-6)


@needs_cpp
def test_meta_tensors_give_shapes():
    logits = torch.empty(2, 3, 50, device="meta", dtype=torch.bfloat16)
    ids = torch.empty(2, 3, 4, device="meta", dtype=torch.long)
    s = fastcalib.statistics(logits, ids, ranks=True, backend="cpp")
    assert s.entropy.shape == (2, 3) and s.log_prob.shape == s.n_greater.shape == (2, 3, 4)
    assert s.entropy.device.type == "meta" and s.entropy.dtype == torch.float32 and s.n_equal.dtype == torch.int64
    assert fastcalib.softmax(logits, backend="cpp").dtype == torch.bfloat16
    assert fastcalib.ranks(logits, ids, temperature=1.0, backend="cpp").mass_greater.shape == (2, 3, 4)


def test_export(route):
    class Module(torch.nn.Module):
        def forward(self, z, ids):
            s = fastcalib.statistics(z, ids, [0.7, 1.0], backend=route)
            return s.log_prob, s.entropy

    z, ids = random_logits(4, 60), torch.tensor([1, 2, 3, 4])
    exported = torch.export.export(Module(), (z, ids)).module()
    for a, b in zip(exported(z, ids), Module()(z, ids)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
def test_checkpointing_gives_the_same_gradient(route, dtype):
    from torch.utils.checkpoint import checkpoint

    def f(z):
        return fastcalib.statistics(z, torch.tensor([1, 2]), backend=route).log_prob.sum()

    a, b = (random_logits(2, 60, dtype=dtype).requires_grad_() for _ in range(2))
    f(a).backward()
    checkpoint(f, b, use_reentrant=False).backward()
    assert torch.equal(a.grad, b.grad)


def test_data_parallel_threads_agree(route):
    """Calls from several Python threads at once, as nn.DataParallel and dataloaders make them."""
    from concurrent.futures import ThreadPoolExecutor

    logits = [random_logits(3, 5_000, seed=i) for i in range(8)]
    want = [fastcalib.statistics(z, backend=route).entropy for z in logits]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda z: fastcalib.statistics(z, backend=route).entropy, logits * 3))
    assert all(torch.equal(a, b) for a, b in zip(got, want * 3))
