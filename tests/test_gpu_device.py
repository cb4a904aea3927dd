"""What only a device has: streams, graphs, an allocator, several of it, synchronisation. Not yet run on a GPU.

Where there is none, all of it runs on a stand-in made of the CPU's kernels (gpu_devices.py), so that a body that could not
run, or could not pass, is seen before the day a GPU is there; and what needs no real one also in the emulator, with
FASTCALIB_TEST_GPU=emulated-sm90.
"""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import fastcalib
from fastcalib import ValidSets, losses

from . import test_registration
from .gpu_jobs import JOBS, N, every_job

V = 3_001
# What a call may take beyond its results: partial states of the segments of every row and the like, a few hundred
# bytes a row. 4 MB is a thirtieth of the logits below; a copy of them, or an upcast, is far beyond it.
SCRATCH = 4 << 20


def inputs(gpu, n=N, v=V, seed=0, dtype=torch.float32):
    z = gpu.logits(n, v, seed=seed, dtype=dtype).requires_grad_()
    return z, gpu.ids(v, n, seed=seed)


def assert_same_bits(got, want, what):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        same = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        assert a.shape == b.shape and same, f"{what}: result {i} differs"


@every_job
def test_every_job_is_the_cpus(gpu, job):
    """The jobs of the tests below do on the device what they do on the CPU."""
    z, target = inputs(gpu, v=333)
    got = job(z, target, gpu.backend)
    want = job(z.detach().cpu().requires_grad_(), target.cpu(), "eager")
    for a, b in zip(got, want):
        assert a.device == gpu.device
        # two float32 results that are each within a few 1e-6 of the truth, times coefficients of up to 1e2 (c_div)
        torch.testing.assert_close(a.cpu().to(b.dtype), b, rtol=4e-5, atol=2e-5, equal_nan=True)  # an empty set: NaN


@every_job
def test_the_same_bits_in_every_run(gpu, job):
    results = [job(*inputs(gpu), gpu.backend) for _ in range(3)]
    for again in results[1:]:
        assert_same_bits(again, results[0], "a later run")


@pytest.mark.parametrize("name", ["statistics", "statistics_with_ranks", "ranks", "softmax", "log_softmax"])
@pytest.mark.parametrize("v", [333, 40_000])
def test_a_row_has_the_same_bits_in_any_batch(gpu, name, v):
    z, target = inputs(gpu, n=67, v=v)
    job = JOBS[name]
    if name == "statistics":  # without the mean over the batch that its gradient has

        def job(z, target, backend):
            s = fastcalib.statistics(z, target, [1.0, 0.6], backend=backend)
            return *(t for t in s if t is not None), torch.autograd.grad(s.entropy.sum() + s.log_prob.sum(), z)[0]

    whole = job(z, target, gpu.backend)
    for rows in (slice(0, 1), slice(64, 67), slice(5, 38)):
        part = job(z.detach()[rows].clone().requires_grad_(), target[rows].clone(), gpu.backend)
        assert_same_bits(part, [t[rows] for t in whole], f"rows {rows}")


def test_bad_ids_of_a_set_are_an_error_with_validate(gpu):
    z, _ = inputs(gpu, n=3)
    sets = ValidSets(torch.tensor([0, 5, V]).to(gpu.device), torch.tensor([0, 1, 1, 3]).to(gpu.device))
    for function in (fastcalib.statistics, fastcalib.ranks):
        with pytest.raises(ValueError, match=rf"entry 1 of set 2 .*{V}"):
            function(z, sets, backend=gpu.backend, validate=True)


# --- a real device


@pytest.mark.parametrize("which", ["statistics", "ranks", "softmax"])
def test_opcheck(real_gpu, which):
    ops, device, backend = torch.ops.fastcalib, real_gpu.device, real_gpu.backend

    def there(args):
        return tuple(real_gpu.put(a) if isinstance(a, torch.Tensor) else a for a in args)

    one = torch.ones(1, 1, dtype=torch.float64, device=device)
    if which == "statistics":
        for _, args in test_registration.statistics_inputs():
            opcheck(ops.statistics.default, (*there(args), backend))
    elif which == "ranks":
        ids = real_gpu.ids(40, 6)
        opcheck(ops.ranks.default, (real_gpu.logits(3, 40), ids, None, 2, None, one, 40, -100, backend))
    else:
        for log in (False, True):
            opcheck(ops.softmax.default, (real_gpu.logits(3, 40).requires_grad_(), one, 38, log, backend))


def test_compiles_into_one_graph(real_gpu):
    torch._dynamo.reset()
    compiled = torch.compile(test_registration.step, fullgraph=True, backend=real_gpu.compiler)
    test_registration.both_ways(
        test_registration.step, compiled, real_gpu.logits(2, 6, 300), real_gpu.ids(300, 2, 5), [0.5, 1.0],
        real_gpu.backend,
    )  # fmt: skip


