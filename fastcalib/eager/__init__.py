"""The reference: every primitive in plain, differentiable PyTorch. Tests and benchmarks compare with it.

Arguments are in the normal form that ``fastcalib.ops`` prepares: logits (N, V) over the real vocabulary, temperatures
(1 or N, K) in float64, selected tokens as flat ids with the row of each.
"""

from .pr_divergence import pr_divergence
from .ranks import ranks
from .softmax import log_softmax, softmax
from .statistics import statistics

__all__ = ["log_softmax", "pr_divergence", "ranks", "softmax", "statistics"]
