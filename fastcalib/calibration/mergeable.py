"""What the states of this package share: histograms over [0, 1] at K temperatures, and merging without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .bins import Reliability, check_count, reliability

# Contributions are rounded to multiples of 2^-24 (3e-8, below the rounding of the float32 statistics themselves). Sums
# of such numbers are exact in float64 while they stay below 2^29 = 5e8, hence the same bits in any order and grouping.
GRID = float(2**24)

State = TypeVar("State", bound="BinnedState")


def on_grid(x: Tensor) -> Tensor:
    """``x`` rounded to what sums exactly, float64."""
    return x.double().mul(GRID).round().div(GRID)


def as_temperatures(temperatures: float | Iterable[float], name: str) -> tuple[float, ...]:
    """A number or a sequence of them, of Python, NumPy or PyTorch, as a tuple; ``name`` is the class, for the error."""
    numbers: tuple[float, ...] = ()
    try:
        single = not isinstance(temperatures, Iterable) or (isinstance(temperatures, Tensor) and not temperatures.dim())
        numbers = tuple(float(t) for t in ((temperatures,) if single else temperatures))  # type: ignore[arg-type, union-attr]
    except (TypeError, ValueError):
        pass  # of no use, and said so below
    if not numbers or not all(0 < t < math.inf for t in numbers):
        raise ValueError(
            f"{name}: temperatures must be a positive finite number or a sequence of them, got {temperatures!r}"
        )
    return numbers


class BinnedState:
    """Sums over tokens in O(K cells) memory. A subclass names its tensors and fills them."""

    _SCALARS: tuple[str, ...] = ("n_tokens", "n_undefined")  # int64 ()
    _SUMS: tuple[str, ...] = ()  # float64 (K,)
    _CELLS = ("cell_count", "cell_hits", "cell_confidence")  # (K, cells), int64 but for the last
    _COUNTS: ClassVar[Mapping[str, int]] = {}  # int64 of this length

    n_tokens: Tensor
    n_undefined: Tensor
    cell_count: Tensor
    cell_hits: Tensor
    cell_confidence: Tensor

    def __init__(
        self,
        temperatures: float | Iterable[float] = 1.0,
        *,
        cells: int = 3840,
        device: torch.device | str | None = None,
    ) -> None:
        self.temperatures = as_temperatures(temperatures, type(self).__name__)
        check_count(f"{type(self).__name__}: cells", cells)
        k = len(self.temperatures)
        for name in self._SCALARS:
            setattr(self, name, torch.zeros((), dtype=torch.int64, device=device))
        for name in self._SUMS:
            setattr(self, name, torch.zeros(k, dtype=torch.float64, device=device))
        for name in self._CELLS:
            dtype = torch.float64 if name == "cell_confidence" else torch.int64
            setattr(self, name, torch.zeros(k, cells, dtype=dtype, device=device))
        for name, size in self._COUNTS.items():
            setattr(self, name, torch.zeros(size, dtype=torch.int64, device=device))

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return (*cls._SCALARS, *cls._SUMS, *cls._CELLS, *cls._COUNTS)

    @property
    def cells(self) -> int:
        """Size of the histogram."""
        return self.cell_count.shape[1]

    def merge(self: State, other: State) -> State:
        """The state of both token sets together; neither argument changes.

        Raises:
            TypeError: something else than another state of this class.
            ValueError: other temperatures or another number of cells.
        """
        if type(other) is not type(self):
            raise TypeError(f"merge: needs another {type(self).__name__}, got {type(other).__name__}")
        if self.temperatures != other.temperatures or self.cells != other.cells:
            mine, theirs = ((s.temperatures, s.cells) for s in (self, other))
            raise ValueError(f"merge: states must agree in temperatures and cells, got {mine} and {theirs}")
        out = type(self)(self.temperatures, cells=self.cells, device=self.n_tokens.device)
        for name in self._names():
            x: Tensor = getattr(self, name)
            setattr(out, name, x + getattr(other, name).to(x.device))
        return out

    def select(self: State, indices: Sequence[int]) -> State:
        """The same tokens at some of the temperatures, given by position."""
        index = list(indices) if isinstance(indices, Iterable) else [indices]
        k = len(self.temperatures)
        if not index or not all(isinstance(i, int) and -k <= i < k for i in index):
            raise ValueError(f"select: needs positions among the {k} temperatures {self.temperatures}, got {indices!r}")
        out = type(self)([self.temperatures[i] for i in index], cells=self.cells, device=self.n_tokens.device)
        for name in self._names():
            x: Tensor = getattr(self, name)
            setattr(out, name, x[index] if name in self._SUMS + self._CELLS else x.clone())
        return out

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors (temperatures as float64), for ``torch.save`` or safetensors."""
        tensors = {name: getattr(self, name) for name in self._names()}
        return {"temperatures": torch.tensor(self.temperatures, dtype=torch.float64), **tensors}

    @classmethod
    def from_state_dict(cls: type[State], state: Mapping[str, Tensor]) -> State:
        """The inverse of :meth:`state_dict`; ValueError if an entry is missing."""
        missing = [name for name in ("temperatures", *cls._names()) if name not in state]
        if missing:
            raise ValueError(f"from_state_dict: missing {', '.join(missing)}")
        out = cls(state["temperatures"].tolist(), cells=state["cell_count"].shape[1])
        for name in cls._names():
            setattr(out, name, state[name].clone())
        return out

    def reliability(self, n_bins: int = 15) -> Reliability:
        """Reliability diagram with equal-width bins, closed on the right, the first also on the left."""
        return reliability(self.cell_count, self.cell_hits, self.cell_confidence, n_bins)
