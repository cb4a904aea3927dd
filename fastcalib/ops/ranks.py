"""``ranks``: exact counts and masses above thresholds or selected tokens, without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..backends import extension, resolve
from ..eager.softmax import statistics_dtype
from ..valid_sets import ValidSets
from . import _gpu
from ._arguments import (
    Index,
    Temperature,
    check_ids,
    check_ignore_index,
    check_logits,
    flat_index,
    normalise_index,
    normalise_temperature,
    raise_bad_id,
    row_layout,
    with_axis,
)
from ._library import LIBRARY
from .types import TokenRanks

LIBRARY.define(
    "ranks(Tensor logits, Tensor? index, Tensor? thresholds, SymInt per_row, Tensor? offsets, Tensor? temperature, "
    "SymInt vocab_size, int ignore_index, str backend='auto') "
    "-> (Tensor n_greater, Tensor n_equal, Tensor mass_greater)"
)


def _allocate(
    logits: Tensor, index: Tensor | None, thresholds: Tensor | None, temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    given = index if index is not None else thresholds
    assert given is not None
    nnz = given.shape[0]
    k = 0 if temperature is None else temperature.shape[1]
    counts = torch.empty(nnz, dtype=torch.int64, device=logits.device)
    mass = torch.empty(nnz, k, dtype=statistics_dtype(logits.dtype), device=logits.device)
    return counts, torch.empty_like(counts), mass


def _forward(
    logits: Tensor,
    index: Tensor | None,
    thresholds: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    temperature: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    out = _allocate(logits, index, thresholds, temperature)
    if _gpu.serves(logits, backend):
        _gpu.ranks(out, logits, index, thresholds, per_row, offsets, temperature, vocab_size, ignore_index, backend)
        return out
    layout = row_layout(logits)
    if thresholds is not None:
        thresholds = thresholds.contiguous()
    if temperature is not None:
        temperature = temperature.contiguous()
    bad = extension().ranks(
        *layout.args(),
        vocab_size,
        0 if index is None else index.data_ptr(),
        0 if thresholds is None else thresholds.data_ptr(),
        per_row,
        0 if offsets is None else offsets.data_ptr(),
        ignore_index,
        0 if temperature is None else temperature.data_ptr(),
        0 if temperature is None else temperature.shape[0],
        0 if temperature is None else temperature.shape[1],
        *(t.data_ptr() for t in out),
        torch.get_num_threads(),
    )
    if bad >= 0:
        assert index is not None
        raise_bad_id(flat_index(index, per_row, offsets, logits), bad, vocab_size, ignore_index)
    return out


def _forward_fake(
    logits: Tensor,
    index: Tensor | None,
    thresholds: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    temperature: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(logits, index, thresholds, temperature)


def _setup_context(ctx: object, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output)  # type: ignore[attr-defined]


def _autograd(ctx: object, *_: object) -> tuple:
    return (None,) * 9  # counts have no gradient


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("ranks", _forward, _device)
torch.library.register_fake("fastcalib::ranks", _forward_fake, lib=LIBRARY)
torch.library.register_autograd("fastcalib::ranks", _autograd, setup_context=_setup_context, lib=LIBRARY)


def ranks(
    logits: Tensor,
    index: Tensor | ValidSets | None = None,
    *,
    thresholds: Tensor | None = None,
    temperature: Temperature | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    validate: bool = False,
) -> TokenRanks:
    """How many tokens, and how much probability, lie above each selected token (or each threshold) of a row.

    Counts are exact integers, ties are told apart (``n_equal``), and the vocabulary is neither sorted nor copied:
    one read of the logits whatever the number of thresholds. Comparisons are IEEE in the dtype of the logits; a NaN is
    neither greater nor equal, and a row without a softmax has NaN masses. Not differentiable.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        index: token ids (*), (*, M), or a :class:`ValidSets` of N = prod(*) sets. A selected token is not counted in
            its own ``n_equal``. Entries equal to ``ignore_index`` give 0.
        thresholds: numbers (*) or (*, M) to compare with instead of an index.
        temperature: None for counts alone; else as in :func:`fastcalib.statistics`, and ``mass_greater`` is
            sum of p_v over the tokens with z_v above the threshold.
        vocab_size: columns from here on are padding and not counted.
        ignore_index: an id that stands for "no token".
        backend: "auto", "eager", "cpp", "triton" or "cuda".
        validate: on an accelerator, look whether every id is in the vocabulary, which waits for the device. Without it
            a bad id there has counts of -1 and mass NaN.

    Returns:
        :class:`TokenRanks`; fields shaped like the index or thresholds (flat (nnz,) for ValidSets), masses plus [K].

    Raises:
        TypeError, ValueError: as :func:`fastcalib.statistics`, and for both or neither of index and thresholds.

    Source: spec section 3 (derived). The rank of a valid token underlies order calibration in Banayeeanzade et al. 2026
    (arXiv 2605.11128), Definition 4.1.

    Example:
        >>> import torch, fastcalib
        >>> r = fastcalib.ranks(torch.tensor([[4.0, 1.0, 3.0, 1.0]]), torch.tensor([[0, 1]]), temperature=1.0)
        >>> r.n_greater.tolist(), r.n_equal.tolist()
        ([[0, 2]], [[0, 1]])
    """
    width = check_logits(logits, vocab_size)
    if (index is None) == (thresholds is None):
        raise ValueError("ranks needs exactly one of index (token ids) and thresholds (numbers)")
    check_ignore_index(ignore_index)
    temperatures, has_axis = None, False
    if temperature is not None:
        temperatures, has_axis = normalise_temperature(temperature, logits)
        temperatures = temperatures.detach()
    bounds = None
    if index is not None:
        ids = normalise_index(index, logits)
    else:
        ids, bounds = _normalise_thresholds(thresholds, logits)
    if validate and bounds is None:
        _gpu.validate_ids(ids, width, ignore_index)
    rows = max(logits.shape[:-1].numel(), 1)
    backend = _gpu.backend_for_ranks(
        backend, resolve(backend, logits.device, logits.dtype, "ranks"), ids.per_row or ids.ids.shape[0] // rows
    )
    if backend == "eager":
        n_greater, n_equal, mass = _eager(
            logits, None if bounds is not None else ids.ids, bounds, ids, temperatures, width, ignore_index
        )
    else:
        n_greater, n_equal, mass = torch.ops.fastcalib.ranks(
            logits, None if bounds is not None else ids.ids, bounds, ids.per_row, ids.offsets, temperatures, width,
            ignore_index, backend,
        )  # fmt: skip
    shape = ids.shape
    if mass is not None and temperatures is not None:
        mass = mass.reshape(*shape, mass.shape[-1]) if has_axis else mass.reshape(shape)
    return TokenRanks(n_greater.reshape(shape), n_equal.reshape(shape), mass if temperatures is not None else None)


def _normalise_thresholds(thresholds: Tensor | None, logits: Tensor) -> tuple[Index, Tensor]:
    if not isinstance(thresholds, Tensor):
        raise TypeError(f"thresholds must be a tensor, got {type(thresholds).__name__}")
    leading, shape = tuple(logits.shape[:-1]), tuple(thresholds.shape)
    if thresholds.device != logits.device:
        raise ValueError(f"thresholds are on {thresholds.device}, the logits are on {logits.device}")
    if shape == leading:
        per_row = 1
    elif shape[:-1] == leading and thresholds.dim() == logits.dim():
        per_row = shape[-1]
    else:
        raise ValueError(
            f"thresholds must have shape {leading} or {with_axis(leading)} for logits of shape {tuple(logits.shape)}, "
            f"got {shape}"
        )
    flat = thresholds.detach().reshape(-1).to(statistics_dtype(logits.dtype))
    return Index(flat, per_row, None, shape), flat


def _eager(
    logits: Tensor,
    index: Tensor | None,
    bounds: Tensor | None,
    ids: Index,
    temperature: Tensor | None,
    width: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    flat = logits.detach()[..., :width].reshape(-1, width)
    row_of = ids.rows(flat.shape[0])
    if index is None:
        assert bounds is not None
        return eager.ranks(flat, bounds, row_of, temperature)
    check_ids(ids, width, ignore_index)
    ignored = index == ignore_index
    selected = flat[row_of, torch.where(ignored, 0, index)]
    n_greater, n_equal, mass = eager.ranks(flat, selected, row_of, temperature, selected=True)
    if mass is not None:
        mass = torch.where(ignored[:, None], 0.0, mass)
    return torch.where(ignored, 0, n_greater), torch.where(ignored, 0, n_equal), mass
