"""Global, shared and local memory, with everything that must hold about an access.

Global buffers are the caller's own memory, seen under emulated addresses: 2^40 bytes apart, so that no wrong index
reaches another buffer, and equal to the real address modulo 4096, so that alignment is the real one. Reading or
writing outside of what the launch was given, a vector access that is not aligned to its size, a read of bytes nobody
has written, are reports; such lanes read zeros and write nothing.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .formats import Array
from .races import Shadow, expand

if TYPE_CHECKING:
    from .lanes import Lanes
    from .machine import Machine
    from .parser import Instruction

SPACING = 1 << 40
ALIGNMENT = 64
CHUNK = 1 << 16
WORD = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8"), 16: np.dtype("c16")}
ONES = {size: np.frombuffer(b"\1" * size, dtype)[0] for size, dtype in WORD.items()}
POISON = np.uint16(0x7FB5)  # NaN as float32, float16 and bfloat16
POISON_BYTES = np.frombuffer(POISON.tobytes() * 8, np.uint8)


@dataclass
class Traffic:
    """Bytes moved to or from one buffer: lanes of a warp at one address count once, as hardware merges them."""

    loaded: int = 0
    stored: int = 0
    loaded_once: int = 0  # distinct bytes: what DRAM must deliver
    stored_once: int = 0
    loaded_sectors: int = 0  # distinct sectors of 32 bytes
    stored_sectors: int = 0
    atomics: int = 0


@dataclass
class Allocation:
    """One buffer. ``raw`` begins at the aligned address below ``base``: a word index is then an aligned address."""

    name: str
    base: int
    size: int
    raw: np.ndarray
    granule: int = 4
    initialised: np.ndarray | None = None  # 1 for each byte that has been written; None where all are
    allowed: np.ndarray | None = None  # 1 for each byte that the tensors reach; None where all are
    constant: bool = False
    internal: bool = False  # a variable of the module: its traffic is not counted
    traffic: Traffic = field(default_factory=Traffic)
    shadow: Shadow | None = None
    pending_reads: list[tuple[np.ndarray, int, np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.origin = self.base // ALIGNMENT * ALIGNMENT
        self.end = self.base + self.size
        self._words: dict[tuple[str, int], np.ndarray] = {}
        self.loaded = np.zeros(len(self.raw), np.uint8)  # 1 for each byte touched
        self.stored = np.zeros(len(self.raw), np.uint8)
        # Of a very large buffer only the chunks touched are looked at in the end (a page of zeros costs nothing till
        # then).
        self.chunks = np.zeros(len(self.raw) // CHUNK + 1, bool) if len(self.raw) > 256 * CHUNK else None

    def words(self, which: str, size: int) -> np.ndarray:
        """raw, loaded, stored, initialised or allowed as words of ``size`` bytes."""
        key = (which, size)
        if key not in self._words:
            self._words[key] = getattr(self, which).view(WORD[size])
        return self._words[key]

    def start_shadow(self) -> None:
        """The first write: from now on races are looked for, against the reads so far as well."""
        self.shadow = Shadow.of(len(self.raw) // self.granule)
        for words, size, unit, clock in self.pending_reads:
            repeat = max(size // self.granule, 1)
            self.shadow.note_read(
                expand(words, size, self.granule), np.repeat(unit + 1, repeat), np.repeat(clock, repeat)
            )
        self.pending_reads.clear()

    def touch(self, which: str, words: Array, size: int) -> None:
        self.words(which, size)[words] = ONES[size]
        if self.chunks is not None:
            self.chunks[words // (CHUNK // size)] = True

    def finish(self) -> None:
        for kind in ("loaded", "stored"):
            if not getattr(self.traffic, kind):
                continue
            touched = getattr(self, kind)
            if self.chunks is not None:
                pieces = [touched[i * CHUNK : (i + 1) * CHUNK] for i in np.flatnonzero(self.chunks)]
                touched = np.concatenate(pieces)
            setattr(self.traffic, f"{kind}_once", int(np.count_nonzero(touched)))
            sectors = touched.view(np.uint64).reshape(-1, 4)
            setattr(self.traffic, f"{kind}_sectors", int(np.count_nonzero(sectors.any(1))))


def allocation(name: str, pointer: int, size: int, base: int, granule: int) -> Allocation:
    """The memory at a real address, under an emulated one that is equal to it modulo the alignment."""
    start = pointer // ALIGNMENT * ALIGNMENT
    length = -(-(pointer + size - start) // ALIGNMENT) * ALIGNMENT
    raw = np.frombuffer((ctypes.c_uint8 * length).from_address(start), np.uint8)
    return Allocation(name, base, size, raw, granule)


class GlobalMemory:
    """The buffers of one launch."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.bases: list[int] = []

    def add(self, name: str, pointer: int, size: int, granule: int = 4) -> Allocation:
        base = (len(self.allocations) + 1) * SPACING + pointer % 4096
        self.allocations.append(allocation(name, pointer, size, base, granule))
        self.bases.append(base)
        return self.allocations[-1]

    def resolve(
        self,
        machine: Machine,
        instruction: Instruction,
        lanes: Lanes,
        active: Array | None,
        address: Array,
        size: int,
        verb: str,
    ) -> list[tuple[Array | None, Allocation, Array]]:
        """For each buffer: which of the addresses lie in it (None: all of them), and their word indices."""
        low, high = int(address.min()), int(address.max())
        found = self._at(low)
        if found and high + size <= found.end and not int(np.bitwise_or.reduce(address)) % size:
            return [
                (None, found, ((address - np.uint64(found.origin)) >> np.uint64(size.bit_length() - 1)).view(np.int64))
            ]
        misaligned = address % np.uint64(size) != 0
        if misaligned.any():
            where = _first(lanes, active, misaligned)
            buffer = self.describe(int(address[misaligned][0]), size)
            machine.report("misaligned", instruction, f"misaligned {verb} of {size} bytes at {buffer}, {where}")
        result: list[tuple[Array | None, Allocation, Array]] = []
        good = ~misaligned
        owner = np.searchsorted(np.array(self.bases, np.uint64), address, side="right").astype(np.int64) - 1
        for number in np.unique(owner):
            chosen = good & (owner == number)
            buffer = self.allocations[number] if number >= 0 else None
            inside = chosen & (address <= np.uint64(max(buffer.end - size, 0))) if buffer else np.zeros_like(chosen)
            outside = chosen & ~inside
            if outside.any():
                where = _first(lanes, active, outside)
                place = self.describe(int(address[outside][0]), size)
                machine.report("bounds", instruction, f"out-of-bounds {verb} of {size} bytes at {place}, {where}")
            if buffer and inside.any():
                picked = np.flatnonzero(inside)
                words = ((address[picked] - np.uint64(buffer.origin)) >> np.uint64(size.bit_length() - 1)).view(
                    np.int64
                )
                result.append((picked, buffer, words))
        return result

    def _at(self, address: int) -> Allocation | None:
        position = bisect_right(self.bases, address) - 1
        return self.allocations[position] if position >= 0 else None

    def describe(self, address: int, size: int) -> str:
        """Names the buffer meant, and the usual cause where an index has wrapped at 32 bits."""
        nearest = min(
            self.allocations, key=lambda item: min(abs(address - item.base), abs(address - item.end)), default=None
        )
        if nearest is None:
            return f"address {address:#x}"
        offset = address - nearest.base
        text = f"{nearest.name}{offset:+d} ({nearest.size} bytes)"
        for element in (1, 2, 4, 8):
            for wraps in (1, -1, 2, -2):
                if 0 <= offset + wraps * element * 2**32 <= nearest.size - size:
                    return f"{text}: {-wraps * element * 2**32:+d} from inside it, as if an index had overflowed int32"
        return text


