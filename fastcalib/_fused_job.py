"""One call of a fused loss: its arguments made flat, and what takes a chunk of rows through forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
from .losses._modules import as_module
from .ops import TokenStatistics
from .ops._arguments import normalise_temperature, outside, raise_bad_target, row_layout, row_of
from .ops._gpu import in_one_launch
from .ops._statistics import allocate, backward_into, forward_and_backward_into


def make_job(
    caller: str,
    logits: Tensor,
    target: Tensor,
    loss_fn: TokenLoss | Callable[..., Tensor],
    given: tuple[Any, ...],
    num_items_in_batch: int | Tensor | None,
    token_args: Mapping[str, Any],
    wanting: str,
    chunk_size: int,
) -> Job:
    """Checks, and everything per token made flat. Of the logits only shape, dtype and device are looked at.

    ``given``: temperature, ignore_index, reduction, vocab_size, backend. ``wanting``: what a gradient is computed for,
    in words; empty where none is.
    """
    loss_fn = as_module(loss_fn)
    settings = _settings(loss_fn, *given)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    width = check_target(f"{caller}({name})", logits, target, settings.vocab_size)
    if settings.reduction not in ("mean", "sum"):
        raise ValueError(
            f'{caller}: reduction must be "mean" or "sum", got {settings.reduction!r}: the gradient is computed '
            "before the upstream gradient of each token could be known; call the loss itself for per-token values"
        )
    target = target.to(torch.int64)  # a uint8 156 would compare equal to -100
    tokens = {k: broadcast(name, k, v, target) for k, v in token_args.items() if isinstance(v, Tensor)}
    constants = {k: v for k, v in token_args.items() if k not in tokens}
    own: Mapping[str, Any] = {}
    if isinstance(loss_fn, TokenLoss):
        own = loss_fn.own_arguments()
        tokens, constants = token_tensors(loss_fn.formula, own, target, settings.ignore_index, token_args), {}
    if isinstance(settings.temperature, Tensor) and settings.temperature.numel() > 1:
        tokens[_TEMPERATURE] = broadcast(name, "temperature", settings.temperature, target)
    if wanting:
        _refuse_other_gradients(caller, wanting, loss_fn, settings.temperature, tokens)
    kept = (target != settings.ignore_index).reshape(-1)
    items = None if num_items_in_batch is None else number_of_items(num_items_in_batch, logits.device)
    temperatures, several = _temperatures(caller, loss_fn, settings, own, logits)
    moments, linear = getattr(loss_fn, "moments", True), getattr(loss_fn, "linear", False)
    if isinstance(loss_fn, TokenLoss):
        moments, linear = loss_fn.formula.moments_for(settings), loss_fn.formula.linear_for(settings)
    return Job(
        caller, loss_fn, settings, own, width, target.reshape(-1).contiguous(), kept,
        {k: v.reshape(-1) for k, v in tokens.items()}, constants, items, temperatures, several, moments, linear,
        chunk_size,
    )  # fmt: skip


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
    names = ("temperature", "ignore_index", "reduction", "vocab_size", "backend")
    settings = loss_fn.settings if isinstance(loss_fn, TokenLoss) else _Plain()
    return replace(settings, **{k: v for k, v in zip(names, given) if v is not None})


def _factors(loss_fn: object, settings: Any, own: Mapping[str, Any]) -> tuple[float, ...] | None:
    if isinstance(loss_fn, TokenLoss):
        return loss_fn.formula.factors_for(own, settings)
    several = getattr(loss_fn, "temperatures", None)
    return None if several is None else tuple(several)


def _temperatures(
    caller: str, loss_fn: object, settings: Any, own: Mapping[str, Any], logits: Tensor
) -> tuple[Tensor, bool]:
    """All temperatures, (1 or N, K), checked, and whether the statistics carry the axis of K."""
    temperatures, several = normalise_temperature(settings.temperature, logits)
    factors = _factors(loss_fn, settings, own)
    if factors is None:
        return temperatures, several
    if several:
        raise ValueError(f"{caller}: give several temperatures by the argument or by loss_fn.temperatures, not by both")
    normalise_temperature(factors, logits)
    return temperatures * row_of(list(factors), temperatures.device), True


def _refuse_other_gradients(
    caller: str, wanted: str, loss_fn: object, temperature: float | Tensor, tokens: Mapping[str, Tensor]
) -> None:
    """Everything that would silently get no gradient."""
    wanting = [k for k, v in tokens.items() if v.requires_grad]
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        wanting.append("temperature")
    if isinstance(loss_fn, nn.Module):
        wanting += [f"loss_fn.{k}" for k, p in loss_fn.named_parameters() if p.requires_grad]
    if wanting:
        raise ValueError(
            f"{caller}: {wanting[-1]} requires a gradient, but only {wanted} get one here; detach it, or use the "
            f"loss without {caller}"
        )


def check_ids_first(target: Tensor, job: Job) -> None:
    """A bad id in a later chunk must not be found when the logits of an earlier one are gone."""
    ignore_index = job.settings.ignore_index
    if target.device.type == "cpu" and bool(outside(job.target, job.width, ignore_index).any()):
        raise_bad_target(target.to(torch.int64), job.width, ignore_index)


@dataclass(frozen=True)
class Job:
    """One call, with everything per token flat: (N,)."""

    caller: str
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
        scale = self.scale(logits) if gradient is not None else None
        chunk, linear = self.chunk(logits, gradient is not None)
        if linear:
            loss, _ = chunk(self, logits, slice(0, self.target.shape[0]), scale, gradient)
            return reduce_loss(loss, self.kept, self.settings.reduction, self.items)
        made = []
        flat = None if gradient is None or gradient is logits else gradient.view(-1, logits.shape[-1])
        stop = 0
        for rows in _chunks(logits, self.chunk_size):
            start, stop = stop, stop + rows.shape[:-1].numel()
            out = rows if flat is None else flat[start:stop]
            made.append(chunk(self, rows, slice(start, stop), scale, out if gradient is not None else None))
        return self.reduce(made, logits)

    def chunk(self, logits: Tensor, gradient: bool) -> tuple[Callable[..., tuple[Tensor, Tensor]], bool]:
        """What takes a chunk of rows through forward (and backward), and whether it takes any number of them."""
        backend = resolve(self.settings.backend, logits.device, logits.dtype)
        if backend == "eager":
            return _eager_chunk, False
        linear = gradient and self._goes_through_at_once(logits, backend)
        return (_kernel_linear if linear else _kernel_chunk), linear

    def _goes_through_at_once(self, logits: Tensor, backend: str) -> bool:
        """Whether one call takes each row through forward and backward; with Triton if no moment but sum_logits (for
        label smoothing) is read."""
        if not self.linear or backend == "cpp":
            return self.linear
        smoothed = isinstance(self.loss_fn, TokenLoss) and not (
            self.loss_fn.formula.moments or self.settings.entropy_bonus
        )
        if backend == "triton" and self.moments and not smoothed:
            return False
        return in_one_launch(logits, self.temperatures, self.width, backend)

    def reduce(self, made: list[tuple[Tensor, Tensor]], logits: Tensor) -> Tensor:
        """The loss of all tokens from the losses and log-probabilities of each chunk; a loss with a memory is told."""
        if made and isinstance(self.loss_fn, TokenLoss) and type(self.loss_fn).observe is not TokenLoss.observe:
            self.loss_fn.observe(-torch.cat([log_prob for _, log_prob in made]), self.kept)
        empty = torch.empty(0, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        losses = torch.cat([loss for loss, _ in made]) if made else empty
        return reduce_loss(losses, self.kept, self.settings.reduction, self.items)

    def scale(self, logits: Tensor) -> Tensor:
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
                f"{self.caller}: loss_fn must return one loss a token, shape {tuple(target.shape)}, got {got}"
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
    job: Job, rows: Tensor, part: slice, scale: Tensor | None, out: Tensor | None
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
    job: Job, rows: Tensor, part: slice, scale: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Through the kernels: forward, autograd on the few numbers per row alone, backward while the rows are in cache."""
    target, width, ignore = job.target[part], job.width, job.settings.ignore_index
    backend = resolve(job.settings.backend, rows.device, rows.dtype)
    temperature = job.temperatures if job.temperatures.shape[0] == 1 else job.temperatures[part]
    packed = torch.ops.fastcalib.statistics(
        rows, temperature, target, 1, None, width, ignore, False, backend, job.moments
    )
    numbers = Numbers(job, packed)
    if out is None or scale is None:
        return job.per_token(numbers.stats, part), numbers.log_prob
    loss, (g_rows, g_scalars, g_log_prob) = numbers.differentiate(part, scale)
    backward_into(
        out, g_rows, g_scalars, g_log_prob, rows, temperature, target, 1, None, packed[0], packed[1], packed[7], width,
        ignore, packed[3], backend,
    )  # fmt: skip
    return loss, numbers.log_prob


