"""The Triton kernels in Triton's own interpreter: what they mean, for every dtype and size, without compiling anything.

The interpreter is chosen when Triton is imported, so the cases run in a process of their own, which the first test
starts. It rounds float32 to bfloat16 by cutting and loses bfloat16 denormals; gradients in bfloat16 get a unit more
for that here, and are checked to the bit on the emulated device (test_triton_emulated.py). It adds the lanes of a
reduction up one after another, where a device halves their number from step to step: it is made to do that too, since
128 roundings are more than the kernels promise (row_state.py).
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import cases, reference
from .cases import random_logits, random_sets
from .checks import assert_statistics, assert_within, check_gradient
from .test_ranks import check_index, check_thresholds
from .test_softmax import exact, tolerance

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_a_process_of_its_own starts")
launch = importlib.import_module("fastcalib.triton_kernels.launch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FULL = bool(os.environ.get("FASTCALIB_PROVE"))


@pytest.fixture(autouse=INTERPRETED)
def _reductions_by_halves(monkeypatch):
    from triton.runtime.interpreter import ReduceOps

    def halve(self, input):
        assert self.axis is not None and not self.keep_dims, "no kernel here asks for more"
        types, data = [t.dtype for t in input], [t.handle.data for t in input]
        while (count := data[0].shape[self.axis]) > 1:
            assert count % 2 == 0, "tensors of Triton have a power of two of elements"
            parts = [np.split(array, 2, self.axis) for array in data]
            sides = [[self.to_tensor(p[i], kind) for p, kind in zip(parts, types)] for i in (0, 1)]
            data = [t.handle.data for t in self.combine_fn.fn(*sides[0], *sides[1])]
        return [self.to_tensor(array.squeeze(self.axis), kind) for array, kind in zip(data, types)]

    monkeypatch.setattr(ReduceOps, "generic_reduce", halve)


def sizes(quick, all_of_them):
    return all_of_them if FULL else quick


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.prove)], ids=["quick", "full"])
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_of_its_own(full):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTCALIB_PROVE": "1" if full else ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@inside
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", sizes((1, 2, 31, 2_049), (1, 2, 31, 1_000, 2_049, 8_193, 32_000, 50_257)))
def test_statistics(v, dtype):
    logits = random_logits(2, v, dtype=dtype, seed=v)
    index = random_sets(2, v, [3, 0])
    got = fastcalib.statistics(logits, ValidSets.from_lists(index), [0.7], backend="triton")
    assert_statistics(got, reference.statistics(logits, [0.7], index), dtype, f"V={v}")


@inside
@pytest.mark.parametrize("k", [1, 3, 8, *sizes((), (9, 17))])
def test_temperatures(k):
    logits, index = random_logits(2, 200), [[3], [199, 0]]
    temperatures = (0.3 + 2 * torch.rand(k, generator=cases.generator(k))).tolist()
    got = fastcalib.statistics(logits, ValidSets.from_lists(index), temperatures, backend="triton")
    assert_statistics(got, reference.statistics(logits, temperatures, index), torch.float32, f"K={k}")
    per_row = torch.tensor([0.5, 2.0])
    got = fastcalib.statistics(logits, temperature=per_row, backend="triton").entropy
    assert_within(got, reference.statistics(logits, per_row).entropy[:, 0], 1e-5, "a temperature a row")


def hostile(v, dtype):
    return {n: r for n, r in cases.defined_rows(v, dtype).items() if n != "denormal" or dtype != torch.bfloat16}


@inside
@pytest.mark.parametrize("dtype", sizes((torch.bfloat16,), DTYPES), ids=cases.dtype_id)
@pytest.mark.parametrize("v", sizes((1, 31), (1, 2, 31, 2_049)))
def test_hostile_rows(v, dtype):
    rows = hostile(v, dtype)
    logits = torch.stack(list(rows.values()))
    index = [sorted({0, v // 2, v - 1}) for _ in rows]
    got = fastcalib.statistics(logits, ValidSets.from_lists(index), [1e-3, 1.0, 1e3], backend="triton")
    want = reference.statistics(logits, [1e-3, 1.0, 1e3], index)
    assert_statistics(got, want, dtype, f"V={v}", names=list(rows))
    undefined = torch.stack(list(cases.undefined_rows(v, dtype).values()))
    s = fastcalib.statistics(undefined, torch.zeros(len(undefined), dtype=torch.long), backend="triton")
    assert all(getattr(s, name).isnan().all() for name in (*reference.SMOOTH, "max_logit"))


@inside
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=cases.dtype_id)
@pytest.mark.parametrize("v", sizes((1, 31, 2_049), (1, 2, 31, 2_049, 32_000)))
def test_gradient(v, dtype):
    logits = random_logits(2, v, dtype=dtype, seed=v)
    check_gradient(logits, random_sets(2, v, [1, 9]), [0.9, 1.7], "triton", f"V={v}")
    padded = torch.cat([logits, torch.full((2, 11), torch.nan, dtype=dtype)], -1)
    check_gradient(padded, [[0], []], 0.9, "triton", "padding", vocab_size=v)


@inside
@pytest.mark.parametrize("function", [fastcalib.softmax, fastcalib.log_softmax])
@pytest.mark.parametrize("v", sizes((1, 31, 2_049), (1, 2, 31, 2_049, 32_000, 50_257)))
def test_softmax(function, v, monkeypatch):
    logits = random_logits(2, v, seed=v)
    upstream = torch.randn(2, v, generator=cases.generator(1))
    want_from = logits.double().requires_grad_()
    t = torch.tensor([0.5, 2.0])
    exact_t = t.double().requires_grad_()
    want = exact(function, want_from, exact_t)
    want_z, want_t = torch.autograd.grad(want, (want_from, exact_t), upstream.double())
    for processors in (1, 1_000):
        monkeypatch.setattr(launch, "processors_override", processors)
        z, given = logits.clone().requires_grad_(), t.clone().requires_grad_()
        out = function(z, given, backend="triton")
        assert_within(out, want, tolerance(function, want, torch.float32), f"V={v}")
        got_z, got_t = torch.autograd.grad(out, (z, given), upstream)
        # p |g| and sums of it, in float32
        assert_within(got_z, want_z, 4e-6 * (1 + want_z.abs()), f"V={v} gradient")
        assert_within(got_t, want_t, 4e-6 * (1 + v * upstream.abs().max()), f"V={v} gradient to T")


@inside
@pytest.mark.parametrize("m", sizes((1, 3, 40), (1, 3, 5, 40, 300, 4_096)))
def test_ranks(m):
    v = max(m, 500)
    logits = random_logits(2, v, seed=m)
    ids = torch.stack([torch.randperm(v)[:m] for _ in range(2)])
    check_index(logits, ids, None, "triton", f"M={m}")
    check_index(logits, ids, [1.0, 0.3], "triton", f"M={m}")
    check_thresholds((logits * 2).round() / 2, torch.randn(2, m).mul(4).round() / 2, None, "triton", f"M={m} ties")


@inside
def test_ragged_ranks():
    logits = random_logits(6, 300, dtype=torch.float16)
    lists = random_sets(6, 300, [0, 1, 90, 7])
    got = fastcalib.ranks(logits, ValidSets.from_lists(lists), temperature=1.0, backend="triton")
    greater, equal, mass = reference.counts(logits, [logits[r, i] for r, i in enumerate(lists)], 1.0)
    assert torch.equal(got.n_greater, greater) and torch.equal(got.n_equal, equal - 1)
    assert_within(got.mass_greater, mass[:, 0], 4e-6 * mass[:, 0] + 1e-7, "mass")


@inside
def test_ranks_along_with_statistics():
    logits, ids = (random_logits(3, 400) * 2).round() / 2, torch.tensor([[1, 2], [399, -100], [5, 5]])
    s = fastcalib.statistics(logits, ids, ranks=True, backend="triton")
    r = fastcalib.ranks(logits, ids, temperature=1.0, backend="cpp" if fastcalib.backends()["cpp"][0] else "eager")
    assert torch.equal(s.n_greater, r.n_greater) and torch.equal(s.n_equal, r.n_equal)
    torch.testing.assert_close(s.mass_greater, r.mass_greater, rtol=4e-6, atol=1e-7)


@inside
@pytest.mark.parametrize("layout", sizes(("starts at an odd column", "columns not adjacent"), tuple(cases.LAYOUTS)))
def test_any_layout(layout):
    logits = random_logits(2, 3, 77)
    ids = torch.arange(6).reshape(2, 3) * 10
    results = []
    for z in (logits, cases.LAYOUTS[layout](logits)):
        z = z.detach().requires_grad_()
        s = fastcalib.statistics(z, ids, 0.8, backend="triton")
        p = fastcalib.softmax(z, 0.8, backend="triton")
        n = fastcalib.ranks(z, ids, backend="triton").n_greater
        (g,) = torch.autograd.grad(s.log_prob.sum() + p.square().sum(), z)
        results.append((s.entropy, s.log_prob, p, n, g))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@inside
def test_empty_batches_and_sets():
    for shape, ids in (((0, 9), (0, 2)), ((3, 9), (3, 0))):
        z = torch.randn(shape, requires_grad=True)
        s = fastcalib.statistics(z, torch.zeros(ids, dtype=torch.long), [1.0, 2.0], ranks=True, backend="triton")
        (s.entropy.sum() + fastcalib.softmax(z, backend="triton").sum()).backward()
        assert z.grad.shape == shape
        r = fastcalib.ranks(z, torch.zeros(ids, dtype=torch.long), temperature=1.0, backend="triton")
        assert r.n_greater.shape == r.mass_greater.shape == ids
