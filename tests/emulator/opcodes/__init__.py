"""One module for each group of opcodes; importing this package registers them all."""

from . import (
    approximate,
    async_copy,
    atomics,
    bits,
    control,
    convert,
    floating,
    integer,
    matrix,
    memory_access,
    moves,
    warp,
)

__all__ = [
    "approximate",
    "async_copy",
    "atomics",
    "bits",
    "control",
    "convert",
    "floating",
    "integer",
    "matrix",
    "memory_access",
    "moves",
    "warp",
]
