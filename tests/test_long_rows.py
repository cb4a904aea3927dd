"""Rows longer than the kernels' blocks and segments, one temperature and many: where the shortcuts are.

One temperature is summed in one pass against the maximum so far; 16-bit logits at several are counted first.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import fastcalib
from fastcalib import ValidSets

from . import cases, reference
from .cases import random_logits, random_sets
from .checks import assert_statistics

V = 33_001  # two segments, the second one short
MANY = [0.3, 0.5, 0.7, 0.9, 1.0, 1.3, 1.7, 2.5, 4.0]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def hostile_rows(dtype: torch.dtype) -> dict[str, Tensor]:
    base = random_logits(V, seed=7).double()
    steps = torch.arange(V).double() // 4_000  # of several blocks each
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.uint16)
    numbers = patterns.view(dtype).double() if dtype != torch.float32 else torch.linspace(-80, 80, 65_536).double()
    numbers = numbers[(numbers.abs() < 80)]
    rows = {
        "steps of 40": base + 40 * steps,
        "steps of 200": base + 200 * steps,
        "steps down of 200": base - 200 * steps,
        "every value below 80": numbers[torch.randperm(len(numbers), generator=cases.generator(3))][:V],
        "a few finite": torch.where(torch.arange(V) % 4_001 == 7, base, -torch.inf),
        "second segment masked": torch.where(torch.arange(V) < 32_768, base, -torch.inf),
        "first segment masked": torch.where(torch.arange(V) >= 32_768, base, -torch.inf),
    }
    return {**cases.defined_rows(V, dtype), **{name: row.to(dtype) for name, row in rows.items()}}


@cache
def hostile(dtype: torch.dtype, temperatures: tuple[float, ...]) -> tuple:
    rows = hostile_rows(dtype)
    logits, index = torch.stack(list(rows.values())), random_sets(len(rows), V, [2, 5])
    return list(rows), logits, index, reference.statistics(logits, list(temperatures), index)


@pytest.mark.parametrize("temperatures", [(1.0,), (0.4,), (0.05,), tuple(MANY)], ids=["one", "cold", "colder", "many"])
@pytest.mark.parametrize("dtype", FLOATS, ids=cases.dtype_id)
def test_hostile_long_rows(backend, dtype, temperatures):
    names, logits, index, want = hostile(dtype, temperatures)
    got = fastcalib.statistics(logits, ValidSets.from_lists(index), list(temperatures), backend=backend)
    assert_statistics(got, want, dtype, "hostile", names=names)


@pytest.mark.parametrize("temperatures", [[1.0], [1.0, 0.7], MANY], ids=["one", "two", "many"])
@pytest.mark.parametrize("dtype", FLOATS, ids=cases.dtype_id)
def test_undefined_long_rows_leave_others_alone(backend, dtype, temperatures):
    base = random_logits(V, dtype=dtype, seed=4)
    undefined = list(cases.undefined_rows(V, dtype).values())
    if dtype == torch.float32:  # a NaN whose low bits an integer addition to its exponent turns into a number
        undefined.append(base.clone())
        undefined[-1][9] = torch.tensor(0x7FC00001, dtype=torch.int32).view(dtype)
    rows = []
    for bad in undefined:
        rows += [bad, base]  # a neighbour each: what one row leaves behind in a scratch memory harms the next
    got = fastcalib.statistics(torch.stack(rows), temperature=temperatures, backend=backend)
    alone = fastcalib.statistics(base, temperature=temperatures, backend=backend)
    assert got.logsumexp[::2].isnan().all() and got.entropy[::2].isnan().all()
    few = fastcalib.statistics(torch.stack(rows), temperature=temperatures, moments=False, backend=backend)
    assert few.logsumexp[::2].isnan().all() and not few.logsumexp[1::2].isnan().any()
    for field in ("logsumexp", "entropy", "collision", "var_logit", "sum_logits", "std_logits"):
        value, want = getattr(got, field)[1::2], getattr(alone, field)
        assert torch.equal(value, want.expand_as(value)), field


@pytest.mark.parametrize("value", [64.0, -64.0, 2.0**-20])
def test_extremes_at_the_end_of_a_segment(backend, value):
    """Magnitudes are bounded in whole blocks and in what is left over; outside of the bounds nothing is counted."""
    logits = random_logits(1, 20_001, dtype=torch.bfloat16).abs().clamp(min=0.01)
    logits[:, -1] = value
    index = [[20_000]]
    want = reference.statistics(logits, MANY, index)
    got = fastcalib.statistics(logits, ValidSets.from_lists(index), MANY, backend=backend)
    assert_statistics(got, want, torch.bfloat16, f"{value} at the end")


def test_temperatures_far_apart_in_16_bits(backend):
    logits = random_logits(2, V, dtype=torch.bfloat16)
    logits[:, ::7] = -torch.inf
    temperatures = [1e-30, 1.0, 1e15, 1e-12]
    together = fastcalib.statistics(logits, temperature=temperatures, backend=backend)
    for i, t in enumerate(temperatures):
        alone = fastcalib.statistics(logits, temperature=t, backend=backend)
        torch.testing.assert_close(together.entropy[:, i], alone.entropy, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(together.collision[:, i], alone.collision, rtol=1e-5, atol=0)
