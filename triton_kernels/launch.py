"""Block sizes, warps and row splits: chosen by V, dtype and N alone, never by timing runs.

Nothing here depends on measuring: an autotuner would retune for each length, and bits would depend on what it found.
Sums are cut by V and the dtype alone; N and the number of multiprocessors only decide which programs do the work.
Not yet run on a GPU: the numbers follow from registers and bytes in flight, argued beside each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

VECTOR_BYTES = 16
SEGMENT_BYTES = 64 << 10
MAX_SEGMENTS = 64
# Lanes of a program that looks at a whole row twice: as few such programs as fill a multiprocessor (softmax.py).
ROW_LANES = 512
# Sums of up to 8 temperatures (four registers each) stay in registers beside a tile of 32 numbers; more take another
# read.
MAX_GROUP = 8

# Threads of a warp (a wavefront on AMD's CDNA). A lane is a thread, so lanes decide the bits and warps follow.
threads_per_warp = 64 if torch.version.hip else 32
# No contraction to fused multiply-adds beyond those that the kernels write (row_state.py).
EXACT = {"enable_fp_fusion": False}


def registers(warps: int, most: int = 255) -> dict[str, int]:
    """The option that gives the threads of a large program all the registers there are: left alone, ptxas now and then
    holds them to 64 or 128 and spills. ``most`` asks for it in a small program, too."""
    if threads_per_warp != 32 or (warps < 8 and most == 255):
        return {}
    return {"maxnreg": min(most, 65_536 // (warps * 32))}


# Set to force a number of multiprocessors (tests of row splits, machines without a device).
processors_override: int | None = None


class Tiling(NamedTuple):
    """How a row is cut: tiles of (unroll, lanes, vector) columns, segments of whole tiles."""

    lanes: int
    vector: int
    unroll: int
    segment: int

    @property
    def warps(self) -> int:
        return max(1, self.lanes // threads_per_warp)

    @property
    def tile(self) -> int:
        return self.lanes * self.vector * self.unroll

    def segments(self, vocab: int) -> int:
        return -(-vocab // self.segment)

    def constants(self) -> dict[str, int]:
        """The compile-time arguments and options that every reducing kernel takes."""
        return {
            "LANES": self.lanes, "VECTOR": self.vector, "UNROLL": self.unroll, "SEGMENT": self.segment,
            "num_warps": self.warps, **EXACT, **registers(self.warps),
        }  # fmt: skip


@lru_cache(maxsize=256)
def tiling(vocab: int, dtype: torch.dtype, lanes: int = 128) -> Tiling:
    """The cut of a row of V logits: V class and dtype only.

    128 threads with 32 numbers each: 64 (16-bit) or 128 bytes in flight per thread, some 70 registers, so that five
    or more programs share a multiprocessor: over 40 KiB in flight where 18 KiB cover the latency of an H100's memory
    at its full 3.35 TB/s. A segment is 64 KiB of a row: its final reduction over lanes costs 5 to 10% of its sums, and
    a row of 128,256 bfloat16 logits still feeds four programs. Short rows get fewer, or lanes would idle.
    """
    vector = VECTOR_BYTES // dtype.itemsize
    if vocab <= 1024:
        return Tiling(32, vector, 16 // vector, 1024)
    if vocab <= 8192:
        return Tiling(min(lanes, 128), vector, 16 // vector, 8192)
    segment = SEGMENT_BYTES // dtype.itemsize
    while segment * MAX_SEGMENTS < vocab:
        segment *= 2
    return Tiling(lanes, vector, 32 // vector, segment)


def alignment(tensor: Tensor, *strides: int) -> int:
    """Bytes that the first column of every row is aligned to: 16, or the largest power of two below that holds."""
    size = tensor.element_size()
    bits = tensor.data_ptr() | VECTOR_BYTES
    for stride in strides:
        bits |= stride * size
    return bits & -bits


def groups(count: int) -> tuple[int, int]:
    """Temperatures per program and number of such groups: one group up to 8, equal ones beyond."""
    number = max(1, -(-count // MAX_GROUP))
    return max(1, -(-count // number)), number


def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors; 132 (an H100) where no device can be asked."""
    if processors_override is not None:
        return processors_override
    return _processors(device) if device.type == "cuda" else 132


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def chunk(cut: Tiling) -> int:
    """Columns that a program of an element by element pass takes: enough to pay for reading the row's constants."""
    return 4 * cut.tile


def relative_alignment(
    source: Tensor, layout: tuple[int, int, int, int], target: Tensor, other: tuple[int, ...]
) -> int:
    """Bytes that a row of ``source`` is aligned to at the column where the same row of ``target`` reaches 16 bytes.

    16 where both lie alike (any V, as long as both are contiguous); an element's size where they differ.
    """
    size = source.element_size()
    bits = VECTOR_BYTES | abs(source.data_ptr() - target.data_ptr())
    if layout[1] == other[1]:
        for mine, theirs in zip(layout[2:], other[2:], strict=True):
            bits |= abs(mine - theirs) * size
    else:  # rows are counted in other groups: each step must be aligned by itself
        for stride in (*layout[2:], *other[2:]):
            bits |= stride * size
    return bits & -bits
