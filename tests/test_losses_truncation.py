"""The truncation losses: what they remember, what they drop, and how they resume."""

from __future__ import annotations

import math

import pytest
import torch

from fastcalib import losses

from .losses import TARGET, N, sharp_logits


@pytest.mark.parametrize("name", ["TruncLoss", "TruncRLoss"])
def test_truncation_keeps_everything_until_its_memory_is_full(name: str, backend: str) -> None:
    module = getattr(losses, name)(drop=0.25, buffer_size=2 * N, reduction="none", backend=backend)
    z = sharp_logits(torch.float32)
    nll = losses.nll(z, TARGET, reduction="none", backend=backend)
    for _ in range(2):
        assert torch.equal(module(z, TARGET), nll)
    assert module.seen == 2 * N and torch.equal(module.recent, nll.repeat(2))
    cut = nll.repeat(2).quantile(0.75 if name == "TruncLoss" else 0.25)
    keep = nll < cut if name == "TruncLoss" else nll > cut
    assert torch.equal(module(z, TARGET), torch.where(keep, nll, 0.0)) and 0 < keep.sum() < N
    module.reduction = "mean"


def test_truncation_memory_is_a_ring_of_kept_tokens() -> None:
    module = losses.TruncLoss(buffer_size=5)
    seen: list[float] = []
    for step in range(7):
        nll = torch.arange(step % 4 + 1, dtype=torch.float32) + 10 * step
        kept = torch.arange(step % 4 + 1) % 3 != 1
        nll[0] = torch.nan if step == 3 else nll[0]
        module.observe(nll, kept)
        seen += [x for x, k in zip(nll.tolist(), kept.tolist()) if k and not math.isnan(x)]
        ring = [0.0] * 5
        for i, x in enumerate(seen):
            ring[i % 5] = x
        assert module.recent.tolist() == ring and module.seen == len(seen)
    module.observe(torch.arange(13.0), torch.ones(13, dtype=torch.bool))  # more than it holds: the last ones stay
    assert sorted(module.recent.tolist()) == [8.0, 9.0, 10.0, 11.0, 12.0]
    module.observe(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert module.seen == len(seen) + 13


def test_truncation_resumes_from_its_state_and_rests_in_eval() -> None:
    z = sharp_logits(torch.float32)
    first = losses.TruncLoss(drop=0.5, buffer_size=N)
    first(z, TARGET)
    second = losses.TruncLoss(drop=0.5, buffer_size=N)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(z * 0.5, TARGET), first(z * 0.5, TARGET))
    state = {k: v.clone() for k, v in first.state_dict().items()}
    first.eval()(z, TARGET)
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items())


def test_truncation_survives_infinite_losses() -> None:
    module = losses.TruncLoss(drop=0.4, buffer_size=4)
    module.observe(torch.tensor([1.0, torch.inf, torch.inf, 2.0]), torch.ones(4, dtype=torch.bool))
    assert not module.threshold().isnan() and module.threshold() > 2


def test_truncation_mean_counts_dropped_tokens() -> None:
    z = sharp_logits()
    each = losses.trunc(z, TARGET, threshold=3.0, reduction="none")
    assert (each == 0).any()
    torch.testing.assert_close(losses.trunc(z, TARGET, threshold=3.0), each.sum() / N)


def test_truncation_compiles_with_its_memory() -> None:
    torch._dynamo.reset()
    plain, module = losses.TruncLoss(buffer_size=N), losses.TruncLoss(buffer_size=N)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(sharp_logits(torch.float32), TARGET), plain(sharp_logits(torch.float32), TARGET))
        assert torch.equal(module.recent, plain.recent) and module.seen == plain.seen
