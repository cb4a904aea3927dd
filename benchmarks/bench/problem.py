"""The inputs of one benchmark case and its float64 answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

# The shapes of the results tables. The last one fits in the caches of most machines, which is said beside it.
SHAPES = ((256, 128_256), (4_096, 32_000), (1, 262_144))
# 1/T of these is in arithmetic progression, which a kernel may exploit ...
ARITHMETIC = {
    1: (1.0,),
    4: tuple(1.0 / (0.5 + 0.5 * k) for k in range(4)),
    8: tuple(1.0 / (0.5 + 0.25 * k) for k in range(8)),
}
# ... and of these it is not.
ARBITRARY = {1: (1.0,), 4: (0.5, 0.7, 1.0, 2.0), 8: (0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0)}
CHECKED_ELEMENTS = 4_000_000  # float64 answers are computed for as many leading rows as hold about this many logits


class Problem:
    """Logits (N, V) with one target per row, and more selected tokens on request; normal, standard deviation 2.

    Args:
        n, v: rows and vocabulary.
        dtype: of the logits.
        seed: of the random numbers; the same seed gives the same problem on the same kind of device.
        device: where everything lives.
    """

    def __init__(self, n: int, v: int, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.n, self.v, self.dtype, self.device = n, v, dtype, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.logits = torch.empty(n, v, device=device).normal_(0.0, 2.0, generator=self.generator).to(dtype)
        self.target = torch.randint(v, (n,), generator=self.generator, device=device)
        self._selected: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()

    @property
    def checked_rows(self) -> int:
        """How many leading rows the float64 answers cover."""
        return max(1, min(self.n, CHECKED_ELEMENTS // self.v))

    @cached_property
    def scratch(self) -> Tensor:
        """A second array like the logits, its pages already touched; 64-byte aligned, as torch allocates."""
        return torch.zeros_like(self.logits)

    @cached_property
    def upstream(self) -> Tensor:
        """A gradient arriving at a dense softmax, like the logits."""
        empty = torch.empty(self.n, self.v, device=self.device)
        return empty.normal_(generator=self.generator).to(self.dtype)

    @cached_property
    def teacher(self) -> Tensor:
        """Logits of another model, some way from the first."""
        noise = torch.empty(self.n, self.v).normal_(generator=self.generator)
        return (self.logits.float() + noise).to(self.dtype)

    def selected(self, m: int) -> Tensor:
        """(N, m) distinct random token ids per row, int64."""
        if m not in self._selected:
            rows = [
                torch.randperm(self.v, generator=self.generator, device=self.device)[:m] for _ in range(min(self.n, 64))
            ]
            # 64 different sets are enough, and drawing 4,096 permutations of a vocabulary is not
            self._selected[m] = torch.stack([rows[i % len(rows)] for i in range(self.n)])
        return self._selected[m]

    def rows64(self) -> Tensor:
        """The checked rows in float64."""
        return self.logits[: self.checked_rows].to(torch.float64)


Outputs = dict[str, Tensor]


def max_error(outputs: Outputs, reference: Outputs) -> float | None:
    """Largest error over all named outputs that the reference has: relative, or absolute where the value is below 1.

    Integer outputs count as wrong (error 1 or more) wherever they differ. Gradients (names starting with "grad") are
    compared relative to the largest gradient, as their scale is arbitrary. Rows beyond the reference's are not checked.
    """
    worst: float | None = None
    for name, want in reference.items():
        if name not in outputs:
            continue
        got = outputs[name].detach().to(want.device)  # a float64 answer may have been formed on the CPU
        got = got[: want.shape[0]] if want.ndim else got
        if got.numel() != want.numel():
            raise ValueError(f"{name}: shape {tuple(got.shape)} where the reference has {tuple(want.shape)}")
        difference = (got.reshape(want.shape).to(torch.float64) - want.to(torch.float64)).abs()
        scale = want.abs().max().clamp(min=1e-300) if name.startswith("grad") else want.abs().clamp(min=1)
        error = float((difference / scale).max())
        worst = error if worst is None else max(worst, error)
    return worst


def gradient(
    per_token: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, divisor: int
) -> tuple[Tensor, Tensor]:
    """Loss ``per_token(logits, target).sum() / divisor`` and its gradient."""
    leaf = logits.detach().requires_grad_()
    loss = per_token(leaf, target).sum() / divisor
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad
