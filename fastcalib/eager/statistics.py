"""Reference row statistics (spec, section 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.types import TokenRanks, TokenStatistics
from .ranks import ranks as eager_ranks
from .softmax import shifted, statistics_dtype


def statistics(
    logits: Tensor,
    temperature: Tensor,
    index: Tensor | None = None,
    index_rows: Tensor | None = None,
    *,
    ranks: bool = False,
    ignore_index: int = -100,
    skipped: Tensor | None = None,
) -> TokenStatistics:
    """All fields of :class:`TokenStatistics` for logits (N, V), temperature (1 or N, K), index and index_rows (nnz,).

    Fields over temperatures come out (N, K), selected tokens (nnz, K), counts (nnz,). Rows in ``skipped`` (N,) are 0.
    """
    # Widened once: two casts would round a bfloat16 gradient twice.
    z = logits.to(statistics_dtype(logits.dtype))
    if skipped is not None:
        z = torch.where(skipped[:, None], 0.0, z)  # gradient exactly 0, whatever stands there
    y, masked, dead, m = shifted(z)
    dtype = y.dtype
    keep = skipped if skipped is not None else torch.zeros_like(dead)
    undefined = dead | ~m.isfinite()
    ids, ignored = None, None
    if index is not None:
        assert index_rows is not None
        ignored = index == ignore_index
        ids = torch.where(ignored, 0, index)
        y_selected = y[index_rows, ids]

    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("logsumexp", "entropy", "max_prob", "collision", "mean_logit", "var_logit", "log_prob")
    }
    y_top = y.gather(-1, z.detach().nan_to_num(0.0).argmax(-1, keepdim=True)).squeeze(-1)
    for k in range(temperature.shape[1]):
        b = (1.0 / temperature[:, k]).to(dtype).expand(y.shape[0])
        e = torch.where(masked, 0.0, (y * b[:, None]).exp())
        s0 = torch.where(dead, 1.0, e.sum(-1))
        log_s0 = s0.log()
        p = e / s0[:, None]
        present = torch.where(p > 0, y, 0.0)  # a mask of finfo.min: 0 * y^2 would be 0 * inf
        y1 = (p * present).sum(-1)
        values = {
            "logsumexp": b * m + log_s0,
            "entropy": log_s0 - b * y1,
            "max_prob": (b * y_top - log_s0).exp(),
            "collision": (p * p).sum(-1),
            "mean_logit": m + y1,
            "var_logit": (p * (present - y1[:, None]) ** 2).sum(-1),
        }
        for name, value in values.items():
            value = torch.where(dead, torch.nan, value)
            columns[name].append(torch.where(keep, 0.0, value))
        if ids is not None:
            assert index_rows is not None and ignored is not None
            value = b[index_rows] * y_selected - log_s0[index_rows]
            value = torch.where(masked[index_rows, ids], value - torch.inf, value)
            value = torch.where(dead[index_rows], torch.nan, value)
            columns["log_prob"].append(torch.where(ignored, 0.0, value))

    finite = ~masked
    n = finite.sum(-1)
    finite_z = torch.where(masked, 0.0, z)
    total = finite_z.sum(-1)
    mean = total / n.clamp(min=1)
    spread = torch.where(masked, 0.0, (finite_z - mean[:, None]) ** 2).sum(-1) / (n - 1).clamp(min=1)
    std = torch.where(spread > 0, torch.where(spread > 0, spread, 1.0).sqrt(), spread)
    total = torch.where(masked.any(-1), total - torch.inf, total)  # finite ones keep their gradient
    total, std = (torch.where(undefined, torch.nan, x) for x in (total, std))

    counts = TokenRanks(None, None, None)  # type: ignore[arg-type]
    if ranks:
        assert ids is not None and index_rows is not None and ignored is not None
        found = eager_ranks(logits, z[index_rows, ids].detach(), index_rows, temperature, selected=True)
        assert found.mass_greater is not None
        counts = TokenRanks(
            torch.where(ignored, 0, found.n_greater),
            torch.where(ignored, 0, found.n_equal),
            torch.where(ignored[:, None], 0.0, found.mass_greater),
        )
    stacked = {name: torch.stack(parts, -1) for name, parts in columns.items() if parts}
    top = torch.where(undefined, -1, z.detach().nan_to_num(0.0, neginf=-torch.inf).argmax(-1))
    return TokenStatistics(
        **{name: stacked[name] for name in columns if name != "log_prob"},
        argmax=torch.where(keep, -1, top),
        sum_logits=torch.where(keep, 0.0, total),
        std_logits=torch.where(keep, 0.0, std),
        max_logit=torch.where(keep, 0.0, torch.where(undefined, torch.nan, m)),
        log_prob=stacked.get("log_prob"),
        n_greater=counts.n_greater,
        n_equal=counts.n_equal,
        mass_greater=counts.mass_greater,
    )
