"""What a call costs when there is nothing to compute: logits of shape (1, 32)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ours
from .harness import Variant, measure
from .problem import Problem
from .suite import Settings, reason


def _calls(problem: Problem) -> dict[str, Callable[[], Callable[[], Any]]]:
    z, t = problem.logits, problem.target
    leaf = z.detach().clone().requires_grad_()
    index = problem.selected(4)

    def both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(leaf, t), leaf)

    def drop_in(x: Tensor, target: Tensor) -> Tensor:
        return ours.functional("cross_entropy", x, target)()["loss"]

    return {
        "torch.logsumexp": lambda: lambda: torch.logsumexp(z, -1),
        "torch.softmax": lambda: lambda: torch.softmax(z, -1),
        "fastcalib.softmax": lambda: ours.dense("softmax", z, 1.0),
        "fastcalib.statistics": lambda: ours.statistics(z, t, (1.0,)),
        "fastcalib.ranks M=4": lambda: ours.ranks(z, index),
        "F.cross_entropy": lambda: lambda: F.cross_entropy(z, t),
        "fastcalib.functional.cross_entropy": lambda: ours.functional("cross_entropy", z, t),
        "F.cross_entropy, fwd+bwd": lambda: both(F.cross_entropy),
        "fastcalib.functional.cross_entropy, fwd+bwd": lambda: both(drop_in),
        "fastcalib.losses.nll, fwd+bwd": lambda: both(ours.loss_function("nll", {})),
    }


def run_overhead(settings: Settings) -> dict[str, Any]:
    """Microseconds per call by name: {"median_us", "least_us"}, or {"unavailable": reason}."""
    variants: list[Variant] = []
    results: dict[str, Any] = {}
    for name, factory in _calls(Problem(1, 32, torch.float32)).items():
        results[name] = {}
        try:
            call = factory()
            for _ in range(20):
                call()
        except Exception as error:
            results[name] = {"unavailable": reason(error)}
        else:
            variants.append(Variant(name, call))
    settings.say("overhead: calls on 1 x 32 logits")
    timings = measure(variants, rounds=settings.rounds, budget=settings.budget, quiet=settings.quiet)
    for name, timing in timings.items():
        results[name] = {"median_us": timing.median * 1e6, "least_us": timing.least * 1e6}
    return results
