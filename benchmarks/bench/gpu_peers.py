"""Other people's GPU kernels for the same jobs, by their public functions. Not yet run on a GPU.

Each is imported when asked for; one that is not installed or does not run is reported as not available. Some write the
gradient over the logits: those get a copy, which is renewed before every call, outside the clock.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import linear, plain
from .cases import Call, Case, compiled
from .peers import Peer, _version
from .problem import Outputs, Problem

COMPARED = 256  # most selected tokens a row for which torch.compile compares each of them with each logit


@dataclass(frozen=True)
class Prepared:
    """A callable, and what has to run before each call of it, untimed."""

    call: Call
    before: Callable[[], Any] | None = None


Factory = Callable[[], Prepared]
Loss = Callable[[Tensor, Tensor], Tensor]


def survey() -> list[Peer]:
    """Every peer with its version here and what it is compared at."""
    return [
        Peer("torch", torch.__version__, "eager and torch.compile: the baselines of every row"),
        Peer("triton", _version("triton"), "the compiler of our kernels and of most peers"),
        Peer("liger-kernel", _version("liger-kernel"), "cross-entropy beside nll, softmax (at temperature 1)"),
        Peer("quack-kernels", _version("quack-kernels"), "cross-entropy beside nll, softmax (at temperature 1)"),
        Peer("flash-attn", _version("flash-attn"), "cross-entropy beside nll"),
        Peer("trl", _version("trl"), "selective_log_softmax_and_entropy (its kernel) beside statistics K=1"),
    ]


def _attribute(path: str) -> Any:
    """The attribute at "module:name"."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def liger_loss() -> Loss:
    return _attribute("liger_kernel.transformers.cross_entropy:LigerCrossEntropyLoss")()  # type: ignore[no-any-return]


def quack_loss() -> Loss:
    return _attribute("quack.cross_entropy:cross_entropy")  # type: ignore[no-any-return]


def flash_loss() -> Loss:
    function = _attribute("flash_attn.ops.triton.cross_entropy:cross_entropy_loss")
    return lambda logits, target: function(logits, target)[0].mean()  # (loss, z-loss) of each row


def liger_softmax() -> Callable[[Tensor], Tensor]:
    return _attribute("liger_kernel.transformers.softmax:LigerSoftmax")()  # type: ignore[no-any-return]


def quack_softmax() -> Callable[[Tensor], Tensor]:
    return _attribute("quack.softmax:softmax")  # type: ignore[no-any-return]


def _loss(find: Callable[[], Loss], problem: Problem, backward: bool, overwrites: bool) -> Prepared:
    function, target = find(), problem.target
    if not backward:
        return Prepared(lambda: {"loss": function(problem.logits, target)})
    given = problem.logits.clone() if overwrites else problem.logits

    def call() -> Outputs:
        leaf = given.detach().requires_grad_()
        loss = function(leaf, target)
        return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, leaf)[0]}

    return Prepared(call, partial(given.copy_, problem.logits) if overwrites else None)


def _softmax(find: Callable[[], Callable[[Tensor], Tensor]], problem: Problem, backward: bool) -> Prepared:
    """Of logits divided by the row's temperature beforehand: these peers have no temperature."""
    function = find()
    scaled = (problem.logits.float() / 0.7).to(problem.dtype)
    if not backward:
        return Prepared(lambda: {"out": function(scaled)})
    upstream = problem.upstream / 0.7
    leaf = scaled.requires_grad_()
    return Prepared(lambda: {"grad": torch.autograd.grad(function(leaf), leaf, upstream)[0]})


def _trl(problem: Problem, backward: bool) -> Prepared:
    function, target = _attribute("trl.kernels:selective_log_softmax_and_entropy"), problem.target
    leaf = problem.logits.detach().requires_grad_(backward)

    def call() -> Outputs:
        log_prob, entropy = function(leaf, target, temperature=1.0)
        if not backward:
            return {"log_prob": log_prob, "entropy": entropy}
        return {"grad": torch.autograd.grad(entropy.sum() + log_prob.sum(), leaf)[0]}

    return Prepared(call)


def _linear(problem: Problem, chunks: bool) -> Prepared:
    """What a layer's statistics are to be held against: by chunks of logits, and the product alone."""
    layer = linear.layer_of(problem)
    if chunks:
        return Prepared(linear.statistics_in_chunks(layer))
    product = linear.products(layer)["matmul"]

    def call() -> Outputs:
        product()
        return {}

    return Prepared(call)


def factories(case: Case, problem: Problem) -> dict[str, Factory]:
    """What can be set beside the competitors that a case has on every device."""
    backward = case.direction == "fwd+bwd"
    if case.op == "loss nll":
        return {
            "liger-kernel": partial(_loss, liger_loss, problem, backward, True),
            "quack": partial(_loss, quack_loss, problem, backward, False),
            "flash-attn": partial(_loss, flash_loss, problem, backward, False),
        }
    if case.op == "softmax":
        return {
            "liger-kernel": partial(_softmax, liger_softmax, problem, backward),
            "quack": partial(_softmax, quack_softmax, problem, backward),
        }
    if case.op == "linear statistics":
        return {
            "fastcalib in chunks": partial(_linear, problem, True),
            "matmul alone": partial(_linear, problem, False),
        }
    if case.op == "statistics K=1":
        return {"trl kernel": partial(_trl, problem, backward)}
    if case.op.startswith("ranks M="):
        index = problem.selected(int(case.op.removeprefix("ranks M=")))
        if index.shape[1] <= COMPARED:  # the compiler stores none of the comparisons, so size is no obstacle
            fast = compiled(plain.ranks_brute)
            return {"torch.compile": lambda: Prepared(partial(fast, problem.logits, index))}
    return {}
