"""Order calibration: are valid tokens ranked above invalid ones, and what does each cutoff of the ranking keep?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._arguments import check_logits
from ..ops._set_arguments import check_are_sets, check_counts, check_sets
from ..ops.ranks import ranks
from ..valid_sets import ValidSets
from . import _segments
from ._segments import Part

TOKEN_FIELDS = 5  # of Order, from the first: one number a valid token


@dataclass(frozen=True)
class Order:
    """How a ranking orders N sets of valid tokens; see :func:`order`.

    Frontier, flat (nnz,), each set's tokens from the most likely to the least (ties in the order of the set):
        precision: float64, share of valid tokens among those kept by the smallest cutoff that keeps this token.
        recall: float64, share of the set's counts (continuations) that this cutoff keeps.
        token_recall: float64, share of the set's tokens that it keeps.
        rank: int64, how many tokens of the vocabulary it keeps: 1 + n_greater + n_equal.
        token: int64, the token's id.
        offsets: int64 (N + 1,), set i is [offsets[i], offsets[i + 1]).

    Per set, (N,), float64:
        area: area under the frontier over recall: for each recall the best precision of a cutoff that reaches it.
        token_area: the same over token_recall.
        recall_at_precision: the most recall of a cutoff with at least the asked precision; 0 where there is none.
        token_recall_at_precision: the same for token_recall.
        r_precision: share of valid tokens among the top |G| (the size oracle), ties at its border shared out evenly.
        average_precision: mean of ``precision`` over the set.
        auroc: probability that a random valid token lies above a random invalid one; a tie counts one half.
        order_calibrated: bool, every valid token lies at or above every invalid one.
    """

    precision: Tensor
    recall: Tensor
    token_recall: Tensor
    rank: Tensor
    token: Tensor
    offsets: Tensor
    area: Tensor
    token_area: Tensor
    recall_at_precision: Tensor
    token_recall_at_precision: Tensor
    r_precision: Tensor
    average_precision: Tensor
    auroc: Tensor
    order_calibrated: Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1


def order(
    logits: Tensor,
    sets: ValidSets,
    *,
    counts: Tensor | None = None,
    precision: float = 0.8,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Order:
    """Precision-recall frontier of the ranking in each row of logits against its set of valid tokens.

    Two reads of the logits whatever the size of the sets: their ranks, and a count of NaN. The vocabulary is neither
    sorted nor copied. A cutoff keeps all tokens with a logit at or above some value, so ties stand or fall together:
    tied valid tokens share one point of the frontier. On an accelerator the host waits for nothing; not yet run
    on a GPU.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        sets: valid tokens, N = prod(*) sets.
        counts: (nnz,), how many valid outputs continue with each token (N(prefix + v) of a trie), integers or weights;
            without it each token counts once and ``recall`` equals ``token_recall``.
        precision: where ``recall_at_precision`` is read off.
        vocab_size: columns from here on are padding and not ranked.
        backend: "auto", "eager", "cpp", "triton" or "cuda".

    Returns:
        :class:`Order`. An empty set has NaN for all numbers and is order-calibrated; a set of the whole vocabulary has
        precision 1 everywhere and an AUROC of NaN (there is no invalid token); a row with a NaN among its logits has no
        order: NaN, rank -1, not order-calibrated. Infinite logits are ranked like others.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range; the message names argument and value.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), Definition 4.1; area, recall at a precision, AP and AUROC are
    read off the same frontier (derived).

    Example:
        >>> import torch, fastcalib
        >>> from fastcalib.diagnostics import order
        >>> logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
        >>> o = order(logits, fastcalib.ValidSets.from_lists([[0, 1]]))
        >>> o.token.tolist(), o.rank.tolist(), [round(p, 3) for p in o.precision.tolist()]
        ([0, 1], [1, 3], [1.0, 0.667])
        >>> o.recall_at_precision.item(), o.auroc.item(), o.order_calibrated.item()
        (0.5, 0.75, False)
    """
    width = check_logits(logits, vocab_size)
    n_greater, n_equal = ranks_of_valid(logits, sets, width, backend)
    return order_from_ranks(n_greater, n_equal, sets, counts=counts, vocab_size=width, precision=precision)


def ranks_of_valid(logits: Tensor, sets: ValidSets, vocab_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """n_greater and n_equal of the valid tokens, (nnz,), as :func:`order_from_ranks` takes them."""
    check_sets(sets, logits, vocab_size)
    r = ranks(logits, sets, vocab_size=vocab_size, backend=backend)
    # Every number is at or above -inf, a NaN is not; what a comparison says of it would pass for a rank.
    lowest = torch.full(logits.shape[:-1], -torch.inf, device=logits.device)
    numbers = ranks(logits, thresholds=lowest, vocab_size=vocab_size, backend=backend)
    ordered = (numbers.n_greater + numbers.n_equal).reshape(-1) == vocab_size
    return torch.where(ordered[sets.rows()], r.n_greater, -1), r.n_equal


def order_from_ranks(
    n_greater: Tensor,
    n_equal: Tensor,
    sets: ValidSets,
    *,
    counts: Tensor | None = None,
    vocab_size: int,
    precision: float = 0.8,
) -> Order:
    """The same from ranks that are already there, those of :func:`fastcalib.ranks` for these sets.

    Args:
        n_greater: integers (nnz,), tokens of the vocabulary above each valid one; a negative one marks a row without
            an order (NaN results).
        n_equal: integers (nnz,), other tokens with the same logit.
        sets, counts, precision: as for :func:`order`.
        vocab_size: the size of the vocabulary that was ranked.

    Example:
        >>> import torch, fastcalib
        >>> from fastcalib.diagnostics import order_from_ranks
        >>> sets = fastcalib.ValidSets.from_lists([[7, 9]])
        >>> order_from_ranks(torch.tensor([0, 2]), torch.tensor([0, 0]), sets, vocab_size=4).auroc.item()
        0.75
    """
    _check(n_greater, n_equal, sets, vocab_size, precision)
    weights = check_counts(counts, sets)

    def work(part: Part) -> tuple[Tensor, ...]:
        t = part.tokens
        own = None if weights is None else weights[t]
        return _order(n_greater[t], n_equal[t], sets.values[t], own, part, vocab_size, precision)

    found = _segments.in_parts(sets, 4, work, of_tokens=TOKEN_FIELDS)
    return Order(*[*found[:TOKEN_FIELDS], sets.offsets, *found[TOKEN_FIELDS:]])


def _order(
    n_greater: Tensor,
    n_equal: Tensor,
    values: Tensor,
    weights: Tensor | None,
    part: Part,
    vocab_size: int,
    precision: float,
) -> tuple[Tensor, ...]:
    """The fields of :class:`Order` for some sets, but for the offsets."""
    offsets, size, row = part.offsets, part.sizes, part.rows
    # Sets stay in place, tokens are sorted by what lies above them.
    key = row * (vocab_size + 1) + n_greater.to(torch.int64).clamp(min=0)
    place = torch.argsort(key, stable=True)
    above, equal = n_greater.to(torch.int64)[place], n_equal.to(torch.int64)[place]
    undefined = _segments.reduce((n_greater < 0).to(torch.float64), offsets) > 0

    nth = _segments.running_count(torch.ones_like(above), offsets)  # 1, 2, ... within each set
    last = _last_of_ties(above, row)
    first = _first_of_ties(above, row)
    valid_kept = nth[last]
    valid_above = nth[first] - 1
    tied_valid = valid_kept - valid_above  # this token among them
    kept = above + equal + 1
    bad = undefined[row]
    prec = torch.where(bad, torch.nan, valid_kept.to(torch.float64) / kept)
    token_recall = torch.where(bad, torch.nan, valid_kept.to(torch.float64) / size[row])
    recall = token_recall
    share = token_share = torch.where(bad, torch.nan, 1.0 / size[row].to(torch.float64))
    if weights is not None:
        w = weights[place]
        total = _segments.reduce(w, offsets)[row]
        running = _segments.running_count(w, offsets) if not w.dtype.is_floating_point else _running_sum(w, offsets)
        recall = torch.where(bad, torch.nan, running[last].to(torch.float64) / total)
        share = torch.where(bad, torch.nan, w.to(torch.float64) / total)

    best = _segments.scan(prec, offsets, torch.maximum, back=True)
    enough = prec >= precision
    blank = torch.where(undefined | (size == 0), torch.nan, 0.0)

    def area(of: Tensor) -> Tensor:
        # Rounded shares may add up to a little more than 1 where the precision is 1.
        return _segments.reduce(best * of, offsets).clamp(max=1.0) + blank

    def at_precision(of: Tensor) -> Tensor:
        return _segments.reduce(torch.where(enough, of, 0.0), offsets, "max") + blank

    # Of the border's tied tokens the oracle takes as many as it has room for, valid and invalid alike.
    room = (size[row] - above).clamp(min=0)
    expected = torch.minimum(room.to(torch.float64) / (equal + 1), torch.ones_like(prec))
    n = size.to(torch.float64)
    invalid = (vocab_size - size).to(torch.float64)
    invalid_above = (above - valid_above).to(torch.float64) + (equal - (tied_valid - 1)).to(torch.float64) / 2
    calibrated = _segments.reduce((above > valid_above).to(torch.float64), offsets) == 0
    return (
        prec,
        recall,
        token_recall,
        torch.where(bad, -1, kept),
        values[place],
        area(share),
        area(token_share),
        at_precision(recall),
        at_precision(token_recall),
        _segments.reduce(expected, offsets) / n + blank,
        _segments.reduce(prec, offsets) / n,
        1 - _segments.reduce(invalid_above, offsets) / (n * invalid) + blank,
        calibrated & ~undefined,
    )


def _last_of_ties(above: Tensor, row: Tensor) -> Tensor:
    """For sorted ranks: where the run of tied tokens of the same set ends, (nnz,)."""
    return above.numel() - 1 - _first_of_ties(above.flip(0), row.flip(0)).flip(0)


def _first_of_ties(above: Tensor, row: Tensor) -> Tensor:
    """Where the run of tied tokens begins, (nnz,)."""
    places = torch.arange(above.numel(), device=above.device)
    if above.numel() == 0:
        return places
    begins = torch.ones_like(above, dtype=torch.bool)
    begins[1:] = (above[1:] != above[:-1]) | (row[1:] != row[:-1])
    return torch.where(begins, places, 0).cummax(0).values


def _running_sum(weights: Tensor, offsets: Tensor) -> Tensor:
    return _segments.scan(weights.to(torch.float64), offsets, torch.add)


def _check(n_greater: Tensor, n_equal: Tensor, sets: ValidSets, vocab_size: int, precision: float) -> None:
    check_are_sets(sets)
    for name, tensor in (("n_greater", n_greater), ("n_equal", n_equal)):
        if not isinstance(tensor, Tensor) or tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be an integer tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor.shape != sets.values.shape:
            raise ValueError(
                f"{name} must have shape {tuple(sets.values.shape)} as the sets' values, got {tuple(tensor.shape)}"
            )
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size must be a positive int, got {vocab_size!r}")
    check_precision(precision)


def check_precision(precision: float) -> None:
    """Raise unless a precision can be asked for."""
    if not 0 < precision <= 1:
        raise ValueError(f"precision must lie in (0, 1], got {precision!r}")
