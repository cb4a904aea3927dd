"""Losses on a GPU: value and gradient of each against the CPU's, fused and in place too. Not yet run on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastcalib
from fastcalib import losses

from . import cases
from .cases import random_logits
from .losses import CASES, TARGET, N, every_loss, sharp_logits

UPSTREAM = torch.linspace(-1, 2, N)
# Each side is within 2e-6 of the truth in log p, times a coefficient of up to 1e2 for c_div (see test_losses.py) ...
LOSS = {"rtol": 4e-5, "atol": 1e-5}
# ... and a half-precision gradient is rounded once: a unit in the last place apart where the sides round differently.
ROUNDING = {torch.float32: 4e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def there(gpu, own):
    return {k: gpu.put(v) if isinstance(v, torch.Tensor) else v for k, v in own.items()}


@every_loss
@pytest.mark.parametrize("dtype", ROUNDING, ids=cases.dtype_id)
def test_every_loss_and_its_gradient_are_the_cpus(gpu, case, dtype):
    host = sharp_logits(dtype)
    results = []
    for z, target, own, upstream, backend in (
        (host.clone(), TARGET, case.own, UPSTREAM, "auto" if not gpu.emulated else "eager"),
        (gpu.put(host), gpu.put(TARGET), there(gpu, case.own), gpu.put(UPSTREAM), gpu.backend),
    ):
        z.requires_grad_()
        loss = case.function()(z, target, **own, temperature=0.8, reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(loss, z, upstream)
        results.append((loss.detach().cpu(), gradient.cpu()))
    (want, want_gradient), (got, gradient) = results
    torch.testing.assert_close(got, want, **LOSS)
    torch.testing.assert_close(gradient, want_gradient, rtol=ROUNDING[dtype], atol=4e-6)
    assert gradient.abs().sum() > 0


@every_loss
def test_options_of_every_loss(gpu, case):
    if case.name in ("gem", "tofu"):
        pytest.skip("its options are those of the loss at its own two temperatures")
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "entropy_bonus": 0.2, "num_items_in_batch": 5}
    target = TARGET.clone()
    target[2] = -100
    results = []
    for put, backend in ((lambda x: x, "eager"), (gpu.put, gpu.backend)):
        z = put(sharp_logits(torch.float32)).requires_grad_()
        own = {k: put(v) if isinstance(v, torch.Tensor) else v for k, v in case.own.items()}
        loss = case.function()(z, put(target), **own, **options, backend=backend)
        loss.backward()
        results.append((loss.detach().cpu(), z.grad.cpu()))
    torch.testing.assert_close(results[1][0], results[0][0], **LOSS)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=4e-5, atol=4e-6)
    assert (results[1][1][2] == 0).all(), "an ignored token has a gradient"


@pytest.mark.parametrize("dtype", ROUNDING, ids=cases.dtype_id)
@pytest.mark.parametrize("name", ["NLLLoss", "FocalLoss", "GEMLoss"])
def test_fused_loss_in_place_and_out_of_place(gpu, name, dtype):
    module = getattr(losses, name)()
    host, target = random_logits(7, 1_003, dtype=dtype), torch.tensor([0, 5, -100, 1_002, 7, 9, 11])
    exact = host.float().requires_grad_()
    module(exact, target).backward()
    for inplace in (False, True):
        leaf = gpu.put(host).requires_grad_()
        logits = leaf * 1  # the output of a layer, whose own backward does not need it
        logits.retain_grad()
        before, address, version = logits.detach().clone(), logits.data_ptr(), logits._version
        loss = fastcalib.fused_loss(
            logits, gpu.put(target), module, backend=gpu.backend, inplace_backward=inplace, chunk_size=3
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(gradient.cpu().float(), exact.grad, rtol=ROUNDING[dtype], atol=2e-6)
        assert (gradient[2] == 0).all()
        if inplace:
            assert logits.data_ptr() == address and logits._version > version, "autograd is not told of the write"
            assert not torch.equal(logits.detach(), before)
        else:
            assert torch.equal(logits.detach(), before) and logits._version == version


def test_drop_in_cross_entropy(gpu):
    host, target = random_logits(6, 1_003), torch.tensor([0, 5, -100, 1_002, 7, 9])
    results = []
    for function, put, options in (
        (F.cross_entropy, lambda x: x.double() if x.is_floating_point() else x, {}),
        (fastcalib.functional.cross_entropy, gpu.put, {}),
    ):
        z = put(host).requires_grad_()
        with fastcalib.use_backend(gpu.backend if put == gpu.put else "auto"):
            loss = function(z, put(target), label_smoothing=0.1, **options)
            loss.backward()
        results.append((loss.detach().cpu().double(), z.grad.cpu().double()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=2e-5, atol=1e-7)


def test_the_list_of_losses_is_whole():
    """A loss that is added to the package is added to these tests by being added to tests/losses.py."""
    named = {name for name in losses.__all__ if name.islower() and callable(getattr(losses, name))}
    assert {case.name for case in CASES} <= named
