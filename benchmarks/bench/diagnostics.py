"""Order, cutoffs and shape of many prefixes: ours, and what a careful user writes in plain PyTorch.

The plain one sorts each row once; everything is read off the sorted logits and, for each temperature, one softmax and
one running sum of them. It leaves ties out of account (random float32 logits have none), which ours does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .ours import Call, _attribute, _library
from .problem import Outputs

VALID = 20  # valid tokens of each prefix
TEMPERATURES = (0.01, 0.3, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
TOP_K, TOP_P, MIN_P = (10, 20, 50, 80, 100, 500), (0.1, 0.5, 0.7, 0.9, 0.95), (0.01, 0.1, 0.5, 0.9)
# The paper's grid, in the order of paper_rules(): plain sampling comes first, the size oracle last.
RULES = 1 + len(TOP_K) + len(TOP_P) + len(MIN_P) + 1


def valid_tokens(logits: Tensor, seed: int = 0) -> Tensor:
    """(N, VALID) different ids, half of them among the likely ones."""
    g = torch.Generator().manual_seed(seed)
    n, v = logits.shape
    likely = [torch.topk(row.float(), min(4 * VALID, v)).indices for row in logits[: min(n, 16)]]
    sets = []
    for r in range(n):
        ids = likely[r % len(likely)][torch.randperm(len(likely[0]), generator=g)[: VALID // 2]]
        rest = torch.randint(v, (2 * VALID,), generator=g).unique()  # sorted, hence shuffled before some are taken
        rest = rest[torch.randperm(len(rest), generator=g)]
        sets.append(torch.cat([ids, rest[~torch.isin(rest, ids)]])[:VALID])
    return torch.stack(sets)


ORDER = ("area", "average_precision", "auroc", "r_precision", "recall_at_precision")
CUTOFFS = ("kept", "kept_mass", "kept_valid", "valid_mass", "precision", "recall")
SHAPE = ("kl", "kl_valid", "evenness", "entropy", "expected_distinct")


def _named(order: Any, cutoffs: Any, shape: Any) -> Outputs:
    parts = ((order, ORDER), (cutoffs, CUTOFFS), (shape, SHAPE))
    return {name: getattr(part, name) for part, names in parts for name in names}


def raw(logits: Tensor, ids: Tensor, *, at_once: bool = True) -> Callable[[], tuple[Any, Any, Any]]:
    """``diagnostics.diagnose``, or ``order``, ``cutoffs`` over the paper's grid and ``shape`` one after another."""
    library = _library()
    diagnostics, decoding = import_module("fastcalib.diagnostics"), import_module("fastcalib.decoding")
    rules, temperatures = _attribute(decoding, "paper_rules")(), list(TEMPERATURES)
    sets = library.ValidSets(ids.reshape(-1), torch.arange(len(ids) + 1) * ids.shape[1])
    diagnose, order = _attribute(diagnostics, "diagnose"), _attribute(diagnostics, "order")
    cutoffs, shape = _attribute(decoding, "cutoffs"), _attribute(diagnostics, "shape")

    def once() -> tuple[Any, Any, Any]:
        found = diagnose(logits, sets, rules, temperatures)
        return found.order, found.cutoffs, found.shape

    def thrice() -> tuple[Any, Any, Any]:
        kept = cutoffs(logits, rules, temperatures, sets=sets)
        return order(logits, sets), kept, shape(logits, sets, temperature=temperatures)

    return once if at_once else thrice


def ours(logits: Tensor, ids: Tensor, *, at_once: bool = True) -> Call:
    """The numbers of :func:`raw` that the competitors have too."""
    call = raw(logits, ids, at_once=at_once)
    return lambda: _named(*call())


def plain(logits: Tensor, ids: Tensor) -> Outputs:
    """The same numbers from one sort of each row."""
    v, m = logits.shape[1], ids.shape[1]
    z = logits if logits.dtype == torch.float64 else logits.float()
    s = z.sort(-1, descending=True).values
    low_first = -s
    valid = z.gather(1, ids).sort(-1, descending=True).values
    above = torch.searchsorted(low_first, -valid)
    out = order_of(above, m, v)
    log_p = _log_softmax(valid, z)
    columns = []
    for k, t in enumerate(TEMPERATURES):
        p = torch.softmax(s / t, -1)
        mass = p.cumsum(-1)
        kept = [torch.full((len(z), 1), v), torch.tensor(TOP_K).expand(len(z), -1).clamp(max=v)]
        kept.append((torch.searchsorted(mass, mass.new_tensor(TOP_P).expand(len(z), -1).contiguous()) + 1).clamp(max=v))
        borders = s[:, :1] + t * torch.tensor(MIN_P, dtype=torch.float64).log().to(s.dtype)
        kept.append(torch.searchsorted(low_first, -borders, right=True))
        kept.append(torch.full((len(z), 1), m))
        n = torch.cat(kept, 1)
        threshold = s.gather(1, n - 1)
        keeps = valid[:, :, None] >= threshold[:, None]
        q = log_p[k].exp()
        of_valid = keeps.sum(1)
        columns.append({
            "kept": n, "kept_mass": mass.gather(1, n - 1), "kept_valid": of_valid,
            "valid_mass": (keeps * q[:, :, None]).sum(1), "precision": of_valid / n, "recall": of_valid / m,
            "entropy": -torch.special.xlogy(p, p).sum(-1), **shape_of(log_p[k], m),
        })  # fmt: skip
    return out | {name: torch.stack([c[name] for c in columns], 1) for name in columns[0]}


def _log_softmax(valid: Tensor, z: Tensor) -> list[Tensor]:
    return [valid / t - torch.logsumexp(z / t, -1, keepdim=True) for t in TEMPERATURES]


def order_of(above: Tensor, m: int, v: int) -> Outputs:
    i = torch.arange(1, m + 1)
    precision = i / (above + 1).double()
    best = precision.flip(1).cummax(1).values.flip(1)
    return {
        "area": best.mean(1), "average_precision": precision.mean(1), "r_precision": (above < m).double().mean(1),
        "recall_at_precision": torch.where(precision >= 0.8, i / m, 0.0).amax(1),
        "auroc": 1 - (above - (i - 1)).double().mean(1) / (v - m),
    }  # fmt: skip


def shape_of(log_p: Tensor, m: int) -> Outputs:
    log_mass = torch.logsumexp(log_p, -1)
    log_q = log_p - log_mass[:, None]
    kl_valid = -math.log(m) - log_q.mean(-1)
    return {
        "kl": kl_valid - log_mass, "kl_valid": kl_valid,
        "evenness": (-(log_q.exp() * log_q).sum(-1)).exp() / m,
        "expected_distinct": -torch.expm1(m * torch.log1p(-log_p.exp())).sum(-1),
    }  # fmt: skip


def competitors(logits: Tensor) -> tuple[dict[str, Callable[[], Call]], Callable[[int], Any]]:
    """Factories, and the float64 answer of so many leading rows."""
    ids = valid_tokens(logits)
    factories: dict[str, Callable[[], Call]] = {
        "fastcalib": partial(ours, logits, ids),
        "fastcalib, three calls": partial(ours, logits, ids, at_once=False),
        "eager": lambda: partial(plain, logits, ids),
    }
    return factories, lambda rows: plain(logits[:rows].double(), ids[:rows])
