"""Triton's own building blocks through the driver, against torch; and the driver itself."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from tests import emulator  # noqa: E402

SM = pytest.mark.parametrize("sm", [80, 90])


@triton.jit
def online_logsumexp(x, out, V, stride, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.full([BLOCK], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        z = tl.load(x + row * stride + start + tl.arange(0, BLOCK)).to(tl.float32) * scale
        new = tl.maximum(m, z)
        s = s * tl.exp2(m - new) + tl.exp2(z - new)
        m = new
    column = full + tl.arange(0, BLOCK)
    z = tl.load(x + row * stride + column, mask=column < V, other=-float("inf")).to(tl.float32) * scale
    new = tl.maximum(m, z)
    s = s * tl.exp2(m - new) + tl.exp2(z - new)
    top = tl.max(new, 0)
    tl.store(out + row, top + tl.log2(tl.sum(s * tl.exp2(new - top), 0)))


@SM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reduction_of_a_real_vocabulary(sm: int, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 128256) * 3).to(dtype)
    with emulator.triton(sm=sm) as run:
        out = torch.empty(4)
        online_logsumexp[(4,)](x, out, 128256, x.stride(0), math.log2(math.e), BLOCK=4096)
    reference = torch.logsumexp(x.double(), 1)
    # Half an ulp of exp2 for each of two factors, and 2^-24 for each of a dozen sums of one lane: far below 1e-6.
    torch.testing.assert_close(out.double() * math.log(2), reference, rtol=1e-6, atol=0)
    counters = run.launches[0].counters
    traffic = counters.buffers["x"]
    assert traffic.loaded == traffic.loaded_once == x.nbytes  # each logit is read once
    assert counters.load_widths[128] == x.nbytes // 16  # and by 16 bytes, the masked tail included
    assert 2.0 <= counters.per_element(x.numel())["ex2"] < 2.2
    assert counters.buffers["out"].stored == 16


def test_results_do_not_depend_on_the_order_of_programs_and_tolerate_approximations() -> None:
    x = torch.randn(40, 1000)
    results = []
    for options in ({}, {"shuffle_seed": 1}, {"batch_lanes": 1}, {"approx_ulp": 2.0}):
        with emulator.triton(**options):
            out = torch.empty(40)
            online_logsumexp[(40,)](x, out, 1000, 1000, math.log2(math.e), BLOCK=512)
            results.append(out)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])
    # 2 ulp in each exponential, the same again in the logarithm.
    torch.testing.assert_close(results[3], results[0], rtol=2e-6, atol=0)


@triton.jit
def sort_and_scan(x, ordered, summed, top, BLOCK: tl.constexpr, K: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x + index)
    tl.store(ordered + index, tl.sort(value, descending=True))
    tl.store(summed + index, tl.cumsum(value.to(tl.int32), 0))
    tl.store(top + tl.arange(0, K), tl.topk(value, K))


@SM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sort_topk_and_cumsum(sm: int, dtype: torch.dtype) -> None:
    x = torch.randint(-100, 100, (512,)).to(dtype)
    with emulator.triton(sm=sm):
        ordered, summed, top = torch.empty_like(x), torch.empty(512, dtype=torch.int32), torch.empty(8, dtype=dtype)
        sort_and_scan[(1,)](x, ordered, summed, top, BLOCK=512, K=8)
    expected = x.sort(descending=True)[0]
    assert torch.equal(ordered, expected) and torch.equal(top, expected[:8])
    assert torch.equal(summed.long(), x.long().cumsum(0))


@triton.jit
def _merge(m1, s1, m2, s2):
    m = tl.maximum(m1, m2)
    return m, s1 * tl.exp(m1 - m) + s2 * tl.exp(m2 - m)


@triton.jit
def scan_reduce_gather(x, index, maxima, sums, total, picked, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    ones = tl.full([BLOCK], 1.0, tl.float32)
    m, s = tl.associative_scan((value, ones), 0, _merge)
    tl.store(maxima + i, m)
    tl.store(sums + i, s)
    whole_m, whole_s = tl.reduce((value, ones), 0, _merge)
    tl.store(total, whole_m + tl.log(whole_s))
    best, where = tl.max(value, 0, return_indices=True)
    tl.store(total + 1, best)
    tl.store(total + 2, where.to(tl.float32))
    tl.store(picked + i, tl.gather(value, tl.load(index + i), 0))


@SM
def test_associative_scan_reduce_and_gather(sm: int) -> None:
    x, index = torch.randn(256), torch.randint(0, 256, (256,), dtype=torch.int32)
    with emulator.triton(sm=sm):
        maxima, sums, total, picked = torch.empty(256), torch.empty(256), torch.empty(3), torch.empty(256)
        scan_reduce_gather[(1,)](x, index, maxima, sums, total, picked, BLOCK=256)
    torch.testing.assert_close(maxima + sums.log(), torch.logcumsumexp(x, 0), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(total[0], torch.logsumexp(x, 0), rtol=1e-6, atol=0)
    assert total[1:].tolist() == [x.max().item(), x.argmax().item()] and torch.equal(picked, x[index.long()])


@triton.jit
def histogram_and_atomics(x, bins, added, largest, BLOCK: tl.constexpr, BINS: tl.constexpr):
    value = tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(bins + tl.arange(0, BINS), tl.histogram(value, BINS))
    tl.atomic_add(added + value, tl.full([BLOCK], 1, tl.int32))
    tl.atomic_max(largest, tl.max(value, 0))


@SM
@pytest.mark.parametrize("bins", [2, 64])
def test_histogram_and_atomics(sm: int, bins: int) -> None:
    x = torch.randint(0, bins, (1024,), dtype=torch.int32)
    with emulator.triton(sm=sm):
        counted, added, largest = (torch.zeros(n, dtype=torch.int32) for n in (bins, bins, 1))
        histogram_and_atomics[(4,)](x, counted, added, largest, BLOCK=256, BINS=bins)
    expected = torch.bincount(x, minlength=bins)
    assert torch.equal(counted.long(), expected) and torch.equal(added.long(), expected)
    assert largest.item() == x.max().item()


@triton.jit
def native_arithmetic(x, y, z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(z + i, tl.maximum(a * b + a, a - b))


@SM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_in_sixteen_bits(sm: int, dtype: torch.dtype) -> None:
    """Bit for bit: what TRITON_INTERPRET cannot show. The product and the sum are fused (one rounding)."""
    x, y = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    with emulator.triton(sm=sm) as run:
        z = torch.empty_like(x)
        native_arithmetic[(1,)](x, y, z, BLOCK=256)
    fused = (x.double() * y.double() + x.double()).to(dtype)
    apart = x * y + x
    expected = fused if run.launches[0].counters.opcodes["fma"] else apart
    assert torch.equal(z, torch.maximum(expected, x - y))


@triton.jit
def matrix_product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right))


@SM
def test_matrix_product(sm: int) -> None:
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    with emulator.triton(sm=sm):
        c = torch.empty(32, 16)
        matrix_product[(1,)](a, b, c, M=32, N=16, K=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def pipelined_sum(x, out, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=3):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out, tl.sum(total, 0))


@SM
def test_pipelined_loads(sm: int) -> None:
    x = torch.randn(10000)
    with emulator.triton(sm=sm) as run:
        out = torch.empty(1)
        pipelined_sum[(1,)](x, out, 10000, BLOCK=1024)
    torch.testing.assert_close(out, x.sum()[None], rtol=1e-5, atol=1e-4)  # 10,000 numbers in another order
    assert run.launches[0].counters.buffers["x"].loaded == 40000


@triton.autotune(configs=[triton.Config({"BLOCK": block}) for block in (64, 128)], key=["n"])
@triton.jit
def tuned_double(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def test_autotuned_kernels_run() -> None:
    x = torch.randn(300)
    with emulator.triton():
        y = torch.empty(300)
        tuned_double[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, y, 300)
    assert torch.equal(y, 2 * x)


@triton.jit
def copy_some(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


def test_two_architectures_in_one_process_and_nesting() -> None:
    config = triton.runtime.driver
    before = config._active
    x, y = torch.randn(64), torch.zeros(64)
    with emulator.triton(sm=80) as outer:
        first = copy_some[(1,)](x, y, 64, BLOCK=64)
        with emulator.triton(sm=90) as inner:
            second = copy_some[(1,)](x, y, 64, BLOCK=64)
        third = copy_some[(1,)](x, y, 64, BLOCK=64)
    assert ".target sm_80" in first.asm["ptx"] and ".target sm_90" in second.asm["ptx"] and third is first
    assert (len(outer.launches), len(inner.launches)) == (2, 1) and config._active is before
    with pytest.raises(RuntimeError, match="in the block"), emulator.triton():
        raise RuntimeError("in the block")
    assert config._active is before


def test_specialisation_follows_the_real_pointers() -> None:
    """A pointer that is not divisible by 16 compiles another kernel, which may not load 16 bytes at once."""
    x, y = torch.randn(260), torch.zeros(260)
    with emulator.triton() as run:
        copy_some[(1,)](x, y, 256, BLOCK=256)
        copy_some[(1,)](x[1:], y, 256, BLOCK=256)
    assert max(run.launches[0].counters.load_widths) == 64 and max(run.launches[1].counters.load_widths) == 32
    assert torch.equal(y[:256], x[1:257])


def test_launch_records() -> None:
    with emulator.triton() as run:
        copy_some[(1, 1)](torch.zeros(8), torch.zeros(8), 8, BLOCK=32, num_warps=1)
        copy_some[(0,)](torch.zeros(8), torch.zeros(8), 8, BLOCK=32, num_warps=1)  # an empty grid launches nothing
    (launch,) = run.launches
    assert (launch.kernel, launch.grid, launch.block) == ("copy_some", (1, 1, 1), (32, 1, 1))
    assert list(launch.counters.buffers) == ["x", "y"] and launch.reports == []