def _first(lanes: Lanes, active: Array | None, chosen: Array) -> str:
    """How many lanes, and which is the first."""
    position = int(np.flatnonzero(chosen)[0])
    lane = position if active is None else int(active[position])
    count = int(np.count_nonzero(chosen))
    return f"{count} lane{'s' * (count > 1)}, first {lanes.machine.name_thread(lanes, lane)}"


class BlockMemory:
    """Shared memory of each CTA of a batch, or local memory of each thread: bounds, and bytes written so far."""

    def __init__(self, kind: str, regions: int, size: int) -> None:
        self.kind, self.size = kind, size
        self.stride = -(-max(size, 1) // 128) * 128
        self.raw = np.zeros(regions * self.stride, np.uint8)
        self.written = np.zeros(regions * self.stride, np.uint8)
        self._words: dict[tuple[str, int], np.ndarray] = {}

    def words(self, which: str, size: int) -> np.ndarray:
        key = (which, size)
        if key not in self._words:
            self._words[key] = getattr(self, which).view(WORD[size])
        return self._words[key]

    def resolve(
        self,
        instruction: Instruction,
        lanes: Lanes,
        active: Array | None,
        offset: Array,
        region: Array,
        size: int,
        verb: str,
    ) -> tuple[Array | None, Array]:
        """Which offsets are good (None: all), and their word indices."""
        bad = offset > np.uint64(max(self.size - size, 0)) if size <= self.size else np.ones(len(offset), bool)
        crooked = offset & np.uint64(size - 1)
        machine = lanes.machine
        if bad.any():
            place = f"{self.kind}+{int(offset[bad][0].view(np.int64))} ({self.size} bytes)"
            machine.report(
                "bounds", instruction, f"out-of-bounds {verb} of {size} bytes at {place}, {_first(lanes, active, bad)}"
            )
        if crooked.any():
            place = f"{self.kind}+{int(offset[crooked != 0][0].view(np.int64))}"
            where = _first(lanes, active, crooked != 0)
            machine.report("misaligned", instruction, f"misaligned {verb} of {size} bytes at {place}, {where}")
            bad = bad | (crooked != 0)
        words = (region * self.stride + offset.view(np.int64)) >> (size.bit_length() - 1)
        if not bad.any():
            return None, words
        good = np.flatnonzero(~bad)
        return good, words[good]
