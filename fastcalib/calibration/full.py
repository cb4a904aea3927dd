"""Full calibration: every class of the vocabulary at every token, not only the most probable one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..ops._arguments import check_ignore_index, check_target, outside, raise_bad_target
from ..ops.softmax import softmax
from .bins import cell_index, coarsen
from .mergeable import BinnedState, on_grid

# Probabilities looked at together; some 40 bytes each are in use at a time.
CHUNK_ELEMENTS = 1 << 20
# Probabilities of one row are added as multiples of 2^-40, in integers: the same sum in any order, on any device. A row
# of 262,144 is off by 2^-41 each at most, 1.2e-7 in all; a probability above 2^-16 is exact.
UNIT = float(2**40)


class FullCalibrationState(BinnedState):
    """Full-ECE at K temperatures, in O(bins) memory however many tokens and however large the vocabulary.

    Each token gives V pairs (probability of a class, whether the class is the target), all of which are binned; the
    top-1 confidence of :class:`CalibrationState` is but one of them. What samplers use is the whole distribution, which
    this looks at. It needs every probability, so it costs a dense softmax of each chunk and temperature, and the
    binning of it in plain PyTorch: far more than :func:`fastcalib.statistics`.

    States over disjoint tokens merge exactly: the result is the same, bit for bit, in whatever order and grouping
    tokens arrive and states merge (while every sum is below 2^29; from the kernels, not from ``backend="eager"``, whose
    rows may depend on their batch).

    Args:
        temperatures: a number or a sequence of K.
        cells: size of the fine histogram; ``n_bins`` of any estimator must divide it.
        device: where the sums are kept.

    Attributes:
        n_tokens: int64 (), tokens counted.
        n_undefined: int64 (), tokens left out because their row has no softmax (all -inf, a NaN or +inf).
        cell_count, cell_hits: int64 (K, cells), pairs in each cell and the targets among them.
        cell_confidence: float64 (K, cells), sum of their probabilities.

    Source: Liu et al. 2024 (arXiv 2406.11345).

    Example:
        >>> import torch
        >>> state = FullCalibrationState()
        >>> logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(10, 3)
        >>> state.update(logits, torch.tensor([0] * 6 + [1] * 3 + [2]))  # as often as their probabilities say
        >>> f"{state.full_ece(5).item():.6f}"
        '0.000000'
        >>> state.update(logits, torch.tensor([2] * 10))  # of all twenty 6, 3 and 11, where 12, 6 and 2 were expected
        >>> f"{state.full_ece(5).item():.6f}"
        '0.900000'
    """

    @torch.no_grad()
    def update(
        self,
        logits: Tensor,
        target: Tensor,
        ignore_index: int = -100,
        *,
        vocab_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        """Add tokens, about a million probabilities at a time.

        Args:
            logits: (*, V), any floating dtype; probabilities are float32 (float64 for float64 logits).
            target: integer token ids, (*).
            ignore_index: targets of this value are left out. So are, on an accelerator, targets outside the vocabulary,
                where finding them would be a synchronisation.
            vocab_size: columns from here on are padding and give no pairs. Masked tokens (-inf) are pairs of
                probability 0.
            backend: as in :func:`fastcalib.softmax`.

        Raises:
            TypeError, ValueError: shapes and dtypes that do not fit, a target outside the vocabulary.
        """
        width = check_target("FullCalibrationState.update", logits, target, vocab_size)
        rows = max(1, CHUNK_ELEMENTS // max(width, self.cells))
        add_every_class(self, logits, target, width, ignore_index, rows, backend)

    def add_probabilities(self, k: int, p: Tensor, target: Tensor, use: Tensor) -> None:
        """Probabilities (n, V) at temperature k; rows not in ``use`` (n,) are 0 and count for nothing."""
        n, device = p.shape[0], self.n_tokens.device
        cell = cell_index(p, self.cells)
        hit_cell = cell.gather(1, target[:, None]).squeeze(1)
        place = cell.add_(torch.arange(n, device=p.device)[:, None] * self.cells).reshape(-1)
        count = torch.bincount(place, minlength=n * self.cells).view(n, self.cells) * use[:, None]
        units = p.double().mul_(UNIT).round_().long().reshape(-1)
        mass = torch.zeros(n * self.cells, dtype=torch.int64, device=p.device).scatter_add_(0, place, units)
        self.cell_count[k] += count.sum(0).to(device)
        self.cell_hits[k].scatter_add_(0, hit_cell.to(device), use.to(device, torch.int64))
        self.cell_confidence[k] += on_grid(mass.view(n, self.cells).double() / UNIT).sum(0).to(device)

    def full_ece(self, n_bins: int = 15) -> Tensor:
        """Full-ECE, float64 (K,), in [0, 2]: sum over bins of |targets in the bin - sum of its probabilities| / tokens.

        Divided by tokens, as in the paper, not by pairs, so that it does not shrink as the vocabulary grows. Bins of
        equal width, closed on the right, the first also on the left. NaN without tokens.
        """
        hits, confidence = coarsen(self.cell_hits, n_bins), coarsen(self.cell_confidence, n_bins)
        return (hits - confidence).abs().sum(-1) / self.n_tokens


class EveryClass(Protocol):
    """A state that takes in the whole softmax of each token."""

    temperatures: tuple[float, ...]
    n_tokens: Tensor
    n_undefined: Tensor

    def add_probabilities(self, k: int, p: Tensor, target: Tensor, use: Tensor) -> None:
        """Probabilities (n, V) at temperature k; rows not in ``use`` (n,) are 0 and count for nothing."""


def add_every_class(
    state: EveryClass, logits: Tensor, target: Tensor, width: int, ignore_index: int, rows: int, backend: str
) -> None:
    """The first ``width`` probabilities of each token that has a softmax, at every temperature, some rows at a time."""
    check_ignore_index(ignore_index)
    target = target.to(torch.int64)  # a uint8 156 would compare equal to -100
    wanted = (target != ignore_index) & ~outside(target, width, ignore_index)
    if target.device.type == "cpu" and bool((wanted != (target != ignore_index)).any()):
        raise_bad_target(target, width, ignore_index)
    ids, device = torch.where(wanted, target, 0), state.n_tokens.device
    for z, y, use in blocks(logits, ids, wanted, rows):
        z = z[:, :width].to(torch.promote_types(z.dtype, torch.float32))
        defined = use.new_zeros(0)
        for k, temperature in enumerate(state.temperatures):
            p = softmax(z, temperature, backend=backend)
            defined = ~p.isnan().any(-1)
            used = use & defined
            state.add_probabilities(k, torch.where(used[:, None], p, 0.0), y, used)
        state.n_tokens += (use & defined).sum().to(device)
        state.n_undefined += (use & ~defined).sum().to(device)


def blocks(logits: Tensor, target: Tensor, use: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of at most n rows, (m, V), (m,) and (m,): a batch that cannot be flattened without a copy is not copied."""
    if logits.dim() == 1:
        yield logits[None], target[None], use[None]
    elif logits.dim() == 2:
        yield from zip(logits.split(n), target.split(n), use.split(n))
    elif logits.is_contiguous():
        yield from blocks(logits.flatten(0, -2), target.reshape(-1), use.reshape(-1), n)
    else:
        for part in zip(logits, target, use):
            yield from blocks(*part, n)