def _kernel_linear(job: Job, rows: Tensor, part: slice, scale: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """A loss that is linear in the statistics: its gradient in them is the same at any, so they need not be known, and
    one call takes each row through forward and backward."""
    target, backend = job.target[part], resolve(job.settings.backend, rows.device, rows.dtype)
    temperature = job.temperatures if job.temperatures.shape[0] == 1 else job.temperatures[part]
    anywhere = allocate(rows, temperature, target, False)
    for numbers in (*anywhere[:3], anywhere[7]):
        numbers.zero_()
    _, (g_rows, g_scalars, g_log_prob) = Numbers(job, anywhere).differentiate(part, scale)
    packed = forward_and_backward_into(
        out, g_rows, g_scalars, g_log_prob, rows, temperature, target, job.width, job.settings.ignore_index,
        job.moments, backend,
    )  # fmt: skip
    made = Numbers(job, packed)
    return job.per_token(made.stats, part), made.log_prob


class Numbers:
    """The few numbers per row of a packed result, each a leaf of its own for autograd: views of one packed leaf would
    cost more than the numbers are worth."""

    def __init__(self, job: Job, packed: Sequence[Tensor]) -> None:
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


# logsumexp, max_prob and log_prob among the fields of Numbers.
_WITHOUT_MOMENTS = (0, 2, 8)


def _pack(gradients: list[Tensor | None], like: Tensor) -> Tensor:
    """Gradients of the fields of a packed tensor, side by side as it is; None is 0."""
    out = torch.zeros_like(like)
    for field, gradient in zip(out, gradients):
        if gradient is not None:
            field.copy_(gradient.reshape(field.shape))
    return out
