"""From a loss function to its module, so that ``losses.nll`` serves wherever ``losses.NLLLoss()`` does."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

from ._base import TokenLoss
from .diversity import GEMLoss, ToFULoss, gem, tofu
from .likelihood import (
    DFTLoss,
    FocalLoss,
    GCELoss,
    GoldLoss,
    MixCELoss,
    NLLLoss,
    dft,
    focal,
    gce,
    gold,
    mixce,
    nll,
)
from .precision_recall import CDivLoss, LambdaPRLoss, TailrLoss, c_div, lambda_pr, tailr
from .truncation import TruncLoss, TruncRLoss

# trunc and trunc_r are given a threshold, their modules keep a running one: no module does what those functions do.
_MODULES: dict[Any, type[TokenLoss]] = {
    nll: NLLLoss, tailr: TailrLoss, lambda_pr: LambdaPRLoss, c_div: CDivLoss, gold: GoldLoss, dft: DFTLoss,
    mixce: MixCELoss, gce: GCELoss, focal: FocalLoss, gem: GEMLoss, tofu: ToFULoss,
}  # fmt: skip
_RUNNING = {"trunc": TruncLoss, "trunc_r": TruncRLoss}


def as_module(loss_fn: Any) -> Any:
    """The module of a loss function of this package, or of a :func:`functools.partial` of one; others as they are.

    Raises:
        TypeError: a class in the place of its instance, a function without such a module, numbers it lacks.
    """
    function: Any = loss_fn
    numbers: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not function.args:
        numbers = {**function.keywords, **numbers}
        function = function.func
    function = getattr(function, "__func__", function)  # a class attribute, seen through an instance
    if isinstance(function, FunctionType) and function in _MODULES:
        return _MODULES[function](**numbers)
    ours = getattr(function, "__module__", "").startswith("fastcalib.losses.") and not isinstance(function, TokenLoss)
    if ours or isinstance(function, type):
        kind, name = "class" if isinstance(function, type) else "function", getattr(function, "__name__", "")
        raise TypeError(
            f"loss_fn must be a loss module such as fastcalib.losses.{_RUNNING.get(name, NLLLoss).__name__}(), or "
            f"a callable on the statistics, got the {kind} {name}"
        )
    return loss_fn
