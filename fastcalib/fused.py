"""``fused_loss``: loss and gradient of any additive token loss in one go, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backends import resolve
from .losses._base import (
    TokenLoss,
    broadcast,
    check_target,
    number_of_items,
    per_token_loss,
    read,
    reduce_loss,
    token_tensors,
)
from .ops import TokenStatistics
from .ops._arguments import BadTokenId, normalise_temperature, outside, raise_bad_target, row_layout, row_of
from .ops._gpu import in_one_launch
from .ops._memory import empty_like_logits
from .ops.statistics import _allocate, backward_into, forward_and_backward_into

# Bytes of logits per chunk. Measured at 256 x 128,256 float32 in place, 2 threads, 48 MB of last-level cache: 34 ms in
# chunks of 8 MB, 22 of 32, 20 of 64, 18 in one. The autograd of one chunk's small tensors (some 0.6 ms) costs more than
# the second read that a warm chunk saves, so chunks are few; a smaller chunk_size pays where memory is slow.
CHUNK_BYTES = 256 << 20


def fused_loss(
    logits: Tensor,
    target: Tensor,
    loss_fn: TokenLoss | Callable[..., Tensor],
    *,
    temperature: float | Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str | None = None,
    num_items_in_batch: int | Tensor | None = None,
    inplace_backward: bool = False,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    **token_args: Any,
) -> Tensor:
    """Loss over all tokens whose gradient is computed along with it, while each chunk of rows is still in cache.

    The same number and the same gradient as the loss module (or the callable) on :func:`fastcalib.statistics`, for
    every loss that is a sum over tokens. With ``inplace_backward=True`` the gradient needs no memory either. The
    gradient is stored in the dtype of the logits before the upstream gradient multiplies it: with float16 logits and a
    loss scaler use the loss itself. torch.compile breaks its graph here, as at any call that runs autograd inside.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        target: integer token ids, (*).
        loss_fn: a module of :mod:`fastcalib.losses`, or any callable
            ``loss_fn(stats: TokenStatistics, target, **token_args) -> loss``, all shaped (n,), that treats tokens one
            by one and is differentiable in the statistics. The values that it gives to ignored tokens do not matter. An
            attribute ``temperatures`` (K numbers) on a callable asks for statistics at these multiples of
            ``temperature``, with a trailing axis of K; an attribute ``moments = False`` says that it reads none of what
            :func:`fastcalib.statistics` leaves out then, ``linear = True`` that it is linear in the statistics, so that
            its gradient needs none of them: both are faster (the latter reads the logits once instead of twice).
        temperature, ignore_index, reduction, vocab_size, backend: None takes the module's setting, for another callable
            1.0, -100, "mean", None and "auto". As in :class:`fastcalib.losses.Options`; a callable may also have a
            sequence of K temperatures, which gives the trailing axis too.
        reduction: "mean" (over the tokens kept) or "sum".
        num_items_in_batch: the result is then sum / num_items_in_batch.
        inplace_backward: write the gradient over the logits, which then hold no logits any more: do not use them, nor
            any view of them, afterwards. Their version counter is bumped, so that autograd notices where it needs them.
        chunk_size: rows at a time; None chooses by bytes.
        **token_args: tensors that broadcast to the target are cut like it and handed to the loss (``weight``,
            ``position``, ...); anything else is handed over as it is.

    Returns:
        A scalar, float32 (float64 for float64 logits), in nats. It can go through ``backward`` once: the gradient is
        computed already and is handed out, not copied. Only the logits receive a gradient.

    Raises:
        ValueError: reduction="none"; shapes that do not fit; a temperature, token argument or parameter of the loss
            that requires a gradient (it would get none); for inplace_backward, logits that are a leaf or whose rows
            share memory.
        RuntimeError: a second backward through one result.

    Source: derived (spec section 1, gradient of any function of the row state).

    Example:
        >>> import torch, fastcalib
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> target = torch.tensor([1, 3])
        >>> fastcalib.fused_loss(logits, target, fastcalib.losses.NLLLoss()).backward()
        >>> logits.grad
        tensor([[ 0.1250, -0.3750,  0.1250,  0.1250],
                [ 0.1250,  0.1250,  0.1250, -0.3750]])
        >>> def brier(stats, target):
        ...     return 1 - 2 * stats.log_prob.exp() + stats.collision
        >>> fastcalib.fused_loss(logits, target, brier)
        tensor(0.7500, grad_fn=<_FusedLossBackward>)
    """
    settings = _settings(loss_fn, temperature, ignore_index, reduction, vocab_size, backend)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    width = check_target(f"fused_loss({name})", logits, target, settings.vocab_size)
    if settings.reduction not in ("mean", "sum"):
        raise ValueError(
            f'fused_loss: reduction must be "mean" or "sum", got {settings.reduction!r}: the gradient is computed '
            "before the upstream gradient of each token could be known; call the loss itself for per-token values"
        )
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"fused_loss: chunk_size must be a positive number of rows or None, got {chunk_size!r}")
    differentiate = logits.requires_grad and torch.is_grad_enabled()
    tokens = {k: broadcast(name, k, v, target) for k, v in token_args.items() if isinstance(v, Tensor)}
    constants = {k: v for k, v in token_args.items() if k not in tokens}
    own: Mapping[str, Any] = {}
    if isinstance(loss_fn, TokenLoss):
        own = loss_fn.own_arguments()
        tokens, constants = token_tensors(loss_fn.formula, own, target, token_args), {}
    if isinstance(settings.temperature, Tensor) and settings.temperature.numel() > 1:
        tokens[_TEMPERATURE] = broadcast(name, "temperature", settings.temperature, target)
    target = target.to(torch.int64)  # a uint8 156 would compare equal to -100
    if differentiate:
        _refuse_other_gradients(loss_fn, settings.temperature, tokens)
        if inplace_backward:
            _check_inplace(logits)
            _check_ids_first(target, width, settings.ignore_index)
    kept = (target != settings.ignore_index).reshape(-1)
    items = None if num_items_in_batch is None else number_of_items(num_items_in_batch, logits.device)
    temperatures, several = _temperatures(loss_fn, settings, own, logits)
    moments, linear = getattr(loss_fn, "moments", True), getattr(loss_fn, "linear", False)
    if isinstance(loss_fn, TokenLoss):
        moments, linear = loss_fn.formula.moments_for(settings), loss_fn.formula.linear_for(settings)
    job = _Job(
        loss_fn, settings, own, width, target.reshape(-1), kept,
        {k: v.reshape(-1) for k, v in tokens.items()}, constants, items, temperatures, several, moments, linear,
        chunk_size or max(1, CHUNK_BYTES // (logits.shape[-1] * logits.element_size())),
    )  # fmt: skip
    try:
        return _FusedLoss.apply(logits, job, inplace_backward) if differentiate else job.run(logits, None)
    except BadTokenId:  # which counts within its chunk
        raise_bad_target(target, width, settings.ignore_index)


# Name under which per-row temperatures travel among the token arguments; no Python argument can be called so.
_TEMPERATURE = "temperature of the row"


@dataclass(frozen=True)
class _Plain:
    """Settings for a callable that is no module of ours."""

    temperature: float | Sequence[float] | Tensor = 1.0
    ignore_index: int = -100
    reduction: str = "mean"
    vocab_size: int | None = None
    backend: str = "auto"


def _settings(loss_fn: object, *given: Any) -> Any:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a loss module or a callable, got {type(loss_fn).__name__}")
    ours = getattr(loss_fn, "__module__", "").startswith("fastcalib.losses.") and not isinstance(loss_fn, TokenLoss)
    if ours or isinstance(loss_fn, type):  # nll and NLLLoss, where NLLLoss() is meant
        kind, name = "class" if isinstance(loss_fn, type) else "function", getattr(loss_fn, "__name__", "")
        raise TypeError(
            "loss_fn must be a loss module such as fastcalib.losses.NLLLoss(), or a callable on the statistics, got "
            f"the {kind} {name}"
        )
    names = ("temperature", "ignore_index", "reduction", "vocab_size", "backend")
    settings = loss_fn.settings if isinstance(loss_fn, TokenLoss) else _Plain()
    return replace(settings, **{k: v for k, v in zip(names, given) if v is not None})


def _factors(loss_fn: object, settings: Any, own: Mapping[str, Any]) -> tuple[float, ...] | None:
    if isinstance(loss_fn, TokenLoss):
        return loss_fn.formula.factors_for(own, settings)
    several = getattr(loss_fn, "temperatures", None)
    return None if several is None else tuple(several)


def _temperatures(loss_fn: object, settings: Any, own: Mapping[str, Any], logits: Tensor) -> tuple[Tensor, bool]:
    """All temperatures, (1 or N, K), checked, and whether the statistics carry the axis of K."""
    temperatures, several = normalise_temperature(settings.temperature, logits)
    factors = _factors(loss_fn, settings, own)
    if factors is None:
        return temperatures, several
    if several:
        raise ValueError(
            "fused_loss: give several temperatures by the argument or by loss_fn.temperatures, not by both"
        )
    normalise_temperature(factors, logits)
    return temperatures * row_of(list(factors), temperatures.device), True


def _refuse_other_gradients(loss_fn: object, temperature: float | Tensor, tokens: Mapping[str, Tensor]) -> None:
    """Everything that would silently get no gradient."""
    wanting = [k for k, v in tokens.items() if v.requires_grad]
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        wanting.append("temperature")
    if isinstance(loss_fn, nn.Module):
        wanting += [f"loss_fn.{k}" for k, p in loss_fn.named_parameters() if p.requires_grad]
    if wanting:
        raise ValueError(
            f"fused_loss: {wanting[-1]} requires a gradient, but only the logits get one here; detach it, or use the "
            "loss without fused_loss"
        )


def _check_inplace(logits: Tensor) -> None:
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "fused_loss: inplace_backward=True would replace the values of a leaf tensor by its own gradient; give it "
            "the output of a computation (a model's logits), or leave inplace_backward=False"
        )
    layout = row_layout(logits)
    if layout.tensor is not logits:
        raise ValueError(
            "fused_loss: inplace_backward=True needs adjacent columns and at most two strides over the rows, got "
            f"strides {logits.stride()} for shape {tuple(logits.shape)}"
        )
    reach = logits.shape[-1]  # elements spanned so far; a larger step keeps rows apart
    steps = [(layout.inner, layout.inner_stride), (layout.n_rows // max(layout.inner, 1), layout.outer_stride)]
    for size, stride in sorted(steps, key=lambda step: step[1]):
        if size > 1 and stride < reach:
            raise ValueError(
                f"fused_loss: rows of the logits share memory (shape {tuple(logits.shape)}, strides "
                f"{logits.stride()}), so their gradients cannot be written in place; leave inplace_backward=False"
            )
        reach += (size - 1) * stride


def _check_ids_first(target: Tensor, width: int, ignore_index: int) -> None:
    """A bad id in a later chunk must not be found when the logits of an earlier one are gone."""
    if target.device.type == "cpu" and bool(outside(target, width, ignore_index).any()):
        raise_bad_target(target, width, ignore_index)


@dataclass(frozen=True)
class _Job:
    """One call, with everything per token flat: (N,)."""

    loss_fn: Any
    settings: Any
    own: Mapping[str, Any]
    width: int
    target: Tensor
    kept: Tensor
    tokens: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    items: int | float | Tensor | None
    temperatures: Tensor  # (1 or N, K), float64
    several: bool  # whether statistics carry the axis of K
    moments: bool  # whether the loss reads more than log-probabilities, maximum and normaliser
    linear: bool  # whether its gradient in the statistics is the same for all of them
    chunk_size: int

    def run(self, logits: Tensor, gradient: Tensor | None) -> Tensor:
        """The reduced loss; writes the gradient where one is given: the logits themselves, or a contiguous tensor."""
        remembers = isinstance(self.loss_fn, TokenLoss) and type(self.loss_fn).observe is not TokenLoss.observe
        backend = resolve(self.settings.backend, logits.device, logits.dtype)
        chunk = _eager_chunk if backend == "eager" else _kernel_chunk
        scale = self._scale(logits) if gradient is not None else None
        if scale is not None and gradient is not None and self._goes_through_at_once(logits, backend):
            loss, _ = _kernel_linear(self, logits, scale, gradient, backend)
            return reduce_loss(loss, self.kept, self.settings.reduction, self.items)
        losses, log_probs = [], []
        flat = None if gradient is None or gradient is logits else gradient.view(-1, logits.shape[-1])
        stop = 0
        for rows in _chunks(logits, self.chunk_size):
            start, stop = stop, stop + rows.shape[:-1].numel()
            out = rows if flat is None else flat[start:stop]
            loss, log_prob = chunk(self, rows, slice(start, stop), scale, out if gradient is not None else None)
            losses.append(loss)
            if remembers:
                log_probs.append(log_prob)
        if remembers and log_probs:
            self.loss_fn.observe(-torch.cat(log_probs), self.kept)
        empty = torch.empty(0, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        return reduce_loss(torch.cat(losses) if losses else empty, self.kept, self.settings.reduction, self.items)

    def _goes_through_at_once(self, logits: Tensor, backend: str) -> bool:
        """Whether one call takes each row through forward and backward; on an accelerator if no moment but sum_logits
        (for label smoothing) is read."""
        if not self.linear or backend != "triton":
            return self.linear and backend == "cpp"
        smoothed = isinstance(self.loss_fn, TokenLoss) and not (
            self.loss_fn.formula.moments or self.settings.entropy_bonus
        )
        return (smoothed or not self.moments) and in_one_launch(logits, self.temperatures, self.width, backend)

    def _scale(self, logits: Tensor) -> Tensor:
        """Upstream gradient of each token."""
        one = torch.ones((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        if self.items is not None:
            return one / self.items
        return one / self.kept.sum() if self.settings.reduction == "mean" else one

    def temperature(self, part: slice) -> float | Tensor:
        rows = self.tokens.get(_TEMPERATURE)
        t = self.settings.temperature
        if rows is not None:
            return rows[part]
        return t.reshape(()) if isinstance(t, Tensor) else t

    def per_token(self, stats: TokenStatistics, part: slice) -> Tensor:
        """The loss of the chunk's tokens, exactly 0 where ignored."""
        target = self.target[part]
        tokens = {k: v[part] for k, v in self.tokens.items() if k != _TEMPERATURE}
        if isinstance(self.loss_fn, TokenLoss):
            return per_token_loss(
                self.loss_fn.formula, self.own, self.settings, stats, target,
                temperature=self.temperature(part), vocab_size=self.width, **tokens,
            )  # fmt: skip
        loss = self.loss_fn(stats, target, **tokens, **self.constants)
        if not isinstance(loss, Tensor) or loss.shape != target.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"fused_loss: loss_fn must return one loss a token, shape {tuple(target.shape)}, got {got}"
            )
        return torch.where(self.kept[part], loss, 0.0)


