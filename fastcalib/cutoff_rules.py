"""The cutoff rules of sampling as values with a name: what they keep is computed in :mod:`fastcalib.decoding`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from .ops._cutoff_rules import Rule as Code

# The grid of Banayeeanzade et al. 2026 (arXiv 2605.11128).
PAPER_TEMPERATURES = (0.01, 0.3, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)


class Rule:
    """A cutoff rule. ``str(rule)`` is its name and number, which :func:`parse_rule` reads."""

    name: ClassVar[str]
    code: ClassVar[Code]

    @property
    def value(self) -> float:
        """Its one number; 0 where it has none."""
        return float(*vars(self).values())

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}" if vars(self) else self.name


def _check(rule: Rule, value: float, good: bool, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not good:
        raise ValueError(f"{rule.name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class TopK(Rule):
    """The k most likely tokens, and those tied with the last of them. k may exceed the vocabulary."""

    k: int
    name, code = "top_k", Code.TOP_K

    def __post_init__(self) -> None:
        _check(self, self.k, isinstance(self.k, int) and self.k >= 1, "a positive int")

    def __str__(self) -> str:
        return f"{self.name}={self.k}"


@dataclass(frozen=True)
class _OfP(Rule):
    p: float

    def __post_init__(self) -> None:
        _check(self, self.p, isinstance(self.p, (int, float)) and 0 <= self.p <= 1, "a number in [0, 1]")


@dataclass(frozen=True)
class TopP(_OfP):
    """Tokens with less than probability p strictly above them: the nucleus, ties with its last token included."""

    name, code = "top_p", Code.TOP_P


@dataclass(frozen=True)
class MinP(_OfP):
    """Tokens with at least p times the probability of the most likely one."""

    name, code = "min_p", Code.MIN_P


@dataclass(frozen=True)
class _OfEpsilon(Rule):
    epsilon: float

    def __post_init__(self) -> None:
        e = self.epsilon
        _check(self, e, isinstance(e, (int, float)) and 0 < e < 1, "a number in (0, 1)")


@dataclass(frozen=True)
class Epsilon(_OfEpsilon):
    """Tokens with at least probability epsilon."""

    name, code = "epsilon", Code.EPSILON


@dataclass(frozen=True)
class Eta(_OfEpsilon):
    """Tokens with at least probability min(epsilon, sqrt(epsilon) exp(-entropy))."""

    name, code = "eta", Code.ETA


@dataclass(frozen=True)
class TopNSigma(Rule):
    """Tokens within n standard deviations (of the row's finite logits, unbiased) of the largest logit."""

    n: float
    name, code = "top_n_sigma", Code.TOP_N_SIGMA

    def __post_init__(self) -> None:
        good = isinstance(self.n, (int, float)) and self.n >= 0 and math.isfinite(self.n)
        _check(self, self.n, good, "a finite number >= 0")


@dataclass(frozen=True)
class SizeOracle(Rule):
    """As many tokens as the row has valid ones (at least 1), ties with the last included: top-k told the right k."""

    name, code = "size_oracle", Code.SIZE_ORACLE


@dataclass(frozen=True)
class KeepAll(Rule):
    """Every token: plain sampling. Its threshold is -inf."""

    name, code = "none", Code.NONE


_NUMBERED: dict[str, Callable[[str], Rule]] = {
    "top_k": lambda text: TopK(int(text) if text.lstrip("+-").isdecimal() else float(text)),  # type: ignore[arg-type]
    "top_p": lambda text: TopP(float(text)),
    "min_p": lambda text: MinP(float(text)),
    "epsilon": lambda text: Epsilon(float(text)),
    "eta": lambda text: Eta(float(text)),
    "top_n_sigma": lambda text: TopNSigma(float(text)),
}
_PLAIN: dict[str, type[Rule]] = {"size_oracle": SizeOracle, "none": KeepAll}


def parse_rule(text: str) -> Rule:
    """A rule from its name: "top_k=50", "top_p=0.9", "min_p=0.1", "epsilon=3e-4", "eta=3e-4", "top_n_sigma=1",
    "size_oracle", "none".

    Raises:
        TypeError, ValueError: for anything else; the message lists the names.

    Example:
        >>> parse_rule("top_p=0.9"), str(TopP(0.9)), parse_rule("none")
        (TopP(p=0.9), 'top_p=0.9', KeepAll())
    """
    if not isinstance(text, str):
        raise TypeError(f"parse_rule: a rule is a string such as 'top_p=0.9', got {type(text).__name__}")
    name, equals, number = (part.strip() for part in text.partition("="))
    if name in _PLAIN and not equals:
        return _PLAIN[name]()
    if name not in _NUMBERED or not number:
        names = ", ".join([*(f"{n}=NUMBER" for n in _NUMBERED), *_PLAIN])
        raise ValueError(f"parse_rule: {text!r} is no cutoff rule; there are {names}")
    try:
        return _NUMBERED[name](number)
    except ValueError as error:
        what = str(error) if str(error).startswith(name) else f"{number!r} is no number"
        raise ValueError(f"parse_rule: {text!r}: {what}") from None


def paper_rules() -> list[Rule]:
    """The rules of Banayeeanzade et al. 2026 whose numbers it gives, plain sampling and the size oracle: 17."""
    rules: list[Rule] = [KeepAll(), *(TopK(k) for k in (10, 20, 50, 80, 100, 500))]
    rules += [TopP(p) for p in (0.1, 0.5, 0.7, 0.9, 0.95)]
    return [*rules, *(MinP(p) for p in (0.01, 0.1, 0.5, 0.9)), SizeOracle()]
