"""The operations: schema, checks, autograd and dispatch. The only callers of kernels."""

from .linear import linear_ranks, linear_statistics
from .pr_divergence import pr_divergence
from .ranks import ranks
from .softmax import log_softmax, softmax
from .statistics import statistics
from .types import PRDivergence, TokenRanks, TokenStatistics

__all__ = [
    "PRDivergence",
    "TokenRanks",
    "TokenStatistics",
    "linear_ranks",
    "linear_statistics",
    "log_softmax",
    "pr_divergence",
    "ranks",
    "softmax",
    "statistics",
]
