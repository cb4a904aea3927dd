"""Reference counts around thresholds (spec, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.types import TokenRanks
from .softmax import softmax, statistics_dtype

# Elements of the (thresholds, V) comparison formed at a time: the reference is allowed temporaries, not gigabytes.
CHUNK = 1 << 24


@torch.no_grad()
def ranks(
    logits: Tensor,
    thresholds: Tensor,
    threshold_rows: Tensor,
    temperature: Tensor | None = None,
    *,
    selected: bool = False,
) -> TokenRanks:
    """Counts and masses for logits (N, V), thresholds and their rows (nnz,), temperature (1 or N, K) or None.

    Comparisons are IEEE: a NaN is neither greater nor equal. With ``selected=True`` the thresholds are logits of the
    row itself and n_equal leaves that one out. Masses come out (nnz, K), NaN in a row without a softmax.
    """
    dtype = statistics_dtype(logits.dtype)
    z = logits.to(dtype)
    t = thresholds.to(dtype)
    nnz, vocab = t.numel(), z.shape[1]
    n_greater = torch.empty(nnz, dtype=torch.int64, device=z.device)
    n_equal = torch.empty_like(n_greater)
    mass = None
    probs: list[Tensor] = []
    if temperature is not None:
        probs = [softmax(z.double(), temperature[:, k : k + 1]) for k in range(temperature.shape[1])]
        mass = torch.empty(nnz, len(probs), dtype=dtype, device=z.device)
    step = max(1, CHUNK // max(vocab, 1))
    for start in range(0, nnz, step):
        part = slice(start, start + step)
        rows, bound = z[threshold_rows[part]], t[part, None]
        greater = rows > bound
        n_greater[part] = greater.sum(-1)
        n_equal[part] = (rows == bound).sum(-1)
        for k, p in enumerate(probs):
            assert mass is not None
            p_rows = p[threshold_rows[part]]
            value = torch.where(greater, p_rows, 0.0).sum(-1)
            undefined = p_rows.isnan().any(-1)
            mass[part, k] = torch.where(undefined, torch.nan, value).to(dtype)
    if selected:
        n_equal -= 1
        n_equal.clamp_(min=0)  # a NaN logit does not even equal itself
    return TokenRanks(n_greater, n_equal, mass)
