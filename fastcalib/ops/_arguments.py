"""Checks at the door, and the normal form that kernels and references take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..valid_sets import ValidSets

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# dtype codes shared with csrc/bindings.cpp
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Temperature = float | Sequence[float] | Tensor
NUMBERS = (int, float, np.integer, np.floating)
# Between these 1/T and its product with any logit difference keep their meaning in float32. Greedy decoding is argmax.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-30, 1e15


def check_logits(logits: Tensor, vocab_size: int | None, name: str = "logits") -> int:
    """Validate logits (*, V) and return the number of real columns; ``name`` is the argument's."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}; torch.as_tensor converts arrays")
    if type(logits).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor: fastcalib reads raw memory and has no sharding rule yet. "
            "Call .full_tensor() first, or .to_local() when every rank holds whole rows"
        )
    if logits.is_nested or logits.layout is not torch.strided:
        kind = "nested" if logits.is_nested else str(logits.layout)
        raise TypeError(f"{name} must be a dense tensor (*, V), got a {kind} one; pass the values of its rows")
    if logits.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (*, V) with V >= 1, got {tuple(logits.shape)}")
    width = logits.shape[-1]
    if vocab_size is None:
        return width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size must be an int, got {vocab_size!r}")
    if not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size must lie in [1, {width}] for {name} with {width} columns, got {vocab_size}")
    return vocab_size


def check_ignore_index(ignore_index: int) -> None:
    """Raise unless it is an integer; the registered operation would, in terms of its schema."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int (a token id that stands for no token), got {ignore_index!r}")


def _check_number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(
            f"{name} must be a number, a sequence of numbers (several for all rows) or a tensor (one a row), got "
            f"{value!r}"
        )
    if not LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE:
        raise ValueError(_bad_temperature(name, float(value)))
    return float(value)


def _bad_temperature(where: str, value: float) -> str:
    return (
        f"{where} must be positive and finite, got {value} (allowed: {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g})"
    )


def normalise_temperature(temperature: Temperature, logits: Tensor, name: str = "temperature") -> tuple[Tensor, bool]:
    """Temperature as float64 (1 or N, K), and whether results carry an axis of K; ``name`` is the argument's."""
    leading = logits.shape[:-1]
    if isinstance(temperature, Tensor):
        if not temperature.dtype.is_floating_point:
            raise TypeError(f"a {name} tensor must be floating point, got {temperature.dtype}")
        if temperature.device != logits.device and not (temperature.device.type == "cpu" and temperature.dim() == 0):
            raise ValueError(f"{name} is on {temperature.device}, the logits are on {logits.device}")
        if not torch.compiler.is_compiling() and temperature.device.type == "cpu" and not is_fake(temperature):
            bad = ~((temperature >= LOWEST_TEMPERATURE) & (temperature <= HIGHEST_TEMPERATURE))
            if bad.any():
                position = tuple(bad.nonzero()[0].tolist())
                where = f"{name}{list(position)}" if position else name
                raise ValueError(_bad_temperature(where, float(temperature[position].detach())))
        flat = temperature.to(logits.device, torch.float64)
        if flat.dim() == 0 or (flat.numel() == 1 and flat.dim() <= len(leading)):
            return flat.reshape(1, 1), False
        try:
            flat = flat.expand(leading)
        except RuntimeError:
            raise ValueError(
                f"a {name} tensor must broadcast to the leading dimensions {tuple(leading)} of the logits, got "
                f"shape {tuple(temperature.shape)}; pass a list of numbers for several temperatures per row"
            ) from None
        return flat.reshape(-1, 1), False
    if isinstance(temperature, (str, bytes)):  # a sequence, whose characters alone would be named
        _check_number(temperature, name)
    if isinstance(temperature, Sequence):
        values = [_check_number(t, name) for t in temperature]
        if not values:
            raise ValueError(f"{name} is an empty sequence; pass at least one number")
        return row_of(values, logits.device), True
    return row_of([_check_number(temperature, name)], logits.device), False


def temperature_a_row(name: str, temperature: Any, logits: Tensor) -> Tensor:
    """One temperature for all rows or one each, float64 (1 or N, 1); ``name`` is the argument's."""
    if not isinstance(temperature, (*NUMBERS, Tensor)):
        raise TypeError(
            f"{name} must be a number or a tensor over the leading dimensions, got {type(temperature).__name__}"
        )
    number = temperature if isinstance(temperature, Tensor) else float(temperature)
    return normalise_temperature(number, logits, name)[0]


