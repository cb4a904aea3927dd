"""The gradient of the statistics to a temperature tensor: from what forward kept, and one more read at half of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..eager.softmax import statistics_dtype
from ._arguments import Index


def temperature_gradient(
    grad_rows: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    temperature: Tensor,
    index: Index | None,
    rows: Tensor,
    log_prob: Tensor,
    saved: Tensor,
    vocab_size: int,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Gradient to T. With b = 1/T and y = z - max z, E and Var over p:

    dL/db = E[z], dH/db = -b Var, dE/db = Var, d max_prob/db = -max_prob E[y], d log p_i/db = z_i - E[z],
    dC/db = 2 C (E' - E) with E' the mean logit at T/2 (p^2 renormalised is the softmax there), dVar/db = third
    central moment.
    """
    g_logsumexp, g_entropy, g_max_prob, g_collision, g_mean, g_var = grad_rows.unbind(0)
    _, _, max_prob, collision, mean_logit, var_logit = rows.unbind(0)
    k = temperature.shape[1]
    log_s0, y1 = saved[:, 3 : 3 + k], saved[:, 3 + k :]
    b = (1.0 / temperature).to(rows.dtype)
    half = torch.ops.fastcalib.statistics(
        logits, temperature / 2, None, 0, None, vocab_size, ignore_index, False, backend
    )  # fmt: skip
    third = _third_central_moment(logits, temperature, vocab_size)
    skipped = (log_s0 == 0) & (rows[0] == 0) & (max_prob == 0)  # every statistic of a skipped row is 0
    grad = (
        g_logsumexp * mean_logit
        - g_entropy * b * var_logit
        - g_max_prob * max_prob * y1
        + g_collision * 2 * collision * (half[7][:, 3 + k :] - y1)
        + g_mean * var_logit
        + g_var * third
    )
    grad = torch.where(skipped | grad.isnan(), torch.zeros_like(grad), grad)
    if index is not None:
        row_of = index.rows(saved.shape[0])
        b_of = b.expand(saved.shape[0], k)[row_of]
        per_token = (log_prob + log_s0[row_of]) / b_of - y1[row_of]
        none = (index.ids == ignore_index)[:, None] | ~per_token.isfinite()
        per_token = torch.where(none, torch.zeros_like(per_token), per_token * grad_log_prob)
        grad = grad.index_add(0, row_of, per_token)
    grad = grad.to(torch.float64) * -((1.0 / temperature) ** 2)
    return grad if temperature.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)


def _third_central_moment(logits: Tensor, temperature: Tensor, vocab_size: int) -> Tensor:
    """E[(z - E[z])^3], (N, K): only the gradient of var_logit to T needs it, so no kernel keeps it."""
    z = logits[..., :vocab_size].reshape(-1, vocab_size)
    columns = []
    for k in range(temperature.shape[1]):
        p = eager.softmax(z.to(statistics_dtype(z.dtype)), temperature[:, k : k + 1])
        y = torch.where(p > 0, z.to(p.dtype), torch.zeros_like(p))
        y = y - (p * y).sum(-1, keepdim=True)
        columns.append(torch.where(p > 0, p * y**3, torch.zeros_like(p)).sum(-1))
    return torch.stack(columns, -1)
