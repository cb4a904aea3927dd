"""The Triton kernels, compiled to PTX and run on the emulated device (tests/emulator), against float64.

Strict: an access out of bounds, a misaligned vector, a race or a read of memory that nothing wrote fails the test. The
whole grid of the CPU's tests runs on the same kernels with FASTCALIB_TEST_BACKENDS="triton-sm80 triton-sm90" (`make
prove`). Nothing here has been compared with a real GPU. Each shape class and dtype is a compilation of some seconds,
hence the few sizes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import cases, emulator, reference
from .cases import random_logits, random_sets
from .checks import assert_statistics, assert_within, check_gradient
from .test_ranks import check_index, check_thresholds
from .test_softmax import exact, tolerance

launch = importlib.import_module("fastcalib.triton_kernels.launch")
backends = importlib.import_module("fastcalib.backends")

HALVES = (torch.bfloat16, torch.float16)
# 36 tokens: one warp and a masked tail; 2,049: rows that start anywhere; 33,000: two segments in bfloat16, aligned.
SMALL, ODD, LONG = 36, 2_049, 33_000


@pytest.fixture(params=[90, pytest.param(80, marks=pytest.mark.prove)], ids=lambda sm: f"sm{sm}")
def device(request) -> Iterator[emulator.Run]:
    """An emulated GPU, on which backend="triton" runs CPU tensors."""
    with emulator.triton(sm=request.param, ptxas=False) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_on_cpu", ("triton",))
        yield run


@pytest.fixture
def processors(monkeypatch):
    """Force the number of multiprocessors, and with it whether rows are split."""
    return lambda number: monkeypatch.setattr(launch, "processors_override", number)


def bits(tensors):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.detach().contiguous().view(integers[t.element_size()]) for t in tensors if t is not None]


def assert_same_bits(got, want, what):
    for i, (a, b) in enumerate(zip(bits(got), bits(want), strict=True)):
        assert torch.equal(a, b), f"{what}: result {i} differs"


def check_statistics(logits, index, temperature, what, names=None):
    sets = ValidSets.from_lists(index) if any(index) else None
    got = fastcalib.statistics(logits, sets, temperature, backend="triton")
    assert_statistics(got, reference.statistics(logits, temperature, index), logits.dtype, what, names=names)
    return got


@pytest.mark.parametrize(
    "dtype, v",
    [
        (torch.bfloat16, ODD),
        (torch.float32, SMALL),
        (torch.bfloat16, LONG),
        *(
            pytest.param(dtype, v, marks=pytest.mark.prove)
            for dtype in (torch.float32, *HALVES)
            for v in (1, 2, 31, SMALL, 1_000, ODD, LONG, 50_257, 128_256)
        ),
    ],
    ids=cases.dtype_id,
)
def test_statistics(device, dtype, v):
    logits = torch.cat([random_logits(1, v, dtype=dtype, scale=scale, seed=v) for scale in (3.0, 5.0)])
    check_statistics(logits, random_sets(2, v, [3, 17]), [0.7], f"V={v}")


def test_hostile_rows(device):
    """Every row that is there to break something, and those without a softmax, in one batch."""
    for v in (SMALL, ODD):
        rows = cases.defined_rows(v, torch.bfloat16)
        logits = torch.stack(list(rows.values()))
        index = [[0, v // 2, v - 1] for _ in rows]
        check_statistics(logits, index, [0.7], f"V={v}", names=list(rows))
        undefined = torch.stack(list(cases.undefined_rows(v, torch.bfloat16).values()))
        s = fastcalib.statistics(undefined, torch.full((len(undefined),), v - 1), [0.7], backend="triton")
        assert all(getattr(s, name).isnan().all() for name in (*reference.SMOOTH, "max_logit"))
        assert (s.argmax == -1).all()


@pytest.mark.prove
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 17])
def test_many_temperatures(device, k):
    """Up to 8 share a read; 9 and 17 are groups of 5 and of 6."""
    temperatures = (0.3 + 2 * torch.rand(k, generator=cases.generator(k))).tolist()
    check_statistics(random_logits(2, 2_100), random_sets(2, 2_100, [5, 1]), temperatures, f"K={k}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.prove)])
def test_ranks_along_with_statistics(device, dtype):
    """One or two selected tokens are counted in the same read, more in a second one: the same answers."""
    logits = (random_logits(4, ODD, dtype=dtype) * 4).round() / 4
    logits[1, ::3] = -torch.inf
    logits[2, 7] = torch.nan
    ids = torch.stack([torch.randperm(ODD)[:2] for _ in range(4)])
    ids[1, 0] = 0  # a masked token: nothing but its like is equal to it
    ids[3, 0] = -100
    along = fastcalib.statistics(logits, ids, [0.7], ranks=True, backend="triton")
    wide = torch.cat([ids, torch.full((4, 1), 5)], 1)
    apart = fastcalib.statistics(logits, wide, [0.7], ranks=True, backend="triton")
    picked = [logits[r, ids[r].clamp(min=0)] for r in range(4)]
    greater, equal, mass = reference.counts(logits, picked, [0.7])
    equal -= torch.cat([~p.isnan() for p in picked]).long()
    ignored = (ids == -100).flatten()
    greater[ignored], equal[ignored], mass[ignored] = 0, 0, 0.0
    for s in (along, apart):
        columns = slice(0, 2)
        assert torch.equal(s.n_greater[:, columns].flatten(), greater)
        assert torch.equal(s.n_equal[:, columns].flatten(), equal)
        got = s.mass_greater[:, columns].reshape(-1, 1)
        # sums of V probabilities in float32; NaN for the row that has none
        torch.testing.assert_close(got.double(), mass, rtol=4e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(
    "dtype, v",
    [
        (torch.bfloat16, ODD),
        (torch.float32, SMALL),
        *(
            pytest.param(dtype, v, marks=pytest.mark.prove)
            for dtype in (torch.float32, *HALVES)
            for v in (1, 2, 31, 1_000, LONG, 50_257)
        ),
    ],
    ids=cases.dtype_id,
)
def test_gradient_of_statistics(device, dtype, v):
    logits = random_logits(3, v, dtype=dtype, seed=v)
    if v > 30:
        logits[1, 3:20] = -torch.inf
    check_gradient(logits, random_sets(3, v, [1, 9, 0]), [0.9, 1.7], "triton", f"V={v}", skip=("sum_logits",))
    repeated = torch.tensor([[0, 0, v - 1]] * 3)
    z = logits.detach().requires_grad_()
    s = fastcalib.statistics(z, repeated, backend="triton")
    (got,) = torch.autograd.grad(s.log_prob.sum() + s.max_prob.sum(), z)
    s = fastcalib.statistics(z, repeated, backend="eager")
    (want,) = torch.autograd.grad(s.log_prob.sum() + s.max_prob.sum(), z)
    # both round once to the dtype of the logits; before that they differ by a few units of float32 of numbers up to 3
    eps = torch.finfo(dtype).eps if dtype in HALVES else 0.0
    torch.testing.assert_close(got, want, rtol=2 * eps + 4e-6, atol=1e-6)


def test_gradient_of_masked_padded_ignored_and_undefined_rows(device):
    logits = torch.cat([random_logits(5, 30), torch.full((5, 9), torch.nan)], 1)
    logits[0, 3] = -torch.inf
    logits[1, :30] = -torch.inf
    logits[2, 4] = torch.nan
    z = logits.clone().requires_grad_()
    ids = torch.tensor([3, 2, 1, -100, 40])  # 40 is no token: nothing is read, its row's gradient is that of the others
    s = fastcalib.statistics(z, ids, vocab_size=30, backend="triton")
    assert s.log_prob[0] == -torch.inf and s.log_prob[3] == 0 and s.log_prob[[1, 2, 4]].isnan().all()
    (g,) = torch.autograd.grad(s.log_prob.sum() + s.entropy.sum(), z)
    assert (g[:, 30:] == 0).all() and (g[1] == 0).all() and (g[3] == 0).all() and g[0, 3] == 0
    assert g[2, :30].isnan().all()
    alone = logits[4:].clone().requires_grad_()
    (w,) = torch.autograd.grad(fastcalib.statistics(alone, vocab_size=30, backend="triton").entropy.sum(), alone)
    assert torch.equal(g[4:], w)


def test_bad_ids_read_nothing(device):
    """No assert on an accelerator: NaN and -1, and nothing around the row is read (or this run would fail)."""
    ids = torch.tensor([[0, 99], [2**40, -1], [-(2**62), 5]])
    logits = random_logits(3, 60)
    s = fastcalib.statistics(logits, ids, ranks=True, backend="triton")
    bad = (ids < 0) | (ids >= 60)
    for counts in (s.n_greater, s.n_equal):
        assert (counts[bad] == -1).all() and (counts[~bad] >= 0).all()
    assert s.log_prob[bad].isnan().all() and s.log_prob[~bad].isfinite().all()
    assert s.mass_greater[bad].isnan().all() and s.mass_greater[~bad].isfinite().all()
    r = fastcalib.ranks(logits, ids, backend="triton")
    assert torch.equal(r.n_greater, s.n_greater) and torch.equal(r.n_equal, s.n_equal)
    for function in (fastcalib.statistics, fastcalib.ranks):
        with pytest.raises(ValueError, match=r"99, outside \[0, 60\)"):
            function(logits, ids, backend="triton", validate=True)


@pytest.mark.parametrize("function", [fastcalib.softmax, fastcalib.log_softmax])
@pytest.mark.parametrize(
    "dtype, v",
    [
        (torch.bfloat16, ODD),
        *(
            pytest.param(dtype, v, marks=pytest.mark.prove)
            for dtype in (torch.float32, *HALVES)
            for v in (1, 31, 1_000, LONG, 50_257)
        ),
    ],
    ids=cases.dtype_id,
)
def test_softmax(device, processors, function, dtype, v):
    """Forward and backward, whole rows and split ones, which give the same bits."""
    logits = random_logits(2, v, dtype=dtype, seed=v)
    upstream = torch.randn(2, v, generator=cases.generator(1)).to(dtype)
    results = []
    for number in (1, 1_000):
        processors(number)
        z, t = logits.clone().requires_grad_(), torch.tensor([0.5, 2.0], requires_grad=True)
        out = function(z, t, backend="triton")
        results.append((out, *torch.autograd.grad(out, (z, t), upstream)))
    assert_same_bits(results[1], results[0], "split rows")
    t = torch.tensor([0.5, 2.0])
    want = exact(function, logits, t)
    out, gz, gt = results[0]
    assert_within(out, want, tolerance(function, want, dtype), f"V={v}")
    z, given = logits.clone().requires_grad_(), t.clone().requires_grad_()
    want_z, want_t = torch.autograd.grad(function(z, given, backend="eager"), (z, given), upstream)
    # The gradient is made from the stored result: half a unit of it enters each term, here and not in the reference.
    eps = torch.finfo(dtype).eps if dtype in HALVES else 2e-6
    size = upstream.abs().max().item() * 2
    torch.testing.assert_close(
        gz, want_z, rtol=4 * eps, atol=size * (4 * eps if function is fastcalib.log_softmax else eps)
    )
    torch.testing.assert_close(gt, want_t, rtol=0.0, atol=eps * 30 * upstream.abs().sum(1).max().item())


@pytest.mark.parametrize(
    "m", [2, 40, *(pytest.param(m, marks=pytest.mark.prove) for m in (1, 4, 5, 17, 256, 2_500, 4_096))]
)
def test_ranks(device, m):
    dtype = torch.bfloat16 if m % 2 == 0 else torch.float32
    v = max(ODD, m)
    logits = random_logits(2, v, dtype=dtype, seed=m)
    ids = torch.stack([torch.randperm(v)[:m] for _ in range(2)])
    check_index(logits, ids, None, "triton", f"M={m}")
    some = random_logits(2, m, scale=4.0, seed=m + 1)
    some[:, 0] = torch.tensor([-torch.inf, torch.nan])
    check_thresholds(logits, some, [1.0, 0.3], "triton", f"M={m} thresholds")


def test_ranks_of_ragged_sets_and_hostile_rows(device):
    rows = {**cases.defined_rows(300, torch.bfloat16), **cases.undefined_rows(300, torch.bfloat16)}
    logits = torch.stack(list(rows.values()))
    lists = random_sets(len(rows), 300, [0, 1, 130, 7])
    got = fastcalib.ranks(logits, ValidSets.from_lists(lists), temperature=[1.0, 0.05], backend="triton")
    picked = [logits[r, ids] for r, ids in enumerate(lists)]
    greater, equal, mass = reference.counts(logits, picked, [1.0, 0.05])
    assert torch.equal(got.n_greater, greater)
    assert torch.equal(got.n_equal, equal - torch.cat([~p.isnan() for p in picked]).long())
    torch.testing.assert_close(got.mass_greater.double(), mass, rtol=4e-6, atol=1e-7, equal_nan=True)


def everything(logits, ids):
    z = logits.detach().requires_grad_()
    s = fastcalib.statistics(z, ids, 0.7, ranks=True, backend="triton")
    smooth = [getattr(s, n) for n in reference.SMOOTH]
    (g,) = torch.autograd.grad(smooth, z, [torch.ones_like(x) for x in smooth])
    r = fastcalib.ranks(logits, ids.repeat(1, 3), temperature=0.7, backend="triton")
    return [*(x for x in s if x is not None), g, *r]


@pytest.mark.parametrize("v", [ODD, pytest.param(LONG + 1, marks=pytest.mark.prove)])
def test_a_row_has_the_same_bits_alone_in_company_and_at_any_alignment(device, v):
    """V is odd: in a batch every row lies at another offset from 16 bytes, alone it is aligned, in a view it is not."""
    logits, ids = random_logits(9, v, dtype=torch.bfloat16), torch.randint(0, v, (9, 2))
    together = everything(logits, ids)
    for r in (0, 3, 8):
        alone = everything(logits[r : r + 1].clone(), ids[r : r + 1])
        assert_same_bits([x[r : r + 1] for x in together], alone, f"row {r} alone")
    wide = torch.full((9, v + 7), torch.nan, dtype=torch.bfloat16)
    view = wide[:, 3 : 3 + v].copy_(logits)
    assert_same_bits(everything(view, ids), together, "a view at an odd column")


def traffic(run, kernel, name="x"):
    """What the launches of a kernel moved from and to a buffer."""
    moved = [launched.counters for launched in run.launches if launched.kernel == kernel]
    assert moved, f"{kernel} was not launched: {sorted({launched.kernel for launched in run.launches})}"
    return moved, [c.buffers[name] for c in moved if name in c.buffers]


@pytest.mark.parametrize("v", [LONG, pytest.param(ODD, marks=pytest.mark.prove)])
def test_statistics_reads_each_logit_once_and_its_gradient_reads_and_writes_once(device, v):
    logits = random_logits(2, v, dtype=torch.bfloat16).requires_grad_()
    s = fastcalib.statistics(logits, torch.tensor([1, v - 1]), ranks=True, backend="triton")
    size = logits.nbytes
    counters, moved = traffic(device, "_segments")
    assert sum(t.loaded_once for t in moved) == size, "every byte comes from memory once"
    # besides, each program reads the first 64 columns of its segment for the centre of the spread (two warps of them
    # twice)
    programs = 2 * launch.tiling(v, torch.bfloat16).segments(v)
    assert sum(t.loaded for t in moved) <= size + programs * 2 * 64 * 2
    assert sum(c.stored for c in counters) < 0.01 * size
    _, selected = traffic(device, "_finish")
    assert sum(t.loaded for t in selected) <= 64 * 2, "only the selected tokens, and a vector around the maximum"
    if v == LONG:
        whole = {bits: n for c in counters for bits, n in c.load_widths.items()}
        assert whole[128] * 16 > 0.7 * size, f"bytes in 128-bit loads: {whole}"  # a masked tail is 16 bits wide

    (s.entropy.sum() - s.log_prob.sum()).backward()
    _, read = traffic(device, "_gradient")
    _, written = traffic(device, "_gradient", "out")
    assert [t.loaded for t in read] == [size] and [t.stored for t in written] == [size]


def test_ranks_read_each_logit_once(device):
    logits = random_logits(2, LONG, dtype=torch.bfloat16)
    fastcalib.ranks(logits, torch.randint(0, LONG, (2, 30)), backend="triton")
    counters, moved = traffic(device, "_place")
    assert [t.loaded for t in moved] == [logits.nbytes]
    # thresholds above everything: nothing passes, so nothing is looked up and nothing counted
    fastcalib.ranks(logits, thresholds=torch.full((2, 30), 1e9), backend="triton")
    counters, _ = traffic(device, "_place")
    assert counters[-1].buffers["bins"].stored == 0 and counters[-1].loaded < logits.nbytes * 1.01


def test_exponentials_per_element(device):
    """One for each element and temperature, and one more for each lane and tile."""
    n, v = 2, 32_768
    fastcalib.statistics(random_logits(n, v, dtype=torch.bfloat16), temperature=0.7, backend="triton")
    (counters,), _ = traffic(device, "_segments")
    cut = launch.tiling(v, torch.bfloat16)
    per_lane = cut.vector * cut.unroll
    want = n * v * (1 + 1 / per_lane)
    assert want <= counters.ex2 <= want + n * cut.lanes, "and one for each lane where lanes are added up"


def test_ignored_rows_are_not_read(device):
    logits = random_logits(4, ODD, dtype=torch.bfloat16)
    fastcalib.statistics(logits, torch.tensor([-100, 5, -100, -100]), backend="triton")
    _, moved = traffic(device, "_segments")
    assert sum(t.loaded_once for t in moved) <= logits.nbytes // 4


@pytest.mark.prove
def test_approximate_instructions_may_be_off(device):
    """ex2.approx and lg2.approx are 2 units off on hardware: the promise of 2e-6 must survive that."""
    with emulator.triton(sm=90, ptxas=False, approx_ulp=2.0):
        check_statistics(random_logits(2, LONG, dtype=torch.bfloat16), random_sets(2, LONG, [9]), [0.7], "2 ulp")


@pytest.mark.prove
def test_programs_in_any_order(device):
    logits, ids = random_logits(3, LONG, dtype=torch.bfloat16), torch.randint(0, LONG, (3, 2))
    want = everything(logits, ids)
    with emulator.triton(sm=90, ptxas=False, shuffle_seed=7):
        assert_same_bits(everything(logits, ids), want, "programs in another order")
