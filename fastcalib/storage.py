"""Results on disk that are either whole or absent, so that an interrupted run loses nothing it had finished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it on success and removed on failure.

    The suffix is kept (figure writers choose the format by it).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(facts: Any) -> str:
    """Twelve hexadecimal digits of a hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def digest(tensor: Tensor) -> str:
    """The same of a tensor's numbers."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Record:
    """What one unit of work left behind: tensors, and a few facts that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    reused: bool = False


class Store:
    """Records in a folder, one safetensors file each.

    Args:
        folder: created when the first record is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str, inputs: Any) -> bool:
        """Whether a record of these inputs is there."""
        return self._read(name, inputs) is not None

    def get(self, name: str, inputs: Any, compute: Callable[[], Record]) -> Record:
        """The record of that name if it was made from the same inputs, else ``compute()``, saved."""
        found = self._read(name, inputs)
        if found is not None:
            return found
        from safetensors.torch import save_file

        record = compute()
        metadata = {"inputs": _canonical(inputs), "facts": json.dumps(record.facts)}
        tensors = {key: value.detach().cpu().contiguous() for key, value in record.tensors.items()}
        with whole_file(self.folder / f"{name}.safetensors") as path:
            save_file(tensors, path, metadata)
        return record

    def _read(self, name: str, inputs: Any) -> Record | None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("inputs") != _canonical(inputs):
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                return Record(tensors, json.loads(metadata["facts"]), reused=True)
        except (SafetensorError, OSError, KeyError, ValueError):
            return None  # a damaged file is work to do again, not an error


def _canonical(inputs: Any) -> str:
    return json.dumps(inputs, sort_keys=True)
