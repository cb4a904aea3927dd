"""The statistics of a linear layer's logits, chunk by chunk or tile by tile, and their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import extension
from ..eager.softmax import statistics_dtype
from . import _gpu
from ._arguments import DTYPE_CODE, Index
from ._linear import (
    COLUMNS,
    FORWARD_BYTES,
    LEAST_COLUMNS,
    ROW_BYTES,
    Gradients,
    Linear,
    Wanted,
    make_linear,
    without_autocast,
)
from ._statistics import ROW_FIELDS, allocate, backward_into, pointer
from ._statistics_temperature import temperature_gradient
from .statistics import _eager

# Axis of each packed result along which rows (or selected tokens, in the order of their rows) lie.
ROW_AXIS = (1, 1, 0, 0, 0, 0, 0, 0)
OF_TOKENS = (2, 4, 5, 6)  # log_prob, n_greater, n_equal, mass_greater


@dataclass(frozen=True)
class Request:
    """What is wanted of the logits of a layer; everything but the tensors that may require a gradient."""

    index: Index | None
    width: int
    ignore_index: int
    ranks: bool
    moments: bool
    backend: str
    dtype: torch.dtype  # of the logits
    scale: float | None
    softcap: float | None
    chunk_size: int | None


def cut_index(index: Index | None, parts: list[slice]) -> list[tuple[Index | None, slice]]:
    """The selected tokens of each part of the rows, and where they lie among all of them."""
    if index is None:
        return [(None, slice(0, 0))] * len(parts)
    if index.offsets is None:
        m = index.per_row
        ends = [slice(p.start * m, p.stop * m) for p in parts]
        return [(Index(index.ids[e], m, None, (e.stop - e.start,)), e) for e in ends]
    places = index.offsets.tolist()  # on an accelerator this waits for the device
    out: list[tuple[Index | None, slice]] = []
    for p in parts:
        e = slice(places[p.start], places[p.stop])
        offsets = index.offsets[p.start : p.stop + 1] - places[p.start]
        out.append((Index(index.ids[e], 0, offsets, (e.stop - e.start,)), e))
    return out


def part_of(temperature: Tensor, rows: slice) -> Tensor:
    return temperature if temperature.shape[0] == 1 else temperature[rows]


def forward(layer: Linear, temperature: Tensor, request: Request) -> tuple[Tensor, ...]:
    """The statistics, packed as those of the registered operation ``statistics``."""
    if in_tiles(layer, temperature, request):
        return _in_tiles(layer, temperature, request)
    if request.backend == "cpp" and not request.ranks:
        return _by_columns(layer, temperature, request)
    return _by_rows(layer, temperature, request)


def in_tiles(layer: Linear, temperature: Tensor, request: Request) -> bool:
    """Whether one kernel makes the logits and adds them up (linear_statistics of the Triton kernels)."""
    ids = None if request.index is None else request.index.ids
    return not request.ranks and _gpu.linear_fits(layer.hidden, layer.weight, temperature, ids, request.backend)


def _in_tiles(layer: Linear, temperature: Tensor, request: Request) -> tuple[Tensor, ...]:
    index = request.index
    stand_in = layer.hidden.new_empty(()).expand(layer.n_rows, layer.width)
    out = allocate(stand_in, temperature, None if index is None else index.ids, False)
    _gpu.linear_statistics_forward(
        out, layer.hidden, layer.weight, layer.bias, layer.scale, layer.softcap, temperature, index,
        request.ignore_index, request.moments,
    )  # fmt: skip
    return out


def _by_columns(layer: Linear, temperature: Tensor, request: Request) -> tuple[Tensor, ...]:
    """A chunk of the vocabulary at a time, read while it is in the cache and merged into the state of each row; the
    weight is read once. Selected logits are picked up on the way."""
    n_rows, width, index = layer.n_rows, layer.width, request.index
    temperature = temperature.contiguous()
    k = temperature.shape[1]
    stand_in = layer.hidden.new_empty(()).expand(n_rows, width)
    out = allocate(stand_in, temperature, None if index is None else index.ids, False)
    rows, scalars, log_prob, argmax, _, _, _, saved = out
    module = extension()
    heads = torch.empty(n_rows * module.statistics_head_bytes, dtype=torch.uint8)
    sums = torch.empty(n_rows * k * module.statistics_sums_bytes, dtype=torch.uint8)
    chosen = torch.empty(log_prob.shape[0], dtype=torch.float64)
    at = (temperature.data_ptr(), temperature.shape[0], k)
    selection = (0, 0, 0) if index is None else (index.ids.data_ptr(), index.per_row, pointer(index.offsets))
    code, threads = DTYPE_CODE[layer.hidden.dtype], torch.get_num_threads()
    size = request.chunk_size or _columns(n_rows, layer.hidden.element_size())
    buffer = layer.buffer(n_rows, min(size, width))
    for start in range(0, width, size):
        z = layer.logits(buffer, columns=slice(start, min(start + size, width)))
        module.statistics_chunk(
            z.data_ptr(), code, n_rows, max(n_rows, 1), 0, z.shape[1], z.shape[1], start, *at, *selection,
            request.ignore_index, request.moments, heads.data_ptr(), sums.data_ptr(), chosen.data_ptr(), threads,
        )  # fmt: skip
    module.statistics_from_state(
        code, n_rows, *at, *selection, request.ignore_index, heads.data_ptr(), sums.data_ptr(), chosen.data_ptr(),
        *(t.data_ptr() for t in (rows, scalars, log_prob, argmax, saved)),
    )  # fmt: skip
    return out


def _columns(n_rows: int, size: int) -> int:
    return max(LEAST_COLUMNS, min(COLUMNS, FORWARD_BYTES // max(n_rows * size, 1) // 64 * 64))


def _by_rows(layer: Linear, temperature: Tensor, request: Request) -> tuple[Tensor, ...]:
    """Some rows of all logits at a time, through the operation of the backend."""
    size = layer.chunk_rows(ROW_BYTES)
    parts = list(layer.row_chunks(size)) or [slice(0, 0)]  # no rows at all still have results, of the right shapes
    buffer, made = layer.buffer(size), []
    for part, (ids, _) in zip(parts, cut_index(request.index, parts)):
        z = layer.logits(buffer, part)
        made.append(_packed(z, part_of(temperature, part), ids, request))
    return tuple(torch.cat([m[i] for m in made], axis) for i, axis in enumerate(ROW_AXIS))


def _packed(z: Tensor, temperature: Tensor, ids: Index | None, request: Request) -> Sequence[Tensor]:
    if request.backend != "eager":
        return torch.ops.fastcalib.statistics(
            z, temperature, None if ids is None else ids.ids, 0 if ids is None else ids.per_row,
            None if ids is None else ids.offsets, request.width, request.ignore_index, request.ranks,
            request.backend, request.moments,
        )  # fmt: skip
    s = _eager(z, temperature, ids, request.width, request.ignore_index, request.ranks)
    n, k = z.shape[0], temperature.shape[1]
    real, count = z.new_empty(0, dtype=statistics_dtype(z.dtype)), torch.empty(0, dtype=torch.int64, device=z.device)
    return (
        torch.stack([getattr(s, field) for field in ROW_FIELDS]),
        torch.stack([s.sum_logits, s.std_logits]),
        real.reshape(0, k) if s.log_prob is None else s.log_prob,
        s.argmax,
        count if s.n_greater is None else s.n_greater,
        count if s.n_equal is None else s.n_equal,
        real.reshape(0, k) if s.mass_greater is None else s.mass_greater,
        torch.cat([s.max_logit.detach()[:, None], z.new_zeros(n, 2 + 2 * k, dtype=real.dtype)], -1),
    )


def _gradient_of_chunk(
    z: Tensor, ids: Index | None, upstream: Sequence[Tensor], packed: Sequence[Tensor], temperature: Tensor,
    request: Request, wants_temperature: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of a chunk of logits (over the logits themselves, where a kernel writes it) and of its temperatures."""
    if request.backend == "eager":
        leaves = [z.requires_grad_(), temperature.detach().requires_grad_(wants_temperature)]
        with torch.enable_grad():
            made = _packed(leaves[0], leaves[1], ids, request)[:3]
        pairs = [(m, g) for m, g in zip(made, upstream) if m.requires_grad]
        wanted = leaves if wants_temperature else leaves[:1]
        found = torch.autograd.grad([m for m, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True)
        return found[0], (found[1] if wants_temperature else None)
    rows, scalars, log_prob, argmax, _, _, _, saved = packed
    flat, per_row, offsets = (None, 0, None) if ids is None else (ids.ids, ids.per_row, ids.offsets)
    grad_temperature = None
    if wants_temperature:
        grad_temperature = temperature_gradient(
            upstream[0], upstream[2], z, temperature, ids, rows, log_prob, saved, request.width, request.ignore_index,
            request.backend,
        )  # fmt: skip
    backward_into(
        z, upstream[0], upstream[1], upstream[2], z, temperature, flat, per_row, offsets, rows, scalars, saved,
        request.width, request.ignore_index, argmax, request.backend,
    )  # fmt: skip
    return z, grad_temperature


class LinearStatistics(torch.autograd.Function):
    """Forward keeps a few numbers per row; backward makes the logits again, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, request: Request
    ) -> tuple[Tensor, ...]:
        with without_autocast(hidden):
            layer = make_linear(
                hidden, weight, bias, request.dtype, request.width, request.scale, request.softcap
            )  # fmt: skip
            out = forward(layer, temperature, request)
        ctx.mark_non_differentiable(*out[3:])
        ctx.save_for_backward(hidden, weight, bias, temperature, *out)
        ctx.request = request
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, temperature, *packed = ctx.saved_tensors
        request: Request = ctx.request
        wants_hidden, wants_weight, wants_bias, wants_temperature, _ = ctx.needs_input_grad
        layer = make_linear(hidden, weight, bias, request.dtype, request.width, request.scale, request.softcap)
        buffers = 1 if request.softcap is None else 2
        size = layer.chunk_rows(ROW_BYTES, buffers)
        parts = list(layer.row_chunks(size))
        sums = Gradients(layer, Wanted.of(hidden, weight, bias, ctx.needs_input_grad), len(parts))
        buffer, tanh = layer.buffer(size), layer.buffer(size) if request.softcap is not None else None
        temperatures = []
        for part, (ids, tokens) in zip(parts, cut_index(request.index, parts)):
            z = layer.logits(buffer, part, tanh=tanh)
            # selected tokens lie in the third of the upstream gradients and the third of the results
            cut = [g[:, part].contiguous() if i < 2 else g[tokens].contiguous() for i, g in enumerate(upstream[:3])]
            own = [
                t[:, part].contiguous() if axis else t[tokens if i == 2 else part]
                for i, (t, axis) in enumerate(zip(packed, ROW_AXIS))
            ]
            made, for_temperature = _gradient_of_chunk(
                z, ids, cut, own, part_of(temperature, part), request, wants_temperature
            )
            if for_temperature is not None:
                temperatures.append(for_temperature)
            if wants_hidden or wants_weight or wants_bias:
                sums.add(layer.before_cap(made, tanh), part)
        grad_temperature = None
        if wants_temperature:
            whole = temperature.shape[0] == 1
            grad_temperature = torch.zeros_like(temperature)
            if temperatures:
                grad_temperature = torch.stack(temperatures).sum(0) if whole else torch.cat(temperatures)
        bias_size = 0 if bias is None else bias.shape[0]
        return sums.hidden, sums.finished_weight(), sums.finished_bias(bias_size), grad_temperature, None
