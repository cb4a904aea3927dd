"""Classwise calibration: each class of the vocabulary by itself, whichever token is the most probable one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops._arguments import check_target
from .bins import cell_index, check_count
from .full import CHUNK_ELEMENTS, add_every_class
from .mergeable import as_temperatures

# Probabilities are added as multiples of 2^-36, in integers: the same sum in any order, on any device, off by 2^-37 a
# token at most. What 2^27 = 134 million tokens add up to still fits an int64.
UNIT = float(2**36)
MOST_TOKENS = 2**27


class ClasswiseCalibrationState:
    """Classwise ECE at K temperatures: 8 K V n_bins bytes however many tokens (15 bins of 128,000 classes: 15 MB).

    Every token gives each class a pair (its probability, whether it is the target), as in
    :class:`FullCalibrationState`, but pairs of different classes are not mixed: a class that is predicted too often
    does not make up for one that is predicted too seldom. It costs a dense softmax of each chunk and temperature.

    States over disjoint tokens merge exactly: the result is the same, bit for bit, in whatever order and grouping
    tokens arrive and states merge (from the kernels, not from ``backend="eager"``, whose rows may depend on their
    batch).

    Args:
        vocab_size: V, classes; columns of the logits from there on are padding.
        temperatures: a number or a sequence of K.
        n_bins: of equal width, closed on the right, the first also on the left.
        device: where the sums are kept.

    Attributes:
        n_tokens: int64 (), tokens counted; at most 2^27.
        n_undefined: int64 (), tokens left out because their row has no softmax (all -inf, a NaN or +inf).
        gap: int64 (K, V, n_bins), targets less probabilities in each bin of each class, in units of 2^-36.

    Source: Kull et al. 2019 (arXiv 1910.12656), section 2.

    Example:
        >>> import torch
        >>> state = ClasswiseCalibrationState(3)
        >>> logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(10, 3)
        >>> state.update(logits, torch.tensor([0] * 6 + [1] * 3 + [2]))  # as often as their probabilities say
        >>> f"{state.classwise_ece().item():.6f}"
        '0.000000'
        >>> state.update(logits, torch.tensor([2] * 10))  # of all twenty 6, 3 and 11, where 12, 6 and 2 were expected
        >>> [f"{x:.3f}" for x in state.per_class()[0].tolist()]
        ['0.300', '0.150', '0.450']
    """

    def __init__(
        self,
        vocab_size: int,
        temperatures: float | Iterable[float] = 1.0,
        *,
        n_bins: int = 15,
        device: torch.device | str | None = None,
    ) -> None:
        self.temperatures = as_temperatures(temperatures, type(self).__name__)
        check_count(f"{type(self).__name__}: vocab_size", vocab_size)
        check_count(f"{type(self).__name__}: n_bins", n_bins)
        self.n_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.n_undefined = torch.zeros((), dtype=torch.int64, device=device)
        self.gap = torch.zeros(len(self.temperatures), vocab_size, n_bins, dtype=torch.int64, device=device)

    @property
    def vocab_size(self) -> int:
        """Number of classes."""
        return self.gap.shape[1]

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return self.gap.shape[2]

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, ignore_index: int = -100, *, backend: str = "auto") -> None:
        """Add tokens, about a million probabilities at a time.

        Args:
            logits: (*, V) or wider, any floating dtype; probabilities are float32 (float64 for float64 logits). Masked
                tokens (-inf) are pairs of probability 0.
            target: integer token ids, (*).
            ignore_index: targets of this value are left out. So are, on an accelerator, targets outside the vocabulary,
                where finding them would be a synchronisation.
            backend: as in :func:`fastcalib.softmax`.

        Raises:
            TypeError, ValueError: shapes and dtypes that do not fit, a target outside the vocabulary.
        """
        width = check_target("ClasswiseCalibrationState.update", logits, target, self.vocab_size)
        add_every_class(self, logits, target, width, ignore_index, max(1, CHUNK_ELEMENTS // width), backend)

    def add_probabilities(self, k: int, p: Tensor, target: Tensor, use: Tensor) -> None:
        """Probabilities (n, V) at temperature k; rows not in ``use`` (n,) are 0 and count for nothing."""
        device = self.gap.device
        units = (p * -UNIT).round_().long()  # a power of two: nothing is lost in float32 either
        units.scatter_add_(1, target[:, None], (use * int(UNIT))[:, None])
        place = cell_index(p, self.n_bins).add_(torch.arange(self.vocab_size, device=p.device) * self.n_bins)
        self.gap[k].view(-1).scatter_add_(0, place.reshape(-1).to(device), units.reshape(-1).to(device))

    def per_class(self) -> Tensor:
        """The calibration error of each class, float64 (K, V): sum over bins of |targets - probabilities| / tokens.

        NaN without tokens.

        Raises:
            OverflowError: more tokens than the sums can hold.
        """
        if int(self.n_tokens) > MOST_TOKENS:
            raise OverflowError(
                f"ClasswiseCalibrationState: {int(self.n_tokens)} tokens are more than the {MOST_TOKENS} whose sums "
                "are sure to fit; take the mean of several states"
            )
        return self.gap.abs().sum(-1).double() / UNIT / self.n_tokens

    def classwise_ece(self) -> Tensor:
        """Classwise ECE, float64 (K,): the mean of :meth:`per_class` over the vocabulary, in [0, 2 / V].

        Divided by V as in the paper, so that over a large vocabulary it is small: compare it at one V only.
        """
        return self.per_class().mean(-1)

    def merge(self, other: ClasswiseCalibrationState) -> ClasswiseCalibrationState:
        """The state of both token sets together; neither argument changes.

        Raises:
            TypeError: something else than another state of this class.
            ValueError: other temperatures, classes or bins.
        """
        if type(other) is not type(self):
            raise TypeError(f"merge: needs another {type(self).__name__}, got {type(other).__name__}")
        mine, theirs = ((s.temperatures, s.vocab_size, s.n_bins) for s in (self, other))
        if mine != theirs:
            raise ValueError(f"merge: states must agree in temperatures, classes and bins, got {mine} and {theirs}")
        device = self.gap.device
        out = type(self)(self.vocab_size, self.temperatures, n_bins=self.n_bins, device=device)
        for name in ("n_tokens", "n_undefined", "gap"):
            setattr(out, name, getattr(self, name) + getattr(other, name).to(device))
        return out

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors (temperatures as float64), for ``torch.save`` or safetensors."""
        temperatures = torch.tensor(self.temperatures, dtype=torch.float64)
        tensors = {"n_tokens": self.n_tokens, "n_undefined": self.n_undefined, "gap": self.gap}
        return {"temperatures": temperatures, **tensors}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> ClasswiseCalibrationState:
        """The inverse of :meth:`state_dict`; ValueError if an entry is missing."""
        names = ("temperatures", "n_tokens", "n_undefined", "gap")
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"from_state_dict: missing {', '.join(missing)}")
        _, vocab_size, n_bins = state["gap"].shape
        out = cls(vocab_size, state["temperatures"].tolist(), n_bins=n_bins)
        out.n_tokens, out.n_undefined, out.gap = (state[name].clone() for name in names[1:])
        return out
