"""Comparison with the reference, with a reason for each tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

import fastcalib

from . import reference
from .reference import OVER_TEMPERATURES, SMOOTH, Reference

# The promise: 2e-6 for float32 statistics, 17 units in the last place: a sum of up to 262,144 terms in blocks, an
# exponential, a logarithm. For float64 nothing was promised; 2e-13 is 900 of its units, what serial lanes may lose.
UNIT = {torch.float32: 2e-6, torch.float64: 2e-13}
# Probabilities below the smallest normal number may be flushed to 0, or be that number: moments may hold V such terms
# times a square of logits. Far below anything that matters, yet not 0.
FLOOR = {torch.float32: 1e-30, torch.float64: 1e-290}


def unit(dtype: torch.dtype) -> float:
    """Relative error allowed for logits of a dtype; half types are widened as they are read, so they get float32's."""
    return UNIT[torch.float64 if dtype == torch.float64 else torch.float32]


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float, what: str, names: list[str] | None = None) -> None:
    """|got - want| <= bound where want is finite; elsewhere the same infinity or NaN."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(want.shape)
    same = torch.where(want.isfinite(), (got - want).abs() <= bound, (got == want) | (got.isnan() & want.isnan()))
    if not same.all():
        at = tuple((~same).nonzero()[0].tolist())
        row = f" ({names[at[0]]})" if names and len(names) == len(want) else ""
        off = (got - want)[~same].abs()
        raise AssertionError(
            f"{what}{list(at)}{row}: got {got[at].item()!r}, expected {want[at].item()!r}, "
            f"bound {bound[at].item():.3g}; {off.numel()} of {same.numel()} off, the worst by {off.max().item():.3g}"
        )


def bounds(want: Reference, u: float) -> dict[str, Tensor]:
    """How far each field may be from the reference, with u the relative error of a sum."""
    one = torch.ones((), dtype=torch.float64)
    size = want.size[:, None]
    return {
        # the promise of the README: u relative, absolute below 1
        "logsumexp": u * want.logsumexp.abs().maximum(one),
        "entropy": u * want.entropy.abs().maximum(one),
        "log_prob": u * want.log_prob.abs().maximum(one),
        # exp(-log s0) or 1/s0: the relative error of s0, and of an exponential of up to -12.5
        "max_prob": 2 * u * want.max_prob,
        # r2 / s0^2: three relative errors
        "collision": 4 * u * want.collision,
        # max z + s1/s0: each of them rounded, whatever their sum
        "mean_logit": u * size.maximum((want.mean_logit - want.max_logit[:, None]).abs()),
        # s2/s0 - (s1/s0)^2: a difference of two numbers of the size of `spread`
        "var_logit": 2 * u * want.spread,
        # pairwise sums of V numbers
        "sum_logits": u * want.total,
        # the logits of a row with a large common part differ from their mean by as much as rounding allows
        "std_logits": 4 * u * want.std_logits + u * want.size,
        "max_logit": 0 * want.max_logit,
    }


def assert_statistics(
    got: fastcalib.TokenStatistics, want: Reference, dtype: torch.dtype, what: str, *, names: list[str] | None = None
) -> None:
    """Every field against the reference; ``got`` has a temperature axis and one leading dimension.

    Rows that hold finfo.min beside other numbers are excused from std_logits: their sum of squares is beyond their
    dtype, and no kernel is asked for a number that means nothing. ``names`` of the rows go into the message.
    """
    limits = bounds(want, unit(dtype))
    for name in (*OVER_TEMPERATURES, "sum_logits", "std_logits", "max_logit", "log_prob"):
        value = getattr(got, name)
        if value is None:
            continue
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), (
            f"{what} {name}: {value.dtype}"
        )
        expected, limit = getattr(want, name), limits[name].nan_to_num(0.0, posinf=torch.inf)
        if name == "log_prob":
            value = value.reshape(expected.shape)
        expected = expected.detach().to(value.dtype).double()  # what overflows float32 is an infinity in both
        if name == "std_logits":
            enormous = want.size > torch.finfo(dtype).max / 2
            value, expected = (torch.where(enormous, 0.0, t.double()).to(t.dtype) for t in (value, expected))
        floor = FLOOR[value.dtype] * want.size.nan_to_num(1.0).clamp(1.0, 1e5).max() ** 2
        assert_within(value, expected, limit + floor, f"{what} {name}", names)
    assert torch.equal(got.argmax, want.argmax), f"{what} argmax: {got.argmax.tolist()} for {want.argmax.tolist()}"


def random_upstream(want: Reference, seed: int, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A random upstream gradient for every smooth field, float64; of both signs and different for each element."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name in SMOOTH:
        if name not in skip:
            field = getattr(want, name)
            out[name] = torch.randn(field.shape, generator=g, dtype=torch.float64).float().double()
    return out


def pull_back(result: object, inputs: list[Tensor], upstream: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of the inputs for upstream gradients of any fields of a TokenStatistics or Reference."""
    outputs = [(getattr(result, name), g) for name, g in upstream.items() if getattr(result, name).requires_grad]
    values = [v for v, _ in outputs]
    grads = [g.to(v).reshape(v.shape) for v, g in outputs]
    return list(torch.autograd.grad(values, inputs, grads, allow_unused=True))


