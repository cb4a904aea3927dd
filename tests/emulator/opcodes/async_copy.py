"""Asynchronous copies from global to shared memory by the threads themselves.

PTX ISA, "Data Movement and Conversion Instructions: cp.async, cp.async.commit_group, cp.async.wait_group,
cp.async.wait_all". What is copied is there at once, but counts as never written until the thread that asked for it has
waited for its group: whoever reads it earlier reads memory that nobody has written. For other warps it is written by
the wait, so that the barrier they need is one after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Unsupported
from ..formats import Array
from ..lanes import Lanes
from ..parser import Address, Immediate, Instruction
from .memory_access import Access, active_lanes, pick
from .registry import Operation, opcode

if TYPE_CHECKING:
    from ..executor import Batch


@dataclass
class Copy:
    """One instruction's worth, for the lanes whose guard held."""

    lanes: Lanes
    store: Access
    address: Array
    value: Array
    group: Array  # of each lane: how many groups its thread had committed before

    def part(self, chosen: Array) -> Copy:
        if chosen.all():
            return self
        lanes = Lanes(self.lanes.batch, self.lanes.everyone[chosen])
        return Copy(lanes, self.store, self.address[chosen], self.value[chosen], self.group[chosen])

    def finish(self) -> None:
        self.store.store(self.lanes, None, self.address, self.value)


class Copies:
    """The copies of a batch that nobody has waited for, and the groups that each thread has committed."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.committed = np.zeros(batch.count, np.int64)
        self.pending: list[Copy] = []

    def begin(self, lanes: Lanes, store: Access, address: Array, value: Array) -> None:
        copy = Copy(lanes, store, address, value, self.committed[lanes.everyone])
        copy.finish()
        shared = self.batch.shared
        places = (lanes.cta * shared.stride + address.astype(np.int64))[address <= np.uint64(shared.size)]
        shared.written[(places[:, None] + np.arange(store.size)) % len(shared.written)] = 0
        self.pending.append(copy)

    def commit(self, lanes: Lanes) -> None:
        self.committed[lanes.everyone] += 1

    def wait(self, lanes: Lanes, allowed: int | None) -> None:
        """All but the ``allowed`` last groups of each thread are done; None: all copies, those of no group too."""
        limit = np.zeros(self.batch.count, np.int64)  # groups before this one
        here = lanes.everyone
        limit[here] = self.committed[here] + 1 if allowed is None else self.committed[here] - allowed
        still = []
        for copy in self.pending:
            done = copy.group < limit[copy.lanes.everyone]
            if done.any():
                copy.part(done).finish()
            if not done.all():
                still.append(copy.part(~done))
        self.pending = still


def _copies(lanes: Lanes) -> Copies:
    batch = lanes.batch
    if batch.copies is None:
        batch.copies = Copies(batch)
    return batch.copies


@opcode("cp")
def copy(instruction: Instruction) -> Operation:
    modifiers = instruction.modifiers
    if "async" not in modifiers or any(m in ("bulk", "mbarrier", "reduce") for m in modifiers):
        raise Unsupported(f"{instruction}: only cp.async of 4, 8 or 16 bytes is implemented")
    if "commit_group" in modifiers:
        return _of_groups(instruction, lambda copies, lanes: copies.commit(lanes))
    if "wait_group" in modifiers or "wait_all" in modifiers:
        allowed: int | None = None
        if "wait_group" in modifiers:
            (number,) = instruction.operands
            assert isinstance(number, Immediate)
            allowed = number.value
        return _of_groups(instruction, lambda copies, lanes: copies.wait(lanes, allowed))
    target, source, size, *rest = instruction.operands
    assert isinstance(target, Address) and isinstance(source, Address) and isinstance(size, Immediate)
    bits = {4: "b32", 8: "b64", 16: "b128"}[size.value]
    kinds = {"ld": ("global", bits), "st": ("shared", bits)}
    parts = {
        name: Access(Instruction(name, kind, [], None, instruction.line, instruction.text))
        for name, kind in kinds.items()
    }
    if any(m.endswith("cache_hint") for m in modifiers):
        rest = rest[:-1]

    def function(lanes: Lanes, mask: Array | None, into: Array, out_of: Array, *length: Array) -> None:
        """Where fewer bytes than the size are to be read, the others become zero."""
        active = active_lanes(lanes, mask)
        if active is not None and not len(active):
            return
        wanted = lanes.spread(length[0]) if length else np.full(lanes.count, size.value, np.uint32)
        if bool(((wanted != 0) & (wanted != size.value)).any()):
            raise Unsupported(f"{instruction}: a copy of some of its bytes")
        reading = wanted != 0 if mask is None else (wanted != 0) & mask
        value = parts["ld"].load(lanes, reading, out_of)
        copying = lanes if active is None else Lanes(lanes.batch, lanes.everyone[active])
        address = np.ascontiguousarray(pick(lanes, into, active))
        _copies(lanes).begin(copying, parts["st"], address, pick(lanes, value, active))

    arguments = ((target, "u64"), (source, "u64"), *((operand, "u32") for operand in rest))
    return Operation(function, (), arguments, needs_lanes=True)


def _of_groups(instruction: Instruction, act: Callable[[Copies, Lanes], None]) -> Operation:
    def function(lanes: Lanes, mask: Array | None) -> None:
        active = active_lanes(lanes, mask)
        act(_copies(lanes), lanes if active is None else Lanes(lanes.batch, lanes.everyone[active]))

    return Operation(function, (), (), needs_lanes=True)
