"""Layers whose logits are exact in every dtype and in any order of summation, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcalib.ops.linear import Rows

from .cases import generator


@dataclass
class Layer:
    """hidden (N, D), weight (V, D), bias (V,) or None, all leaves."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def exact(self) -> Layer:
        """The same numbers in float64, as leaves of their own."""
        return Layer(*(None if t is None else t.detach().double().requires_grad_() for t in self.inputs))

    def logits(self, scale: float | None = None, softcap: float | None = None) -> Tensor:
        """All of them, in the dtype of the layer."""
        z = F.linear(self.hidden, self.weight, self.bias)
        z = z if scale is None else z * scale
        return z if softcap is None else torch.tanh(z / softcap) * softcap

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.inputs if t is not None]


def exact_layer(
    n: int, v: int, d: int = 8, dtype: torch.dtype = torch.float32, bias: bool = False, seed: int = 0
) -> Layer:
    """Multiples of 1/2 up to 1: logits are multiples of 1/4 up to d + 1, which even bfloat16 holds for d up to 31."""
    g = generator(seed)

    def halves(*shape: int) -> Tensor:
        return (torch.randint(-2, 3, shape, generator=g) / 2).to(dtype).requires_grad_()

    return Layer(halves(n, d), halves(v, d), halves(v) if bias else None)


def random_layer(n: int, v: int, d: int = 16, dtype: torch.dtype = torch.float64, bias: bool = False) -> Layer:
    """Normal numbers: logits of standard deviation 2."""
    g = generator(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    return Layer(normal(n, d), normal(v, d, scale=2 / d**0.5), normal(v) if bias else None)


def every_row(hidden: Tensor, ids: object, temperature: Tensor, ignore_index: int) -> Rows:
    """For _rows_to_do of ops/linear.py, which looks at the tokens on a CPU and leaves out rows; on a GPU they stay."""
    return Rows(hidden.reshape(-1, hidden.shape[-1]), ids, temperature, None, hidden.shape[:-1].numel())