def assert_gradient(
    got: Tensor, want: Tensor, scale: Tensor, dtype: torch.dtype, what: str, exact_zero: Tensor | None = None
) -> None:
    """A gradient in the dtype of the logits against float64.

    ``scale`` is the sum of the sizes of its terms (reference.gradient_scale): the rounding error of computing it is a
    few units of that, and rounding the result to its dtype adds half a unit in the last place of the result.
    """
    assert got.dtype == dtype, f"{what}: gradient in {got.dtype} for {dtype} logits"
    u = unit(dtype)
    store = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    smallest = torch.finfo(dtype).tiny if dtype != torch.float16 else 2**-24
    assert_within(got, want, 4 * u * scale + store * want.abs() + smallest, what)
    if exact_zero is not None:
        assert (got[exact_zero] == 0).all(), f"{what}: gradient of a masked token is {got[exact_zero].abs().max()}"


def check_gradient(
    logits: Tensor, index: list[list[int]], temperature: float | list[float] | Tensor, backend: str, what: str,
    *, skip: tuple[str, ...] = (), vocab_size: int | None = None, seed: int = 0, device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """The gradient of all smooth fields at once, random upstreams, against autograd of the reference. logits (N, V).

    ``device``: where the gradient is computed; logits and temperature are given on the CPU.
    """
    before = logits.detach().clone()
    exact = logits.detach().double().requires_grad_()
    want = reference.statistics(exact, temperature, index, vocab_size=vocab_size)
    upstream = random_upstream(want, seed, skip)
    (expected,) = pull_back(want, [exact], upstream)
    if expected is None:  # no row with a softmax: nothing depends on the logits
        expected = torch.zeros_like(exact)
    z = logits.detach().to(device).requires_grad_()
    sets = fastcalib.ValidSets.from_lists(index).to(device) if any(index) else None
    temperature_there = temperature.to(device) if isinstance(temperature, Tensor) else temperature
    got = fastcalib.statistics(z, sets, temperature_there, vocab_size=vocab_size, backend=backend)
    present = upstream if sets is not None else {k: v for k, v in upstream.items() if k != "log_prob"}
    (actual,) = pull_back(got, [z], present)
    scale = reference.gradient_scale(before, temperature, index, upstream, vocab_size=vocab_size)
    zero = before == -torch.inf
    if vocab_size is not None:
        zero[:, vocab_size:] = True
    assert_gradient(actual.cpu(), expected, scale, logits.dtype, what, zero)
    assert torch.equal(z.detach().cpu().nan_to_num(), before.nan_to_num()), f"{what}: the logits were written to"
