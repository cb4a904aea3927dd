"""``linear_statistics`` and ``linear_ranks``: the same numbers from hidden states and the weight of the last layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import resolve
from ..valid_sets import ValidSets
from . import _gpu
from ._arguments import (
    Index,
    Temperature,
    check_ids,
    check_ignore_index,
    normalise_index,
    normalise_temperature,
)
from ._linear import ROW_BYTES, check_chunk_size, check_linear, make_linear, without_autocast
from ._linear_chunks import OF_TOKENS, ROW_AXIS, LinearStatistics, Request, cut_index, part_of
from .ranks import _eager as _eager_ranks
from .ranks import _normalise_thresholds
from .statistics import _check_ranked, unpack
from .types import TokenRanks, TokenStatistics


@dataclass(frozen=True)
class Rows:
    """The rows to compute, (n, D), and what belongs to them. ``kept``: which of all rows they are; None: all."""

    hidden: Tensor
    ids: Index | None
    temperature: Tensor | None
    kept: Tensor | None
    n_rows: int  # of all

    def tokens(self) -> Tensor:
        """Where their selected tokens lie among those of all rows."""
        assert self.kept is not None and self.ids is not None
        m = self.ids.per_row
        return (self.kept[:, None] * m + torch.arange(m)).reshape(-1)


def _rows_to_do(hidden: Tensor, ids: Index | None, temperature: Tensor | None, ignore_index: int) -> Rows:
    """Leaves out rows all of whose tokens are ignored. On a CPU, and not for ragged sets: on an accelerator to look
    would be a synchronisation, and there the kernels leave out what they can."""
    n_rows = math.prod(hidden.shape[:-1])
    flat = hidden.reshape(n_rows, hidden.shape[-1])
    if ids is None or ids.offsets is not None or ids.per_row == 0 or ids.ids.device.type != "cpu":
        return Rows(flat, ids, temperature, None, n_rows)
    tokens = ids.ids.view(n_rows, ids.per_row)
    wanted = (tokens != ignore_index).any(-1)
    if bool(wanted.all()):
        return Rows(flat, ids, temperature, None, n_rows)
    kept = wanted.nonzero().squeeze(-1)
    rest = tokens.index_select(0, kept).reshape(-1)
    if temperature is not None and temperature.shape[0] > 1:
        temperature = temperature.index_select(0, kept)
    return Rows(flat.index_select(0, kept), Index(rest, ids.per_row, None, (rest.shape[0],)), temperature, kept, n_rows)


def _put(t: Tensor, at: Tensor, size: int, axis: int, fill: int = 0) -> Tensor:
    """What was found for some, in its place among all."""
    shape = list(t.shape)
    shape[axis] = size
    return t.new_full(shape, fill).index_copy(axis, at, t)


def _spread(packed: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """The packed results in their place among all rows: 0, and argmax -1, for those left out."""
    assert rows.kept is not None and rows.ids is not None
    tokens, out = rows.tokens(), []
    for i, (t, axis) in enumerate(zip(packed, ROW_AXIS)):
        if i not in OF_TOKENS:
            out.append(_put(t, rows.kept, rows.n_rows, axis, -1 if i == 3 else 0))
        elif t.shape[0] == tokens.shape[0]:
            out.append(_put(t, tokens, rows.n_rows * rows.ids.per_row, axis))
        else:  # counts that were not asked for
            out.append(t)
    return out


@torch.compiler.disable
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | ValidSets | None = None,
    temperature: Temperature = 1.0,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    ranks: bool = False,
    moments: bool = True,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> TokenStatistics:
    """:func:`fastcalib.statistics` of the logits of a linear layer, which never exist as a whole.

    The logits are ``c tanh(s (hidden weight^T + bias) / c)`` with c the softcap and s the scale, rounded to the dtype
    of the layer as they would be. On a CPU they are made 8,192 columns at a time and read while in the cache; with
    ``ranks``, on other backends and going backward (which makes them again), some rows at a time. On a GPU one Triton
    kernel makes tiles of them and adds each up in registers, without ``ranks``, for at most 4 temperatures and 16
    selected tokens a row, where D is a multiple of 16 and so are the strides of rows; else, and going backward, some
    rows at a time through the library's matrix product and the backend's kernels. Not yet run on a GPU. torch.compile
    breaks its graph here. Rows without a token to look at are left out of the product (on a CPU; on a GPU, whole tiles
    of 128 or 64 such rows).

    Args:
        hidden: (*, D), float32, bfloat16, float16 or float64; any strides. Under autocast the product is in its dtype.
        weight: (V, D), of the same dtype.
        index, temperature, ranks, moments, ignore_index, backend, validate: as for :func:`fastcalib.statistics`.
        bias: (V,).
        logit_softcap: c, positive; None for none.
        logit_scale: s; None for none.
        vocab_size: rows of the weight from here on are padding; they are not read, and their gradient is 0.
        chunk_size: columns of logits at a time; None takes 8,192, fewer for many rows. Only speed and memory change,
            and the last bit where the matrix product rounds otherwise for another shape.

    Returns:
        :class:`TokenStatistics`, in float32 (float64 for float64). Differentiable, once, in hidden, weight, bias and a
        temperature tensor; each gradient has the dtype of its tensor, and those of weight and bias are summed over
        tokens in float32. What does not require a gradient costs none.

    Raises:
        TypeError: dtypes that differ or make no sense, a DTensor.
        ValueError: shapes that do not fit, an id outside [0, vocab_size), a temperature, softcap, scale or chunk_size
            out of range.

    Source: spec sections 1 and 4 (derived): the states of disjoint sets of columns merge.

    Example:
        >>> import torch, fastcalib
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
        >>> fastcalib.linear_statistics(hidden, weight, torch.tensor([2, 0])).log_prob
        tensor([-0.4076, -1.0986])
    """
    stand_in, width = check_linear(
        "linear_statistics", hidden, weight, bias, logit_softcap, logit_scale, vocab_size
    )  # fmt: skip
    check_ignore_index(ignore_index)
    check_chunk_size("linear_statistics", chunk_size, "columns")
    ids = None if index is None else normalise_index(index, stand_in)
    temperatures, has_axis = normalise_temperature(temperature, stand_in)
    if ranks:
        _check_ranked(ids)
    if ids is not None:
        check_ids(ids, width, ignore_index)
        if validate:
            _gpu.validate_ids(ids, width, ignore_index)
    backend = resolve(backend, hidden.device, stand_in.dtype)
    rows = _rows_to_do(hidden, ids, temperatures, ignore_index)
    request = Request(
        rows.ids, width, ignore_index, ranks, moments or temperatures.requires_grad, backend, stand_in.dtype,
        logit_scale, logit_softcap, chunk_size,
    )  # fmt: skip
    packed = LinearStatistics.apply(rows.hidden, weight, bias, rows.temperature, request)
    if rows.kept is not None:
        packed = _spread(packed, rows)
    axis = (temperatures.shape[1],) if has_axis else ()
    return unpack(packed, tuple(hidden.shape[:-1]), None if ids is None else ids.shape, axis, ranks, moments)


@torch.compiler.disable
@torch.no_grad()
def linear_ranks(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | ValidSets | None = None,
    *,
    thresholds: Tensor | None = None,
    temperature: Temperature | None = None,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> TokenRanks:
    """:func:`fastcalib.ranks` of the logits of a linear layer, which never exist as a whole.

    Some rows at a time, each with all its logits: a selected token is compared with the others by the number that the
    same matrix product gave them all, so ties are exact, which a second dot product for the selected tokens alone would
    not promise. The logits are those of :func:`fastcalib.linear_statistics`, whose remarks on devices and torch.compile
    hold here too. Not differentiable.

    Args:
        hidden, weight, bias, logit_softcap, logit_scale: the layer, as for :func:`fastcalib.linear_statistics`.
        index, thresholds, temperature, vocab_size, ignore_index, backend, validate: as for :func:`fastcalib.ranks`.
            Thresholds are compared with the logits in their dtype.
        chunk_size: rows at a time; None takes as many as have 128 MB of logits.

    Returns:
        :class:`TokenRanks`; fields shaped like the index or thresholds (flat (nnz,) for ValidSets), masses plus [K].

    Raises:
        TypeError, ValueError: as :func:`fastcalib.linear_statistics` and :func:`fastcalib.ranks`.

    Source: spec section 3 (derived).

    Example:
        >>> import torch, fastcalib
        >>> hidden, weight = torch.tensor([[1.0]]), torch.tensor([[4.0], [1.0], [3.0], [1.0]])
        >>> r = fastcalib.linear_ranks(hidden, weight, torch.tensor([[0, 1]]))
        >>> r.n_greater.tolist(), r.n_equal.tolist()
        ([[0, 2]], [[0, 1]])
    """
    stand_in, width = check_linear("linear_ranks", hidden, weight, bias, logit_softcap, logit_scale, vocab_size)
    if (index is None) == (thresholds is None):
        raise ValueError("linear_ranks needs exactly one of index (token ids) and thresholds (numbers)")
    check_chunk_size("linear_ranks", chunk_size, "rows")
    check_ignore_index(ignore_index)
    temperatures, has_axis = None, False
    if temperature is not None:
        temperatures, has_axis = normalise_temperature(temperature, stand_in)
    if index is not None:
        ids, numbers = normalise_index(index, stand_in), False
        check_ids(ids, width, ignore_index)
        if validate:
            _gpu.validate_ids(ids, width, ignore_index)
    else:
        ids, numbers = _normalise_thresholds(thresholds, stand_in)[0], True
    backend = resolve(backend, hidden.device, stand_in.dtype, "ranks")
    rows = _rows_to_do(hidden, None if numbers else ids, temperatures, ignore_index)
    used = ids if rows.ids is None else rows.ids
    with without_autocast(hidden):
        layer = make_linear(rows.hidden, weight, bias, stand_in.dtype, width, logit_scale, logit_softcap)
        size = chunk_size or layer.chunk_rows(ROW_BYTES)
        parts = list(layer.row_chunks(size)) or [slice(0, 0)]
        buffer = layer.buffer(size)
        made: list[Sequence[Tensor]] = []
        for part, (chosen, _) in zip(parts, cut_index(used, parts)):
            assert chosen is not None
            z, t = layer.logits(buffer, part), None if rows.temperature is None else part_of(rows.temperature, part)
            bounds, tokens = (chosen.ids, None) if numbers else (None, chosen.ids)
            if backend == "eager":
                found = _eager_ranks(z, tokens, bounds, chosen, t, width, ignore_index)
                made.append([m for m in found if m is not None])
            else:
                made.append(
                    torch.ops.fastcalib.ranks(
                        z, tokens, bounds, chosen.per_row, chosen.offsets, t, width, ignore_index, backend
                    )
                )
    whole = [torch.cat([m[i] for m in made]) for i in range(2 if temperatures is None else 3)]
    if rows.kept is not None:
        whole = [_put(t, rows.tokens(), ids.ids.shape[0], 0) for t in whole]
    n_greater, n_equal = (t.reshape(ids.shape) for t in whole[:2])
    if temperatures is None:
        return TokenRanks(n_greater, n_equal, None)
    return TokenRanks(n_greater, n_equal, whole[2].reshape(*ids.shape, *whole[2].shape[1:][: int(has_axis)]))
