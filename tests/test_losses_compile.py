"""Losses under torch.compile: one graph, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcalib

from .losses import CASES, TARGET, Case, every_loss, sharp_logits


def assert_compiles(case: Case, **options: object) -> None:
    z = sharp_logits(torch.float32)

    def step(z: Tensor) -> Tensor:
        return case.function()(z, TARGET, **case.own, label_smoothing=0.1, **options)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = z.clone().requires_grad_(), z.clone().requires_grad_()
    a, b = compiled(got), step(want)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss, leaf in ((a, got), (b, want))))


@every_loss
def test_compiles_without_a_graph_break(case: Case) -> None:
    assert_compiles(case)


@pytest.mark.parametrize("name", [n for n, (live, _) in fastcalib.backends().items() if live])
def test_compiles_with_a_backend_named(name: str) -> None:
    assert_compiles(CASES[0], backend=name)
