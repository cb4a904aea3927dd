"""The operations: schema, checks, autograd and dispatch. The only callers of kernels."""

from .linear import linear_ranks, linear_statistics
from .ranks import ranks
from .softmax import log_softmax, softmax
from .statistics import statistics
from .types import TokenRanks, TokenStatistics

__all__ = [
    "TokenRanks",
    "TokenStatistics",
    "linear_ranks",
    "linear_statistics",
    "log_softmax",
    "ranks",
    "softmax",
    "statistics",
]
