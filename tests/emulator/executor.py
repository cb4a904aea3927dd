"""Runs the CTAs of a batch in step: which threads go next, where they part and meet, and barriers.

PTX ISA, "Parallel Synchronization and Communication Instructions: bar, barrier" and "Control Flow Instructions".
Threads at one block form a group; the group of the earliest block goes first, so that threads which parted meet again
where their paths do. A block with warp-wide instructions waits for the rest of its warps as long as anybody else can
run. Threads that spin do not starve the others: from time to time the group that has waited longest goes. CTAs of
later batches start when earlier ones have ended, so a kernel in which a CTA waits for a later one does not end here
(``max_steps``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .lanes import WARP, Lanes
from .memory import BlockMemory
from .races import Shadow

if TYPE_CHECKING:
    from .machine import Machine
    from .opcodes.async_copy import Copies
    from .program import Block

TURN = 512  # steps between two turns for whoever has waited longest


class Waiting:
    """Who has arrived at one barrier of one CTA."""

    def __init__(self) -> None:
        self.positions: list[np.ndarray] = []
        self.blocks: list[Block] = []
        self.arrived = 0
        self.arriving: list[np.ndarray] = []  # bar.arrive: these do not wait
        self.expected: int | None = None
        self.predicates: list[np.ndarray] = []


class Batch:
    def __init__(self, machine: Machine, ctas: np.ndarray) -> None:
        self.machine = machine
        self.program = machine.program
        self.ctas, self.threads = len(ctas), machine.threads
        per_cta = machine.warps_per_cta
        self.count = self.ctas * self.threads
        self.warps = self.ctas * per_cta
        self.positions = np.arange(self.count)
        self.thread = np.tile(np.arange(self.threads), self.ctas)
        self.cta = np.repeat(np.arange(self.ctas), self.threads)
        self.cta_in_grid = np.repeat(ctas, self.threads)
        self.lane = self.thread % WARP
        self.warp = self.cta * per_cta + self.thread // WARP
        self.unit = self.cta_in_grid * per_cta + self.thread // WARP
        self.cta_units = ctas[:, None] * per_cta + np.arange(per_cta)
        self.cta_number = np.full(machine.ctas, -1)
        self.cta_number[ctas] = np.arange(self.ctas)
        self.slot = self.warp * WARP + self.lane
        self.at_slot = np.full(self.warps * WARP, -1)
        self.at_slot[self.slot] = self.positions
        self.alive = np.ones(self.count, bool)
        self.alive_in_warp = np.bincount(self.warp, minlength=self.warps)
        self.alive_in_cta = np.full(self.ctas, self.threads)
        self.registers: list[Any] = [_poison(register.type) for register in self.program.kernel.registers.values()]
        self.shared = BlockMemory("shared", self.ctas, machine.shared_bytes)
        self.local = (
            BlockMemory("local", self.count, machine.kernel.local_bytes) if machine.kernel.local_bytes else None
        )
        self.shared_shadow = (
            Shadow.of(len(self.shared.raw) // self.program.shared_granule + 4) if machine.races else None
        )
        self.copies: Copies | None = None  # asynchronous ones, from the first on
        self.groups: dict[int, Lanes] = {0: Lanes(self, None)}
        self.waiting: dict[tuple[int, int], Waiting] = {}
        self.everybody = self.groups[0]
        if machine.races:
            machine.races.begin(self)

    def local_warp(self, unit: int) -> tuple[int, int]:
        cta, warp = divmod(unit, self.machine.warps_per_cta)
        return int(self.cta_number[cta]), warp

    def run(self) -> None:
        blocks = self.program.blocks
        executed = np.zeros(len(blocks), np.int64)
        turns: dict[int, int] = {}
        for step in range(self.machine.options.max_steps):
            if not self.groups:
                if not self.waiting:
                    break
                self._unblock()
                continue
            number = self._choose(turns, step)
            lanes = self.groups.pop(number)
            turns.pop(number, None)
            if number >= len(blocks):
                self._exit(lanes)
                continue
            executed[number] += lanes.count
            self._step(blocks[number], lanes)
        else:
            raise self.machine.fail(
                f"no end after {self.machine.options.max_steps} steps (does a CTA wait for a later one?)"
            )
        counters = self.machine.counters
        for block, times in zip(blocks, executed.tolist()):
            if times:
                for name, count in block.counts.items():
                    counters.instructions[name] += count * times
                for instruction in block.instructions:
                    counters.opcodes[instruction.name] += times

    # --- scheduling

    def _choose(self, turns: dict[int, int], step: int) -> int:
        if len(self.groups) == 1:
            return next(iter(self.groups))
        for number in self.groups:
            turns.setdefault(number, step)
        blocks = self.program.blocks
        # Parts of warps at a warp-wide instruction are never in turn while others can run: they wait for those.
        ready = [
            number
            for number in sorted(self.groups)
            if number >= len(blocks) or not blocks[number].converges or self.groups[number].whole_warps()
        ]
        if not ready:
            return min(self.groups)
        if step % TURN == TURN - 1:
            return min(ready, key=lambda number: (turns[number], number))
        return ready[0]

    def _go(self, number: int, lanes: Lanes) -> None:
        there = self.groups.get(number)
        if there is not None:
            lanes = self._lanes(np.union1d(there.everyone, lanes.everyone))
        self.groups[number] = lanes

    def _lanes(self, index: np.ndarray) -> Lanes:
        return self.everybody if len(index) == self.count else Lanes(self, index)

    def _step(self, block: Block, lanes: Lanes) -> None:
        if lanes.index is None:
            outcome = self.program.run(block, self.registers, lanes)
        else:
            outcome = self._run_part(block, lanes)
        if block.kind == "fall":
            self._go(block.following, lanes)
        elif block.kind == "barrier":
            self._barrier(block, lanes, *outcome)
        else:
            chosen, rest = self._part(lanes, outcome)
            if rest is not None:
                self._go(block.following, rest)
            if chosen is not None and block.kind == "branch":
                self._go(block.taken, chosen)
            elif chosen is not None and block.kind == "exit":
                self._exit(chosen)
            elif chosen is not None:
                raise self.machine.fail(f"{block.last}: trap, {self.machine.name_thread(chosen, 0)}")

    def _run_part(self, block: Block, lanes: Lanes) -> Any:
        """Gather the registers that the block reads, run, and put back what it wrote."""
        index = lanes.index
        view: dict[int, Any] = {}
        for register in block.uses:
            value = self.registers[register]
            view[register] = value[index] if np.ndim(value) else value
        outcome = self.program.run(block, view, lanes)
        for register in block.defines:
            new, old = np.asarray(view[register]), np.asarray(self.registers[register])
            whole = old.copy() if old.ndim else np.full(self.count, old)
            whole[index] = new.view(whole.dtype)
            self.registers[register] = whole
        return outcome

    def _part(self, lanes: Lanes, predicate: Any) -> tuple[Lanes | None, Lanes | None]:
        """Those for whom the guard holds, and the others."""
        if predicate is None:
            return lanes, None
        predicate = np.asarray(predicate)
        if predicate.ndim == 0:
            return (lanes, None) if predicate else (None, lanes)
        if predicate.all():
            return lanes, None
        if not predicate.any():
            return None, lanes
        everyone = lanes.everyone
        return Lanes(self, everyone[predicate]), Lanes(self, everyone[~predicate])

    def _exit(self, lanes: Lanes) -> None:
        self.alive[lanes.everyone] = False
        self.alive_in_warp -= np.bincount(lanes.warp, minlength=self.warps)
        self.alive_in_cta -= np.bincount(lanes.cta, minlength=self.ctas)

    # --- barriers

    def _barrier(self, block: Block, lanes: Lanes, guard: Any, number: Any, expected: Any, predicate: Any) -> None:
        lanes_here, rest = self._part(lanes, guard)
        if rest is not None:
            self._go(block.following, rest)
        if lanes_here is None:
            return
        if predicate is not None and lanes_here is not lanes:
            predicate = lanes.spread(predicate)[np.isin(lanes.everyone, lanes_here.everyone)]
        lanes, machine = lanes_here, self.machine
        numbers = np.unique(number)
        if len(numbers) != 1:
            raise machine.fail(f"{block.last}: threads name different barriers")
        instruction = block.last
        ctas = None if instruction.has("arrive") or expected is not None else self._whole_ctas(lanes)
        if ctas is not None:
            machine.counters.barriers += len(ctas)
            if machine.races:
                machine.races.barrier_of_whole(self, ctas)
            if predicate is not None:
                self._reduce(instruction, lanes.everyone, lanes.spread(predicate).reshape(len(ctas), -1))
            self._go(block.following, lanes)
            return
        aligned = instruction.name == "bar" or instruction.has("aligned")
        if aligned and not lanes.whole_warps():
            machine.report(
                "barrier", instruction, "only a part of a warp is at this barrier: the rest has taken another path"
            )
        values = lanes.spread(predicate) if predicate is not None else None
        for cta in np.unique(lanes.cta).tolist():
            here = np.flatnonzero(lanes.cta == cta)
            waiting = self.waiting.setdefault((cta, int(numbers[0])), Waiting())
            waiting.arrived += len(here)
            waiting.blocks.append(block)
            if expected is not None:
                waiting.expected = int(np.max(expected))
            if instruction.has("arrive"):
                waiting.arriving.append(lanes.everyone[here])
                self._go(block.following, self._lanes(lanes.everyone[here]))
            else:
                waiting.positions.append(lanes.everyone[here])
            if values is not None:
                waiting.predicates.append(values[here])
            if waiting.arrived >= (waiting.expected or int(self.alive_in_cta[cta])):
                self._release(cta, int(numbers[0]))

    def _whole_ctas(self, lanes: Lanes) -> np.ndarray | None:
        """The CTAs of these lanes where every thread of each is here, so that nobody has to wait."""
        if self.waiting:
            return None
        here = np.bincount(lanes.cta, minlength=self.ctas)
        ctas = np.flatnonzero(here)
        return ctas if bool((here[ctas] == self.threads).all()) else None

    def _release(self, cta: int, number: int) -> None:
        waiting = self.waiting.pop((cta, number))
        machine = self.machine
        machine.counters.barriers += 1
        different = {block.number: block for block in waiting.blocks if not block.last.has("arrive")}
        if len(different) > 1 and waiting.expected is None:
            places = " and ".join(str(block.last) for block in different.values())
            machine.report(
                "barrier", next(iter(different.values())).last, f"divergent barrier: threads of one CTA met at {places}"
            )
        exited = self.threads - int(self.alive_in_cta[cta])
        if exited and waiting.expected is None:
            message = f"{exited} threads of the CTA had exited when the others met at this barrier"
            machine.report("barrier", waiting.blocks[0].last, message)
        first = cta * machine.warps_per_cta
        if machine.races:
            waiters = (
                np.unique(self.warp[np.concatenate(waiting.positions)]) - first
                if waiting.positions
                else np.zeros(0, int)
            )
            arrivers = (
                np.unique(self.warp[np.concatenate(waiting.arriving)]) - first if waiting.arriving else np.zeros(0, int)
            )
            machine.races.barrier(self, cta, waiters, arrivers)
        if waiting.predicates:
            everyone, values = np.concatenate(waiting.positions), np.concatenate(waiting.predicates)
            self._reduce(waiting.blocks[0].last, everyone, values[None])
        blocks = [block for block in waiting.blocks if not block.last.has("arrive")]
        for block, positions in zip(blocks, waiting.positions):
            self._go(block.following, self._lanes(positions))

    def _reduce(self, instruction: Any, positions: np.ndarray, table: np.ndarray) -> None:
        """bar.red: the predicate over all threads that met."""
        if instruction.has("popc"):
            result = table.sum(1).astype(np.uint32)
        else:
            result = table.all(1) if instruction.has("and") else table.any(1)
        register = instruction.operands[0].index
        old = np.asarray(self.registers[register])
        whole = old.copy() if old.ndim else np.full(self.count, old)
        whole[positions] = np.repeat(result, len(positions) // len(result)).view(whole.dtype)
        self.registers[register] = whole

    def _unblock(self) -> None:
        """Everybody left waits: let go the barriers that only exited threads hold up, or say that it is a deadlock."""
        for (cta, number), waiting in list(self.waiting.items()):
            if waiting.expected is None and waiting.arrived >= int(self.alive_in_cta[cta]):
                self._release(cta, number)
        if self.groups:
            return
        lines = []
        for (cta, number), waiting in self.waiting.items():
            name = self.machine.name_warp(int(self.cta_units[cta, 0])).rsplit(" warp", 1)[0]
            wanted = waiting.expected or int(self.alive_in_cta[cta])
            places = ", ".join(sorted({str(block.last) for block in waiting.blocks}))
            lines.append(f"{name}: {waiting.arrived} of {wanted} threads at barrier {number} ({places})")
        raise self.machine.fail("deadlock at barriers: " + "; ".join(lines[:4]))


def _poison(ptx_type: str) -> Any:
    """What a register holds before anything is written to it."""
    if ptx_type == "pred":
        return np.bool_(False)
    if ptx_type == "b128":
        return np.complex128(complex(-7.7e77, 7.7e77))
    size = {"8": 1, "16": 2, "32": 4, "64": 8}[ptx_type.lstrip("busf")]
    return np.array(0xDEADBEEFDEADBEEF & ((1 << 8 * size) - 1), f"u{size}")[()]
