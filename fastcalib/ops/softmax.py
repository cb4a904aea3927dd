"""``softmax`` and ``log_softmax`` with a temperature, one for all rows or one each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import eager
from ..backends import extension, resolve
from ..eager.softmax import statistics_dtype
from . import _gpu
from ._arguments import NUMBERS, check_logits, normalise_temperature, row_layout
from ._library import LIBRARY
from ._memory import empty_like_logits

LIBRARY.define(
    "softmax(Tensor logits, Tensor temperature, SymInt vocab_size, bool log, str backend='auto') "
    "-> (Tensor output, Tensor logsumexp)"
)
LIBRARY.define(
    "softmax_backward(Tensor grad, Tensor output, Tensor logsumexp, Tensor temperature, SymInt vocab_size, bool log, "
    "bool temperature_grad, str backend='auto') "
    "-> (Tensor grad_logits, Tensor grad_temperature)"
)


def _allocate_logsumexp(logits: Tensor) -> Tensor:
    # It tells backward a row of -inf (gradient 0) from one with a NaN (gradient NaN): the output is NaN for both.
    return torch.empty(math.prod(logits.shape[:-1]), dtype=statistics_dtype(logits.dtype), device=logits.device)


def _forward(
    logits: Tensor, temperature: Tensor, vocab_size: int, log: bool, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    out, logsumexp = empty_like_logits(logits), _allocate_logsumexp(logits)
    if _gpu.serves(logits, backend):
        _gpu.softmax_forward(out, logsumexp, logits, temperature, vocab_size, log, backend)
        return out, logsumexp
    layout, temperature = row_layout(logits), temperature.contiguous()
    extension().softmax_forward(
        *layout.args(),
        vocab_size,
        logits.shape[-1],
        temperature.data_ptr(),
        temperature.shape[0],
        out.data_ptr(),
        logsumexp.data_ptr(),
        log,
        torch.get_num_threads(),
    )
    return out, logsumexp


def _backward(
    grad: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    temperature: Tensor,
    vocab_size: int,
    log: bool,
    temperature_grad: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    layout, temperature = row_layout(grad), temperature.contiguous()
    output = output.contiguous()
    grad_logits = empty_like_logits(grad)
    per_row = torch.zeros(layout.n_rows if temperature_grad else 0, dtype=torch.float64, device=grad.device)
    if _gpu.serves(grad, backend):
        _gpu.softmax_backward(
            grad_logits, per_row if temperature_grad else None, grad, output, logsumexp, temperature, vocab_size, log,
            backend,
        )  # fmt: skip
        return grad_logits, per_row
    extension().softmax_backward(
        *layout.args(),
        vocab_size,
        grad.shape[-1],
        output.data_ptr(),
        logsumexp.data_ptr(),
        temperature.data_ptr(),
        temperature.shape[0],
        grad_logits.data_ptr(),
        per_row.data_ptr() if temperature_grad else 0,
        log,
        torch.get_num_threads(),
    )
    return grad_logits, per_row


def _forward_fake(
    logits: Tensor, temperature: Tensor, vocab_size: int, log: bool, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return out, _allocate_logsumexp(logits)


def _backward_fake(
    grad: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    temperature: Tensor,
    vocab_size: int,
    log: bool,
    temperature_grad: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    n_rows = math.prod(grad.shape[:-1]) if temperature_grad else 0
    return (
        torch.empty(grad.shape, dtype=grad.dtype, device=grad.device),
        torch.empty(n_rows, dtype=torch.float64, device=grad.device),
    )


def _setup_context(ctx: object, inputs: tuple, output: tuple) -> None:
    _, temperature, vocab_size, log, backend = inputs
    ctx.mark_non_differentiable(output[1])  # type: ignore[attr-defined]
    ctx.save_for_backward(*output, temperature)  # type: ignore[attr-defined]
    ctx.constants = (vocab_size, log, backend)  # type: ignore[attr-defined]


def _autograd(ctx: object, grad: Tensor, _: Tensor) -> tuple:
    output, logsumexp, temperature = ctx.saved_tensors  # type: ignore[attr-defined]
    vocab_size, log, backend = ctx.constants  # type: ignore[attr-defined]
    needs_logits, needs_temperature = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
    grad_logits, per_row = torch.ops.fastcalib.softmax_backward(
        grad, output, logsumexp, temperature, vocab_size, log, needs_temperature, backend
    )
    grad_temperature = None
    if needs_temperature:
        grad_temperature = per_row[:, None]
        if temperature.shape[0] != grad_temperature.shape[0]:
            grad_temperature = grad_temperature.sum(0, keepdim=True)
    return grad_logits if needs_logits else None, grad_temperature, None, None, None


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("softmax", _forward, _device)
    LIBRARY.impl("softmax_backward", _backward, _device)
torch.library.register_fake("fastcalib::softmax", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastcalib::softmax_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("fastcalib::softmax", _autograd, setup_context=_setup_context, lib=LIBRARY)


def _call(logits: Tensor, temperature: float | Tensor, vocab_size: int | None, backend: str, log: bool) -> Tensor:
    width = check_logits(logits, vocab_size)
    if not isinstance(temperature, (*NUMBERS, Tensor)):
        raise TypeError(
            f"temperature must be a number or a tensor over the leading dimensions, got {type(temperature).__name__}; "
            "a dense softmax takes one temperature a row (statistics takes several)"
        )
    temperatures, _ = normalise_temperature(temperature, logits)
    backend = resolve(backend, logits.device, logits.dtype, "softmax")
    if backend != "eager":
        return torch.ops.fastcalib.softmax(logits, temperatures, width, log, backend)[0]
    flat = logits[..., :width].reshape(-1, width)
    out = (eager.log_softmax if log else eager.softmax)(flat, temperatures)
    out = out.reshape(*logits.shape[:-1], width)
    padding = logits.shape[-1] - width
    return torch.nn.functional.pad(out, (0, padding), value=-torch.inf if log else 0.0) if padding else out


def softmax(
    logits: Tensor, temperature: float | Tensor = 1.0, *, vocab_size: int | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(logits / temperature) over the last dimension.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        temperature: a number, or a tensor that broadcasts to the leading dimensions (one temperature a row).
        vocab_size: columns from here on are padding: probability 0, gradient 0.
        backend: "auto", "eager", "cpp", "triton" or "cuda".

    Returns:
        (*, V) in the dtype of the logits, computed in float32 (float64 for float64). Differentiable in the logits and
        in a temperature tensor. Masked tokens (-inf) are exactly 0; probabilities below 1.2e-38 are flushed to 0; a row
        that is -inf throughout is NaN with gradient 0.

    Raises:
        TypeError, ValueError: as :func:`fastcalib.statistics`.

    Source: temperature scaling, Guo et al. 2017 (arXiv 1706.04599).

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.softmax(torch.tensor([0.0, 1.0, -torch.inf]), temperature=0.5)
        tensor([0.1192, 0.8808, 0.0000])
    """
    return _call(logits, temperature, vocab_size, backend, log=False)


def log_softmax(
    logits: Tensor, temperature: float | Tensor = 1.0, *, vocab_size: int | None = None, backend: str = "auto"
) -> Tensor:
    """log softmax(logits / temperature) in nats; arguments, edge cases and errors of :func:`softmax`.

    Masked tokens and padding are -inf with gradient exactly 0.

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.log_softmax(torch.tensor([0.0, 1.0]), temperature=0.5)
        tensor([-2.1269, -0.1269])
    """
    return _call(logits, temperature, vocab_size, backend, log=True)
