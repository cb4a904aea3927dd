"""Order, cutoffs and shape as most people write them: transformers' warpers one by one, a softmax after each.

Every rule masks its own copy of the scores; top-p and min-p sort the vocabulary each time. Nothing is shared between
rules or temperatures, which is what :func:`bench.diagnostics.plain` adds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .diagnostics import MIN_P, TEMPERATURES, TOP_K, TOP_P, order_of, shape_of
from .problem import Outputs


def why_not() -> str | None:
    """Why there are no warpers; None where there are."""
    try:
        import transformers  # noqa: F401
    except ImportError as missing:
        return str(missing)
    return None


def by_warpers(logits: Tensor, ids: Tensor) -> Outputs:
    """The numbers of :func:`bench.diagnostics.plain`."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    m, v = ids.shape[1], logits.shape[1]
    nothing = torch.empty(len(logits), 0, dtype=torch.int64)  # the tokens so far, which these warpers do not look at
    rules = [None, *map(TopKLogitsWarper, TOP_K), *map(TopPLogitsWarper, TOP_P), *map(MinPLogitsWarper, MIN_P)]
    rules.append(TopKLogitsWarper(m))  # the size oracle
    z = logits if logits.dtype == torch.float64 else logits.float()
    place = z.argsort(-1, descending=True).argsort(-1)  # the rank of every token
    out = order_of(place.gather(1, ids).sort(-1).values, m, v)
    columns = []
    for t in TEMPERATURES:
        scores = TemperatureLogitsWarper(t)(nothing, z)
        log_p = scores.log_softmax(-1)
        p = log_p.exp()
        of_valid = log_p.gather(1, ids)
        found = []
        for rule in rules:
            kept = (scores if rule is None else rule(nothing, scores)) > -torch.inf
            valid = kept.gather(1, ids)
            found.append((kept.sum(-1), (p * kept).sum(-1), valid.sum(-1), (of_valid.exp() * valid).sum(-1)))
        n, mass, n_valid, valid_mass = (torch.stack(x, 1) for x in zip(*found))
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
        columns.append({
            "kept": n, "kept_mass": mass, "kept_valid": n_valid, "valid_mass": valid_mass, "precision": n_valid / n,
            "recall": n_valid / m, "entropy": entropy, **shape_of(of_valid, m),
        })  # fmt: skip
    return out | {name: torch.stack([c[name] for c in columns], 1) for name in columns[0]}
