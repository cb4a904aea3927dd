"""Loss and gradient in one launch (triton_kernels/fused.py), on the emulated device, against float64 and against the
kernels that take two. Not yet run on a GPU.

Strict, as in test_triton_emulated.py: an access out of bounds, a misaligned vector, a race or a read of memory that
nothing wrote fails the test; so does a lane that looks at a column after another has replaced it.
"""

from __future__ import annotations

import pytest
import torch

import fastcalib
from fastcalib import fused_loss, losses

from . import cases
from .cases import random_logits
from .losses import assert_nll, exact_nll
from .test_triton_emulated import HALVES, LONG, ODD, SMALL, assert_same_bits, device, launch, processors, traffic

__all__ = ["device", "processors"]  # fixtures

FEW, MANY = 1_000, 1  # multiprocessors: fewer rows than that take two launches, as many or more take one


def one_launch(run) -> bool:
    return [launched.kernel for launched in run.launches] == ["_rows"]


def run(logits, target, loss_fn, inplace=False, **given):
    """Loss and gradient; in place through a copy that is no leaf."""
    leaf = logits.detach().clone().requires_grad_()
    loss = fused_loss(
        leaf * 1 if inplace else leaf, target, loss_fn, inplace_backward=inplace, backend="triton", **given
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "dtype, v",
    [
        (torch.float32, SMALL),
        (torch.bfloat16, ODD),
        *(
            pytest.param(dtype, v, marks=pytest.mark.prove)
            for dtype in (torch.float32, *HALVES)
            for v in (1, 2, 31, 1_000, 8_192, ODD, 32_000, LONG, 50_257, 128_256)
        ),
    ],
    ids=cases.dtype_id,
)
def test_against_float64_and_bit_for_bit_against_two_launches(device, processors, dtype, v, smoothing):
    logits, target = random_logits(3, v, dtype=dtype, seed=v), torch.tensor([v - 1, -100, v // 2])
    logits[1] = torch.nan  # ignored, and not to be looked at
    weight = torch.tensor([0.5, 2.0, 3.0])
    loss_fn = losses.NLLLoss(label_smoothing=smoothing, temperature=0.8, reduction="sum")
    results = []
    for number, inplace in ((MANY, False), (MANY, True), (FEW, False)):
        processors(number)
        device.launches.clear()
        results.append(run(logits, target, loss_fn, inplace, weight=weight))
        assert one_launch(device) == (number == MANY)
    assert_same_bits(results[1], results[0], "in place")
    assert_same_bits(results[2], results[0], "two launches")
    clean = torch.where(logits.isnan(), 0.0, logits)
    assert_nll(results[0], exact_nll(clean, target, smoothing, 0.8, weight), dtype, f"V={v}")
    assert (results[0][1][1] == 0).all()


@pytest.mark.parametrize(
    "v, smoothing",
    [
        (SMALL, 0.1),
        *(pytest.param(v, s, marks=pytest.mark.prove) for v in (SMALL, ODD, LONG) for s in (0.0, 0.1)),
    ],
)
def test_hostile_and_undefined_rows_bad_ids_and_padding(device, processors, v, smoothing):
    """Whatever two launches make of them, bit for bit: masked, overflowing, NaN and empty rows, each twice."""
    rows = {**cases.defined_rows(v, torch.bfloat16), **cases.undefined_rows(v, torch.bfloat16)}
    logits = torch.stack([row for row in rows.values() for _ in range(2)])
    logits = torch.cat([logits, torch.full((len(logits), 3), torch.nan, dtype=logits.dtype)], 1)
    target = torch.tensor([v - 1, 0]).repeat(len(rows))
    target[4], target[5] = v + 1, -7  # no tokens
    scale = torch.arange(1.0, len(target) + 1)
    loss_fn = losses.NLLLoss(label_smoothing=smoothing, reduction="sum", vocab_size=v, temperature=0.7)
    results = []
    for number in (MANY, FEW):
        processors(number)
        results.append(run(logits, target, loss_fn, weight=scale)[1])
    for r, name in enumerate(name for name in rows for _ in range(2)):
        assert torch.equal(results[0][r].isnan(), results[1][r].isnan()), name
        assert torch.equal(results[0][r].nan_to_num(), results[1][r].nan_to_num()), name
    assert (results[0][:, v:] == 0).all()


def test_a_users_loss_of_confidence_and_argmax(device, processors):
    """Whatever is linear in log_prob, logsumexp and max_prob; the owner of max_prob may be the target."""
    v = SMALL
    logits, target = random_logits(4, v, dtype=torch.float32), torch.randint(0, v, (4,))
    logits[2, target[2]] = 20.0
    logits[3, ::2] = logits[3].max()  # the lowest of many maxima owns it

    def loss_fn(stats, target):
        return 0.3 * stats.logsumexp - stats.log_prob + 2.0 * stats.max_prob + (stats.argmax == target)

    loss_fn.linear, loss_fn.moments = True, False
    results = []
    for number in (MANY, FEW):
        processors(number)
        device.launches.clear()
        results.append(run(logits, target, loss_fn))
        assert one_launch(device) == (number == MANY)
    assert_same_bits(results[0], results[1], "two launches")


def test_what_needs_more_takes_two_launches(device, processors):
    """The entropy, the square of the normaliser, several temperatures, a loss that is not linear."""
    processors(MANY)
    logits, target = random_logits(2, SMALL), torch.tensor([1, 2])
    for loss_fn in (
        losses.NLLLoss(entropy_bonus=0.1), losses.NLLLoss(z_loss=0.1), losses.FocalLoss(),
    ):  # fmt: skip
        device.launches.clear()
        got = run(logits, target, loss_fn)
        assert not one_launch(device)
        leaf = logits.clone().requires_grad_()
        loss = fused_loss(leaf, target, loss_fn, backend="eager")
        loss.backward()
        torch.testing.assert_close(got[0], loss.detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(got[1], leaf.grad, rtol=2e-6, atol=1e-6)


def test_strides_and_the_place_of_a_row_do_not_show(device, processors):
    """V is odd: rows lie anywhere. Alone, in a batch, at an odd column of a wider tensor, with rows far apart."""
    processors(MANY)
    logits, target = random_logits(2, ODD, dtype=torch.bfloat16), torch.randint(0, ODD, (2,))
    loss_fn = losses.NLLLoss(reduction="sum")
    want = run(logits, target, loss_fn)[1]
    for r in (0, 1):
        assert_same_bits([run(logits[r : r + 1], target[r : r + 1], loss_fn)[1]], [want[r : r + 1]], f"row {r} alone")
    wide = torch.full((2, 2, ODD + 6), torch.nan, dtype=torch.bfloat16)
    wide[:, 1, 3 : 3 + ODD] = logits
    got = wide.clone().requires_grad_()
    fused_loss(got[:, 1, 3 : 3 + ODD], target, loss_fn, backend="triton").backward()
    assert_same_bits([got.grad[:, 1, 3 : 3 + ODD]], [want], "a view")
    inside = wide.clone().requires_grad_() * 1
    fused_loss(inside[:, 1, 3 : 3 + ODD], target, loss_fn, inplace_backward=True, backend="triton")
    after = inside.detach()
    assert_same_bits([after[:, 1, 3 : 3 + ODD]], [want], "a view, in place")
    after[:, 1, 3 : 3 + ODD] = torch.nan
    assert after.isnan().all(), "written beside the view"


@pytest.mark.parametrize(
    "v", [LONG, pytest.param(50_257, marks=pytest.mark.prove), pytest.param(128_256, marks=pytest.mark.prove)]
)
def test_each_logit_comes_from_memory_once_and_is_written_once(device, processors, v):
    processors(MANY)
    logits, target = random_logits(2, v, dtype=torch.bfloat16), torch.tensor([5, v - 1])
    device.launches.clear()
    run(logits, target, losses.NLLLoss(reduction="sum"))
    assert one_launch(device)
    counters, read = traffic(device, "_rows")
    _, written = traffic(device, "_rows", "out")
    size = logits.nbytes
    assert [t.loaded_once for t in read] == [size] and [t.stored_once for t in written] == [size]
    # two looks, the targets, and a vector around each maximum (which 16 warps may ask for each)
    assert read[0].loaded <= 2 * size + 2 * (2 + 16 * 16) * 2
    assert written[0].stored == size + 2 * 2, "and the target's columns a second time"
    if v % 8 == 0:
        wide = counters[0].load_widths[128] * 16
        assert wide > 0.9 * 2 * size or v == LONG, "all but the tails in 128 bits"


def test_ignored_rows_are_not_read(device, processors):
    processors(MANY)
    logits = random_logits(4, ODD, dtype=torch.bfloat16)
    device.launches.clear()
    _, gradient = run(logits, torch.tensor([-100, 5, -100, -100]), losses.NLLLoss())
    _, moved = traffic(device, "_rows")
    assert sum(t.loaded_once for t in moved) <= logits.nbytes // 4
    assert (gradient[[0, 2, 3]] == 0).all()


def test_few_rows_take_the_other_route(device, processors):
    """As many programs as multiprocessors or more: 132 rows of an H100, and never endless ones."""
    fused = fastcalib.ops._gpu.kernels("fused")
    logits = torch.empty(4, SMALL)
    for number, want in ((4, True), (5, False)):
        processors(number)
        assert fused.serves(logits, 4, SMALL, 1) == want
    processors(MANY)
    assert not fused.serves(logits, 4, SMALL, 2)
    most = launch.tiling(1 << 19, torch.float32).segment * 32
    assert fused.serves(logits, 4, most, 1) and not fused.serves(logits, 4, most + 1, 1)
