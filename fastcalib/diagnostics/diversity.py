"""What validity costs in diversity, for a model whose logits fall evenly with the rank (Theorem 5.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Cumulants of the uniform distribution on 0..v-1 are B_n / n (v^n - 1); the series of Delta has them times
# (n - 1) / n!, with the sign that squares give: B_n (n - 1) / (n n!) for n = 2, 4, 6, 8.
_SERIES = ((2, 1 / 24), (4, -1 / 960), (6, 1 / 36288), (8, -7 / 9676800))
_SMALL = 0.1  # below, the closed form cancels; the first term left out is 1e-14 of the sum


def diversity_loss(v: int | Tensor, a: float | Tensor) -> Tensor:
    """Delta_v(a) = ln v - H(p) with p(i) proportional to exp(-a i / v), i = 0, ..., v - 1: nats, float64.

    What an even spread over v valid tokens loses in entropy when their logits fall by a / v from one to the next.

    Args:
        v: number of valid tokens, >= 1; a number or a tensor.
        a: >= 0, inf allowed; a number or a tensor that broadcasts with v. Differentiable.

    Returns:
        float64, 0 for a = 0 or v = 1, ln v for a = inf.

    Raises:
        ValueError: v below 1, a negative or NaN.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), Theorem 5.2; the closed form derived.

    Example:
        >>> import math
        >>> f"{diversity_loss(2, math.log(1 / 0.05)).item():.4f}"
        '0.2176'
    """
    size = torch.as_tensor(v, dtype=torch.float64)
    slope = torch.as_tensor(a, dtype=torch.float64, device=size.device)
    if not bool((size >= 1).all()):
        raise ValueError(f"diversity_loss: v must be at least 1 (a number of valid tokens), got {size.min().item():g}")
    if not bool((slope >= 0).all()):
        bad = slope[~(slope >= 0)].flatten()[0].item()
        raise ValueError(f"diversity_loss: a must be >= 0, got {bad:g}")
    size, slope = torch.broadcast_tensors(size, slope)
    small, endless = slope < _SMALL, slope == torch.inf
    # Each branch sees only values it can take: a NaN in the one not chosen would spoil the gradient.
    s = torch.where(small, slope, 0.0)
    series = torch.stack([c * s**n * (1 - size**-n) for n, c in _SERIES]).sum(0)
    # H = log Z + theta E[i] with theta = a / v, Z = (1 - e^-a) / (1 - e^-theta), E[i] = 1/(e^theta - 1) - v/(e^a - 1).
    c = torch.where(small | endless, 1.0, slope)
    theta = c / size
    log_z = (-torch.expm1(-c)).log() - (-torch.expm1(-theta)).log()
    # 1 / (e^x - 1) as e^-x / (1 - e^-x): nothing overflows
    mean = (-theta).exp() / -torch.expm1(-theta) - size * (-c).exp() / -torch.expm1(-c)
    closed = size.log() - log_z - theta * mean
    return torch.where(endless, size.log(), torch.where(small, series, closed))


def diversity_bound(v: Tensor | Sequence[int], epsilon: float | Tensor) -> Tensor:
    """The most diversity that validity >= 1 - epsilon leaves: exp(-sum_t Delta_{v_t}(ln 1/epsilon)), float64.

    For a model whose logits fall evenly with the rank and that ranks its valid tokens first, with nothing but a
    temperature to choose: enough slope to keep epsilon of the mass off the invalid tokens makes the valid ones uneven.

    Args:
        v: (*, T), how many tokens are valid at each of T steps, >= 1.
        epsilon: in [0, 1], what validity may lack; a number or a tensor that broadcasts with (*).

    Returns:
        (*), between 1 / prod(v) (epsilon 0) and 1 (epsilon 1).

    Raises:
        ValueError: epsilon outside [0, 1], v below 1 or without an axis of steps.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), Theorem 5.2.

    Example:
        >>> f"{diversity_bound([10, 10, 10], 0.01).item():.3f}"
        '0.178'
    """
    sizes = torch.as_tensor(v, dtype=torch.float64)
    if sizes.dim() == 0:
        raise ValueError("diversity_bound: v must have an axis of steps, (*, T); [v] is one step")
    lacking = torch.as_tensor(epsilon, dtype=torch.float64, device=sizes.device)
    fits = (lacking >= 0) & (lacking <= 1)
    if not bool(fits.all()):
        raise ValueError(f"diversity_bound: epsilon must lie in [0, 1], got {lacking[~fits].flatten()[0].item():g}")
    return (-diversity_loss(sizes, -lacking.log()[..., None]).sum(-1)).exp()
