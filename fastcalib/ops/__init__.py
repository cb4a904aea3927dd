"""The operations: schema, checks, autograd and dispatch. The only callers of kernels."""

from .pr_divergence import pr_divergence
from .ranks import ranks
from .softmax import log_softmax, softmax
from .statistics import statistics
from .types import PRDivergence, TokenRanks, TokenStatistics

__all__ = [
    "PRDivergence", "TokenRanks", "TokenStatistics", "log_softmax", "pr_divergence", "ranks", "softmax", "statistics",
]  # fmt: skip
