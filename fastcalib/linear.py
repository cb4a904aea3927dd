"""``linear_loss``: any additive token loss of the logits of a linear layer, which never exist as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._fused_job import Job, Numbers, check_ids_first, make_job
from .backends import resolve
from .fused import CHUNK_BYTES
from .losses._base import TokenLoss
from .ops._arguments import Index, check_target
from .ops._linear import Gradients, Linear, Wanted, check_chunk_size, check_linear, make_linear
from .ops._linear_chunks import Request, forward, in_tiles
from .ops._linear_filter import FilteredGradients, check_filter_below


@torch.compiler.disable
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_fn: TokenLoss | Callable[..., Tensor],
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    temperature: float | Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str | None = None,
    num_items_in_batch: int | Tensor | None = None,
    token_weight: Tensor | None = None,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    filter_below: float | None = None,
    **token_args: Any,
) -> Tensor:
    """:func:`fastcalib.fused_loss` of the logits of a linear layer, from hidden states and its weight.

    Some rows at a time, their logits are made in a buffer, their gradient is written over them, and goes from there to
    hidden states, weight and bias: three matrix products, of which none is done twice. Beside inputs and gradients
    there is one chunk of logits. The gradient of a half-precision weight is summed over chunks in float32, and takes
    the memory of float32 until the last; where one chunk holds all rows there is nothing to sum. Without a gradient the
    logits are made as in :func:`fastcalib.linear_statistics`. Rows whose target is ignored are left out of the products
    (on a CPU).

    As in fused_loss the gradients are stored in the dtypes of their tensors before the upstream gradient multiplies
    them: with float16 and a loss scaler use :func:`fastcalib.linear_statistics` and the loss on it, which also keeps
    less where a loss is but a part of the whole, for a fourth product. torch.compile breaks its graph here. On an
    accelerator the products are the library's and the kernels the backend's; not yet run on a GPU.

    Args:
        hidden: (*, D), float32, bfloat16, float16 or float64; any strides. Under autocast the product is in its dtype.
        weight: (V, D), of the same dtype. It may be tied to an embedding.
        target: integer token ids, (*).
        loss_fn, temperature, ignore_index, reduction, num_items_in_batch, backend, **token_args: as for
            :func:`fastcalib.fused_loss`.
        bias: (V,).
        token_weight: what the losses call ``weight`` (of each token), a name that the layer has taken here.
        logit_softcap: c, positive; None for none. The logits are ``c tanh(s (hidden weight^T + bias) / c)``.
        logit_scale: s; None for none.
        chunk_size: rows of logits at a time; None chooses as many as have 256 MB of logits, half as many with a softcap
            (which needs a second buffer).
        vocab_size: rows of the weight from here on are padding; they are not read, and their gradient is 0.
        filter_below: leave out of the products for hidden and weight whatever of the logits' gradient is next to
            nothing: 128 neighbouring logits of a token where each derivative of the token's own loss (its weight
            included, the mean's division not) is below this in absolute value. Inexact: with e for this number, s
            for that division and M for the logits left out of a token, its hidden state's gradient is off by at most
            e s times the sum over M of |weight|, and the gradient of a weight row by at most e s times the sum of
            |hidden| over the tokens left out there; the loss and the bias's gradient are exact. It pays where the model
            is sure: forward and backward take 1.2 to 1.7 times less on one core at 2**-12 (Cut Cross-Entropy's) and an
            entropy of 2 nats, and next to nothing less at 4 nats, where four tiles in five hold some likely token,
            unless likely tokens lie together. None, the default, leaves out nothing. On a CPU only.

    Returns:
        A scalar, float32 (float64 for float64), in nats. It can go through ``backward`` once. hidden, weight and bias
        receive a gradient; what does not require one costs none.

    Raises:
        TypeError: dtypes that differ or make no sense, a DTensor.
        ValueError: reduction="none"; shapes that do not fit; a softcap, scale or chunk_size out of range; a
            temperature, token argument or parameter of the loss that requires a gradient (it would get none).
        RuntimeError: a second backward through one result.

    Source: derived (spec section 1, gradient of any function of the row state).

    Example:
        >>> import torch, fastcalib
        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> loss = fastcalib.linear_loss(hidden, weight, torch.tensor([1, 3]), fastcalib.losses.NLLLoss())
        >>> loss.backward(); weight.grad
        tensor([[ 0.1250,  0.1250],
                [-0.3750,  0.1250],
                [ 0.1250,  0.1250],
                [ 0.1250, -0.3750]])
    """
    logits = check_linear("linear_loss", hidden, weight, bias, logit_softcap, logit_scale, vocab_size)[0]
    check_target("linear_loss", hidden, target, None, "hidden")  # before the checks that know of logits alone
    check_chunk_size("linear_loss", chunk_size, "rows")
    given = (temperature, ignore_index, reduction, vocab_size, backend)
    token_args |= {} if token_weight is None else {"weight": token_weight}
    check_filter_below("linear_loss", filter_below, hidden.device)
    differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    wanting = "hidden, weight and bias" if differentiate else ""
    job = make_job("linear_loss", logits, target, loss_fn, given, num_items_in_batch, token_args, wanting, 1)
    check_ids_first(target, job)
    flat, job = _leave_out_ignored(hidden.reshape(job.kept.shape[0], hidden.shape[-1]), job)
    constants = (logits.dtype, logit_scale, logit_softcap, chunk_size, filter_below)
    if differentiate:
        return _LinearLoss.apply(flat, weight, bias, job, constants)
    layer = make_linear(flat, weight, bias, logits.dtype, job.width, logit_scale, logit_softcap)
    return _without_gradient(layer, job, chunk_size)


def _leave_out_ignored(hidden: Tensor, job: Job) -> tuple[Tensor, Job]:
    """The rows with a target. On a CPU: on an accelerator to look would be a synchronisation."""
    if hidden.device.type != "cpu" or bool(job.kept.all()):
        return hidden, job
    rows = job.kept.nonzero().squeeze(-1)
    shared = job.temperatures.shape[0] == 1
    return hidden.index_select(0, rows), replace(
        job,
        target=job.target[rows],
        kept=job.kept[rows],
        tokens={name: value[rows] for name, value in job.tokens.items()},
        temperatures=job.temperatures if shared else job.temperatures[rows],
    )


def _without_gradient(layer: Linear, job: Job, chunk_size: int | None) -> Tensor:
    settings, like = job.settings, layer.hidden
    backend = resolve(settings.backend, like.device, like.dtype)
    target = Index(job.target, 1, None, tuple(job.target.shape))
    request = Request(
        target, job.width, settings.ignore_index, False, job.moments, backend, like.dtype, layer.scale, layer.softcap,
        None,
    )  # fmt: skip
    if backend != "cpp" and not in_tiles(layer, job.temperatures, request):
        return _loop(layer, job, chunk_size, None)
    numbers = Numbers(job, forward(layer, job.temperatures, request))
    loss = job.per_token(numbers.stats, slice(0, layer.n_rows))
    return job.reduce([(loss, numbers.log_prob)], like)


def _loop(
    layer: Linear, job: Job, chunk_size: int | None, gradients: Callable[[int], Gradients] | None
) -> Tensor:  # fmt: skip
    """The reduced loss, chunk of rows by chunk of rows. ``gradients``: called with the number of chunks, makes what is
    given each chunk's gradient."""
    bent = layer.softcap is not None and gradients is not None
    size = chunk_size or layer.chunk_rows(CHUNK_BYTES, 2 if bent else 1)
    parts = list(layer.row_chunks(size))
    sums = None if gradients is None else gradients(len(parts))
    scale = None if sums is None else job.scale(layer.hidden)
    chunk, _ = job.chunk(layer.hidden, sums is not None)
    buffer, tanh = layer.buffer(size), layer.buffer(size) if bent else None
    made = []
    for part in parts:
        z = layer.logits(buffer, part, tanh=tanh)
        made.append(chunk(job, z, part, scale, None if sums is None else z))
        if sums is not None:
            sums.add(layer.before_cap(z, tanh), part)
    return job.reduce(made, layer.hidden)


class _LinearLoss(torch.autograd.Function):
    """The reduced loss, with its gradients in hand already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, constants: tuple) -> Tensor:
        dtype, scale, softcap, chunk_size, filter_below = constants
        layer = make_linear(hidden, weight, bias, dtype, job.width, scale, softcap)
        wanted = Wanted.of(hidden, weight, bias, ctx.needs_input_grad)
        sums: list[Gradients] = []

        def make(chunks: int) -> Gradients:
            if filter_below is None:
                sums.append(Gradients(layer, wanted, chunks))
            else:
                limit = filter_below * float(job.scale(hidden))
                sums.append(FilteredGradients(layer, wanted, chunks, limit))
            return sums[0]

        loss = _loop(layer, job, chunk_size, make)
        # Not save_for_backward: each gradient must be let go when it is handed out, so that it can be taken over.
        ctx.gradients = (
            sums[0].hidden,
            sums[0].finished_weight(),
            sums[0].finished_bias(0 if bias is None else bias.shape[0]),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_loss: backward through this result a second time; its gradients were handed out the first "
                "time. Call linear_loss again, or use linear_statistics and the loss on it where a graph is retained"
            )
        # On a CPU looking at the number is free; on an accelerator it would be a synchronisation.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return (*gradients, None, None)
