"""fused_loss: the number and gradient of the unfused path for any loss, chunk and layout."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastcalib
from fastcalib import TokenStatistics, losses
from fastcalib.fused import fused_loss

from .cases import LAYOUTS, random_logits
from .losses import TARGET, Case, N, V, assert_same, every_loss, result, sharp_logits, split, with_ignored


@every_loss
@pytest.mark.parametrize("chunk_size", [1, 3, N, None])
def test_every_loss_is_the_unfused_one_bit_for_bit(case: Case, chunk_size: int | None, backend: str) -> None:
    own, tokens = split(case)
    logits, target = sharp_logits(torch.float32).requires_grad_(), with_ignored()
    for options in (
        {},
        {"reduction": "sum", "temperature": 0.7},
        {"label_smoothing": 0.1, "z_loss": 0.01, "entropy_bonus": 0.2, "temperature": torch.linspace(0.5, 2, N)},
    ):
        module = own.make(**options, backend=backend)
        given = {**tokens, "weight": torch.linspace(-1, 2, N)}
        want = result(module(logits, target, **given), logits)
        got = result(fused_loss(logits, target, module, chunk_size=chunk_size, **given), logits)
        # A regulariser may bring the statistics' axis of temperatures in another order of summation: the last bit.
        assert_same(got, want, exactly="temperature" not in options)


def brier(stats: TokenStatistics, target: Tensor) -> Tensor:
    return 1 - 2 * stats.log_prob.exp() + stats.collision


def everything(stats: TokenStatistics, target: Tensor, *, weight: Tensor, scale: float) -> Tensor:
    """Uses each smooth field, a sliced token argument, a constant and the target."""
    total = stats.logsumexp * 0.1 + stats.entropy + stats.max_prob**2 + stats.collision + 0.1 * stats.mean_logit
    total = total + 0.01 * stats.var_logit.sqrt() + 0.01 * stats.sum_logits + stats.std_logits.square() - stats.log_prob
    return total * weight * scale + (target % 3) * stats.entropy


@pytest.mark.parametrize("chunk_size", [1, 3, N])
def test_a_users_own_loss(chunk_size: int, backend: str) -> None:
    logits, target = sharp_logits().requires_grad_(), with_ignored()
    kept = target != -100
    for loss_fn, given in ((brier, {}), (everything, {"weight": torch.linspace(-1, 2, N), "scale": 0.5})):
        stats = fastcalib.statistics(logits, target, 0.8, backend=backend)
        per_token = torch.where(kept, loss_fn(stats, target, **given), 0.0)
        want = result(per_token.sum() / kept.sum(), logits)
        got = fused_loss(logits, target, loss_fn, temperature=0.8, chunk_size=chunk_size, backend=backend, **given)
        got = result(got, logits)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_a_users_loss_at_several_temperatures(backend: str) -> None:
    def contrast(stats: TokenStatistics, target: Tensor) -> Tensor:
        assert stats.entropy.shape == (*target.shape, 2)
        return (stats.log_prob[:, 0] - 2 * stats.log_prob[:, 1]) * stats.entropy[:, 1]

    logits = sharp_logits().requires_grad_()
    stats = fastcalib.statistics(logits, TARGET, [0.5, 1.5], backend=backend)
    want = result(contrast(stats, TARGET).mean(), logits)
    got = result(fused_loss(logits, TARGET, contrast, temperature=[0.5, 1.5], chunk_size=3, backend=backend), logits)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)

    contrast.temperatures = (1.0, 3.0)  # type: ignore[attr-defined]
    for temperature in (0.5, torch.full((N,), 0.5, dtype=torch.float64)):
        got = fused_loss(logits, TARGET, contrast, temperature=temperature, chunk_size=3, backend=backend)
        torch.testing.assert_close(result(got, logits), want, rtol=1e-13, atol=1e-14)
    with pytest.raises(ValueError, match="not by both"):
        fused_loss(logits, TARGET, contrast, temperature=[0.5, 1.5])


def test_a_users_linear_loss_is_told_by_its_attributes(backend: str) -> None:
    """``linear`` takes each row through forward and backward at once, ``moments`` leaves half the arithmetic out."""

    def focal_mean(stats: TokenStatistics, target: Tensor, *, weight: Tensor) -> Tensor:
        return -stats.log_prob * weight + 0.1 * stats.logsumexp

    weight = torch.linspace(-1, 2, N)
    logits, target = sharp_logits(torch.float32).requires_grad_(), with_ignored()
    want = result(fused_loss(logits, target, focal_mean, weight=weight, backend=backend), logits)
    for linear, moments in ((True, True), (True, False), (False, False)):
        focal_mean.linear, focal_mean.moments = linear, moments
        got = result(fused_loss(logits, target, focal_mean, weight=weight, backend=backend), logits)
        assert_same(got, want, exactly=moments)


@pytest.mark.parametrize("loss", [losses.NLLLoss(), losses.TailrLoss()], ids=["linear", "not linear"])
def test_a_bad_target_leaves_the_logits_alone(loss: losses.TokenLoss, backend: str) -> None:
    """In place, chunk by chunk: found only in the last chunk, it would leave gradients in the place of logits."""
    leaf = sharp_logits(torch.float32).requires_grad_()
    logits, target = leaf * 1.0, with_ignored()
    target[-1] = V
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=rf"target\[{N - 1}\] is {V}"):
        fused_loss(logits, target, loss, chunk_size=1, inplace_backward=True, backend=backend)
    assert torch.equal(logits.detach(), before)


def test_a_bound_method_and_a_constant_are_losses_too(backend: str) -> None:
    logits = sharp_logits().requires_grad_()
    holder = SimpleNamespace(loss=lambda stats, target: -2 * stats.log_prob)
    loss = fused_loss(logits, TARGET, holder.loss, backend=backend)
    torch.testing.assert_close(loss, 2 * losses.nll(logits, TARGET))
    _, gradient = result(fused_loss(logits, TARGET, lambda s, t: torch.ones(t.shape[0]), backend=backend), logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
def test_dtypes(dtype: torch.dtype, inplace: bool, backend: str) -> None:
    leaf = sharp_logits(dtype).requires_grad_()
    loss = losses.TailrLoss(gamma=0.01, backend=backend)
    want = result(loss(leaf, TARGET), leaf)
    logits = leaf.clone()
    got = fused_loss(logits, TARGET, loss, inplace_backward=inplace, chunk_size=3)
    assert_same(result(got, leaf), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 8, 100])
def test_layouts(layout: str, chunk_size: int, backend: str) -> None:
    """A chunk may be a part of a sequence, a sequence, or several with a gap between them."""
    base = random_logits(5, 4, V)
    target = torch.arange(20).view(5, 4)
    target[1, 2] = -100
    logits = LAYOUTS[layout](base).requires_grad_()
    want = result(losses.nll(base.requires_grad_(), target, backend=backend), base)
    got = result(fused_loss(logits, target, losses.NLLLoss(backend=backend), chunk_size=chunk_size), logits)
    assert_same(got, want)


@pytest.mark.parametrize("chunk_size", [2, None])
def test_targets_and_temperatures_that_are_not_adjacent(chunk_size: int | None, backend: str) -> None:
    """A column of a (N, 4) tensor of ids was read as if its numbers were neighbours: another loss, and no error."""
    logits, temperature = random_logits(N, V), torch.linspace(0.5, 2, N)
    apart = torch.randint(V, (N, 4), generator=torch.Generator().manual_seed(0))
    apart[:, 1], spread = with_ignored(), torch.rand(N, 3) + 0.5
    spread[:, 2] = temperature
    weight = torch.eye(V)
    results = []
    for target, t in ((apart[:, 1].clone(), temperature), (apart[:, 1], spread[:, 2])):
        z, h = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        options = {"temperature": t, "chunk_size": chunk_size, "backend": backend}
        made = result(fused_loss(z, target, losses.NLLLoss(), **options), z)
        with torch.no_grad():
            value = fastcalib.linear_loss(h, weight, target, losses.NLLLoss(), **options)
        results.append(
            (*made, *result(fastcalib.linear_loss(h, weight, target, losses.NLLLoss(), **options), h), value)
        )
    assert_same(*results)


def test_vocabulary_padding_and_options_of_the_call_win(backend: str) -> None:
    padded = torch.nn.functional.pad(sharp_logits(), (0, 5), value=50.0).requires_grad_()
    module = losses.NLLLoss(label_smoothing=0.1, ignore_index=3, temperature=5.0, reduction="mean", backend=backend)
    target = with_ignored()
    given = {"ignore_index": -100, "temperature": 0.9, "reduction": "sum", "vocab_size": V}
    loss, gradient = result(fused_loss(padded, target, module, chunk_size=3, **given), padded)
    want = losses.nll(padded, target, label_smoothing=0.1, backend=backend, **given)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, padded)[0], rtol=1e-12, atol=1e-14)
    assert (gradient[:, V:] == 0).all()


def test_num_items_in_batch(backend: str) -> None:
    logits, module = sharp_logits().requires_grad_(), losses.GCELoss(backend=backend)
    for items in (40, torch.tensor(40)):
        want = result(module(logits, TARGET, num_items_in_batch=items), logits)
        assert_same(result(fused_loss(logits, TARGET, module, num_items_in_batch=items, chunk_size=3), logits), want)


def test_nothing_kept_and_no_rows(backend: str) -> None:
    module = losses.NLLLoss(backend=backend)
    logits = sharp_logits().requires_grad_()
    loss, gradient = result(fused_loss(logits, torch.full((N,), -100), module, chunk_size=3), logits)
    assert loss.isnan() and (gradient == 0).all()
    empty = torch.zeros(2, 0, V, requires_grad=True)
    loss, gradient = result(fused_loss(empty, torch.zeros(2, 0, dtype=torch.int64), module), empty)
    assert loss.isnan() and gradient.shape == empty.shape
    assert fused_loss(empty, torch.zeros(2, 0, dtype=torch.int64), module, reduction="sum") == 0


def test_ignored_rows_may_hold_nan(backend: str) -> None:
    logits, target = sharp_logits(), with_ignored()
    want = result(fused_loss(z := logits.clone().requires_grad_(), target, brier, backend=backend), z)
    logits[3], logits[6] = torch.nan, torch.inf
    got = result(fused_loss(z := logits.clone().requires_grad_(), target, brier, chunk_size=3, backend=backend), z)
    assert_same(got, want)


def test_truncation_sees_a_batch_as_one_however_it_is_cut(backend: str) -> None:
    whole, cut = (losses.TruncLoss(drop=0.5, buffer_size=6, backend=backend) for _ in range(2))
    logits = sharp_logits(torch.float32).requires_grad_()
    for step in range(4):
        z = logits / (step + 1)
        want, got = whole(z, with_ignored()), fused_loss(z, with_ignored(), cut, chunk_size=3)
        assert torch.equal(got, want)
        for a, b in zip(whole.buffers(), cut.buffers()):
            assert torch.equal(a, b)


FUNCTIONS = {
    "nll": (losses.nll, losses.NLLLoss()),
    "partial": (
        partial(losses.tailr, gamma=0.1, label_smoothing=0.1),
        losses.TailrLoss(gamma=0.1, label_smoothing=0.1),
    ),
    "partial of a partial": (partial(partial(losses.gce, k=0.2), k=0.5), losses.GCELoss(k=0.5)),
    "two temperatures": (losses.gem, losses.GEMLoss()),
}


@pytest.mark.parametrize("function, module", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_loss_function_serves_as_its_module(function, module):
    logits = sharp_logits().requires_grad_()
    value = fused_loss(logits, TARGET, function)
    assert torch.equal(value, fused_loss(logits, TARGET, module))
    assert value.item() == pytest.approx(function(logits, TARGET).item(), rel=1e-6)  # chunks sum in another order
