"""softmax and log_softmax of the CUDA C++ kernels, in the emulator with all its checks on, against float64.

Each case runs twice: on a device with fewer multiprocessors than rows, where a block takes a row, and on one with more,
where a row is shared out. Both must give the same bits. Nothing here has been compared with a GPU.
"""

from __future__ import annotations

import importlib

import pytest
import torch

import fastcalib
from fastcalib.ops import _gpu

from . import cases, emulated_cuda
from .cases import LAYOUTS, random_logits
from .checks import assert_within
from .test_cuda_emulated import SEGMENT, SHORT, _no_other_backend, each_arch, each_dtype, quick_dtype  # noqa: F401
from .test_softmax import BOTH, INF, NAN, check_gradients, check_hostile_rows, exact, tolerance

if emulated_cuda.why_not():
    pytest.skip(emulated_cuda.why_not(), allow_module_level=True)

backends = importlib.import_module("fastcalib.backends")
both = pytest.mark.parametrize("function", BOTH)
# One kernel of each dtype serves both functions: two of the six pairs are enough to find most of what can break.
PAIRS = [(function, dtype) for dtype in _gpu.DTYPES for function in BOTH]
QUICK = [(fastcalib.softmax, torch.bfloat16), (fastcalib.log_softmax, torch.float32)]
each_pair = pytest.mark.parametrize(
    "function, dtype",
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.prove) for pair in PAIRS],
    ids=[f"{function.__name__}-{cases.dtype_id(dtype)}" for function, dtype in PAIRS],
)
COMMON = ("starts at an odd column", "sequence first")
FEW, MANY = 1, 132  # multiprocessors: whole rows, shared rows


def upstream_for(logits, seed=1):
    return torch.randn(logits.shape, generator=cases.generator(seed)).to(logits.dtype)


