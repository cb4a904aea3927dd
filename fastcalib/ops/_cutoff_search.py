"""Cutoffs from ``statistics`` and ``ranks`` alone: any backend that has those, no sort, no temporary of V numbers.

Every rule keeps the tokens at or above some logit. Where that logit is not a formula of the row's statistics it is
found by bisection over the numbers of the logits' dtype in their order: as integers, 16 bits take 16 reads and float32
takes 32, whatever the number of rules and temperatures, since all of them are asked in one read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..eager.softmax import statistics_dtype
from ._arguments import row_of
from ._cutoff_rules import Rule
from .ranks import ranks
from .statistics import statistics
from .types import TokenStatistics

KEYS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}


def _swap_negative(key: Tensor) -> Tensor:
    """Bits of floats <-> integers in the same order: the magnitude of negative ones is turned round."""
    return torch.where(key < 0, key ^ torch.iinfo(key.dtype).max, key)


def key_of(values: Tensor) -> Tensor:
    """Integers in the order of floating point numbers, -0 just below +0."""
    return _swap_negative(values.contiguous().view(KEYS[values.dtype])).to(torch.int64)


def value_of(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers behind :func:`key_of`."""
    return _swap_negative(keys.to(KEYS[dtype])).view(dtype)


def search(
    logits: Tensor,
    rules: Sequence[tuple[Rule, float]],
    temperature: list[float] | Tensor,
    sizes: Tensor | None,
    last: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, number and mass of the tokens kept, (N, K, R), for logits (N, V): see :mod:`fastcalib.eager.cutoffs`.

    ``temperature``: K numbers, or one a row, (N,). Masses are those of ``ranks``, float32 sums for float32 and 16-bit
    logits: top-p may decide otherwise than exact arithmetic where the mass above a token is within about 1e-6 of p.

    On an accelerator the host waits for nothing. Temporaries are of (N, K R), but for the masses at every threshold and
    temperature, (N, K R, K); nothing is of V. Not yet run on a GPU.
    """
    wide = statistics_dtype(logits.dtype)
    several = isinstance(temperature, list)
    rows, k_count = logits.shape[0], len(temperature) if several else 1
    shape = (rows, k_count, len(rules))
    asked: list[float] | Tensor = [1.0] * k_count if last else temperature
    at = statistics(logits, temperature=asked, backend=backend)
    t = (row_of(asked, logits.device) if isinstance(asked, list) else asked[:, None].to(torch.float64)).expand(
        rows, k_count
    )
    defined = ~at.logsumexp.reshape(rows, -1)[:, 0].isnan()
    top = torch.where(defined, at.max_logit.to(torch.float64), 0.0)
    least = torch.full((rows,), -torch.inf, device=logits.device)
    finite = ranks(logits, thresholds=least, backend=backend).n_greater

    # How many tokens each rule keeps at least (it keeps their ties too), or the mass above a token that drops it.
    wanted = torch.ones(shape, dtype=torch.int64, device=logits.device)
    share = torch.full(shape, -1.0, dtype=torch.float64, device=logits.device)
    border = torch.full(shape, torch.inf, dtype=torch.float64, device=logits.device)
    for r, (rule, value) in enumerate(rules):
        if rule is Rule.TOP_P and value < 1:
            share[:, :, r] = value
        elif rule in (Rule.MIN_P, Rule.EPSILON, Rule.ETA, Rule.TOP_N_SIGMA):
            border[:, :, r] = _border(rule, value, at, t, top)
        elif rule is Rule.TOP_K:
            wanted[:, :, r] = finite.clamp(max=int(min(value, 2**62)))[:, None]
        else:
            many = finite if sizes is None or rule is not Rule.SIZE_ORACLE else torch.minimum(sizes, finite)
            wanted[:, :, r] = many[:, None]
    found = ranks(logits, thresholds=_round_up(border, wide).reshape(rows, -1), backend=backend)
    at_border = (found.n_greater + found.n_equal).reshape(shape)
    wanted = torch.where(border < torch.inf, torch.minimum(at_border, finite[:, None, None]), wanted).clamp(min=1)
    searched = [r for r, (rule, value) in enumerate(rules) if rule is Rule.TOP_P and value < 1]
    if searched:
        # Rounded masses may cross p between two logits: it is their count that says which tokens are kept.
        # Column by column: a list of them would be an index to copy to the device, which waits.
        some, shares = (torch.stack([x[:, :, r] for r in searched], 2) for x in (wanted, share))
        near = _bisect(logits, some, shares, asked, top, backend).to(wide)
        found = ranks(logits, thresholds=near.reshape(rows, -1), backend=backend)
        at_least = (found.n_greater + found.n_equal).reshape(near.shape).clamp(min=1)
        for i, r in enumerate(searched):
            wanted[:, :, r] = at_least[:, :, i]
    threshold = _bisect(logits, wanted, None, asked, top, backend).to(wide)
    threshold = torch.minimum(threshold, top[:, None, None].to(wide))

    flat = torch.nextafter(threshold, torch.full_like(threshold, -torch.inf)).reshape(rows, -1)
    below = ranks(logits, thresholds=flat, temperature=temperature, backend=backend)
    assert below.mass_greater is not None
    mass = _own(below.mass_greater, shape)
    kept = below.n_greater.reshape(shape)
    for r, (rule, _) in enumerate(rules):
        if rule is Rule.NONE:
            threshold[:, :, r], kept[:, :, r], mass[:, :, r] = -torch.inf, finite[:, None], 1.0
    row = defined[:, None, None]
    return (
        torch.where(row, threshold, torch.nan),
        torch.where(row, kept, 0),
        torch.where(row, mass, torch.nan).to(wide),
    )


def _border(rule: Rule, value: float, at: TokenStatistics, t: Tensor, top: Tensor) -> Tensor:
    """The lowest logit kept where it is a formula: p >= q is z >= max + T log(q / p_max), (N, K) or (N, 1)."""
    if rule is Rule.TOP_N_SIGMA:
        return (top - value * at.std_logits.to(torch.float64))[:, None]
    log_value = torch.tensor(value, dtype=torch.float64).log().item()
    if rule is Rule.MIN_P:
        return top[:, None] + t * log_value
    log_p_max = at.max_prob.to(torch.float64).log().reshape(len(top), -1)
    if rule is Rule.ETA:
        half = log_value / 2 - at.entropy.to(torch.float64).reshape(len(top), -1)
        return top[:, None] + t * (half.clamp(max=log_value) - log_p_max)
    return top[:, None] + t * (log_value - log_p_max)


def _round_up(border: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of a dtype that is not below a float64."""
    near = border.to(dtype)
    return torch.where(near < border, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def _own(mass: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Of masses at every temperature, (N, K R[, K]), those at the threshold's own, (N, K, R)."""
    if mass.dim() == 2:
        return mass.reshape(shape)
    return mass.reshape(*shape, shape[1]).diagonal(dim1=1, dim2=3).transpose(1, 2)


def _bisect(
    logits: Tensor,
    wanted: Tensor,
    share: Tensor | None,
    temperature: list[float] | Tensor,
    top: Tensor,
    backend: str,
) -> Tensor:
    """The largest number with ``wanted`` logits at or above it, or the smallest with less than ``share`` above it."""
    dtype = logits.dtype
    shape = (wanted.shape[0], wanted.shape[1], wanted.shape[2])
    # The answer stays in [low, high].
    high = key_of(top.to(dtype))[:, None, None].expand(shape)
    low = key_of(torch.full((), torch.finfo(dtype).min, dtype=dtype, device=logits.device)).expand(shape)
    for _ in range(torch.iinfo(KEYS[dtype]).bits):
        # Halfway without overflow: rounded down where the smallest is sought, up where the largest is.
        middle = (low & high) + ((low ^ high) >> 1) + (((low ^ high) & 1) if share is None else 0)
        value = value_of(middle, dtype).to(statistics_dtype(dtype)).reshape(len(top), -1)
        if share is None:
            r = ranks(logits, thresholds=value, backend=backend)
            enough = (r.n_greater + r.n_equal).reshape(shape) >= wanted
            low, high = torch.where(enough, middle, low), torch.where(enough, high, torch.maximum(middle - 1, low))
        else:
            r = ranks(logits, thresholds=value, temperature=temperature, backend=backend)
            assert r.mass_greater is not None
            light = _own(r.mass_greater, shape).to(torch.float64) < share
            low, high = torch.where(light, low, torch.minimum(middle + 1, high)), torch.where(light, middle, high)
    return value_of(low, dtype)
