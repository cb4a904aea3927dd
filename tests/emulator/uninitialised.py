"""Which bytes of torch.empty memory nobody has written yet.

While a `Watch` is active, tensors from torch.empty and its relatives are filled with a pattern (a NaN in float32,
float16 and bfloat16) and remembered. A kernel's store marks bytes as written; so does the host, noticed before a
launch by bytes that no longer hold the pattern.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .memory import ALIGNMENT, POISON

LARGEST = 64 << 20  # a larger buffer is not watched: filling it would commit memory that a test may only have reserved


@dataclass
class _Record:
    storage: StorageWeakRef
    size: int
    written: np.ndarray


class Uninitialised:
    def __init__(self) -> None:
        self.records: dict[int, _Record] = {}

    def watch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Treat the tensor's whole storage as memory that nobody has written."""
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if tensor.device.type != "cpu" or not 0 < size <= LARGEST or pointer % ALIGNMENT:
            return tensor
        raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        raw[: size // 2 * 2].view(np.uint16)[:] = POISON
        length = -(-size // ALIGNMENT) * ALIGNMENT
        self.records[pointer] = _Record(StorageWeakRef(storage), size, np.zeros(length, np.uint8))
        return tensor

    def written(self, tensor: torch.Tensor, start: int, length: int) -> np.ndarray | None:
        """The written bytes of a range of its storage, from the aligned address below ``start``; None where all are."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        record = self.records.get(pointer)
        if record is None:
            return None
        if record.storage.expired() or record.storage.cdata != StorageWeakRef(storage).cdata:
            del self.records[pointer]  # the memory has another owner now
            return None
        raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        pairs = record.size // 2
        by_host = raw[: 2 * pairs].view(np.uint16) != POISON
        record.written[: 2 * pairs].view(np.uint16)[by_host] = 0x0101
        record.written[2 * pairs :] = 1
        offset = (start - pointer) // ALIGNMENT * ALIGNMENT
        return record.written[offset : offset + length]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Every torch.empty from here on is watched."""

        def watched(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def function(*args: Any, **options: Any) -> torch.Tensor:
                made = make(*args, **options)
                plain = isinstance(made, torch.Tensor) and type(made) in (torch.Tensor, torch.nn.Parameter)
                return (
                    self.watch(made) if plain and made.layout == torch.strided and made.device.type == "cpu" else made
                )

            return function

        with contextlib.ExitStack() as stack:
            for owner, names in (
                (torch, ("empty", "empty_like", "empty_strided")),
                (torch.Tensor, ("new_empty", "new_empty_strided")),
            ):
                for name in names:
                    stack.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name))))
            yield
        self.records.clear()