def same(results, others, what):
    for a, b in zip(results, others, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{what}: the bits differ"


def everything(sm, function, logits, t, upstream, multiprocessors, vocab_size=None, **options):
    """The result, and the gradients to logits and temperature."""
    z, given = logits.detach().requires_grad_(), t.clone().requires_grad_()
    with emulated_cuda.backend(sm, multiprocessors=multiprocessors, **options):
        out = function(z, given, vocab_size=vocab_size, backend="cuda")
        return out, *torch.autograd.grad(out, (z, given), upstream)


def check(sm, function, logits, t, what):
    """Result and gradients against float64, whole rows and shared ones."""
    upstream = upstream_for(logits)
    results = []
    for multiprocessors in (FEW, MANY):
        with emulated_cuda.backend(sm, multiprocessors=multiprocessors):
            results.append(check_gradients(function, logits, t, upstream, "cuda", what))
    same(*results, what)
    want = exact(function, logits, t)
    assert_within(results[0][0], want, tolerance(function, want, logits.dtype), what)


@each_arch()
@each_pair
@pytest.mark.parametrize("all_sizes", [False, pytest.param(True, marks=pytest.mark.prove)], ids=["some", "all"])
def test_sizes_around_vectors_and_segments(sm, function, dtype, all_sizes):
    length = SEGMENT[dtype]
    for v in (*SHORT, length - 1, length, length + 1, 2 * length + 9) if all_sizes else (1, 9, 2_047, length + 1):
        logits = random_logits(2, v, dtype=dtype, seed=v)
        logits[:, -1] = logits.amax(-1) + 2  # a tail that is dropped shows in every probability
        check(sm, function, logits, torch.tensor([0.5, 2.0]), f"V={v}")


@pytest.mark.prove
@each_arch()
@both
@each_dtype
@pytest.mark.parametrize("v", [32_000, 50_257, 128_256])
def test_vocabularies_of_real_models(sm, function, dtype, v):
    check(sm, function, random_logits(2, v, dtype=dtype, seed=v), torch.tensor([0.7, 1.3]), f"V={v}")


@each_arch()
@each_pair
@pytest.mark.parametrize("t", [1e-3, 1.0, pytest.param(1e3, marks=pytest.mark.prove)])
@pytest.mark.parametrize(
    "v", [pytest.param(2, marks=pytest.mark.prove), 3_000, pytest.param(20_000, marks=pytest.mark.prove)]
)
def test_hostile_rows(sm, function, dtype, t, v):
    for multiprocessors in (FEW, MANY) if v > SEGMENT[dtype] else (MANY,):
        with emulated_cuda.backend(sm, multiprocessors=multiprocessors):
            check_hostile_rows(function, v, dtype, t, "cuda")


@each_arch()
@each_pair
def test_rows_without_a_softmax(sm, function, dtype):
    """NaN in all real columns, and alone in it; a row of -inf has gradient 0, one with a NaN or +inf has NaN."""
    v, width = SEGMENT[dtype] + 40, SEGMENT[dtype] + 50
    hostile = cases.undefined_rows(v, dtype)
    some = ("all -inf", f"NaN at {v - 1}", "+inf at 0", "NaN among -inf")
    good = random_logits(len(some), v, dtype=dtype)
    rows = torch.stack([row for pair in zip(good, (hostile[name] for name in some)) for row in pair])
    padded = torch.nn.functional.pad(rows, (0, width - v), value=NAN)
    t, upstream = torch.full((len(rows),), 0.7), upstream_for(padded)
    results = [everything(sm, function, padded, t, upstream, m, vocab_size=v) for m in (FEW, MANY)]
    same(*results, "whole and shared rows")
    out, gz, gt = results[0]
    alone = everything(sm, function, padded[::2], t[::2], upstream[::2], MANY, vocab_size=v)
    same((out[::2], gz[::2], gt[::2]), alone, "beside rows without a softmax")
    assert all(x.isfinite().all() for x in (gz[::2], gt[::2]))
    assert out[1::2, :v].isnan().all()
    assert (out[:, v:] == (0 if function is fastcalib.softmax else -INF)).all() and (gz[:, v:] == 0).all()
    dead = some.index("all -inf") * 2 + 1
    assert (gz[dead] == 0).all() and gt[dead] == 0
    undefined = [r for r in range(1, len(rows), 2) if r != dead]
    assert gz[undefined, :v].isnan().all() and gt[undefined].isnan().all()


@each_arch()
@each_pair
def test_masked_and_padded_columns(sm, function, dtype):
    """Padding of a few columns, of a segment and more, behind a whole number of vectors: exact, aligned or not."""
    block = SEGMENT[dtype] // 8
    t = torch.tensor([0.8, 1.2])
    for v, width in ((block, block + 3), (block, 2 * block), (8 * block, 8 * block + 30), (300, 8 * block + 8)):
        base = random_logits(2, v, dtype=dtype, seed=width)
        base[:, ::3] = -INF
        upstream = torch.full((2, width), INF, dtype=dtype)  # what no real token has may be anything
        upstream[:, :v] = upstream_for(base)
        upstream[:, :v:3] = NAN
        wide = torch.full((2, width + 5), NAN, dtype=dtype)
        wide[:, 3 : 3 + v] = base
        results = [everything(sm, function, wide[:, 3 : 3 + width], t, upstream, m, vocab_size=v) for m in (FEW, MANY)]
        same(*results, f"{v} of {width}")
        out, gz, gt = results[0]
        assert (out[:, v:] == (0 if function is fastcalib.softmax else -INF)).all()
        assert (gz[:, v:] == 0).all() and (gz[:, :v:3] == 0).all()
        only = everything(sm, function, base, t, upstream[:, :v].contiguous(), MANY)
        same((out[:, :v], gz[:, :v], gt), only, f"{v} of {width} without padding")
        assert gz.isfinite().all() and gt.isfinite().all()


@each_arch()
@each_pair
@pytest.mark.parametrize(
    "layout", [*COMMON, *(pytest.param(x, marks=pytest.mark.prove) for x in LAYOUTS if x not in COMMON)]
)
def test_layouts_give_the_same_bits(sm, function, dtype, layout):
    """Of logits and upstream gradients; neither is written to."""
    logits = random_logits(2, 2, 2_053, dtype=dtype)
    t, upstream = torch.tensor([[0.8], [1.5]]), upstream_for(logits)
    want = everything(sm, function, logits, t, upstream, FEW)
    z, g = LAYOUTS[layout](logits), LAYOUTS[layout](upstream)
    before, version = z.clone(), z._version
    same(everything(sm, function, z, t, g, FEW), want, layout)
    assert torch.equal(z, before) and z._version == version


@each_arch()
@each_pair
def test_every_alignment_gives_the_same_bits(sm, function, dtype):
    v = SEGMENT[dtype] + 77 if sm == 80 else 2_100
    logits, t = random_logits(2, v, dtype=dtype), torch.tensor([0.5, 1.0])
    upstream = upstream_for(logits)
    results = []
    for shift in range(16 // logits.element_size()):
        wide = torch.full((2, 2, v + 11), NAN, dtype=dtype)  # an odd distance of rows too
        z, g = wide[0, :, shift : shift + v].copy_(logits), wide[1, :, shift : shift + v].copy_(upstream)
        results.append(everything(sm, function, z, t, g, FEW))
        same(results[-1], results[0], f"shifted by {shift}")


@each_arch()
@each_pair
def test_bits_do_not_depend_on_the_batch_or_on_the_number_of_blocks(sm, function, dtype):
    v = 2 * SEGMENT[dtype] + 333
    logits, t = random_logits(4, v, dtype=dtype), torch.tensor([0.5, 1.0, 1e-2, 3.0])
    upstream = upstream_for(logits)
    together = everything(sm, function, logits, t, upstream, FEW)
    shuffled = everything(sm, function, logits.flip(0), t.flip(0), upstream.flip(0), MANY, shuffle_seed=5)
    same([x.flip(0) for x in shuffled], together, "another order")
    for r in (1, 3):
        for multiprocessors in (FEW, MANY):
            one = slice(r, r + 1)
            alone = everything(sm, function, logits[one], t[one], upstream[one], multiprocessors)
            same(alone, [x[one] for x in together], f"row {r} alone")


@each_arch()
@both
def test_temperatures(sm, function):
    """One for all rows, one that broadcasts, and none that is asked for a gradient; an expanded upstream gradient."""
    logits = random_logits(3, 2, 700, dtype=torch.float32)
    upstream = torch.ones(()).expand(3, 2, 700)
    with emulated_cuda.backend(sm):
        for t in (torch.tensor(0.7), torch.tensor([0.5, 2.0]), torch.tensor([[0.5], [1.0], [2.0]])):
            z, given = logits.clone().requires_grad_(), t.clone().requires_grad_()
            out = function(z, given, backend="cuda") * torch.arange(700.0)
            gz, gt = torch.autograd.grad(out, (z, given), upstream)
            y, other = logits.clone().requires_grad_(), t.clone().requires_grad_()
            want = function(y, other, backend="cpp" if fastcalib.backends()["cpp"][0] else "eager")
            wz, wt = torch.autograd.grad(want * torch.arange(700.0), (y, other), upstream)
            # float32 on both sides, whose sums of up to 700 numbers of up to 700 differ by a few units
            torch.testing.assert_close(gz, wz, rtol=4e-6, atol=4e-6 * wz.abs().max().item())
            torch.testing.assert_close(gt, wt, rtol=2e-5, atol=2e-5 * wt.abs().max().item())
            plain = logits.clone().requires_grad_()
            result = function(plain, t, backend="cuda")
            assert torch.equal(torch.autograd.grad(result * torch.arange(700.0), plain, upstream)[0], gz)


@each_arch()
@both
@pytest.mark.parametrize("shape", [(0, 5), (5,), (2, 0, 5), (1, 1)])
def test_shapes(sm, function, shape):
    z, t = torch.randn(shape, requires_grad=True), torch.ones(shape[:-1], requires_grad=True)
    with emulated_cuda.backend(sm):
        out = function(z, t, backend="cuda")
        assert out.shape == shape
        out.sum().backward()
    assert z.grad.shape == shape and t.grad.shape == shape[:-1]


@each_arch()
@pytest.mark.prove
@both
def test_approximate_powers_off_by_what_the_isa_allows(sm, function):
    logits, t = random_logits(2, 5_000), torch.tensor([0.5, 1.0])
    with emulated_cuda.backend(sm, approx_ulp=2.0):
        check_gradients(function, logits, t, upstream_for(logits), "cuda", "2 ulp off")
        out = function(logits, t, backend="cuda")
    want = exact(function, logits, t)
    assert_within(out, want, tolerance(function, want, torch.float32), "2 ulp off")


@each_arch()
@pytest.mark.prove
@both
def test_rows_more_than_2_31_elements_apart(sm, function):
    try:
        far = torch.empty_strided((2, 1_000), (2**31 + 8, 1), dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this machine does not reserve untouched memory: {error}")
    near, t = random_logits(2, 1_000, dtype=torch.bfloat16), torch.tensor([0.5, 1.0])
    far.copy_(near)
    upstream = upstream_for(near)
    same(
        everything(sm, function, far, t, upstream, MANY), everything(sm, function, near, t, upstream, MANY), "far apart"
    )


def traffic(run, names):
    """Bytes by buffer over all launches: loaded, and for each launch loaded at least once; stored."""
    found = {}
    for position, name in names.items():
        moved = [launch.counters.buffers[position] for launch in run.launches if position in launch.counters.buffers]
        found[name] = (sum(m.loaded for m in moved), max(m.loaded_once for m in moved), sum(m.stored for m in moved))
    return found


FORWARD = {"logits": "logits", "cuda_softmax_forward 10": "out"}
BACKWARD = {"logits": "grad", "cuda_softmax_backward 8": "result", "cuda_softmax_backward 12": "out"}


@each_arch()
@each_pair
@pytest.mark.parametrize("multiprocessors", [FEW, MANY], ids=["whole rows", "shared rows"])
def test_traffic(sm, function, dtype, multiprocessors):
    """What leaves a block is read again, once; what stays is not. 128-bit vectors both ways, each byte written once."""
    segments, rows = 6, 2
    segment = SEGMENT[dtype]
    logits = random_logits(rows, segments * segment, dtype=dtype).requires_grad_()
    size, part = logits.nbytes, rows * segment * logits.element_size()
    upstream = upstream_for(logits)
    # In shared memory, besides the last segment in registers, for two blocks on each multiprocessor (two_looks.cuh;
    # with so few of them, the L2 cache holds whatever remains): 111 KiB each of an H100's, 79 of an A100's.
    kept, kept_pairs = (3, 1) if sm == 90 else (2, 1)
    with emulated_cuda.backend(sm, multiprocessors=multiprocessors) as run:
        out = function(logits, backend="cuda")
        forward = traffic(run, FORWARD)
        assert all(
            launch.counters.load_widths.get(128, 0) * 16 >= 0.99 * launch.counters.loaded - 8_192
            for launch in run.launches
        )
        ex2 = sum(launch.counters.ex2 for launch in run.launches)
        run.launches.clear()
        torch.autograd.grad(out, logits, upstream)
        backward = traffic(run, BACKWARD)
        stores = {bits: n for launch in run.launches for bits, n in launch.counters.store_widths.items() if bits == 128}
    again = 0 if multiprocessors == MANY else 1 + kept
    assert forward == {"logits": (2 * size - again * part, size, 0), "out": (0, 0, size)}
    again = 0 if multiprocessors == MANY else 1 + kept_pairs
    read = (2 * size - again * part, size, 0)
    assert backward == {"grad": read, "result": read, "out": (0, 0, size)}
    assert stores == {128: size // 16}
    assert ex2 == (2 if function is fastcalib.softmax else 1) * logits.numel()


@each_arch()
@each_pair
def test_rows_that_a_block_holds_are_read_once(sm, function, dtype):
    logits = random_logits(3, 2 * SEGMENT[dtype], dtype=dtype).requires_grad_()
    with emulated_cuda.backend(sm, multiprocessors=FEW) as run:
        out = function(logits, backend="cuda")
        assert traffic(run, FORWARD)["logits"][0] == logits.nbytes and len(run.launches) == 1
        run.launches.clear()
        torch.autograd.grad(out, logits, upstream_for(logits))
        backward = traffic(run, BACKWARD)
    assert backward["grad"][0] == backward["result"][0] == logits.nbytes and len(run.launches) == 1


@both
def test_float16(function):
    """The third dtype, quickly."""
    check(90, function, random_logits(2, 2_051, dtype=torch.float16), torch.tensor([0.5, 2.0]), "float16")


@each_arch()
def test_one_block_a_multiprocessor_where_two_would_leave_too_much_to_the_cache(sm):
    """Of 12 segments an H100's shared memory then holds 7 and an A100's 5, where the cache is large it is 3 and 2."""
    segments, kept = 12, {80: (5, 2), 90: (7, 3)}[sm]
    logits = random_logits(1, segments * SEGMENT[torch.bfloat16], dtype=torch.bfloat16)
    for l2_bytes, stay in zip((512 << 10, 50 << 20), kept):  # two blocks would leave 512 KiB there, or 576
        with emulated_cuda.backend(sm, multiprocessors=1, l2_bytes=l2_bytes) as run:
            fastcalib.softmax(logits, backend="cuda")
        part = SEGMENT[torch.bfloat16] * logits.element_size()
        assert traffic(run, FORWARD)["logits"][0] == (2 * segments - 1 - stay) * part


@both
def test_what_the_kernels_do_not_take(function):
    logits = torch.zeros(1, 4, dtype=torch.float64)
    with (
        emulated_cuda.backend(90),
        pytest.raises(TypeError, match=r"take float32, bfloat16 and float16 logits, got torch\.float64"),
    ):
        function(logits, backend="cuda")


@both
def test_automatic_choice_without_triton(function, monkeypatch):
    """On a CUDA device without Triton the extension serves softmax too."""
    automatic = backends._automatic
    monkeypatch.setattr(backends, "_TRITON_FOUND", False)
    monkeypatch.setattr(backends, "_why_no_cuda", lambda: "")
    monkeypatch.setattr(backends, "_automatic", lambda device, dtype: automatic(torch.device("cuda"), dtype))
    logits = random_logits(2, 300)
    with emulated_cuda.backend(90) as run:
        out = function(logits)
    assert run.launches, "the kernels were not launched"
    assert_within(out, exact(function, logits, 1.0), 1e-5, "automatic")
