"""Order and shape: does a model rank valid tokens above invalid ones, and spread its mass over them?

Source: Banayeeanzade et al. 2026 (arXiv 2605.11128); the authors published no code.
"""

from .order import Order, order, order_from_ranks
from .prefixes import Diagnosis, diagnose
from .sequence import (
    Compounding,
    SequenceDiagnostics,
    answer_log_probs,
    at_nodes,
    at_prefixes,
    compounding,
    log_valid_mass,
    sequence,
    truncated_log_prob,
)
from .shape import HeadTailFit, Shape, diversity_bound, diversity_loss, head_tail_fit, shape

__all__ = [
    "Compounding",
    "Diagnosis",
    "HeadTailFit",
    "Order",
    "SequenceDiagnostics",
    "Shape",
    "answer_log_probs",
    "at_nodes",
    "at_prefixes",
    "compounding",
    "diagnose",
    "diversity_bound",
    "diversity_loss",
    "head_tail_fit",
    "log_valid_mass",
    "order",
    "order_from_ranks",
    "sequence",
    "shape",
    "truncated_log_prob",
]
