"""Ragged integer columns in whatever form they come: lists, (values, offsets), pyarrow."""

from __future__ import annotations

import array
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


def ragged(rows: Any, *, what: str, row: str) -> tuple[Ints, Ints]:
    """Values and offsets, both int64, of a ragged column of token ids.

    Args:
        rows: an iterable of sequences of integers, a pair (values, offsets) of tensors or arrays, an object with these
            two attributes, or a pyarrow column of lists.
        what: who asks, for the messages.
        row: what a row is to the caller.

    Raises:
        TypeError, ValueError: anything else, nulls, offsets that do not describe the values, negative ids.
    """
    if type(rows).__module__.split(".")[0] == "pyarrow":
        values, offsets = from_arrow(rows, what=what, row=row)
    elif _is_pair(rows):
        pair = rows if isinstance(rows, tuple) else (rows.values, rows.offsets)
        values, offsets = (_integers(part, name, what) for part, name in zip(pair, ("values", "offsets")))
        if not offsets.size or offsets[0] != 0 or offsets[-1] != values.size or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"{what}: offsets must start at 0, never decrease and end at the number of values ({values.size})"
            )
    else:
        values, offsets = from_sequences(rows, what, row)
    if values.size and values.min() < 0:
        at = int(np.flatnonzero(values < 0)[0])
        which = int(np.searchsorted(offsets, at, side="right")) - 1
        raise ValueError(f"{what}: {row} {which} holds the id {values[at]}; token ids are >= 0")
    return values, offsets


def _is_pair(rows: Any) -> bool:
    if isinstance(rows, tuple):
        return len(rows) == 2 and all(isinstance(part, (Tensor, np.ndarray)) for part in rows)
    return isinstance(getattr(rows, "values", None), Tensor) and isinstance(getattr(rows, "offsets", None), Tensor)


def _integers(column: Any, name: str, what: str) -> Ints:
    numbers = column.detach().cpu().numpy() if isinstance(column, Tensor) else column
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise TypeError(f"{what}: {name} must be integers in one dimension, got {numbers.dtype} {numbers.shape}")
    return np.ascontiguousarray(numbers, dtype=np.int64)


def from_sequences(rows: Iterable[Sequence[int]], what: str, row: str) -> tuple[Ints, Ints]:
    """Values and offsets of an iterable of sequences of integers; see :func:`ragged`."""
    rows = rows if isinstance(rows, (list, tuple)) else list(rows)
    try:
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = array.array("q", itertools.chain.from_iterable(rows))  # refuses 1.5, which numpy would round
    except (TypeError, OverflowError):
        for number, ids in enumerate(rows):
            try:
                len(ids), array.array("q", ids)
            except (TypeError, OverflowError):
                message = f"{what}: {row} {number} must be a sequence of integers (token ids), got {ids!r:.60}"
                raise TypeError(message) from None
        raise
    return np.frombuffer(values, np.int64) if values else np.zeros(0, np.int64), offsets_of(lengths)


def offsets_of(lengths: Ints) -> Ints:
    """0 and the running sums."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


def from_arrow(column: Any, *, what: str, row: str) -> tuple[Ints, Ints]:
    """Values and offsets of a pyarrow array or chunked array of lists of integers, sliced or not.

    Raises:
        ImportError: no pyarrow.
        TypeError: no lists of integers.
        ValueError: nulls.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
    except ImportError as missing:
        raise ImportError(f"{what} reads pyarrow columns and needs pyarrow: pip install pyarrow") from missing
    if not isinstance(column, (pa.Array, pa.ChunkedArray)):
        hint = "; take one of its columns: table['name']" if isinstance(column, (pa.Table, pa.RecordBatch)) else ""
        raise TypeError(f"{what}: needs a pyarrow array or column of lists, got {type(column).__name__}{hint}")
    if not hasattr(column.type, "value_type") or not pa.types.is_integer(column.type.value_type):
        raise TypeError(f"{what}: needs a column of lists of integers, got one of {column.type}")
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    values, lengths, before = [], [], 0
    for chunk in chunks:
        if chunk.null_count:
            at = before + int(np.flatnonzero(chunk.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"{what}: {row} {at} is null; drop such rows first (column.drop_null())")
        # flatten(), not .values: that one ignores a slice, and what stands behind a fixed-size or view list
        flat, length = chunk.flatten(), pc.list_value_length(chunk)
        if flat.null_count:
            place = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
            inside = int(np.searchsorted(np.cumsum(length.to_numpy(zero_copy_only=False)), place, side="right"))
            raise ValueError(f"{what}: {row} {before + inside} holds a null; a token id is missing")
        values.append(flat.to_numpy(zero_copy_only=False).astype(np.int64, copy=False))
        lengths.append(length.to_numpy(zero_copy_only=False).astype(np.int64, copy=False))
        before += len(chunk)
    return _joined(values), offsets_of(_joined(lengths))


def _joined(parts: list[Ints]) -> Ints:
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])


def as_tensor(numbers: NDArray[Any]) -> Tensor:
    """A tensor that shares the memory, or a copy where that is not ours to write to."""
    return torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())
