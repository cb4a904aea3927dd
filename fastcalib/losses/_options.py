"""The options that every loss takes, their checks, and the documentation of both."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

from torch import Tensor

from ..ops._arguments import NUMBERS, check_ignore_index

REDUCTIONS = ("none", "mean", "sum")
# Stands in the docstring of every loss; at run time the text of `Options` takes its place.
COMMON = ":class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors."


class Options(TypedDict, total=False):
    """Arguments that all losses share; the constructors of the modules take them too.

    Other arguments:
        logits: (*, V); float32, bfloat16, float16 or float64. Never written to.
        target: integer token ids, (*).
        temperature: the loss sees softmax(logits / temperature). A number, or a tensor that broadcasts to (*).
        ignore_index: tokens with this target have loss 0 and gradient exactly 0, whatever their logits, and do not
            count in a mean.
        reduction: "mean" (over the tokens kept; NaN when there are none, as in torch), "sum" or "none".
        label_smoothing: e in [0, 1]; the loss becomes (1 - e) loss + e mean_v(-log p_v), as in torch's cross_entropy.
        z_loss: adds z_loss * logsumexp(logits / temperature)^2 to each token.
        entropy_bonus: subtracts entropy_bonus * entropy (nats) of softmax(logits / temperature) from each token.
        weight: floating point, broadcasts to (*); multiplies each token's loss, the three terms above included. A mean
            still divides by the number of tokens kept, not by the sum of the weights. (Call only.)
        num_items_in_batch: number or tensor of one element; the result is then sum / num_items_in_batch, which is what
            gradient accumulation over unequal batches needs. (Call only.)
        vocab_size: columns from here on are padding and take no part; their gradient is 0.
        backend: "auto", "eager" or "cpp".

    Returns:
        float32 (float64 for float64 logits), nats: a scalar, or (*) for reduction="none". Differentiable in the logits
        and in a temperature tensor, at the cost of one read of the logits forward and one read and one write backward.

    Raises:
        TypeError: a target that does not hold integers, an argument that does not exist.
        ValueError: shapes that do not fit, a target outside the vocabulary, a number outside its range.
    """

    temperature: float | Tensor
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    entropy_bonus: float
    vocab_size: int | None
    backend: str


class CallOptions(Options, total=False):
    """:class:`Options` and the two that belong to one batch."""

    weight: Tensor | None
    num_items_in_batch: int | Tensor | None


@dataclass(frozen=True)
class Settings:
    """The options, checked."""

    temperature: float | Tensor = 1.0
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy_bonus: float = 0.0
    vocab_size: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        check_number("label_smoothing", self.label_smoothing, "[0, 1]")
        check_number("z_loss", self.z_loss, "(-inf, inf)")
        check_number("entropy_bonus", self.entropy_bonus, "(-inf, inf)")
        check_ignore_index(self.ignore_index)
        if not isinstance(self.temperature, (*NUMBERS, Tensor)):
            raise TypeError(
                f"temperature must be a number or a tensor that broadcasts to the target, got "
                f"{type(self.temperature).__name__}; a loss has one temperature per token"
            )

    @property
    def regularised(self) -> bool:
        """Whether any term needs the distribution at the base temperature itself."""
        return bool(self.label_smoothing or self.z_loss or self.entropy_bonus)


OPTION_NAMES = tuple(f.name for f in fields(Settings))


def make_settings(name: str, options: dict[str, Any]) -> Settings:
    """Settings from keyword arguments; ``name`` is the loss, for the error about an unknown one."""
    for key in options:
        if key not in OPTION_NAMES:
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")
    return Settings(**options)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')


def check_number(argument: str, value: float, interval: str, loss: str = "") -> None:
    """Raise unless ``value`` lies in ``interval``, written as in mathematics: "(0, 1]"."""
    prefix = f"{loss}: " if loss else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{prefix}{argument} must be a number, got {value!r}")
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low or (interval[0] == "[" and value == low)
    below = value < high or (interval[-1] == "]" and value == high)
    if math.isnan(value) or not (above and below):
        raise ValueError(f"{prefix}{argument} must lie in {interval}, got {value}")


F = TypeVar("F", bound=Callable[..., Any])


def documented(function: F) -> F:
    """Write the common options out, in the docstring and in the signature that help() and IPython show."""
    common = inspect.cleandoc(Options.__doc__ or "").split("\n\n", 1)[1]
    function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace(COMMON, common)
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = {f.name: f.default for f in fields(Settings)} | {"weight": None, "num_items_in_batch": None}
    shared = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in defaults.items()]
    function.__signature__ = signature.replace(parameters=own + shared)  # type: ignore[attr-defined]
    return function
