"""A row of the C++ backend gives the same bits alone, in any batch, on any number of threads, and on every run."""

from __future__ import annotations

import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import cases, reference
from .cases import DTYPES, random_logits

THREADS = (1, 2, 3)


def everything(logits, ids, backend):
    """All outputs and the gradient of logits (N, V) with ids (N, M)."""
    z = logits.detach().requires_grad_()
    s = fastcalib.statistics(z, ids, [0.5, 1.0, 1.7], ranks=True, backend=backend)
    columns = torch.linspace(-1, 1, 3).to(s.entropy.dtype)
    (gradient,) = torch.autograd.grad(
        [getattr(s, n) for n in reference.SMOOTH],
        z,
        [
            (
                columns.expand_as(getattr(s, n))
                if n in (*reference.OVER_TEMPERATURES, "log_prob")
                else torch.ones_like(getattr(s, n))
            )
            for n in reference.SMOOTH
        ],
    )
    few = fastcalib.ranks(logits, ids, temperature=[0.5, 1.0], backend=backend)
    many = fastcalib.ranks(
        logits, thresholds=torch.linspace(-9, 9, 700).expand(len(logits), -1), temperature=1.0, backend=backend
    )
    t = torch.ones(len(logits), requires_grad=True)
    p = fastcalib.softmax(z, t, backend=backend)
    gp = torch.autograd.grad(p, (z, t), torch.linspace(-1, 1, z.shape[-1]).to(z.dtype).expand_as(p))
    lp = fastcalib.log_softmax(z, t, backend=backend)
    gl = torch.autograd.grad(lp, (z, t), torch.linspace(-1, 1, z.shape[-1]).to(z.dtype).expand_as(p))
    named = {n: v for n, v in s._asdict().items() if v is not None} | {"gradient": gradient}
    named |= {f"few {i}": v for i, v in enumerate(few)} | {f"many {i}": v for i, v in enumerate(many)}
    named |= {"softmax": p, "log_softmax": lp, "d softmax": gp[0], "dT softmax": gp[1], "d log": gl[0], "dT log": gl[1]}
    return {n: v.detach() for n, v in named.items()}


def assert_same_bits(got, want, rows, what):
    for name, value in want.items():
        a = got[name]
        a = a if a.shape == value.shape and rows is None else a[rows]
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        same = torch.equal(a.contiguous().view(integers), value.contiguous().view(integers))
        assert same, f"{name} {what}: differs by {(a.double() - value.double()).abs().max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [700, 2_049, 70_001])
def test_alone_or_in_company(cpp_backend, v, dtype):
    n = (300 if v < 3_000 else 12) if not cases.EMULATED else 5
    logits = random_logits(n, v, dtype=dtype, seed=v)
    ids = torch.randint(0, v, (n, 5), generator=cases.generator(v))
    together = everything(logits, ids, cpp_backend)
    for r in (0, 1, n // 2, n - 1) if not cases.EMULATED else (n - 1,):
        alone = everything(logits[r : r + 1], ids[r : r + 1], cpp_backend)
        assert_same_bits(together, alone, slice(r, r + 1), f"of row {r} alone and among {n}")
    some = slice(3, 8) if not cases.EMULATED else slice(1, 3)
    few = everything(logits[some], ids[some], cpp_backend)
    assert_same_bits(together, few, some, "of a few rows and among many")
    turned = everything(logits.flip(0), ids.flip(0), cpp_backend)
    assert_same_bits(turned, {k: x.flip(0) for k, x in together.items()}, None, "at another place")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("n, v", [(1, 262_144), (1, 33_000), (2, 100_000), (3, 50_257), (5, 2_049), (40, 1_000)])
def test_any_number_of_threads(cpp_backend, n, v, dtype):
    logits, ids = random_logits(n, v, dtype=dtype), torch.randint(0, v, (n, 3))
    results = []
    for threads in (*THREADS, 2):
        torch.set_num_threads(threads)
        results.append(everything(logits, ids, cpp_backend))
    for threads, result in zip((*THREADS, 2), results):
        assert_same_bits(result, results[0], None, f"with {threads} threads and with 1")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
def test_any_layout_and_alignment(cpp_backend, dtype):
    for v in (1_000, 40_000):
        logits, ids = random_logits(3, v, dtype=dtype), torch.randint(0, v, (3, 3))
        want = everything(logits, ids, cpp_backend)
        for shift in (1, 2, 3, 5, 7, 17) if not cases.EMULATED else (1, 2, 4):  # each alignment a load can have
            wide = torch.full((3, v + 2 * shift), torch.nan, dtype=dtype)
            view = wide[:, shift : shift + v].copy_(logits)
            assert_same_bits(everything(view, ids, cpp_backend), want, None, f"shifted by {shift}")


@pytest.mark.parametrize("m", [1, 40, 3_000])
def test_ragged_sets_on_any_number_of_threads(cpp_backend, m):
    logits = random_logits(9, 20_000)
    sets = ValidSets.from_lists(cases.random_sets(9, 20_000, [m, 0, 2]))
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        z = logits.clone().requires_grad_()
        s = fastcalib.statistics(z, sets, backend=cpp_backend)
        (g,) = torch.autograd.grad(s.log_prob.sum(), z)
        results.append((s.log_prob, g, *fastcalib.ranks(logits, sets, temperature=1.0, backend=cpp_backend)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_padding_does_not_move_a_bit(cpp_backend):
    """V=1,000 of 1,003 columns is V=1,000: the width of the storage takes no part."""
    logits, ids = random_logits(4, 1_003), torch.randint(0, 1_000, (4, 3))
    a = fastcalib.statistics(logits, ids, vocab_size=1_000, ranks=True, backend=cpp_backend)
    b = fastcalib.statistics(logits[:, :1_000].contiguous(), ids, ranks=True, backend=cpp_backend)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