@every_job
def test_work_goes_to_the_current_stream(real_gpu, job):
    """The logits arrive late on a side stream: kernels on any other would read what was there before."""
    z, target = inputs(real_gpu)
    want = job(z, target, real_gpu.backend)
    late = torch.full_like(z, float("nan")).requires_grad_()
    with real_gpu.side_stream():
        real_gpu.keep_busy()
        late.data.copy_(z.detach())
        got = job(late, target, real_gpu.backend)
    assert_same_bits(got, want, "on a side stream")


@every_job
def test_a_graph_is_captured_once_and_replayed_on_new_inputs(real_gpu, job):
    z, target = inputs(real_gpu)
    captured, replay = real_gpu.capture(lambda: job(z, target, real_gpu.backend))
    for seed in (1, 2):
        fresh, ids = inputs(real_gpu, seed=seed)
        z.data.copy_(fresh.detach())
        target.copy_(ids)
        replay()
        assert_same_bits(captured, job(fresh, ids, real_gpu.backend), f"replay of inputs {seed}")


@every_job
def test_the_host_never_waits(real_gpu, job):
    z, target = inputs(real_gpu)
    if job not in (JOBS["ranks"], JOBS["linear_ranks"]):
        target[2] = -100
    job(z, target, real_gpu.backend)  # compiles
    with real_gpu.waiting_is_an_error():
        job(z, target, real_gpu.backend)
        if not real_gpu.checks_ids:
            fastcalib.statistics(z, torch.full_like(target, V), backend=real_gpu.backend)  # bad ids, no error


@every_job
def test_tensors_on_another_device_than_the_current_one(real_gpu, job):
    other = real_gpu.another()
    if other is None:
        pytest.skip("one CUDA device only")
    z, target = inputs(real_gpu)
    want = job(z, target, real_gpu.backend)
    got = job(z.detach().to(other).requires_grad_(), target.to(other), real_gpu.backend)
    assert all(t.device == other for t in got)
    for a, b in zip(got, want):  # another model of GPU may round exp2 otherwise
        torch.testing.assert_close(a.to(b.device), b, rtol=4e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["statistics_with_ranks", "ranks", "softmax", "log_softmax"])
def test_offsets_beyond_int32(real_gpu, name):
    n, v = real_gpu.far
    rows = [0, 1, n // 2, n - 2, n - 1]  # n // 2 in bytes, the last two in elements beyond 2^31
    needed = 12 * n * v * 2  # logits, gradient, and what autograd holds in float32, with room
    if (free := real_gpu.free_bytes()) < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    z = torch.zeros(n, v, dtype=torch.bfloat16, device=real_gpu.device)
    few = real_gpu.logits(len(rows), v, dtype=torch.bfloat16)
    z[rows] = few
    target = torch.zeros(n, dtype=torch.int64, device=real_gpu.device)
    target[rows] = real_gpu.ids(v, len(rows))
    whole = JOBS[name](z.requires_grad_(), target, real_gpu.backend)
    alone = JOBS[name](few.requires_grad_(), target[rows], real_gpu.backend)
    assert_same_bits([t[rows] for t in whole], alone, "rows far into the memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beyond_the_results_is_small(real_gpu, dtype):
    n, v = real_gpu.large
    z, target = inputs(real_gpu, n=n, v=v, dtype=dtype)
    assert z.nbytes > 2 * SCRATCH
    backend = real_gpu.backend
    for function in (
        lambda: fastcalib.statistics(z.detach(), target, [1.0, 0.5], ranks=True, backend=backend),
        lambda: fastcalib.ranks(z.detach(), target[:, None].expand(-1, 16), temperature=1.0, backend=backend),
        lambda: fastcalib.softmax(z.detach(), 0.7, backend=backend),
        lambda: torch.autograd.grad(losses.nll(z, target, backend=backend), z),
    ):
        function()  # compiles
        extra = real_gpu.peak(function)
        assert extra <= SCRATCH, f"{extra / 2**20:.1f} MB beyond the results"


def test_memory_of_the_gradient_in_place_is_small(real_gpu):
    if real_gpu.backend == "cuda":
        pytest.skip("the CUDA kernels write in place through memory of their own (ops/_cuda.py)")
    n, v = real_gpu.large
    leaf, target = inputs(real_gpu, n=n, v=v)

    def run(logits):
        return fastcalib.fused_loss(logits, target, losses.NLLLoss(), backend=real_gpu.backend, inplace_backward=True)

    run(leaf * 1)  # compiles
    logits = leaf * 1
    extra = real_gpu.peak(lambda: run(logits))
    assert extra <= SCRATCH, f"{extra / 2**20:.1f} MB beyond the logits"