def row_of(values: list[float], device: torch.device) -> Tensor:
    """Numbers as float64 (1, K) on a device, without waiting for it."""
    if torch.compiler.is_compiling():
        # Arithmetic is all that can be done with a Python number without a new compilation for each of its values.
        one = torch.ones(1, dtype=torch.float64, device=device)
        return torch.cat([one * value for value in values])[None]
    if device.type == "cpu":
        return torch.tensor([values], dtype=torch.float64)
    # A copy from the host would wait for the device, and cannot be captured in a graph; a fill does neither.
    return torch.cat([torch.full((1, 1), value, dtype=torch.float64, device=device) for value in values], 1)


def is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


@dataclass(frozen=True)
class Index:
    """Selected tokens, flat: ids (nnz,), and either M per row or the ragged offsets (N + 1,)."""

    ids: Tensor
    per_row: int
    offsets: Tensor | None
    shape: tuple[int, ...]

    def rows(self, n_rows: int) -> Tensor:
        """Row of each selected token, (nnz,)."""
        each = torch.arange(n_rows, device=self.ids.device)
        if self.offsets is None:
            return each.repeat_interleave(self.per_row)
        return each.repeat_interleave(self.offsets.diff(), output_size=self.ids.shape[0])


def normalise_index(index: Tensor | ValidSets, logits: Tensor, name: str = "index") -> Index:
    """Flatten an index of shape (*), (*, M) or a ValidSets over the rows of the logits."""
    leading = tuple(logits.shape[:-1])
    n_rows = math.prod(logits.shape[:-1])
    if isinstance(index, ValidSets):
        if len(index) != n_rows:
            raise ValueError(f"{name} holds {len(index)} sets for {n_rows} rows of logits {tuple(logits.shape)}")
        if index.values.device != logits.device:
            raise ValueError(
                f"{name} is on {index.values.device}, the logits are on {logits.device}; move it by "
                f"{name}.to(logits.device)"
            )
        return Index(index.values, 0, index.offsets, (index.values.shape[0],))
    if not isinstance(index, Tensor):
        raise TypeError(
            f"{name} must be a tensor or a ValidSets, got {type(index).__name__}; torch.as_tensor(ids) makes the one, "
            "ValidSets.from_lists(sets) the other"
        )
    if index.dtype not in INTEGERS:
        raise TypeError(f"{name} must hold integers (token ids; int64, int32, int16, int8 or uint8), got {index.dtype}")
    if index.device != logits.device:
        raise ValueError(f"{name} is on {index.device}, the logits are on {logits.device}")
    shape = tuple(index.shape)
    if shape == leading:
        per_row = 1
    elif shape[:-1] == leading and index.dim() == logits.dim():
        per_row = index.shape[-1]
    else:
        raise ValueError(
            f"{name} must have shape {leading} (one token a row) or {with_axis(leading)} for logits of shape "
            f"{tuple(logits.shape)}, got {shape}"
        )
    # contiguous: a reshape of index[:, ::2] may be a view with a stride, and kernels take a bare pointer
    return Index(index.reshape(-1).to(torch.int64).contiguous(), per_row, None, shape)


def check_target(name: str, logits: Tensor, target: Tensor, vocab_size: int | None, rows: str = "logits") -> int:
    """Shapes and dtypes of a loss's arguments; returns the size of the vocabulary. ``name`` is the loss, ``rows`` what
    its first argument is called."""
    width = check_logits(logits, vocab_size)
    if not isinstance(target, Tensor):
        raise TypeError(
            f"{name}: target must be a tensor of token ids, got {type(target).__name__}; torch.as_tensor makes one"
        )
    if target.dtype not in INTEGERS:
        raise TypeError(
            f"{name}: target must hold token ids in an integer dtype (int64, int32, int16, int8 or uint8), got "
            f"{target.dtype}; for class probabilities use fastcalib.functional.cross_entropy"
        )
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: target must have the leading dimensions {tuple(logits.shape[:-1])} of {rows} "
            f"{tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    return width


def with_axis(leading: tuple[int, ...], axis: str = "M") -> str:
    """The shape (*, M) in words, for messages."""
    return f"({', '.join(map(str, (*leading, axis)))})"


class BadTokenId(ValueError):
    """A token id outside the vocabulary. A loss, which calls its ids target, raises it again under that name."""


