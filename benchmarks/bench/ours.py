"""The calls into fastcalib that are timed. Each function returns a no-argument callable.

Anything that does not exist yet raises here, when the callable is made or first called; the suite reports it as
"not available" and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .problem import Outputs

Call = Callable[[], Outputs]


class NotAvailable(RuntimeError):
    """This version of fastcalib does not have the operation."""


def _library() -> Any:
    try:
        import fastcalib
    except Exception as error:
        raise NotAvailable(f"fastcalib does not import: {error}") from error
    return fastcalib


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        if not hasattr(owner, name):
            raise NotAvailable(f"fastcalib has no {path}")
        owner = getattr(owner, name)
    return owner


def statistics(logits: Tensor, target: Tensor | None, temperatures: Sequence[float], *, ranks: bool = False) -> Call:
    """``fastcalib.statistics`` at one temperature (a float, no axis) or K."""
    function = _attribute(_library(), "statistics")
    temperature = temperatures[0] if len(temperatures) == 1 else list(temperatures)

    def call() -> Outputs:
        s = function(logits, target, temperature, ranks=ranks)
        return {name: value for name, value in s._asdict().items() if value is not None}

    return call


def ranks(logits: Tensor, index: Tensor, temperature: float | None = None) -> Call:
    function = _attribute(_library(), "ranks")

    def call() -> Outputs:
        r = function(logits, index, temperature=temperature)
        return {name: value for name, value in r._asdict().items() if value is not None}

    return call


def pr_divergence(logits: Tensor, teacher: Tensor, lam: Tensor) -> Callable[[Tensor], Tensor]:
    """``logits -> alpha (N, L)`` against a teacher's logits (N, V), or the uniform distribution on an index (N, M)."""
    library = _library()
    function = _attribute(library, "pr_divergence")
    if not teacher.is_floating_point():
        sizes = torch.arange(len(teacher) + 1) * teacher.shape[1]
        target = library.ValidSets(teacher.reshape(-1), sizes)
        return lambda x: function(x, target, lam).alpha
    return lambda x: function(x, teacher, lam).alpha


def dense(name: str, logits: Tensor, temperature: float) -> Call:
    """``fastcalib.softmax`` or ``fastcalib.log_softmax``."""
    function = _attribute(_library(), name)
    return lambda: {"out": function(logits, temperature)}


def functional(name: str, *args: Tensor, **options: Any) -> Call:
    """A drop-in of ``fastcalib.functional``; the result is called "loss"."""
    _import("functional")
    function = _attribute(_library(), f"functional.{name}")
    return lambda: {"loss": function(*args, **options)}


def _import(name: str) -> None:
    """Submodules that ``import fastcalib`` may not have loaded."""
    import importlib

    try:
        importlib.import_module(f"fastcalib.{name}")
    except ImportError as error:
        raise NotAvailable(f"fastcalib has no {name}: {error}") from error


def loss_function(name: str, options: dict[str, float]) -> Callable[[Tensor, Tensor], Tensor]:
    """``(logits, target) -> mean loss`` of one of ``fastcalib.losses``."""
    _import("losses")
    function = _attribute(_library(), f"losses.{name}")
    return lambda logits, target: function(logits, target, **options)


class _Head(torch.autograd.Function):
    """Stands for the layer that made the logits: hands them on as they are, and drops the gradient it gets."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_zeros(1, dtype=torch.float32), None


def fused_in_place(logits: Tensor, target: Tensor) -> Call:
    """NLL and its gradient by ``fastcalib.fused_loss``, the gradient written over the logits (refresh them each time).

    The logits are the output of an autograd node, as in a model, so that the gradient ends in the layer below them.
    """
    _import("losses")
    library = _library()
    fused, loss_fn = _attribute(library, "fused_loss"), _attribute(library, "losses.NLLLoss")()
    token = torch.zeros(1, requires_grad=True)

    def call() -> Outputs:
        head = _Head.apply(token, logits)
        loss = fused(head, target, loss_fn, inplace_backward=True)
        torch.autograd.grad(loss, token)
        return {"loss": loss.detach(), "grad": logits}

    return call


def fused(logits: Tensor, target: Tensor) -> Call:
    """The same with a new gradient."""
    _import("losses")
    library = _library()
    function, loss_fn = _attribute(library, "fused_loss"), _attribute(library, "losses.NLLLoss")()
    leaf = logits.detach().requires_grad_()

    def call() -> Outputs:
        loss = function(leaf, target, loss_fn)
        (grad,) = torch.autograd.grad(loss, leaf)
        return {"loss": loss.detach(), "grad": grad}

    return call


def backward_into(out: Tensor, logits: Tensor, target: Tensor, *, nontemporal: bool) -> Callable[[], None]:
    """The bare backward kernel for the mean NLL, into ``out`` (which may be ``logits``); the forward runs here, once.

    Adapter to the internal ``fastcalib.ops._statistics.backward_into``.
    """
    _library()
    from fastcalib.ops import _statistics as module

    write = _attribute(module, "backward_into")
    n, v = logits.shape
    temperature = torch.ones(1, 1, dtype=torch.float64)
    rows, scalars, log_prob, *_, saved = torch.ops.fastcalib.statistics(
        logits, temperature, target, 1, None, v, -100, False
    )
    zero_rows, zero_scalars = torch.zeros_like(rows), torch.zeros_like(scalars)
    grad_log_prob = torch.full_like(log_prob, -1.0 / n)

    def call() -> None:
        write(
            out, zero_rows, zero_scalars, grad_log_prob, logits, temperature, target, 1, None, rows, scalars, saved, v,
            -100, nontemporal=nontemporal,
        )  # fmt: skip

    return call
