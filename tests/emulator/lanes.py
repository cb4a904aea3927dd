"""The threads that run a block together, and where each of them sits in its warp, its CTA and the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Unsupported
from .formats import Array

if TYPE_CHECKING:
    from .executor import Batch
    from .machine import Machine

WARP = 32


class Lanes:
    """``index`` lists them (ascending) within the batch of CTAs; None stands for all."""

    def __init__(self, batch: Batch, index: np.ndarray | None) -> None:
        self.batch = batch
        self.machine: Machine = batch.machine
        self.index = index
        self.count = batch.count if index is None else len(index)
        self._cache: dict[str, Array] = {}

    def part(self, full: np.ndarray) -> np.ndarray:
        """The lanes' entries of an array over the whole batch."""
        return full if self.index is None else full[self.index]

    def _cached(self, name: str) -> np.ndarray:
        if name not in self._cache:
            self._cache[name] = self.part(getattr(self.batch, name))
        return self._cache[name]

    @property
    def thread(self) -> np.ndarray:
        return self._cached("thread")

    @property
    def cta(self) -> np.ndarray:
        """The number of the CTA within the batch."""
        return self._cached("cta")

    @property
    def warp(self) -> np.ndarray:
        """The number of the warp within the batch."""
        return self._cached("warp")

    @property
    def lane(self) -> np.ndarray:
        return self._cached("lane")

    @property
    def everyone(self) -> np.ndarray:
        """Their positions in the batch."""
        return self.batch.positions if self.index is None else self.index

    def whole_warps(self) -> bool:
        """Is every thread of each warp, but those that have left, among them?"""
        if self.index is None:
            return True
        if "whole" not in self._cache or not self._cache["whole"]:
            present = np.bincount(self.warp, minlength=self.batch.warps)
            self._cache["whole"] = bool(((present == 0) | (present == self.batch.alive_in_warp)).all())
        return bool(self._cache["whole"])

    def square(self) -> bool:
        """Do they fill their warps, so that an array over them is a table of warps by 32?"""
        if "square" not in self._cache:
            full = self.count % WARP == 0 and self.batch.threads % WARP == 0
            if full and self.index is not None:
                warps = self.warp.reshape(-1, WARP)
                full = bool((warps == warps[:, :1]).all())
            self._cache["square"] = full
        return bool(self._cache["square"])

    def spread(self, value: Array) -> np.ndarray:
        """A value of one entry for each lane; uniform values are kept as scalars until somebody needs this."""
        value = np.asarray(value)
        return value if value.ndim else np.broadcast_to(value, (self.count,))

    def special(self, name: str) -> Any:
        """PTX ISA, "Special Registers"."""
        if name not in self._cache:
            self._cache[name] = self._special(name)
        return self._cache[name]

    def _special(self, name: str) -> Array:
        register, _, axis = name.partition(".")
        grid, block = self.machine.grid, self.machine.block
        position = "xyz".find(axis) if axis else 0
        if register == "tid":
            return _unravel(self.thread, block, position)
        if register == "ctaid":
            return _unravel(self.part(self.batch.cta_in_grid), grid, position)
        if register == "laneid":
            return self.lane.astype(np.uint32)
        if register == "warpid":
            return (self.thread // WARP).astype(np.uint32)
        lane = self.lane.astype(np.uint64)
        one = np.uint64(1)
        masks = {
            "lanemask_eq": lambda: one << lane,
            "lanemask_lt": lambda: (one << lane) - one,
            "lanemask_le": lambda: (one << (lane + one)) - one,
            "lanemask_gt": lambda: ~((one << (lane + one)) - one),
            "lanemask_ge": lambda: ~((one << lane) - one),
        }
        if register in masks:
            return masks[register]().astype(np.uint32)
        constants = {
            "ntid": block[position],
            "nctaid": grid[position],
            "nwarpid": -(-self.batch.threads // WARP),
            "dynamic_smem_size": self.machine.dynamic_shared,
            "total_smem_size": self.machine.shared_bytes,
            **dict.fromkeys(("smid", "gridid", "clock", "clock64", "clock_hi", "globaltimer", "cluster_ctaid"), 0),
            **dict.fromkeys(("cluster_ctarank", "clusterid", "is_explicit_cluster"), 0),
            **dict.fromkeys(("nsmid", "cluster_nctaid", "cluster_nctarank", "nclusterid"), 1),
        }
        if register in constants:
            return np.uint32(constants[register])
        raise Unsupported(f"special register %{name}")


def _unravel(linear: np.ndarray, extents: tuple[int, int, int], axis: int) -> np.ndarray:
    for extent in extents[:axis]:
        linear = linear // extent
    return (linear % extents[axis]).astype(np.uint32)