def raise_bad_id(
    index: Index, position: int, vocab_size: int, ignore_index: int | None, name: str = "index"
) -> NoReturn:
    """The error for a token id outside [0, vocab_size); ``position`` counts in the flat ids. ``name`` is the caller's
    argument, ``ignore_index`` None where there is no such argument."""
    if index.offsets is not None:
        row = int(torch.searchsorted(index.offsets, position, right=True)) - 1  # the last set that starts at or before
        where = f"{name}: entry {position - int(index.offsets[row])} of set {row} (values[{position}])"
    else:
        place = [int(i) for i in torch.unravel_index(torch.tensor(position), index.shape)]
        where = f"{name}{place or ''}"
    message = (
        f"{where} is {int(index.ids[position])}, outside [0, {vocab_size}): token ids must lie in the vocabulary of "
        f"{vocab_size}"
    )
    if ignore_index is not None:
        message += f"; entries that stand for no token must equal ignore_index={ignore_index}"
    raise BadTokenId(message) from None


def raise_bad_target(target: Tensor, vocab_size: int, ignore_index: int) -> NoReturn:
    """The same error under the name and in the shape that a loss has for its token ids."""
    ids = target.reshape(-1).to(torch.int64)
    position = int(outside(ids, vocab_size, ignore_index).nonzero()[0])
    raise_bad_id(Index(ids, 1, None, tuple(target.shape)), position, vocab_size, ignore_index, "target")


def outside(ids: Tensor, vocab_size: int, ignore_index: int | None) -> Tensor:
    """Which ids are neither in [0, vocab_size) nor ignore_index."""
    bad = (ids < 0) | (ids >= vocab_size)
    return bad if ignore_index is None else bad & (ids != ignore_index)


def flat_index(ids: Tensor, per_row: int, offsets: Tensor | None, logits: Tensor) -> Index:
    """The :class:`Index` behind what a registered operation receives; a single token a row counts as shape (*)."""
    leading = tuple(logits.shape[:-1])
    return Index(ids, per_row, offsets, leading if per_row == 1 else (*leading, per_row))


def check_ids(index: Index, vocab_size: int, ignore_index: int | None, name: str = "index") -> None:
    """The check that the C++ kernels do while they gather, for those who do not leave it to them: the reference, and
    functions whose ids go by another name than theirs. Only where it costs no device sync."""
    ids = index.ids
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(ids) or ids.numel() == 0:
        return
    low, high = ids.aminmax()
    if low >= 0 and high < vocab_size:
        return
    bad = outside(ids, vocab_size, ignore_index)
    if bad.any():
        raise_bad_id(index, int(bad.nonzero()[0]), vocab_size, ignore_index, name)


@dataclass(frozen=True)
class RowLayout:
    """Address of row r: (r // inner) * outer_stride + (r % inner) * inner_stride, in elements; columns are adjacent."""

    tensor: Tensor
    n_rows: int
    inner: int
    outer_stride: int
    inner_stride: int

    def args(self) -> tuple[int, int, int, int, int, int]:
        """pointer, dtype code, rows, inner, outer stride, inner stride: how csrc/bindings.cpp takes a matrix."""
        t = self.tensor
        return t.data_ptr(), DTYPE_CODE[t.dtype], self.n_rows, self.inner, self.outer_stride, self.inner_stride


def row_layout(logits: Tensor) -> RowLayout:
    """Rows of (*, V) without a copy wherever two strides describe them: slices, shifts, expands; else one copy."""
    shape, strides = logits.shape, logits.stride()
    n_rows = math.prod(shape[:-1])
    if strides[-1] != 1 and shape[-1] > 1:
        logits = logits.contiguous()
        strides = logits.stride()
    # Fuse neighbouring leading dimensions that advance by a common step.
    fused: list[tuple[int, int]] = []
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if fused and fused[-1][1] == size * stride:
            fused[-1] = (fused[-1][0] * size, stride)
        else:
            fused.append((size, stride))
    if len(fused) > 2:
        logits = logits.contiguous()
        fused = [(n_rows, shape[-1])]
    if not fused:
        fused = [(1, 0)]
    if len(fused) == 1:
        return RowLayout(logits, n_rows, max(n_rows, 1), 0, fused[0][1])
    return RowLayout(logits, n_rows, fused[1][0], fused[0][1], fused[1][1])
