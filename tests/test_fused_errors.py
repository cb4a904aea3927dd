"""fused_loss: what it says about mistakes."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastcalib import TokenStatistics, losses
from fastcalib.fused import fused_loss
from fastcalib.losses._modules import as_module

from .losses import TARGET, Case, N, V, every_loss, sharp_logits, split


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"reduction": "none"}, ValueError, "call the loss itself for per-token values"),
        ({"reduction": "average"}, ValueError, "reduction must be"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number of rows or None, got 0"),
        ({"chunk_size": 2.5}, ValueError, "chunk_size"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, ValueError, "broadcast"),
        ({"num_items_in_batch": 0}, ValueError, "must be positive"),
        ({"weight": torch.ones(3)}, ValueError, "weight must broadcast"),
        ({"weight": torch.ones(N, requires_grad=True)}, ValueError, "weight requires a gradient, but only the logits"),
        ({"temperature": torch.ones(N, requires_grad=True)}, ValueError, "temperature requires a gradient"),
        ({"wieght": torch.ones(N)}, TypeError, r"nll\(\) got an unexpected keyword argument 'wieght'"),
        ({"vocab_size": V + 1}, ValueError, "vocab_size"),
    ],
)
def test_bad_arguments(given: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        fused_loss(sharp_logits().requires_grad_(), TARGET, losses.NLLLoss(), **given)


def test_bad_losses_and_targets() -> None:
    logits = sharp_logits().requires_grad_()
    with pytest.raises(ValueError, match=r"one loss a token, shape \(8,\), got \(\)"):
        fused_loss(logits, TARGET, lambda stats, target: stats.entropy.sum())
    with pytest.raises(TypeError, match="must be a loss module or a callable, got str"):
        fused_loss(logits, TARGET, "nll")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="integer dtype"):
        fused_loss(logits, torch.rand(N), losses.NLLLoss())
    target = TARGET.clone()
    target[5:] = V
    for z in (logits, logits.detach()):  # with and without a gradient; the third row of the second chunk
        with pytest.raises(ValueError, match=rf"^target\[5\] is {V}, outside"):
            fused_loss(z, target, losses.NLLLoss(), chunk_size=3)

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, stats: TokenStatistics, target: Tensor) -> Tensor:
            return -stats.log_prob * self.scale

    with pytest.raises(ValueError, match=r"loss_fn\.scale requires a gradient"):
        fused_loss(logits, TARGET, Learned())
    fused_loss(logits, TARGET, Learned().requires_grad_(False))


def test_a_function_that_lacks_its_numbers_says_so():
    with pytest.raises(TypeError, match="lam"):
        fused_loss(sharp_logits(), TARGET, losses.lambda_pr)


@every_loss
def test_every_loss_function_stands_for_its_module_or_names_it(case: Case) -> None:
    """The pair of function and module is declared in one place; documentation and substitution both come from it."""
    module, tokens = getattr(losses, case.module), split(case)[1]
    summary = inspect.getdoc(case.function()).split("\n\n")[0]
    assert module.__doc__.startswith(f"{summary}\n\nThe module of :func:`fastcalib.losses.{case.name}`, ")
    if "threshold" in case.own:  # the module keeps a running one, which no function does
        with pytest.raises(
            TypeError, match=rf"such as fastcalib\.losses\.{case.module}\(\).*the function {case.name}$"
        ):
            fused_loss(sharp_logits(), TARGET, partial(case.function(), **case.own))
        return
    own = {name: value for name, value in case.own.items() if name not in tokens}
    made = as_module(partial(case.function(), **own))
    assert type(made) is module and made.own == module(**own).own


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (losses.GCELoss, r"such as fastcalib\.losses\.GCELoss\(\).*the class GCELoss"),
        (nn.MSELoss, r"such as fastcalib\.losses\.NLLLoss\(\).*the class MSELoss"),
        (losses.pr, "the function pr"),
        (losses.PRLoss(0.5), r"got PRLoss\(lam=0\.5\)"),
    ],
)
def test_what_is_no_loss_of_tokens(loss_fn: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        fused_loss(sharp_logits(), TARGET, loss_fn)
