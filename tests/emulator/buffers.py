"""Tensors as the global memory of a launch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .memory import ALIGNMENT, Allocation, GlobalMemory
from .uninitialised import Uninitialised


@dataclass
class _Range:
    start: int
    end: int
    tensors: list[torch.Tensor]
    names: list[str]


def _footprint(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one past last byte that the tensor's elements reach."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _is_dense(tensor: torch.Tensor, size: int) -> bool:
    """Do its elements cover every byte of their range?"""
    distinct = 1
    for extent, stride in zip(tensor.shape, tensor.stride()):
        distinct *= extent if stride else 1
    return distinct * tensor.element_size() == size


class Buffers:
    """Collects the tensor arguments of a launch; each real address then has an emulated one.

    What a kernel may touch is what the tensors given to it reach: beyond the last element, before the first, between
    the rows of a strided view (``strict_views``) is out of bounds even where the storage goes on.
    """

    def __init__(self, uninitialised: Uninitialised, strict_views: bool = True) -> None:
        self.uninitialised, self.strict_views = uninitialised, strict_views
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.ranges: list[tuple[int, int, Allocation]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"argument {name} is on {tensor.device}: the emulator runs on CPU tensors")
        self.tensors.append((name, tensor))

    def memory(self, granule: int) -> GlobalMemory:
        memory = GlobalMemory()
        ranges: list[_Range] = []
        for name, tensor in sorted(self.tensors, key=lambda item: item[1].data_ptr()):
            start, end = _footprint(tensor)
            if ranges and start < ranges[-1].end:
                ranges[-1].end = max(ranges[-1].end, end)
            elif ranges and start == ranges[-1].start == end:
                pass  # another empty tensor at the same place
            else:
                ranges.append(_Range(start, end, [], []))
            ranges[-1].tensors.append(tensor)
            ranges[-1].names.append(name)
        order = {name: position for position, (name, _) in enumerate(self.tensors)}
        for found in sorted(ranges, key=lambda item: min(order[name] for name in item.names)):
            names = sorted(found.names, key=order.__getitem__)
            narrowest = min(tensor.element_size() for tensor in found.tensors)
            size = found.end - found.start
            buffer = memory.add("=".join(names), found.start, size, min(granule, narrowest))
            if self.strict_views and not any(_is_dense(tensor, size) for tensor in found.tensors):
                buffer.allowed = self._reached(buffer, found)
            buffer.initialised = self.uninitialised.written(found.tensors[0], found.start, len(buffer.raw))
            self.ranges.append((found.start, found.end, buffer))
        return memory

    @staticmethod
    def _reached(buffer: Allocation, found: _Range) -> np.ndarray:
        reached = np.zeros(len(buffer.raw), np.uint8)
        for tensor in found.tensors:
            offset = tensor.data_ptr() - found.start + (found.start % ALIGNMENT)
            shape = [extent if stride else 1 for extent, stride in zip(tensor.shape, tensor.stride())]
            strides = [stride * tensor.element_size() for stride in tensor.stride()]
            elements = np.lib.stride_tricks.as_strided(
                reached[offset:], (*shape, tensor.element_size()), (*strides, 1), writeable=True
            )
            elements[...] = 1
        return reached

    def translate(self, pointer: int) -> int:
        """The emulated address of a real one; a null pointer stays null, and an unknown one is returned as it is."""
        for start, end, buffer in self.ranges:
            if start <= pointer < end or pointer == start:
                return buffer.base + pointer - start
        return pointer
