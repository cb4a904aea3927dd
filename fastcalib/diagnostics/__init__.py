"""Order and shape: does a model rank valid tokens above invalid ones, and spread its mass over them?

Source: Banayeeanzade et al. 2026 (arXiv 2605.11128); the authors published no code.
"""

from .order import Order, order, order_from_ranks

__all__ = ["Order", "order", "order_from_ranks"]
