"""Ragged sets of token ids, one set per row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._ragged import as_tensor, from_arrow, from_sequences, ragged


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return "a nested tensor" if value.is_nested else f"{value.dtype} {tuple(value.shape)}"


def _check_vocab_size(what: str, vocab_size: int) -> None:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"{what}: vocab_size must be a positive int, got {vocab_size!r}")


@dataclass(frozen=True)
class ValidSets:
    """N sets of token ids in compressed sparse row form (fastcalib spec, section 3).

    Row ``i`` holds ``values[offsets[i]:offsets[i + 1]]``. Order is kept; an empty set is allowed.

    Args:
        values: int64 or int32, (nnz,): the token ids.
        offsets: int64, (N + 1,): starts at 0, never decreases, ends at nnz.

    Raises:
        TypeError: values or offsets of the wrong dtype.
        ValueError: offsets that do not describe the values, a negative id, or an id twice in one set.

    Example:
        >>> sets = ValidSets.from_lists([[3, 1], [], [7]])
        >>> len(sets), sets.to_lists()
        (3, [[3, 1], [], [7]])
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        values, offsets = self.values, self.offsets
        for name, tensor in (("values", values), ("offsets", offsets)):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"ValidSets: {name} must be a tensor, got {type(tensor).__name__}; ValidSets.from_lists takes "
                    "lists and arrays of ids, one a row"
                )
            if tensor.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"ValidSets: {name} must be int64 or int32, got {tensor.dtype}")
            if tensor.dim() != 1:
                raise ValueError(f"ValidSets: {name} must have one dimension, got shape {tuple(tensor.shape)}")
        object.__setattr__(self, "values", values.to(torch.int64).contiguous())
        object.__setattr__(self, "offsets", offsets.to(torch.int64).contiguous())
        if torch.compiler.is_compiling():
            return  # to look at the values would break the graph
        offsets = self.offsets
        if offsets.numel() == 0 or offsets[0] != 0 or offsets[-1] != values.numel() or (offsets.diff() < 0).any():
            raise ValueError(
                f"ValidSets: offsets must start at 0, never decrease and end at the number of values ({values.numel()})"
            )
        if values.numel() and values.min() < 0:
            position = int((values < 0).nonzero()[0])
            raise ValueError(f"ValidSets: values[{position}] is {int(values[position])}; token ids are >= 0")
        self._raise_on_duplicate()

    def _raise_on_duplicate(self) -> None:
        values = self.values
        if values.numel() < 2:
            return
        rises = values[1:] > values[:-1]
        between = self.offsets[1:-1] - 1  # from the last id of a set to the first of the next
        rises[between[(between >= 0) & (between < rises.numel())]] = True
        if rises.all():  # sets in increasing order, as masks and tries give them: no sort
            return
        # One sort of (set, id) as one number: numpy's is several times torch's on a CPU.
        span = int(values.max()) + 1
        if len(self) * span >= 2**63:
            values = values.unique(return_inverse=True)[1]
            span = int(values.max()) + 1
        key = self.rows() * span + values
        key = key.sort().values if key.is_cuda else torch.from_numpy(np.sort(key.cpu().numpy()))
        twice = key[1:] == key[:-1]
        if twice.any():
            row = int(key[1:][twice][0]) // span
            ids, counts = self.values[self.offsets[row] : self.offsets[row + 1]].unique(return_counts=True)
            raise ValueError(f"ValidSets: token id {int(ids[counts > 1][0])} stands twice in set {row}")

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def counts(self) -> Tensor:
        """Size of each set, int64 (N,)."""
        return self.offsets.diff()

    def rows(self) -> Tensor:
        """Row of each value, int64 (nnz,)."""
        rows = torch.arange(len(self), device=self.values.device)
        return torch.repeat_interleave(rows, self.counts(), output_size=self.values.numel())  # a GPU is not asked

    def to(self, device: torch.device | str) -> ValidSets:
        """The same sets on another device."""
        return ValidSets(self.values.to(device), self.offsets.to(device))

    def to_lists(self) -> list[list[int]]:
        """The sets as Python lists."""
        values, offsets = self.values.tolist(), self.offsets.tolist()
        return [values[a:b] for a, b in itertools.pairwise(offsets)]

    def to_mask(self, vocab_size: int) -> Tensor:
        """The sets as a bool mask (N, vocab_size).

        Raises:
            ValueError: an id at or beyond ``vocab_size``.

        Example:
            >>> ValidSets.from_lists([[0, 2]]).to_mask(4)
            tensor([[ True, False,  True, False]])
        """
        self._check_fits("to_mask", vocab_size)
        mask = torch.zeros(len(self), vocab_size, dtype=torch.bool, device=self.values.device)
        mask[self.rows(), self.values] = True
        return mask

    def to_bitmask(self, vocab_size: int) -> Tensor:
        """The sets as the packed masks of grammar engines, int32 (N, ceil(vocab_size / 32)): see :meth:`from_bitmask`.

        Raises:
            ValueError: an id at or beyond ``vocab_size``.

        Example:
            >>> ValidSets.from_lists([[0, 31, 32]]).to_bitmask(40)
            tensor([[-2147483647,           1]], dtype=torch.int32)
        """
        self._check_fits("to_bitmask", vocab_size)
        words = (vocab_size + 31) // 32
        flat = torch.zeros(len(self) * words, dtype=torch.int32, device=self.values.device)
        bit = torch.ones_like(self.values, dtype=torch.int32) << (self.values & 31).to(torch.int32)
        # No id stands twice, so the sum of the bits is their union; bit 31 is the sign.
        flat.index_add_(0, self.rows() * words + (self.values >> 5), bit)
        return flat.view(len(self), words)

    def _check_fits(self, what: str, vocab_size: int) -> None:
        _check_vocab_size(what, vocab_size)
        if self.values.numel() and (largest := int(self.values.max())) >= vocab_size:
            raise ValueError(f"{what}: token id {largest} does not fit into vocab_size={vocab_size}")

    @classmethod
    def from_lists(cls, sets: Iterable[Sequence[int]]) -> ValidSets:
        """From any iterable of sequences of ids.

        Example:
            >>> ValidSets.from_lists([[5], [2, 4]]).offsets.tolist()
            [0, 1, 3]
        """
        values, offsets = from_sequences(sets, "from_lists", "set")
        return cls(as_tensor(values), as_tensor(offsets))

    @classmethod
    def from_mask(cls, mask: Tensor) -> ValidSets:
        """From a bool mask (*, V); leading dimensions are flattened, ids come out in increasing order.

        Example:
            >>> ValidSets.from_mask(torch.tensor([[True, False, True]])).to_lists()
            [[0, 2]]
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() == 0:
            raise TypeError(f"from_mask: mask must be a bool tensor (*, V), got {_describe(mask)}")
        mask = mask.reshape(math.prod(mask.shape[:-1]), mask.shape[-1])
        offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
        offsets[1:] = mask.sum(1).cumsum(0)
        return cls(mask.nonzero()[:, 1], offsets)

    @classmethod
    def from_bitmask(cls, bitmask: Tensor, vocab_size: int) -> ValidSets:
        """From the packed masks of grammar engines: int32 (*, ceil(V / 32)), bit ``v & 31`` of word ``v >> 5``.

        Bits at or beyond ``vocab_size`` are padding and ignored.

        Example:
            >>> ValidSets.from_bitmask(torch.tensor([[-2147483647, 1]], dtype=torch.int32), 40).to_lists()
            [[0, 31, 32]]
        """
        _check_vocab_size("from_bitmask", vocab_size)
        words = (vocab_size + 31) // 32
        fits = isinstance(bitmask, Tensor) and bitmask.dtype == torch.int32 and bitmask.dim() > 0
        if not fits or bitmask.shape[-1] < words:
            raise TypeError(
                f"from_bitmask: needs an int32 tensor (*, {words}) for vocab_size={vocab_size}, got "
                f"{_describe(bitmask)}"
            )
        bitmask = bitmask[..., :words].reshape(math.prod(bitmask.shape[:-1]), words)
        row, word = bitmask.nonzero().unbind(1)  # most words of most masks are empty: 32 bits of the others alone
        bits = torch.arange(32, dtype=torch.int32, device=bitmask.device)
        at, bit = ((bitmask[row, word, None] >> bits) & 1).nonzero().unbind(1)
        values = word[at] * 32 + bit
        real = values < vocab_size
        sizes = torch.bincount(row[at][real], minlength=bitmask.shape[0])
        return cls(values[real], torch.cat((sizes.new_zeros(1), sizes.cumsum(0))))

    @classmethod
    def from_arrow(cls, column: Any) -> ValidSets:
        """From a pyarrow array or column of lists of ids, one a row; sliced and chunked ones too.

        Raises:
            ImportError: no pyarrow.
            TypeError: no lists of integers.
            ValueError: a null row (an unknown set is not an empty one), and as :class:`ValidSets`.

        Example:
            >>> import pyarrow
            >>> ValidSets.from_arrow(pyarrow.array([[9], [3, 1], []])[1:]).to_lists()
            [[3, 1], []]
        """
        values, offsets = from_arrow(column, what="from_arrow", row="set")
        return cls(as_tensor(values), as_tensor(offsets))

    @classmethod
    def from_prefix_allowed_tokens_fn(
        cls,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Any],
        input_ids: Tensor | Iterable[Tensor | Sequence[int]],
        *,
        num_beams: int = 1,
    ) -> ValidSets:
        """From the function that transformers' ``generate`` takes, called for each sequence of ids.

        Args:
            prefix_allowed_tokens_fn: (batch_id, input_ids (length,)) -> the ids that may come next. An empty answer is
                an empty set; to ``generate`` it is an error.
            input_ids: int64 (N, length), or N sequences of different lengths.
            num_beams: sequences a batch entry: sequence i is of batch ``i // num_beams``, as ``generate`` has it.

        Raises:
            TypeError: an answer that is no sequence of integers.
            ValueError: as :class:`ValidSets`; an id twice in one answer, which transformers lets pass, among them.

        Example:
            >>> after = {1: [2, 3], 2: [0]}
            >>> allowed = lambda batch_id, ids: after[int(ids[-1])]
            >>> ValidSets.from_prefix_allowed_tokens_fn(allowed, torch.tensor([[5, 1], [5, 2]])).to_lists()
            [[2, 3], [0]]
        """
        if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
            raise ValueError(f"from_prefix_allowed_tokens_fn: num_beams must be a positive int, got {num_beams!r}")
        answers = []
        for number, ids in enumerate(input_ids):
            allowed = prefix_allowed_tokens_fn(number // num_beams, torch.as_tensor(ids))
            answers.append(allowed.tolist() if isinstance(allowed, Tensor) else allowed)
        values, offsets = ragged(answers, what="from_prefix_allowed_tokens_fn", row="answer")
        return cls(as_tensor(values), as_tensor(offsets))

    @classmethod
    def from_jagged(cls, nested: Tensor) -> ValidSets:
        """From a ``torch.nested`` tensor of layout ``torch.jagged``, (N, ragged).

        Example:
            >>> nt = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([0])], layout=torch.jagged)
            >>> ValidSets.from_jagged(nt).to_lists()
            [[1, 2], [0]]
        """
        if not (isinstance(nested, Tensor) and nested.is_nested and nested.layout == torch.jagged):
            raise TypeError(f"from_jagged: needs a nested tensor with layout=torch.jagged, got {_describe(nested)}")
        values, offsets = nested.values(), nested.offsets()  # type: ignore[attr-defined]
        lengths = nested.lengths() if hasattr(nested, "lengths") else None
        if lengths is not None:  # a narrowed jagged tensor has holes between its rows
            return cls.from_lists([row.tolist() for row in nested.unbind()])
        return cls(values, offsets)
