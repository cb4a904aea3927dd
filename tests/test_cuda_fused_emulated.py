"""Loss and gradient in one launch in CUDA C++ (csrc/cuda/fused.cu), in the emulator with all its checks on, against
float64 and bit for bit against the kernels that take four. Not yet run on a GPU.

In place, a lane that looks at a column after another has replaced it is a race, which the emulator reports, or gives
other bits.
"""

from __future__ import annotations

import importlib

import pytest
import torch

import fastcalib
from fastcalib import fused_loss, losses

from . import cases, emulated_cuda
from .cases import LAYOUTS, random_logits
from .losses import assert_nll, exact_nll
from .test_cuda_emulated import SEGMENT, SHORT, _no_other_backend, each_arch, each_dtype, quick_dtype  # noqa: F401

if emulated_cuda.why_not():
    pytest.skip(emulated_cuda.why_not(), allow_module_level=True)

INF, NAN = torch.inf, torch.nan
ONE, MANY = 1, 132  # multiprocessors: at least a row for each takes one launch, fewer rows take four
HALF, FULL = torch.bfloat16, torch.float32


def run(sm, logits, target, loss_fn, multiprocessors=ONE, inplace=False, launches=None, options=None, **given):
    """Loss and gradient; in place through a copy that is no leaf."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with emulated_cuda.backend(sm, multiprocessors=multiprocessors, **(options or {})) as device:
        loss = fused_loss(
            leaf * 1 if inplace else leaf, target, loss_fn, inplace_backward=inplace, backend="cuda", **given
        )
        kernels = [launch.kernel for launch in device.launches]
        expected = launches or (1 if multiprocessors == ONE else 4)
        assert len(kernels) == expected and ("fused_rows" in kernels[0]) == (expected == 1)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def same(got, want, what):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()), f"{what}: other bits"


def every_way(sm, logits, target, loss_fn, what, **given):
    """One launch and four, in place and not: the same bits."""
    results = [
        run(sm, logits, target, loss_fn, multiprocessors, inplace, **given)
        for multiprocessors, inplace in ((ONE, False), (ONE, True), (MANY, False))
    ]
    same(results[1], results[0], f"{what}, in place")
    same(results[2], results[0], f"{what}, four launches")
    return results[0]


def check(sm, dtype, v, smoothing, rows=3):
    """Three rows: the last token, an ignored one that is not looked at, and one in the middle."""
    logits, target = random_logits(rows, v, dtype=dtype, seed=v), torch.tensor([v - 1, -100, v // 2][:rows])
    logits[1] = NAN
    weight = torch.tensor([0.5, 2.0, 3.0][:rows])
    loss_fn = losses.NLLLoss(label_smoothing=smoothing, temperature=0.8, reduction="sum")
    got = every_way(sm, logits, target, loss_fn, f"V={v}", weight=weight)
    assert_nll(got, exact_nll(logits.nan_to_num(0.0), target, smoothing, 0.8, weight), dtype, f"V={v}")
    assert (got[1][1] == 0).all()


@each_arch()
@quick_dtype
@pytest.mark.parametrize("all_sizes", [False, pytest.param(True, marks=pytest.mark.prove)], ids=["some", "all"])
def test_sizes_around_vectors_warps_and_segments(sm, dtype, all_sizes):
    """Of five segments and more, one at least is in no register and no shared memory when it is looked at again."""
    length = SEGMENT[dtype]
    around = (*SHORT, length - 1, length, length + 1, 2 * length + 9, 5 * length + 77)
    for v in around if all_sizes else (1, 2, 31, 2_049, 5 * length + 77):
        check(sm, dtype, v, 0.1 if v % 2 else 0.0, rows=2 if v > 2 * length and not all_sizes else 3)


@pytest.mark.prove
@each_arch()
@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("v", [32_000, 50_257, 128_256])
def test_vocabularies_of_real_models(sm, dtype, v, smoothing):
    check(sm, dtype, v, smoothing)


def confident(stats, target):
    """Of the owner of the maximum and the target, who may be one."""
    return 0.3 * stats.logsumexp - stats.log_prob + 2.0 * stats.max_prob + (stats.argmax == target)


def everything(stats, target):
    """Each statistic that a gradient comes through."""
    return (
        stats.logsumexp - stats.log_prob + 0.5 * stats.max_prob - 0.1 * stats.entropy + 0.2 * stats.collision
        + 0.03 * stats.mean_logit + 0.04 * stats.var_logit + 0.05 * stats.std_logits + 1e-4 * stats.sum_logits
    )  # fmt: skip


def of_two_temperatures(stats, target):
    return stats.logsumexp[..., 0] - stats.log_prob[..., 1] + stats.max_prob[..., 1] - 0.1 * stats.entropy[..., 0]


def of_many_temperatures(stats, target):
    """More than a warp has lanes."""
    return (stats.entropy - stats.log_prob).sum(-1)


for loss in (confident, everything, of_two_temperatures, of_many_temperatures):
    loss.linear = True
confident.moments = False
of_two_temperatures.temperatures = (0.5, 2.0)
of_many_temperatures.temperatures = tuple(0.3 + 0.1 * k for k in range(35))
LOSSES = {
    "label smoothing": losses.NLLLoss(label_smoothing=0.1),
    "entropy bonus": losses.NLLLoss(entropy_bonus=0.1),
    "maximum": confident,
    "everything": everything,
    "two temperatures": of_two_temperatures,
    "35 temperatures": of_many_temperatures,
}


@each_arch()
@quick_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_whatever_is_linear_in_the_statistics(sm, dtype, name):
    v = 1_001
    logits, target = random_logits(5, v, dtype=dtype), torch.tensor([7, v - 1, 0, 500, -100])
    logits[1, v - 1] = 20.0
    logits[2, 4::2] = logits[2].max()  # the lowest of many maxima owns it
    logits[3, ::3] = -INF
    logits[3, 500] = 1.0
    if name in ("everything", "label smoothing"):  # of a masked logit the mean is -inf
        logits[3] = logits[0]
    got = every_way(sm, logits, target, LOSSES[name], name)
    z = logits.double().requires_grad_()
    want = fused_loss(z, target, LOSSES[name], backend="eager")
    (gradient,) = torch.autograd.grad(want, z)
    # half a unit of the dtype, and a few of float32 of the largest term
    unit = torch.finfo(dtype).eps / 2 if dtype != FULL else 0.0
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0
    scale = gradient.abs().max().item()
    torch.testing.assert_close(got[0].double(), want.detach(), rtol=4e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), gradient, rtol=unit + 4e-6, atol=tiny + 2e-6 * scale)


@each_arch()
@quick_dtype
def test_what_is_not_linear_takes_four_launches(sm, dtype):
    logits, target = random_logits(2, 300, dtype=dtype), torch.tensor([1, 2])
    for loss_fn in (losses.NLLLoss(z_loss=0.1), losses.FocalLoss()):
        run(sm, logits, target, loss_fn, launches=4)


@each_arch()
@quick_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("v", [31, pytest.param(2_049, marks=pytest.mark.prove)])
def test_hostile_and_undefined_rows_bad_ids_and_padding(sm, dtype, smoothing, v, monkeypatch):
    """Whatever four launches make of them: masked, overflowing, NaN and empty rows, each twice. The padding is 0."""
    # before the logits give way, ids on a CPU are looked at; those on a GPU are not, for that would wait for it
    monkeypatch.setattr(importlib.import_module("fastcalib.fused"), "check_ids_first", lambda *_: None)
    rows = {**cases.defined_rows(v, dtype), **cases.undefined_rows(v, dtype)}
    logits = torch.stack([row for row in rows.values() for _ in range(2)])
    logits = torch.nn.functional.pad(logits, (0, 3), value=NAN)
    target = torch.tensor([v - 1, 0]).repeat(len(rows))
    target[4], target[5], target[6], target[7] = v + 1, -7, 2**40, -100
    weight = torch.arange(1.0, len(target) + 1)
    loss_fn = losses.NLLLoss(label_smoothing=smoothing, reduction="sum", vocab_size=v, temperature=0.7)
    _, gradient = every_way(sm, logits, target, loss_fn, "hostile", weight=weight)
    assert (gradient[:, v:] == 0).all() and (gradient[7] == 0).all()
    names = [name for name in rows for _ in range(2)]
    for r, name in enumerate(names):
        if name == "all -inf":
            assert (gradient[r] == 0).all()
        elif name not in cases.defined_rows(v, dtype):
            assert r == 7 or gradient[r, :v].isnan().all(), name


@each_arch()
@quick_dtype
def test_masked_and_padded_columns(sm, dtype):
    """Padding of a few columns, of a segment and more, behind a whole number of vectors: aligned or not, in place."""
    block = SEGMENT[dtype] // 8
    shapes = ((block, block + 3), (block, 2 * block), (8 * block, 8 * block + 30), (300, 8 * block + 8))
    for v, width in shapes:
        wide = torch.full((2, width + 5), NAN, dtype=dtype)
        wide[:, 3 : 3 + v] = random_logits(2, v, dtype=dtype, seed=width)
        wide[:, 3 : 3 + v : 3] = -INF
        target = torch.tensor([v - 2, 1])
        loss_fn = losses.NLLLoss(vocab_size=v)
        _, gradient = every_way(sm, wide[:, 3 : 3 + width], target, loss_fn, f"{v} of {width}")
        assert (gradient[:, v:] == 0).all() and (gradient[:, :v:3] == 0).all() and gradient.isfinite().all()
        check_view_in_place(sm, wide, 3, width, target, loss_fn, gradient)


def check_view_in_place(sm, wide, first, width, target, loss_fn, want, **options):
    """The gradient lands in a part of each row of a wider tensor and nowhere else."""
    inside = wide.clone().requires_grad_() * 1
    view = slice(first, first + width)
    with emulated_cuda.backend(sm, multiprocessors=ONE, **options) as device:
        fused_loss(inside[:, view], target, loss_fn, inplace_backward=True, backend="cuda")
        assert ["fused_rows" in launch.kernel for launch in device.launches] == [True]
    after = inside.detach()
    same([after[:, view]], [want], "a view, in place")
    after[:, view] = wide[:, view]
    same([after], [wide], "beside the view")


@each_arch()
@quick_dtype
@pytest.mark.parametrize("longer", [False, pytest.param(True, marks=pytest.mark.prove)], ids=["two segments", "six"])
def test_every_alignment_gives_the_same_bits_in_place(sm, dtype, longer):
    """Vectors reach into the segment after their own, which is written before; rows are an odd number of columns apart.
    Of six segments most are looked at again, of two none."""
    v = (5 if longer else 1) * SEGMENT[dtype] + 77
    logits, target = random_logits(2, v, dtype=dtype), torch.tensor([v - 1, SEGMENT[dtype] - 1])
    loss_fn = losses.NLLLoss(reduction="sum", label_smoothing=0.1)
    want = run(sm, logits, target, loss_fn, MANY)[1]
    shifts = range(16 // logits.element_size())
    for shift in shifts if longer else (1, 16 // logits.element_size() - 1):
        wide = torch.full((2, v + 11), NAN, dtype=dtype)
        wide[:, shift : shift + v] = logits
        check_view_in_place(sm, wide, shift, v, target, loss_fn, want, shuffle_seed=shift)


@each_arch()
def test_what_is_looked_at_again_in_place_off_the_alignment(sm):
    """Three segments of five come from memory again, on a device that keeps one (an RTX's shared memory)."""
    v = 5 * SEGMENT[HALF] - 3
    logits, target = random_logits(1, v, dtype=HALF), torch.tensor([3 * SEGMENT[HALF] - 2])
    want = run(sm, logits, target, losses.NLLLoss(), MANY)[1]
    for shift in (1, 6):
        wide = torch.full((1, v + 11), NAN, dtype=HALF)
        wide[:, shift : shift + v] = logits
        check_view_in_place(sm, wide, shift, v, target, losses.NLLLoss(), want, shuffle_seed=shift)


@each_arch()
@quick_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(sm, dtype, layout):
    logits, target = random_logits(2, 2, 1_029, dtype=dtype), torch.tensor([[5, 1_028], [-100, 0]])
    want = run(sm, logits, target, losses.NLLLoss(), ONE)
    z = LAYOUTS[layout](logits)
    before, version = z.clone(), z._version
    with emulated_cuda.backend(sm, multiprocessors=ONE):
        leaf = z.detach().requires_grad_()
        loss = fused_loss(leaf, target, losses.NLLLoss(), backend="cuda")
        (gradient,) = torch.autograd.grad(loss, leaf)
    same((loss.detach(), gradient), want, layout)
    assert torch.equal(z, before) and z._version == version
    if layout == "sequence first":  # which a copy keeps: two strides over the rows
        same(run(sm, z, target, losses.NLLLoss(), ONE, inplace=True), want, f"{layout}, in place")


@each_arch()
@quick_dtype
def test_bits_do_not_depend_on_the_batch_or_on_the_order_of_warps(sm, dtype):
    v = SEGMENT[dtype] + 333
    logits, target = random_logits(3, v, dtype=dtype), torch.tensor([3, v - 1, 500])
    loss_fn = losses.NLLLoss(reduction="sum")
    together = run(sm, logits, target, loss_fn)[1]
    shuffled = run(sm, logits.flip(0), target.flip(0), loss_fn, inplace=True, options={"shuffle_seed": 5})[1].flip(0)
    same([shuffled], [together], "another order")
    for r in (0, 2):
        alone = run(sm, logits[r : r + 1], target[r : r + 1], loss_fn)[1]
        same([alone], [together[r : r + 1]], f"row {r} alone")


@pytest.mark.prove
@each_arch()
def test_rows_more_than_2_31_elements_apart(sm):
    try:
        far = torch.empty_strided((2, 1_000), (2**31 + 8, 1), dtype=HALF)
    except RuntimeError as error:
        pytest.skip(f"this machine does not reserve untouched memory: {error}")
    near, target = random_logits(2, 1_000, dtype=HALF), torch.tensor([999, 3])
    want = run(sm, near, target, losses.NLLLoss())[1]
    far.copy_(near.requires_grad_())  # no leaf any more
    with emulated_cuda.backend(sm, multiprocessors=ONE):
        fused_loss(far, target, losses.NLLLoss(), inplace_backward=True, backend="cuda")
    same([far.detach()], [want], "far apart")


@pytest.mark.prove
@each_arch()
def test_approximate_powers_off_by_what_the_isa_allows(sm):
    logits, target = random_logits(2, 5_000), torch.tensor([1, 4_999])
    got = run(sm, logits, target, losses.NLLLoss(reduction="sum"), options={"approx_ulp": 2.0})
    assert_nll(got, exact_nll(logits, target), FULL, "2 ulp off")


@each_arch()
@quick_dtype
def test_traffic(sm, dtype):
    """From memory each logit comes once and is written once, in 128 bits; again are asked for what no block keeps, and
    the first warp's part of the last segment, which made room for the numbers of the row; and the target's logits."""
    segments, rows, part = 6, 2, SEGMENT[dtype]
    logits, target = random_logits(rows, segments * part, dtype=dtype), torch.tensor([5, 3 * part])
    size, element = logits.nbytes, logits.element_size()
    kept = 3 if sm == 90 else 2  # in shared memory, beside the last segment in registers
    leaf = logits.requires_grad_()
    with emulated_cuda.backend(sm, multiprocessors=ONE) as device:
        fused_loss(leaf, target, losses.NLLLoss(), backend="cuda")
    (launch,) = device.launches
    read, written = launch.counters.buffers["logits"], launch.counters.buffers["cuda_fused 21"]
    again = rows * part * element * (segments - 1 - kept) + rows * part * element // 8
    assert read.loaded_once == size and read.loaded == size + again + 2 * rows * element < 2 * size
    assert written.stored_once == size and written.stored == size + rows * element and not written.loaded
    widths = launch.counters.load_widths
    assert widths[128] * 16 >= size + again and launch.counters.store_widths[128] * 16 >= size
    assert launch.counters.ex2 <= 2 * logits.numel() + 200 * rows, "one a look, and a few in double"
    small = sum(
        b.loaded_once + b.stored_once for name, b in launch.counters.buffers.items() if b not in (read, written)
    )
    assert small < size / 100, "what waits in the workspace"


@each_arch()
def test_a_row_that_a_block_holds_is_asked_for_once(sm):
    """But for the first warp's part of the last segment; off the alignment a vector of 33 comes twice."""
    part, rows = SEGMENT[HALF], 2
    wide = torch.full((rows, 2 * part + 8), NAN, dtype=HALF)
    for shift in (0, 3):
        leaf = wide[:, shift : shift + 2 * part].copy_(random_logits(rows, 2 * part, dtype=HALF)).requires_grad_()
        with emulated_cuda.backend(sm, multiprocessors=ONE) as device:
            fused_loss(leaf, torch.tensor([0, 1]), losses.NLLLoss(), backend="cuda")
        read = device.launches[0].counters.buffers["logits"]
        asked, targets = rows * (2 + 1 / 8) * part * 2, rows * 2 * 2
        assert read.loaded_once == rows * 2 * part * 2
        assert read.loaded <= asked * (33 / 32 if shift else 1) + targets
        wide = wide.detach()


@each_arch()
def test_ignored_rows_are_not_read_and_cost_no_coefficient(sm):
    logits = random_logits(4, 2_100, dtype=HALF).requires_grad_()
    with emulated_cuda.backend(sm, multiprocessors=ONE) as device:
        loss = fused_loss(logits, torch.tensor([-100, 5, -100, -100]), losses.NLLLoss(), backend="cuda")
        read = device.launches[0].counters.buffers["logits"]
    assert read.loaded_once == logits.nbytes // 4
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[[0, 2, 3]] == 0).all() and gradient[1].any()


@each_arch()
def test_few_rows_take_the_other_route(sm):
    """As many rows as multiprocessors or more: 132 of an H100."""
    logits = torch.empty(2, 2, 100)
    for multiprocessors, want in ((4, True), (5, False)):
        with emulated_cuda.backend(sm, multiprocessors=multiprocessors):
            assert fastcalib.ops._gpu.in_one_launch(logits, torch.ones(1, 1), 100, "cuda") == want


def test_what_the_kernel_does_not_take():
    logits = torch.zeros(1, 4, dtype=torch.float64).requires_grad_()
    with (
        emulated_cuda.backend(90, multiprocessors=ONE),
        pytest.raises(TypeError, match=r"take float32, bfloat16 and float16 logits, got torch\.float64"),
    ):
        fused_loss(logits, torch.tensor([0]), losses.NLLLoss(), backend="cuda")
    with emulated_cuda.backend(90, multiprocessors=ONE) as device:
        empty = torch.zeros(0, 4).requires_grad_()
        fused_loss(empty, torch.zeros(0, dtype=torch.int64), losses.NLLLoss(reduction="sum"), backend="cuda").backward()
        assert empty.grad.shape == (0, 4) and not device.launches
