"""Token-level calibration of language models over huge vocabularies: measure it, train it."""

from __future__ import annotations

from . import calibration, diagnostics, functional, losses
from .answer_trie import AnswerTrie
from .backends import backends, use_backend
from .calibration import CalibrationState, TemperatureFit, fit_temperature, fit_temperature_from
from .curves import PRCurve, angles, f_beta, pr_curve
from .fused import fused_loss
from .linear import linear_loss
from .ops import (
    PRDivergence,
    TokenRanks,
    TokenStatistics,
    linear_ranks,
    linear_statistics,
    log_softmax,
    pr_divergence,
    ranks,
    softmax,
    statistics,
)
from .valid_sets import ValidSets

__version__ = "0.1.0"

__all__ = [
    "AnswerTrie",
    "CalibrationState",
    "PRCurve",
    "PRDivergence",
    "TemperatureFit",
    "TokenRanks",
    "TokenStatistics",
    "ValidSets",
    "angles",
    "backends",
    "calibration",
    "diagnostics",
    "f_beta",
    "functional",
    "fit_temperature",
    "fit_temperature_from",
    "fused_loss",
    "linear_loss",
    "linear_ranks",
    "linear_statistics",
    "log_softmax",
    "losses",
    "pr_curve",
    "pr_divergence",
    "ranks",
    "softmax",
    "statistics",
    "use_backend",
]
