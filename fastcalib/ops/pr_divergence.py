"""``pr_divergence``: precision and recall of one softmax against another, at many trade-offs in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import eager
from ..backends import extension, resolve
from ..eager.softmax import statistics_dtype
from ..valid_sets import ValidSets
from . import _gpu
from ._arguments import NUMBERS, check_logits, is_fake, row_layout, row_of, temperature_a_row, with_axis
from ._library import LIBRARY
from ._memory import empty_like_logits
from ._sparse_pr import against_sets
from .types import PRDivergence

_DENSE = (
    "Tensor logits, Tensor teacher, Tensor lam, Tensor temperature, Tensor teacher_temperature, Tensor? ignored, "
    "SymInt vocab_size"
)
LIBRARY.define(f"pr_divergence({_DENSE}, str backend='auto') -> (Tensor alpha, Tensor beta, Tensor mass, Tensor norms)")
LIBRARY.define(
    f"pr_divergence_backward(Tensor grad_alpha, Tensor grad_beta, {_DENSE}, Tensor mass, Tensor norms, "
    "bool logits_grad, bool teacher_grad, bool temperature_grad, str backend='auto') "
    "-> (Tensor grad_logits, Tensor grad_teacher, Tensor grad_temperature)"
)


def _allocate(logits: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rows, count = math.prod(logits.shape[:-1]), lam.shape[0]
    alpha = torch.empty(n_rows, count, dtype=statistics_dtype(logits.dtype), device=logits.device)
    mass = torch.empty(2, n_rows, count, dtype=torch.float64, device=logits.device)
    return alpha, torch.empty_like(alpha), mass, mass.new_empty(n_rows, 4)


def _pair_arguments(
    logits: Tensor,
    teacher: Tensor,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
    mass: Tensor,
    norms: Tensor,
) -> tuple[list[int], list[Tensor]]:
    """What both C++ functions take first, and the tensors that must outlive the call."""
    student, other = row_layout(logits), row_layout(teacher)
    keep = [t.contiguous() for t in (temperature, teacher_temperature, lam, mass, norms)]
    if ignored is not None:
        keep.append(ignored.contiguous())
    _, _, _, *other_strides = other.args()
    arguments = [
        *student.args(), other.tensor.data_ptr(), *other_strides, vocab_size,
        keep[0].data_ptr(), keep[0].shape[0], keep[1].data_ptr(), keep[1].shape[0], keep[2].data_ptr(), lam.shape[0],
        0 if ignored is None else keep[5].data_ptr(), keep[3].data_ptr(), keep[4].data_ptr(), torch.get_num_threads(),
    ]  # fmt: skip
    return arguments, [*keep, student.tensor, other.tensor]


def _forward(
    logits: Tensor,
    teacher: Tensor,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = alpha, beta, mass, norms = _allocate(logits, lam)
    if _gpu.serves(logits, backend):
        _gpu.pr_divergence_forward(
            out, logits, teacher, lam, temperature, teacher_temperature, ignored, vocab_size, backend
        )  # fmt: skip
        return out
    arguments, _keep = _pair_arguments(
        logits, teacher, lam, temperature, teacher_temperature, ignored, vocab_size, mass, norms
    )  # fmt: skip
    extension().pr_divergence_forward(*arguments, alpha.data_ptr(), beta.data_ptr())
    return out


def _forward_fake(
    logits: Tensor,
    teacher: Tensor,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _allocate(logits, lam)


def _backward(
    grad_alpha: Tensor,
    grad_beta: Tensor,
    logits: Tensor,
    teacher: Tensor,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
    mass: Tensor,
    norms: Tensor,
    logits_grad: bool,
    teacher_grad: bool,
    temperature_grad: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.empty(0, dtype=logits.dtype, device=logits.device)
    grad_logits = empty_like_logits(logits) if logits_grad else none
    grad_teacher = empty_like_logits(teacher) if teacher_grad else none.clone()
    rows = grad_alpha.shape[0] if temperature_grad else 0
    grad_temperature = torch.zeros(rows, 2, dtype=torch.float64, device=logits.device)
    grad_alpha, grad_beta = grad_alpha.contiguous(), grad_beta.contiguous()
    if _gpu.serves(logits, backend):
        _gpu.pr_divergence_backward(
            grad_logits if logits_grad else None, grad_teacher if teacher_grad else None,
            grad_temperature if temperature_grad else None, grad_alpha, grad_beta, logits, teacher, lam, temperature,
            teacher_temperature, ignored, vocab_size, mass, norms, backend,
        )  # fmt: skip
        return grad_logits, grad_teacher, grad_temperature
    arguments, _keep = _pair_arguments(
        logits, teacher, lam, temperature, teacher_temperature, ignored, vocab_size, mass, norms
    )  # fmt: skip
    extension().pr_divergence_backward(
        *arguments,
        grad_alpha.data_ptr(),
        grad_beta.data_ptr(),
        grad_logits.data_ptr() if logits_grad else 0,
        logits.shape[-1],
        grad_teacher.data_ptr() if teacher_grad else 0,
        teacher.shape[-1],
        grad_temperature.data_ptr() if temperature_grad else 0,
    )
    return grad_logits, grad_teacher, grad_temperature


def _backward_fake(
    grad_alpha: Tensor,
    grad_beta: Tensor,
    logits: Tensor,
    teacher: Tensor,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
    mass: Tensor,
    norms: Tensor,
    logits_grad: bool,
    teacher_grad: bool,
    temperature_grad: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    none = (0,)
    return (
        torch.empty(logits.shape if logits_grad else none, dtype=logits.dtype, device=logits.device),
        torch.empty(teacher.shape if teacher_grad else none, dtype=teacher.dtype, device=teacher.device),
        torch.empty(
            grad_alpha.shape[0] if temperature_grad else 0, 2, dtype=torch.float64, device=logits.device
        ),
    )  # fmt: skip


def _setup_context(ctx: object, inputs: tuple, output: tuple) -> None:
    *tensors, vocab_size, backend = inputs
    _, _, mass, norms = output
    ctx.mark_non_differentiable(mass, norms)  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors, mass, norms)  # type: ignore[attr-defined]
    ctx.constants = (vocab_size, backend)  # type: ignore[attr-defined]


def _autograd(ctx: object, grad_alpha: Tensor, grad_beta: Tensor, *_: object) -> tuple:
    logits, teacher, lam, temperature, teacher_temperature, ignored, mass, norms = ctx.saved_tensors  # type: ignore[attr-defined]
    vocab_size, backend = ctx.constants  # type: ignore[attr-defined]
    needs_logits, needs_teacher, _lam, needs_own, needs_other = ctx.needs_input_grad[:5]  # type: ignore[attr-defined]
    grad_logits, grad_teacher, per_row = torch.ops.fastcalib.pr_divergence_backward(
        grad_alpha, grad_beta, logits, teacher, lam, temperature, teacher_temperature, ignored, vocab_size, mass, norms,
        needs_logits, needs_teacher, needs_own or needs_other, backend,
    )  # fmt: skip

    def of(side: int, given: Tensor) -> Tensor:
        column = per_row[:, side : side + 1]
        return column if given.shape[0] == column.shape[0] else column.sum(0, keepdim=True)

    return (
        grad_logits if needs_logits else None,
        grad_teacher if needs_teacher else None,
        None,
        of(0, temperature) if needs_own else None,
        of(1, teacher_temperature) if needs_other else None,
        None,
        None,
        None,
    )


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("pr_divergence", _forward, _device)
    LIBRARY.impl("pr_divergence_backward", _backward, _device)
torch.library.register_fake("fastcalib::pr_divergence", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastcalib::pr_divergence_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("fastcalib::pr_divergence", _autograd, setup_context=_setup_context, lib=LIBRARY)


def pr_divergence(
    logits: Tensor,
    teacher: Tensor | ValidSets,
    lam: float | Sequence[float] | Tensor,
    *,
    weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    ignored: Tensor | None = None,
    backend: str = "auto",
) -> PRDivergence:
    """Precision alpha and recall beta of Q = softmax(logits / temperature) against P, for each trade-off lam.

    ``alpha_lam = sum_v min(lam P_v, Q_v)`` and ``beta_lam = alpha_lam / lam``. Over lam in (0, inf) the points
    (beta, alpha) are the precision-recall curve of Q against P, lam the slope of the ray through each
    (:func:`fastcalib.angles` gives evenly spread ones, :func:`fastcalib.pr_curve` the curve). lam = 1 gives one minus
    the total variation; lam = inf the limit alpha = Q(support of P), lam = 0 the limit beta = P(support of Q).

    P is the softmax of a teacher's logits (dense), or lives on a valid set (sparse). Dense: one read of both rows for
    the normalisers and another look at them while they are in the cache, whatever the number of lam. Sparse: one read
    of the logits.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64: the student's.
        teacher: logits (*, V) of a teacher over the same vocabulary; of another dtype, both are converted to the one
            that holds both. With a ``vocab_size`` the two may differ in their number of columns. Or a
            :class:`ValidSets` of N = prod(*) sets.
        lam: a number >= 0, inf allowed; a sequence or a tensor (L,) adds a trailing axis of L. A constant.
        weights: (nnz,), with a ValidSets only: P is proportional to them in each set; None is uniform. A constant.
        temperature: of the student; a number, or a tensor that broadcasts to (*).
        teacher_temperature: of the teacher; weights are raised to the power 1 / teacher_temperature.
        vocab_size: columns from here on are padding on both sides: no part in anything, gradient 0.
        ignored: bool, broadcasts to (*): rows that are not looked at, alpha and beta 0, gradient exactly 0.
        backend: "auto", "eager", "cpp" or "triton" (not yet run on a GPU).

    Returns:
        :class:`PRDivergence` of alpha and beta, (*) or (*, L), float32 (float64 for float64). A row without a softmax
        on either side, an empty set included, is NaN. A token is outside a support where its logit is -inf, or so low
        that (z - max) / T is beyond the range of float32.

        Differentiable in the logits, the teacher's logits and both temperatures, in one read of both rows and one write
        for each gradient. At a tie Q_v = lam P_v, where alpha has a kink, the gradient is that from above in lam P:
        ``d alpha/dz_v = Q_v (1[Q_v < lam P_v] - A) / T`` with ``A = sum_u Q_u 1[Q_u < lam P_u]``. beta_inf and alpha_0
        are constants, and so is beta_0 for the student (alpha_inf for the teacher). Against a ValidSets the gradient is
        that of the student's logits and temperature.

    Raises:
        TypeError: logits, teacher, weights or ignored of a type or dtype that makes no sense; weights with a dense
            teacher.
        ValueError: shapes that do not fit, lam negative or NaN, lam or weights that require a gradient, weights that
            are negative or not finite, and as :func:`fastcalib.statistics`.

    Source: Verine et al., NeurIPS 2023 and ICML 2025 (arXiv 2508.09654), after Sajjadi et al. 2018 (arXiv 1806.00035);
    spec section 4. Gradients derived (csrc/cpu/pr_divergence.h).

    Example:
        >>> import torch, fastcalib
        >>> student = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])  # on two of four tokens
        >>> d = fastcalib.pr_divergence(student, torch.zeros(1, 4), [0.0, 1.0, float("inf")])
        >>> d.alpha, d.beta
        (tensor([[0.0000, 0.5000, 1.0000]]), tensor([[0.5000, 0.5000, 0.0000]]))
        >>> sets = fastcalib.ValidSets.from_lists([[0, 1, 2, 3]])
        >>> fastcalib.pr_divergence(student, sets, 1.0).alpha
        tensor([0.5000])
    """
    width = check_logits(logits, vocab_size)
    lams, has_axis = normalise_lam(lam, logits.device)
    leading = tuple(logits.shape[:-1])
    rows = _normalise_ignored(ignored, logits)
    if isinstance(teacher, ValidSets):
        alpha, beta = against_sets(
            logits, teacher, lams, weights, temperature, teacher_temperature, width, rows, backend
        )  # fmt: skip
    else:
        if weights is not None:
            raise TypeError("weights belong to a ValidSets; a dense teacher has its logits")
        logits, teacher = _check_pair(logits, teacher, vocab_size, width)
        own = temperature_a_row("temperature", temperature, logits)
        other = temperature_a_row("teacher_temperature", teacher_temperature, teacher)
        backend = resolve(backend, logits.device, logits.dtype, "pr_divergence")
        if backend == "eager":
            flat, against = (x[..., :width].reshape(-1, width) for x in (logits, teacher))
            alpha, beta = eager.pr_divergence(flat, against, lams, own, other, rows)
        else:
            alpha, beta, _, _ = torch.ops.fastcalib.pr_divergence(
                logits, teacher, lams, own, other, rows, width, backend
            )  # fmt: skip
    shape = (*leading, lams.shape[0]) if has_axis else leading
    return PRDivergence(alpha.reshape(shape), beta.reshape(shape))


def _check_pair(logits: Tensor, teacher: Tensor, vocab_size: int | None, width: int) -> tuple[Tensor, Tensor]:
    """The teacher's logits fit the student's; both in one dtype."""
    if not isinstance(teacher, Tensor):
        raise TypeError(
            f"teacher must be a tensor of logits (*, V) or a ValidSets, got {type(teacher).__name__}; "
            "ValidSets.from_lists(sets) makes the latter"
        )
    there = check_logits(teacher, vocab_size, "teacher")
    if teacher.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"teacher must have the leading dimensions {tuple(logits.shape[:-1])} of the logits, got "
            f"{tuple(teacher.shape)}; expand it if one row serves several"
        )
    if there != width:
        raise ValueError(
            f"teacher has {there} columns, the logits have {width}: they must be over the same vocabulary; pass "
            "vocab_size, the number of real tokens, if one of them is padded"
        )
    if teacher.device != logits.device:
        raise ValueError(f"teacher is on {teacher.device}, the logits are on {logits.device}")
    dtype = torch.promote_types(logits.dtype, teacher.dtype)
    return logits.to(dtype), teacher.to(dtype)


def normalise_lam(lam: float | Sequence[float] | Tensor, device: torch.device) -> tuple[Tensor, bool]:
    """lam as float64 (L,), and whether results carry an axis of L."""
    if isinstance(lam, Tensor):
        if not lam.dtype.is_floating_point:
            raise TypeError(f"a lam tensor must be floating point, got {lam.dtype}")
        if lam.dim() > 1 or lam.numel() == 0:
            raise ValueError(f"lam must be a number or have shape (L,) with L >= 1, got shape {tuple(lam.shape)}")
        if lam.requires_grad:
            raise ValueError("lam is a constant and gets no gradient: pass lam.detach()")
        if not torch.compiler.is_compiling() and lam.device.type == "cpu" and not is_fake(lam):
            for value in lam[~(lam >= 0)][:1].tolist():
                raise ValueError(f"lam must be >= 0 (inf allowed), got {value}")
        return lam.reshape(-1).to(device, torch.float64), lam.dim() == 1
    has_axis = isinstance(lam, Sequence) and not isinstance(lam, (str, bytes))
    values = [_check_lam(value) for value in lam] if has_axis else [_check_lam(lam)]  # type: ignore[union-attr]
    if not values:
        raise ValueError("lam is an empty sequence; pass at least one number")
    return row_of(values, device)[0], has_axis


def _check_lam(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"lam must be a number, a sequence of numbers or a tensor (L,), got {value!r}")
    if not value >= 0:
        raise ValueError(f"lam must be >= 0 (inf allowed), got {value}")
    return float(value)


def _normalise_ignored(ignored: Tensor | None, logits: Tensor) -> Tensor | None:
    """bool (N,), contiguous."""
    if ignored is None:
        return None
    leading = tuple(logits.shape[:-1])
    if not isinstance(ignored, Tensor) or ignored.dtype != torch.bool:
        got = ignored.dtype if isinstance(ignored, Tensor) else type(ignored).__name__
        raise TypeError(f"ignored must be a bool tensor, True for rows to leave out (target == -100, say), got {got}")
    if ignored.device != logits.device:
        raise ValueError(f"ignored is on {ignored.device}, the logits are on {logits.device}")
    try:
        return ignored.expand(leading).reshape(-1).contiguous()
    except RuntimeError:
        raise ValueError(
            f"ignored must broadcast to the leading dimensions {leading} of logits {with_axis(leading, 'V')}, got "
            f"shape {tuple(ignored.shape)}"
        ) from None