def _chunks(tensor: Tensor, chunk_size: int) -> Iterator[Tensor]:
    """Views (n, V) or (m, n, V) of at most chunk_size rows, in order, of (*, V) with any strides over the rows."""
    layout = row_layout(tensor)
    if layout.n_rows == 0:
        return
    outer, inner, columns = layout.n_rows // layout.inner, layout.inner, tensor.shape[-1]
    view = layout.tensor.as_strided((outer, inner, columns), (layout.outer_stride, layout.inner_stride, 1))
    if inner < chunk_size:
        yield from view.split(chunk_size // inner)
    else:
        for block in view:
            yield from block.split(chunk_size)


def _eager_chunk(
    job: _Job, rows: Tensor, part: slice, scale: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Through the reference: ordinary autograd on a copy of the chunk."""
    leaf = rows.detach().reshape(-1, rows.shape[-1]).requires_grad_(out is not None)
    settings = job.settings
    factors = _factors(job.loss_fn, settings, job.own)
    with torch.set_grad_enabled(out is not None):
        stats = read(
            leaf, job.target[part], job.temperature(part), factors, moments=job.moments,
            ignore_index=settings.ignore_index, vocab_size=settings.vocab_size, backend="eager",
        )  # fmt: skip
        loss = job.per_token(stats, part)
    assert stats.log_prob is not None
    if out is not None and scale is not None:
        gradient = torch.zeros_like(leaf)
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(
                loss, leaf, scale.to(loss.dtype).expand(loss.shape), materialize_grads=True
            )
        out.copy_(gradient.view(out.shape))
    return loss.detach(), stats.log_prob.detach()


def _kernel_chunk(
    job: _Job, rows: Tensor, part: slice, scale: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Through the kernels: forward, autograd on the few numbers per row alone, backward while the rows are in cache."""
    target, width, ignore = job.target[part], job.width, job.settings.ignore_index
    backend = resolve(job.settings.backend, rows.device, rows.dtype)
    temperature = job.temperatures if job.temperatures.shape[0] == 1 else job.temperatures[part]
    packed = torch.ops.fastcalib.statistics(
        rows, temperature, target, 1, None, width, ignore, False, backend, job.moments
    )
    numbers = _Numbers(job, packed)
    if out is None or scale is None:
        return job.per_token(numbers.stats, part), numbers.log_prob
    loss, (g_rows, g_scalars, g_log_prob) = numbers.differentiate(part, scale)
    backward_into(
        out, g_rows, g_scalars, g_log_prob, rows, temperature, target, 1, None, packed[0], packed[1], packed[7], width,
        ignore, packed[3], backend,
    )  # fmt: skip
    return loss, numbers.log_prob


def _kernel_linear(job: _Job, logits: Tensor, scale: Tensor, out: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """A loss that is linear in the statistics: its gradient in them is the same at any, so they need not be known, and
    one call takes each row through forward and backward."""
    everything = slice(0, job.target.shape[0])
    anywhere = _allocate(logits, job.temperatures, job.target, False)
    for numbers in (*anywhere[:3], anywhere[7]):
        numbers.zero_()
    _, (g_rows, g_scalars, g_log_prob) = _Numbers(job, anywhere).differentiate(everything, scale)
    packed = forward_and_backward_into(
        out, g_rows, g_scalars, g_log_prob, logits, job.temperatures, job.target, job.width, job.settings.ignore_index,
        job.moments, backend,
    )  # fmt: skip
    made = _Numbers(job, packed)
    return job.per_token(made.stats, everything), made.log_prob


class _Numbers:
    """The few numbers per row of a packed result, each a leaf of its own for autograd: views of one packed leaf would
    cost more than the numbers are worth."""

    def __init__(self, job: _Job, packed: Sequence[Tensor]) -> None:
        self.job, self.packed = job, (packed[0], packed[1], packed[2])
        rows, scalars, log_prob, argmax, _, _, _, saved = packed
        per_row, self.log_prob = (rows, log_prob) if job.several else (rows.squeeze(-1), log_prob.squeeze(-1))
        fields: list[Tensor | None] = [*per_row.unbind(0), *scalars.unbind(0), self.log_prob]
        if not job.moments:
            fields = [field if i in _WITHOUT_MOMENTS else None for i, field in enumerate(fields)]
        self.fields = fields
        self.stats = TokenStatistics._make(
            (*fields[:6], argmax, *fields[6:8], saved[:, 0], self.log_prob, None, None, None)
        )

    def differentiate(self, part: slice, scale: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The loss of the tokens, and its gradient in the statistics, packed as these are."""
        leaves = [field for field in self.fields if field is not None]
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            loss = self.job.per_token(self.stats, part)
        gradients: Iterator[Tensor | None] = iter([None] * len(leaves))
        if loss.requires_grad:  # not a constant
            upstream = scale.to(loss.dtype).expand(loss.shape)
            gradients = iter(torch.autograd.grad(loss, leaves, upstream, allow_unused=True))
        each = [None if field is None else next(gradients) for field in self.fields]
        for leaf in leaves:
            leaf.requires_grad_(False)
        rows, scalars, log_prob = self.packed
        packed = _pack(each[:6], rows), _pack(each[6:8], scalars), _pack(each[8:], log_prob[None])[0]
        return loss.detach(), packed


# logsumexp, max_prob and log_prob among the fields of _Numbers.
_WITHOUT_MOMENTS = (0, 2, 8)


def _pack(gradients: list[Tensor | None], like: Tensor) -> Tensor:
    """Gradients of the fields of a packed tensor, side by side as it is; None is 0."""
    out = torch.zeros_like(like)
    for field, gradient in zip(out, gradients):
        if gradient is not None:
            field.copy_(gradient.reshape(field.shape))
    return out


class _FusedLoss(torch.autograd.Function):
    """The reduced loss, with its gradient in hand already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, job: _Job, inplace: bool) -> Tensor:
        values = logits.detach()
        gradient = values if inplace else empty_like_logits(values)
        loss = job.run(values, gradient)
        if inplace:
            torch.autograd.graph.increment_version(logits)
        # Not save_for_backward: the gradient must be let go when it is handed out, so that the logits' accumulator can
        # take the memory over instead of copying it.
        ctx.gradient, ctx.version = gradient, gradient._version
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "fused_loss: backward through this result a second time; its gradient was handed out the first time. "
                "Call fused_loss again, or use the loss without it where a graph is retained"
            )
        if gradient._version != ctx.version:
            raise RuntimeError(
                "fused_loss: with inplace_backward=True the logits hold the gradient, and they were modified in place "
                "before backward"
            )
        # On a CPU looking at the number is free; on an accelerator it would be a synchronisation.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            gradient.mul_(upstream)
        return gradient, None, None
