"""fused_loss: whether a gradient is made, where it is written, and what memory that takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcalib import _fused_job, losses
from fastcalib.fused import fused_loss

from .cases import random_logits
from .losses import CASES, TARGET, Case, N, V, assert_same, case_id, result, sharp_logits, split


def test_no_gradient_is_computed_where_none_is_wanted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, module = sharp_logits(), losses.NLLLoss(backend=backend)
    want = module(logits, TARGET)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(_fused_job, "backward_into", never)
    monkeypatch.setattr(torch.autograd, "grad", never)
    before = logits.clone()
    for inplace in (False, True):
        loss = fused_loss(logits, TARGET, module, inplace_backward=inplace)
        assert torch.equal(loss, want) and not loss.requires_grad
        with torch.no_grad():
            loss = fused_loss(logits.clone().requires_grad_(), TARGET, module, inplace_backward=inplace)
        assert torch.equal(loss, want) and not loss.requires_grad
    assert torch.equal(logits, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradient_scales(inplace: bool, backend: str) -> None:
    leaf, module = sharp_logits().requires_grad_(), losses.NLLLoss(backend=backend)
    (want,) = torch.autograd.grad(module(leaf, TARGET), leaf)
    loss = fused_loss(leaf * 1, TARGET, module, inplace_backward=inplace)
    (got,) = torch.autograd.grad(loss * -0.25 + 3, leaf)
    assert torch.equal(got, want * -0.25)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_is_refused(inplace: bool, backend: str) -> None:
    leaf = sharp_logits().requires_grad_()
    loss = fused_loss(leaf * 1, TARGET, losses.NLLLoss(backend=backend), inplace_backward=inplace)
    (loss * 0.5).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradient_accumulates_over_calls(backend: str) -> None:
    leaf, module = sharp_logits().requires_grad_(), losses.NLLLoss(backend=backend)
    (want,) = torch.autograd.grad(module(leaf, TARGET), leaf)
    for _ in range(2):
        fused_loss(leaf, TARGET, module).backward()
    assert torch.equal(leaf.grad, 2 * want)


def test_the_gradient_is_handed_over_not_copied(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = sharp_logits(torch.float32).requires_grad_()
    held: list[int] = []
    original = _fused_job.Job.run

    def run(self: _fused_job.Job, logits: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        held.append(gradient.data_ptr())
        return original(self, logits, gradient)

    monkeypatch.setattr(_fused_job.Job, "run", run)
    fused_loss(leaf, TARGET, losses.NLLLoss(backend=backend)).backward()
    assert leaf.grad is not None and held == [leaf.grad.data_ptr()]


# In place


def test_in_place_writes_the_gradient_over_the_logits(backend: str) -> None:
    hidden = torch.randn(N, 4, requires_grad=True)
    weight = torch.randn(V, 4, requires_grad=True)
    module = losses.FocalLoss(backend=backend)
    want = torch.autograd.grad(module(hidden @ weight.T, TARGET), (hidden, weight))
    logits = hidden @ weight.T
    version, memory = logits._version, logits.data_ptr()
    loss = fused_loss(logits, TARGET, module, inplace_backward=True, chunk_size=3)
    assert logits._version > version and logits.data_ptr() == memory
    assert logits.detach().sum(-1).abs().max() < 1e-6  # gradients of a softmax add up to 0
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), want):
        torch.testing.assert_close(a, b)


def test_in_place_on_a_shifted_view_leaves_the_rest_alone(backend: str) -> None:
    leaf, target = random_logits(2, 5, V).requires_grad_(), TARGET.view(2, 4)
    module = losses.NLLLoss(backend=backend)
    want = result(module(leaf[:, :-1], target), leaf)
    full = leaf * 1
    last = full[:, -1].detach().clone()
    got = fused_loss(full[:, :-1], target, module, inplace_backward=True, chunk_size=3)
    assert torch.equal(full[:, -1].detach(), last)
    assert_same(result(got, leaf), want)


def test_autograd_notices_that_the_logits_are_gone(backend: str) -> None:
    leaf = sharp_logits().requires_grad_()
    logits = leaf.exp()  # exp saves its output for backward
    loss = fused_loss(logits, TARGET, losses.NLLLoss(backend=backend), inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_modified_after_an_in_place_loss_are_noticed(backend: str) -> None:
    logits = sharp_logits().requires_grad_() * 1
    loss = fused_loss(logits, TARGET, losses.NLLLoss(backend=backend), inplace_backward=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="the logits hold the gradient"):
        loss.backward()


def test_in_place_is_refused_where_it_would_destroy(backend: str) -> None:
    leaf, module = sharp_logits().requires_grad_(), losses.NLLLoss(backend=backend)
    for logits in (leaf, leaf.view(2, 4, V)):
        with pytest.raises(ValueError, match="leaf tensor"):
            fused_loss(logits, TARGET.view(logits.shape[:-1]), module, inplace_backward=True)
    row = (leaf * 1)[0]
    with pytest.raises(ValueError, match="share memory"):
        fused_loss(row.expand(N, V), TARGET, module, inplace_backward=True)
    windows = (leaf * 1).view(-1).as_strided((4, V), (2, 1))
    with pytest.raises(ValueError, match="share memory"):
        fused_loss(windows, TARGET[:4], module, inplace_backward=True)
    with pytest.raises(ValueError, match="adjacent columns"):
        fused_loss((leaf.T * 1).contiguous().T, TARGET, module, inplace_backward=True)
    # out of place all of them are fine
    want = losses.nll(row.expand(N, V), TARGET)
    torch.testing.assert_close(fused_loss(row.expand(N, V), TARGET, module), want)


# Memory


class PeakTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest storage allocated by an operation inside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_in_place_needs_no_temporary_of_the_size_of_a_row(case: Case, cpp_backend: str) -> None:
    """Neither the gradient, nor anything else with an axis of V, is ever allocated."""
    own, tokens = split(case)
    vocabulary = 50_000
    logits = (random_logits(N, vocabulary).requires_grad_() * 1).detach().requires_grad_() * 1
    module = own.make(label_smoothing=0.1, backend=cpp_backend)
    with PeakTensor() as peak:
        peak.known.add(logits.untyped_storage().data_ptr())
        fused_loss(logits, TARGET, module, inplace_backward=True, chunk_size=3, **tokens)
    assert 0 < peak.largest < vocabulary


def test_out_of_place_allocates_the_gradient_alone(cpp_backend: str) -> None:
    logits = random_logits(N, 50_000).requires_grad_()
    with PeakTensor() as peak:
        fused_loss(logits, TARGET, losses.NLLLoss(backend=cpp_backend), chunk_size=3)
    assert peak.largest == logits.untyped_storage().nbytes()
