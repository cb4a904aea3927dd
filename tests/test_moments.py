"""``moments=False``: the same log-probabilities from half the arithmetic, nothing else, and the same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcalib
from fastcalib.ops.statistics import MOMENTS

from .cases import DTYPES, defined_rows, dtype_id, random_logits, undefined_rows

KEPT = ("logsumexp", "max_prob", "log_prob")
# A block of the one-pass loop, its edges, a whole segment and some, GPT-2.
SIZES = (1, 31, 2_047, 2_048, 2_049, 4_096, 32_768, 34_817, 50_257)


def both(logits: Tensor, index: Tensor, backend: str, **options: object) -> tuple[object, object]:
    make = lambda moments: fastcalib.statistics(logits, index, moments=moments, backend=backend, **options)  # noqa: E731
    return make(True), make(False)


def assert_same(full: object, lean: object, dtype: torch.dtype) -> None:
    # Both add the same exponentials in the same order; where the compiler contracts differently, an ulp or two remain.
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 5e-7, "atol": 5e-7}
    for name in KEPT:
        torch.testing.assert_close(getattr(lean, name), getattr(full, name), equal_nan=True, msg=name, **tolerance)
    assert torch.equal(lean.argmax, full.argmax)
    torch.testing.assert_close(lean.max_logit, full.max_logit, rtol=0, atol=0, equal_nan=True)
    assert all(getattr(lean, name) is None for name in MOMENTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("v", SIZES)
def test_same_numbers_on_adversarial_rows(v: int, dtype: torch.dtype, backend: str) -> None:
    rows = {**defined_rows(v, dtype), **undefined_rows(v, dtype)}
    logits = torch.stack([row.to(dtype) for row in rows.values()])
    index = torch.arange(len(rows)) % v
    for temperature in (1.0, 0.05, [0.7, 1.0]):
        full, lean = both(logits, index, backend, temperature=temperature)
        assert_same(full, lean, dtype)


@pytest.mark.parametrize("position", (0, 17, 2_047, 2_048, 5_000, 40_000))
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_one_bad_logit_anywhere_is_seen(position: int, value: float, backend: str) -> None:
    logits = random_logits(3, 40_001)
    logits[1, position] = value
    logits[2, :] = -torch.inf  # a row of masked tokens with a bad one is undefined too
    logits[2, position] = value
    lean = fastcalib.statistics(logits, torch.tensor([5, 5, 5]), moments=False, backend=backend)
    assert lean.log_prob.isnan().tolist() == [False, True, True]
    assert lean.argmax.tolist()[1:] == [-1, -1]


def test_blocks_that_rise_far_above_the_ones_before(backend: str) -> None:
    """The one-pass sum is relative to the maximum so far: a jump of 1, of 60 and of 3e4 must not overflow it."""
    logits = torch.zeros(3, 10_000)
    for row, jump in enumerate((1.0, 60.0, 3e4)):
        logits[row] = (torch.arange(10_000) // 2_048) * jump
    exact = torch.logsumexp(logits.double(), -1)
    for moments in (True, False):
        got = fastcalib.statistics(logits, moments=moments, backend=backend)
        torch.testing.assert_close(got.logsumexp.double(), exact, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_same_gradient(dtype: torch.dtype, backend: str) -> None:
    logits = random_logits(4, 5_003, dtype=dtype).requires_grad_()
    index = torch.tensor([0, 17, -100, 5_002])
    gradients = []
    for stats in both(logits, index, backend):
        loss = (
            (stats.log_prob * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum() + stats.logsumexp.sum() + stats.max_prob.sum()
        )
        gradients.append(torch.autograd.grad(loss, logits)[0])
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=limit, atol=limit * 1e-3)
    assert (gradients[1][2] == 0).all()


def test_gradient_to_the_temperature_keeps_its_moments(backend: str) -> None:
    """It is made of the mean logit, which moments=False must not take away from it."""
    logits, index = random_logits(3, 2_100), torch.tensor([1, 2, 3])
    gradients = []
    for moments in (True, False):
        temperature = torch.full((3,), 0.8, requires_grad=True)
        stats = fastcalib.statistics(logits, index, temperature, moments=moments, backend=backend)
        gradients.append(torch.autograd.grad(stats.log_prob.sum(), temperature)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_ranks_go_along(backend: str) -> None:
    logits, index = random_logits(3, 3_000), torch.tensor([[1, 2], [3, 4], [5, 6]])
    full, lean = both(logits, index, backend, ranks=True)
    assert torch.equal(full.n_greater, lean.n_greater) and torch.equal(full.n_equal, lean.n_equal)
    torch.testing.assert_close(lean.mass_greater, full.mass_greater, rtol=1e-6, atol=1e-6)
