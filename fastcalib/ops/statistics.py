"""``statistics``: everything a token loss or a calibration measure needs, from one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import eager
from ..backends import resolve
from ..valid_sets import ValidSets
from . import _gpu
from ._arguments import (
    Index,
    Temperature,
    check_ids,
    check_ignore_index,
    check_logits,
    normalise_index,
    normalise_temperature,
)
from ._statistics import ROW_FIELDS
from .types import TokenStatistics

MAX_RANKED = 16
# What moments=False leaves out.
MOMENTS = ("entropy", "collision", "mean_logit", "var_logit", "sum_logits", "std_logits")


def statistics(
    logits: Tensor,
    index: Tensor | ValidSets | None = None,
    temperature: Temperature = 1.0,
    *,
    ranks: bool = False,
    moments: bool = True,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    validate: bool = False,
) -> TokenStatistics:
    """Statistics of softmax(logits / temperature) for each row, from one read of the logits; differentiable.

    Whatever is computed from the result, the gradient to the logits costs one more read and one write.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64. Any strides; rows are not copied as long as the columns
            are adjacent and two strides describe the leading dimensions.
        index: token ids whose log-probability is wanted: integers (*) or (*, M), or a :class:`ValidSets` of N = prod(*)
            sets. Entries equal to ``ignore_index`` give 0 everywhere. A row all of whose entries are ignored is
            skipped: every statistic 0, argmax -1, gradient exactly 0.
        temperature: a number; a sequence of K numbers, which adds a trailing axis of K to what depends on it; or a
            tensor that broadcasts to the leading dimensions, one temperature a row. Tensors are differentiable.
        ranks: also count ``n_greater``, ``n_equal`` and ``mass_greater`` of the selected tokens, up to 16 a row, in the
            same read. Larger sets go through :func:`fastcalib.ranks`.
        moments: False leaves out (None) entropy, collision, mean_logit, var_logit, sum_logits and std_logits: half the
            arithmetic, for losses that see only log-probabilities.
        vocab_size: columns from here on are padding and take no part in anything; their gradient is 0.
        ignore_index: an id that stands for "no token".
        backend: "auto", "eager", "cpp", "triton" or "cuda".
        validate: on an accelerator, look whether every id is in the vocabulary, which waits for the device. Without it
            a bad id there has log_prob NaN and counts of -1, and takes no part in the gradient; on a CPU it is always
            an error.

    Returns:
        :class:`TokenStatistics`, in float32 (float64 for float64 logits), natural logarithms.

    Raises:
        TypeError: logits or index of a dtype that makes no sense, a DTensor.
        ValueError: shapes that do not fit, an id outside [0, vocab_size), a temperature that is not positive and
                finite.

    Sources: spec section 1 (derived); temperature scaling after Guo et al. 2017 (arXiv 1706.04599).

    Example:
        >>> import torch, fastcalib
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
        >>> s = fastcalib.statistics(logits, torch.tensor([2]), temperature=[0.5, 1.0])
        >>> s.entropy.exp()
        tensor([[4., 4.]], grad_fn=<ExpBackward0>)
        >>> s.log_prob.sum().backward(); logits.grad
        tensor([[-0.7500, -0.7500,  2.2500, -0.7500]])
    """
    width = check_logits(logits, vocab_size)
    check_ignore_index(ignore_index)
    ids = None if index is None else normalise_index(index, logits)
    temperatures, has_axis = normalise_temperature(temperature, logits)
    if ranks:
        _check_ranked(ids)
    if validate and ids is not None:
        _gpu.validate_ids(ids, width, ignore_index)
    leading = tuple(logits.shape[:-1])
    axis = (temperatures.shape[1],) if has_axis else ()
    selected = () if ids is None else ids.shape
    backend = resolve(backend, logits.device, logits.dtype)
    if backend == "eager":
        every = _shape_eager(_eager(logits, temperatures, ids, width, ignore_index, ranks), leading, selected, axis)
        return every if moments else _without_moments(every)
    packed = torch.ops.fastcalib.statistics(
        logits, temperatures, None if ids is None else ids.ids, 0 if ids is None else ids.per_row,
        None if ids is None else ids.offsets, width, ignore_index, ranks, backend,
        moments or temperatures.requires_grad,
    )  # fmt: skip
    return unpack(packed, leading, selected if ids is not None else None, axis, ranks, moments)


def unpack(
    packed: Sequence[Tensor],
    leading: tuple[int, ...],
    selected: tuple[int, ...] | None,
    axis: tuple[int, ...],
    ranks: bool,
    moments: bool,
) -> TokenStatistics:
    """The operation's packed results in the shapes of the caller. ``selected``: that of the index, None without one."""
    rows, scalars, log_prob, argmax, n_greater, n_equal, mass, saved = packed
    # One view of the packed result, then one unbind: views cost more than the kernel where rows are short.
    every = TokenStatistics._make(
        (
            *rows.reshape(len(ROW_FIELDS), *leading, *axis).unbind(0),
            argmax.reshape(leading),
            *scalars.reshape(2, *leading).unbind(0),
            saved[:, 0].reshape(leading),
            None if selected is None else log_prob.reshape((*selected, *axis)),
            n_greater.reshape(selected) if ranks and selected is not None else None,
            n_equal.reshape(selected) if ranks and selected is not None else None,
            mass.reshape((*selected, *axis)) if ranks and selected is not None else None,
        )
    )
    return every if moments else _without_moments(every)


