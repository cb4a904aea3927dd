"""The answers, in float64, row by row, with nothing taken from the package: what every backend is compared with.

Written to be obviously right, not fast. Only the finite logits of a row enter its sums, so a masked token is left out
rather than multiplied by zero. Everything is differentiable by autograd where it is smooth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

# The fields of TokenStatistics that have a gradient, over temperatures and not.
OVER_TEMPERATURES = ("logsumexp", "entropy", "max_prob", "collision", "mean_logit", "var_logit")
SMOOTH = (*OVER_TEMPERATURES, "sum_logits", "std_logits", "log_prob")


@dataclass
class Reference:
    """Statistics of N rows at K temperatures, and the sizes that error bounds are made of."""

    logsumexp: Tensor  # (N, K), as are the next five
    entropy: Tensor
    max_prob: Tensor
    collision: Tensor
    mean_logit: Tensor
    var_logit: Tensor
    argmax: Tensor  # (N,), as are the next three
    sum_logits: Tensor
    std_logits: Tensor
    max_logit: Tensor
    log_prob: Tensor  # (nnz, K)
    spread: Tensor  # (N, K): E[(z - max)^2] under p, what var_logit is the difference of
    size: Tensor  # (N,): largest |z| among the finite logits
    total: Tensor  # (N,): sum of |z| over the finite logits


def temperatures(value: float | list[float] | Tensor, n_rows: int) -> Tensor:
    """Any temperature argument as float64 (N, K)."""
    if isinstance(value, Tensor):
        value = value.double()
        return (value.reshape(1, 1) if value.numel() == 1 else value.reshape(-1, 1)).expand(n_rows, -1)
    return torch.tensor([value] if isinstance(value, list) else [[value]], dtype=torch.float64).expand(n_rows, -1)


def is_undefined(row: Tensor) -> bool:
    """No softmax: -inf throughout, or a NaN or +inf anywhere."""
    return bool((row == -torch.inf).all() or row.isnan().any() or (row == torch.inf).any())


def statistics(
    logits: Tensor,
    temperature: float | list[float] | Tensor = 1.0,
    index: list[list[int]] | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Reference:
    """Statistics of float64 logits (N, V); index is a list of token ids for each row."""
    logits = logits.double()
    n_rows = logits.shape[0]
    t = temperatures(temperature, n_rows)
    sets = index if index is not None else [[] for _ in range(n_rows)]
    rows = []
    for r in range(n_rows):
        z, ids = logits[r, :vocab_size], sets[r]
        if ids and all(i == ignore_index for i in ids):
            rows.append(_constant(0.0, len(ids), t.shape[1]))
        elif is_undefined(z):
            rows.append(_constant(torch.nan, 0, t.shape[1]))
            rows[-1]["log_prob"] = torch.stack(
                [torch.full((t.shape[1],), 0.0 if i == ignore_index else torch.nan).double() for i in ids]
                or [torch.zeros(0, t.shape[1], dtype=torch.float64)]
            ).reshape(-1, t.shape[1])
        else:
            rows.append(_row(z, t[r], ids, ignore_index))
    joined = {
        name: torch.cat([row[name] for row in rows]) if name == "log_prob" else torch.stack([row[name] for row in rows])
        for name in (f.name for f in fields(Reference))
    }
    return Reference(**joined)


def _constant(value: float, selected: int, k: int) -> dict[str, Tensor]:
    out = {name: torch.full((k,), value, dtype=torch.float64) for name in (*OVER_TEMPERATURES, "spread")}
    out |= {
        name: torch.tensor(value, dtype=torch.float64)
        for name in ("sum_logits", "std_logits", "max_logit", "size", "total")
    }
    return out | {"argmax": torch.tensor(-1), "log_prob": torch.full((selected, k), value, dtype=torch.float64)}


def _row(z: Tensor, t: Tensor, ids: list[int], ignore_index: int) -> dict[str, Tensor]:
    finite = z > -torch.inf
    f, m = z[finite], z.detach().max()
    top = int(np.flatnonzero(z.detach().numpy() == m.item())[0])
    out: dict[str, list[Tensor]] = {name: [] for name in (*OVER_TEMPERATURES, "spread", "log_prob")}
    for temperature in t:
        x = (f - m) / temperature
        log_s = torch.logsumexp(x, 0)
        log_p = x - log_s
        p = log_p.exp()
        some = (
            p > 0
        )  # at finfo.min p is 0, log p is -inf and the square overflows: no part of any sum, as their limits are 0
        log_p, p, y = log_p[some], p[some], (f - m)[some]
        centre = (p * y).sum()  # moments about the maximum: about 0, a common offset would cost them their digits
        out["logsumexp"].append(m / temperature + log_s)
        out["entropy"].append(-(p * log_p).sum())
        out["max_prob"].append(
            ((z[top] - m) / temperature - log_s).exp()
        )  # of ties, the lowest index owns the gradient
        out["collision"].append((p * p).sum())
        out["mean_logit"].append(m + centre)
        out["var_logit"].append((p * (y - centre) ** 2).sum())
        out["spread"].append((p * y**2).sum().detach())
        zero = torch.zeros((), dtype=torch.float64)
        selected = []
        for i in ids:
            if i == ignore_index:
                selected.append(zero)
            elif z[i] == -torch.inf:
                selected.append(-torch.inf - log_s)  # the gradient of the others is that of -log_s
            else:
                selected.append((z[i] - m) / temperature - log_s)
        out["log_prob"].append(torch.stack(selected) if selected else torch.zeros(0, dtype=torch.float64))
    stacked = {name: torch.stack(parts, -1) for name, parts in out.items()}
    masked = not bool(finite.all())
    with torch.no_grad():
        varied = f.numel() > 1 and bool((f != f[0]).any())
    return stacked | {
        "argmax": torch.tensor(top),
        "sum_logits": f.sum() - torch.inf if masked else f.sum(),  # every finite one has gradient 1, as in torch.sum
        "std_logits": ((f - f.mean()).square().sum() / (f.numel() - 1)).sqrt() if varied else f.sum() * 0,
        "max_logit": m,
        "size": f.detach().abs().max(),
        "total": f.detach().abs().sum(),
    }


def gradient_scale(
    logits: Tensor, temperature: float | list[float] | Tensor, index: list[list[int]], upstream: dict[str, Tensor],
    *, vocab_size: int | None = None, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """(N, V): the sum of the absolute values of the terms that a gradient is made of; it errs by a few epsilon of it.

    The terms are those of spec section 1, each taken relative to the row maximum as a one-pass kernel must. Upstreams
    that are absent count as 0.
    """
    z = logits.double()[:, :vocab_size]
    t = temperatures(temperature, z.shape[0]).detach()
    out = torch.zeros_like(logits, dtype=torch.float64)
    flat = 0
    for r in range(z.shape[0]):
        ids = index[r] if index else []
        here = range(flat, flat + len(ids))
        flat += len(ids)
        if is_undefined(z[r]) or (ids and all(i == ignore_index for i in ids)):
            continue
        finite = z[r] > -torch.inf
        y = torch.where(finite, z[r] - z[r].max(), -torch.inf)
        total = torch.zeros_like(y)
        for k in range(t.shape[1]):
            b = 1 / t[r, k]
            log_p = torch.log_softmax(y * b, 0)
            p = log_p.exp()
            d = torch.where(p > 0, y.abs(), 0.0)
            centre = (p * d).sum()

            def g(name: str, r: int = r, k: int = k) -> float:
                return float(upstream[name][r, k].abs()) if name in upstream else 0.0

            bracket = (
                g("logsumexp")
                + g("entropy") * (torch.where(p > 0, log_p.abs(), 0.0) + b * (d + centre) + 1)
                + g("max_prob") * p.max()
                + g("collision") * 2 * (p + (p * p).sum())
                + g("mean_logit") * (t[r, k] + d + centre)
                + g("var_logit") * ((d + centre) ** 2 + 2 * t[r, k] * (d + centre))
            )
            if "log_prob" in upstream:
                bracket = bracket + upstream["log_prob"][list(here), k].abs().sum()
                for j, i in zip(here, ids, strict=True):
                    if i != ignore_index:
                        total[i] += b * upstream["log_prob"][j, k].abs()
            total = total + b * p * bracket
            total[y.argmax()] += b * g("max_prob") * p.max()
        if "sum_logits" in upstream:
            total = total + upstream["sum_logits"][r].abs()
        if "std_logits" in upstream and int(finite.sum()) > 1:
            f = z[r][finite]
            if bool((f != f[0]).any()):
                total = total + upstream["std_logits"][r].abs() * f.std().reciprocal() * f.abs().max() / (f.numel() - 1)
        out[r, : z.shape[1]] = torch.where(finite, total, 0.0)
    return out


def counts(
    logits: Tensor, thresholds: list[Tensor], temperature: float | list[float] | Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """n_greater, n_equal (nnz,) and mass_greater (nnz, K) for the thresholds of each row, by sorting. NaN is false."""
    greater, equal, mass = [], [], []
    t = None if temperature is None else temperatures(temperature, logits.shape[0])
    for r, row in enumerate(logits.double()):
        z = np.sort(row[~row.isnan()].numpy())
        at = thresholds[r].double().numpy()
        right, left = np.searchsorted(z, at, "right"), np.searchsorted(z, at, "left")
        unordered = np.isnan(at)
        greater.append(np.where(unordered, 0, len(z) - right))
        equal.append(np.where(unordered, 0, right - left))
        if t is None:
            continue
        if is_undefined(row):
            mass.append(np.full((len(at), t.shape[1]), np.nan))
            continue
        p = torch.softmax(((row - row.max())[:, None] / t[r]), 0).numpy()[np.argsort(row.numpy(), kind="stable")]
        above = np.concatenate([np.cumsum(p[::-1], 0)[::-1], np.zeros((1, p.shape[1]))])
        mass.append(np.where(unordered[:, None], 0.0, above[right]))
    nnz = sum(len(x) for x in greater)
    return (
        torch.from_numpy(np.concatenate(greater).astype(np.int64)) if nnz else torch.zeros(0, dtype=torch.int64),
        torch.from_numpy(np.concatenate(equal).astype(np.int64)) if nnz else torch.zeros(0, dtype=torch.int64),
        torch.from_numpy(np.concatenate(mass)) if t is not None else None,
    )
