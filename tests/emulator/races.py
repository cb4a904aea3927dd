"""Race detection by happens-before, at the granularity of warps.

Every warp has a clock that advances when it synchronises; a shadow of memory remembers who wrote and who read each
granule, and when. Two accesses to one granule, one of them a write, race unless they are by one warp, both atomic, or
ordered: by a barrier of the CTA (each warp knows up to which clock it has seen each other warp of its CTA) or,
between CTAs, by a release and an acquire at the same address (PTX ISA, "Memory Consistency Model": an atomic releases
if it says .release or .acq_rel or follows a fence, and acquires likewise). What is not seen: races inside one warp,
whose lanes run in step here, and races on accesses narrower than a granule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .formats import Array

if TYPE_CHECKING:
    from .executor import Batch
    from .lanes import Lanes
    from .machine import Machine
    from .memory import Allocation
    from .parser import Instruction

READ, WRITE, ATOMIC = "read", "write", "atomic operation"


@dataclass
class Shadow:
    """Of each granule the last writer (warp + 1; negative: atomic) and the last two different readers, with clocks."""

    writer: np.ndarray
    writer_clock: np.ndarray
    reader: np.ndarray
    reader_clock: np.ndarray
    other: np.ndarray
    other_clock: np.ndarray

    @staticmethod
    def of(granules: int) -> Shadow:
        return Shadow(*(np.zeros(granules, np.int32) for _ in range(6)))

    def note_read(self, granules: Array, unit: Array, clock: Array) -> None:
        before = self.reader[granules]
        replaced = (before != 0) & (before != unit)
        if replaced.any():
            places = granules[replaced]
            self.other[places], self.other_clock[places] = before[replaced], self.reader_clock[places]
        self.reader[granules], self.reader_clock[granules] = unit, clock
        lost = self.reader[granules] != unit  # another warp read it in the same instruction
        if lost.any():
            self.other[granules[lost]], self.other_clock[granules[lost]] = unit[lost], clock[lost]


def expand(words: Array, size: int, granule: int) -> Array:
    """Word indices as granule indices, one row for each lane where a word holds several."""
    per_word = max(size // granule, 1)
    if per_word == 1:
        return words if size >= granule else words * size // granule
    return (words[:, None] * per_word + np.arange(per_word)).ravel()


class Races:
    """The clocks of all warps of a launch, and what they have seen of each other."""

    def __init__(self, machine: Machine, units: int, warps_per_cta: int) -> None:
        self.machine = machine
        self.units, self.per_cta = units, warps_per_cta
        self.clock = np.ones(units, np.int32)
        self.seen: np.ndarray = np.zeros((0, 0, 0), np.int32)  # [CTA of the batch, warp, warp]
        self.published: dict[tuple[int, int], np.ndarray] = {}  # address of an atomic -> clocks released there
        self.acquired: dict[int, np.ndarray] = {}  # warp -> clocks of other CTAs that it has seen
        self.fenced: dict[int, np.ndarray] = {}  # warp -> clocks that a later relaxed atomic releases
        self.unfenced: dict[int, np.ndarray] = {}  # warp -> clocks that the next fence acquires

    def begin(self, batch: Batch) -> None:
        self.seen = np.zeros((batch.ctas, self.per_cta, self.per_cta), np.int32)

    # --- synchronisation within a CTA

    def barrier_of_whole(self, batch: Batch, ctas: np.ndarray) -> None:
        """All warps of each of these CTAs meet."""
        units = batch.cta_units[ctas]
        self.seen[ctas] = self.clock[units][:, None, :]  # [CTA, warp, warp]
        self._share(batch, ctas.tolist(), None)
        self.clock[units] += 1

    def barrier(self, batch: Batch, cta: int, waiting: np.ndarray, arriving: np.ndarray) -> None:
        """Warps of one CTA meet; those that only arrive (bar.arrive) learn nothing."""
        everyone = np.union1d(waiting, arriving)
        units = batch.cta_units[cta]
        known = self.seen[cta, everyone].max(0)
        known[everyone] = np.maximum(known[everyone], self.clock[units[everyone]])
        self.seen[cta, waiting] = known
        self._share(batch, (cta,), everyone)
        self.clock[units[everyone]] += 1

    def _share(self, batch: Batch, ctas: Iterable[int], warps: np.ndarray | None) -> None:
        """A barrier passes on what one of the warps has acquired from other CTAs."""
        if not self.acquired:
            return
        for cta in ctas:
            units = batch.cta_units[cta] if warps is None else batch.cta_units[cta][warps]
            known = [self.acquired[unit] for unit in units.tolist() if unit in self.acquired]
            if known:
                joined = np.maximum.reduce(known)
                for unit in units.tolist():
                    self.acquired[unit] = joined

    # --- synchronisation between CTAs

    def _knowledge(self, batch: Batch, unit: int) -> np.ndarray:
        """Every clock that the warp has seen, its own included."""
        known = self.acquired[unit].copy() if unit in self.acquired else np.zeros(self.units, np.int32)
        cta, warp = batch.local_warp(unit)
        units = batch.cta_units[cta]
        known[units] = np.maximum(known[units], self.seen[cta, warp])
        known[unit] = self.clock[unit]
        return known

    def fence(self, lanes: Lanes) -> None:
        for unit in np.unique(lanes.batch.unit[lanes.everyone]).tolist():
            if unit in self.unfenced:
                self._acquire(unit, self.unfenced.pop(unit))
            self.fenced[unit] = self._knowledge(lanes.batch, unit)
            self.clock[unit] += 1

    def _acquire(self, unit: int, known: np.ndarray) -> None:
        self.acquired[unit] = np.maximum(self.acquired[unit], known) if unit in self.acquired else known

    def synchronise(
        self, lanes: Lanes, active: Array, buffer: Allocation, words: Array, write: bool, release: bool, acquire: bool
    ) -> None:
        """Strong accesses, in the order in which they take their turns: each sees what those before it released there.

        A read sees it at once (.acquire) or at its next fence; a write releases what its warp knows (.release), or
        what that knew at its last fence.
        """
        if self.units == self.per_cta:  # one CTA: nobody to synchronise with
            return
        batch = lanes.batch
        units = batch.unit[lanes.everyone[active]]
        for unit, word in zip(units.tolist(), words.tolist()):
            place = (buffer.base, word)
            known = self.published.get(place)
            if known is not None and acquire:
                self._acquire(unit, known)
            elif known is not None:
                self.unfenced[unit] = np.maximum(self.unfenced[unit], known) if unit in self.unfenced else known
            given = (self._knowledge(batch, unit) if release else self.fenced.get(unit)) if write else None
            if given is not None:
                self.published[place] = np.maximum(given, known) if known is not None else given
            if release:
                self.clock[unit] += 1

    # --- checks

    def _ordered(self, batch: Batch, unit: Array, other: Array, other_clock: Array) -> Array:
        """Has each warp seen what the other did at that clock? Warps are numbered over the grid."""
        same_cta = unit // self.per_cta == other // self.per_cta
        seen = np.zeros(len(unit), np.int32)
        if same_cta.any():
            here = np.flatnonzero(same_cta)
            cta = batch.cta_number[unit[here] // self.per_cta]
            seen[here] = self.seen[cta, unit[here] % self.per_cta, other[here] % self.per_cta]
        if self.acquired and not same_cta.all():
            for position in np.flatnonzero(~same_cta):
                known = self.acquired.get(int(unit[position]))
                seen[position] = 0 if known is None else known[other[position]]
        return (unit == other) | (seen >= other_clock)

    def check(
        self,
        instruction: Instruction,
        lanes: Lanes,
        unit: Array,
        shadow: Shadow,
        granules: Array,
        kind: str,
        place: str,
        unchanged: Array | None = None,
    ) -> None:
        """``unit`` and ``granules`` have one entry for each granule touched.

        ``unchanged`` marks writes of what is there already. They race with nothing: Triton lets several warps store
        one value.
        """
        if unchanged is not None and unchanged.any():
            unit, granules = unit[~unchanged], granules[~unchanged]
        mine = unit + 1
        clock = self.clock[unit]
        writer = shadow.writer[granules]
        foreign = (writer != 0) & (np.abs(writer) != mine)
        if kind == ATOMIC:
            foreign &= writer > 0
        self._judge(
            instruction, lanes, unit, foreign, np.abs(writer) - 1, shadow.writer_clock[granules], kind, WRITE, place
        )
        if kind == READ:
            shadow.note_read(granules, mine, clock)
            return
        for reader, reader_clock in ((shadow.reader, shadow.reader_clock), (shadow.other, shadow.other_clock)):
            who = reader[granules]
            foreign = (who != 0) & (who != mine)
            self._judge(instruction, lanes, unit, foreign, who - 1, reader_clock[granules], kind, READ, place)
        signed = -mine if kind == ATOMIC else mine
        shadow.writer[granules], shadow.writer_clock[granules] = signed, clock
        if kind == WRITE:
            lost = shadow.writer[granules] != signed
            if lost.any() and unchanged is None:
                winner = np.abs(shadow.writer[granules]) - 1
                self._judge(
                    instruction, lanes, unit, lost, winner, np.full(len(unit), 2**30, np.int32), kind, WRITE, place
                )

    def _judge(
        self,
        instruction: Instruction,
        lanes: Lanes,
        unit: Array,
        foreign: Array,
        other: Array,
        other_clock: Array,
        kind: str,
        before: str,
        place: str,
    ) -> None:
        if not foreign.any():
            return
        chosen = np.flatnonzero(foreign)
        guilty = chosen[~self._ordered(lanes.batch, unit[chosen], other[chosen], other_clock[chosen])]
        if len(guilty):
            me, them = int(unit[guilty[0]]), int(other[guilty[0]])
            name = self.machine.name_warp
            message = f"race on {place}: {kind} by {name(me)} and {before} by {name(them)} with nothing between them"
            self.machine.report(f"race {kind} {before}", instruction, f"{message} ({len(guilty)} granules)")