def _without_moments(stats: TokenStatistics) -> TokenStatistics:
    return TokenStatistics(**{**stats._asdict(), **dict.fromkeys(MOMENTS)})


def _check_ranked(ids: Index | None) -> None:
    if ids is None:
        raise ValueError("ranks=True needs an index: the tokens whose rank is wanted")
    if ids.offsets is None:
        most = ids.per_row
    elif torch.compiler.is_compiling() or ids.ids.is_cuda:
        return  # to look would be a synchronisation; the kernels for accelerators take any number
    else:
        most = int(ids.offsets.diff().max()) if ids.offsets.numel() > 1 else 0
    if most > MAX_RANKED:
        raise ValueError(
            f"statistics(ranks=True) counts up to {MAX_RANKED} selected tokens a row, got {most}; "
            "use fastcalib.ranks for larger sets"
        )


def _eager(
    logits: Tensor, temperature: Tensor, ids: Index | None, width: int, ignore_index: int, ranks: bool
) -> TokenStatistics:
    flat = logits[..., :width].reshape(-1, width)
    if ids is None:
        return eager.statistics(flat, temperature)
    check_ids(ids, width, ignore_index)
    row_of = ids.rows(flat.shape[0])
    ignored = ids.ids == ignore_index
    total = torch.zeros(flat.shape[0], dtype=torch.int64, device=flat.device)
    dropped = total.index_add(0, row_of, ignored.to(torch.int64))
    total = total.index_add(0, row_of, torch.ones_like(row_of))
    return eager.statistics(
        flat,
        temperature,
        ids.ids,
        row_of,
        ranks=ranks,
        ignore_index=ignore_index,
        skipped=(total > 0) & (dropped == total),
    )


def _shape_eager(
    result: TokenStatistics, leading: tuple[int, ...], selected: tuple[int, ...], axis: tuple[int, ...]
) -> TokenStatistics:
    """The reference's (N, K), (nnz, K), (N,) and (nnz,) in the shapes of the caller."""
    shapes = dict.fromkeys(ROW_FIELDS, (*leading, *axis))
    shapes |= dict.fromkeys(("log_prob", "mass_greater"), (*selected, *axis))
    shapes |= dict.fromkeys(("n_greater", "n_equal"), selected)
    fields = result._asdict().items()
    return TokenStatistics._make(None if t is None else t.reshape(shapes.get(f, leading)) for f, t in fields)
