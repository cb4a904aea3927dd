"""Token-level calibration of language models over huge vocabularies: measure it, train it."""

from __future__ import annotations

from .backends import backends, use_backend
from .ops import TokenRanks, TokenStatistics, log_softmax, ranks, softmax, statistics
from .valid_sets import ValidSets

__version__ = "0.1.0"

__all__ = [
    "TokenRanks",
    "TokenStatistics",
    "ValidSets",
    "backends",
    "log_softmax",
    "ranks",
    "softmax",
    "statistics",
    "use_backend",
]
