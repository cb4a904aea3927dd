"""Warp-wide instructions.

PTX ISA, "Data Movement and Conversion Instructions: shfl.sync", "Parallel Synchronization and Communication
Instructions: vote.sync, match.sync, activemask, redux.sync, elect.sync, bar.warp.sync". The executor brings the lanes
of a warp together before such a block runs; a membermask that names a lane which is not there, or leaves out one that
is, is a report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..formats import DTYPES, Array
from ..lanes import WARP, Lanes
from ..parser import Immediate, Instruction, Operand
from .registry import Operation, elements, known_modifiers, opcode

ALL = np.uint32(0xFFFFFFFF)


class Table:
    """A value of each lane as a table of warps by 32, with the lanes that take part."""

    def __init__(self, lanes: Lanes, mask: Array | None) -> None:
        self.lanes = lanes
        self.square = lanes.square()
        if self.square:
            self.present = np.ones((lanes.count // WARP, WARP), bool) if mask is None else self.of(mask, False)
        else:
            present = np.zeros(lanes.batch.warps * WARP, bool)
            present[lanes.part(lanes.batch.slot)] = True if mask is None else mask
            self.present = present.reshape(-1, WARP)

    def of(self, value: Array, missing: Any) -> np.ndarray:
        value = np.broadcast_to(self.lanes.spread(value), self.lanes.count)  # one number where all lanes have the same
        if self.square:
            return value.reshape(-1, WARP)
        table = np.full(self.lanes.batch.warps * WARP, missing, value.dtype)
        table[self.lanes.part(self.lanes.batch.slot)] = value
        return table.reshape(-1, WARP)

    def back(self, table: np.ndarray) -> np.ndarray:
        """From the table, or from one value for each warp, to one entry for each lane."""
        if table.ndim == 1:
            table = np.broadcast_to(table[:, None], (len(table), WARP))
        flat = table.reshape(-1)
        return flat if self.square else flat[self.lanes.part(self.lanes.batch.slot)]

    def check(self, instruction: Instruction, membermask: Array) -> None:
        """Each participating lane must be named, and each named lane must be there (or have left the kernel)."""
        named = np.asarray(membermask)
        if self.square and named.ndim == 0 and named == ALL and bool(self.present.all()):
            return
        masks = self.of(np.broadcast_to(named, (self.lanes.count,)).astype(np.uint32), np.uint32(0))
        bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        machine, batch = self.lanes.machine, self.lanes.batch
        if bool((self.present & (masks & bits == 0)).any()):
            machine.report("membermask", instruction, "a lane takes part that its membermask does not name")
        union = np.bitwise_or.reduce(np.where(self.present, masks, np.uint32(0)), axis=1)
        wanted = (union[:, None] & bits) != 0
        if self.square:
            absent = wanted & ~self.present
        else:
            alive = np.zeros(batch.warps * WARP, bool)
            alive[batch.slot] = batch.alive
            absent = wanted & ~self.present & alive.reshape(-1, WARP)
        if bool(absent.any()):
            warp = int(np.flatnonzero(absent.any(1))[0])
            lanes = np.flatnonzero(absent[warp]).tolist()
            machine.report(
                "membermask", instruction, f"lanes {lanes} of a warp are named in the membermask and do not arrive"
            )


def shuffle_sources(mode: str, amount: Array, control: Array) -> tuple[Array, Array]:
    """For a table of lanes: the lane each reads from, and whether that lies in its segment."""
    lane = np.arange(WARP)
    step = np.asarray(amount).astype(np.int64) & 31
    control = np.asarray(control).astype(np.int64)
    clamp, segment = control & 31, (control >> 8) & 31
    last = (lane & segment) | (clamp & ~segment)
    first = lane & segment
    if mode == "up":
        source = lane - step
        inside = source >= last
    elif mode == "down":
        source = lane + step
        inside = source <= last
    elif mode == "bfly":
        source = lane ^ step
        inside = source <= last
    else:
        source = first | (step & ~segment)
        inside = source <= last
    return np.where(inside, source, lane), inside


@opcode("shfl")
def shuffle(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "sync", "up", "down", "bfly", "idx")
    if not instruction.has("sync"):
        raise Unsupported(f"{instruction}: shfl without .sync is gone since sm_70")
    mode = next(name for name in ("up", "down", "bfly", "idx") if instruction.has(name))
    targets = elements(instruction.operands[0])
    value, amount, control, membermask = instruction.operands[1:]
    fixed = None
    if isinstance(amount, Immediate) and isinstance(control, Immediate):
        fixed = shuffle_sources(mode, amount.value, control.value)

    def function(lanes: Lanes, mask: Array | None, value: Array, amount: Array, control: Array, members: Array) -> Any:
        table = Table(lanes, mask)
        table.check(instruction, members)
        values = table.of(value, np.uint32(0))
        if fixed is not None:
            source, inside = fixed
            shuffled, present = values[:, source], table.present[:, source]
            inside = np.broadcast_to(inside, values.shape)
        else:
            zero = np.uint32(0)
            source, inside = shuffle_sources(mode, table.of(amount, zero), table.of(control, zero))
            inside = np.broadcast_to(inside, values.shape)
            source = np.broadcast_to(source, values.shape)
            shuffled, present = np.take_along_axis(values, source, 1), np.take_along_axis(table.present, source, 1)
        if not present.all() and bool((table.present & ~present & inside).any()):
            lanes.machine.report(
                "membermask", instruction, "shuffle from a lane that takes no part: its value is undefined"
            )
        return (table.back(shuffled), table.back(inside)) if len(targets) == 2 else table.back(shuffled)

    results = tuple((target, ptx_type) for target, ptx_type in zip(targets, ("u32", "pred")))
    arguments = tuple((operand, "u32") for operand in (value, amount, control, membermask))
    return Operation(function, results, arguments, needs_lanes=True)


def _ballot(table: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.packbits(table, axis=1, bitorder="little")).view(np.uint32)[:, 0]


@opcode("vote")
def vote(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "sync", "all", "any", "uni", "ballot")
    target, predicate, membermask = instruction.operands
    ballot = instruction.has("ballot")

    def function(lanes: Lanes, mask: Array | None, predicate: Array, members: Array) -> Array:
        table = Table(lanes, mask)
        table.check(instruction, members)
        true = table.of(predicate, False) & table.present
        everyone, anyone = (true | ~table.present).all(1), true.any(1)
        if ballot:
            answer = _ballot(true)
        elif instruction.has("all"):
            answer = everyone
        elif instruction.has("any"):
            answer = anyone
        else:
            answer = everyone | ~anyone
        return table.back(answer)

    result = ((target, "u32" if ballot else "pred"),)
    return Operation(function, result, ((predicate, "pred"), (membermask, "u32")), needs_lanes=True)


REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux")
def reduce(instruction: Instruction) -> Operation:
    """redux.sync on 32-bit integers; on f32 (min and max, sm_100a) a NaN loses unless .NaN is given."""
    known_modifiers(instruction, "sync", "NaN", "abs", *REDUCTIONS)
    if instruction.has("abs"):
        raise Unsupported(f"{instruction}: .abs is not implemented")
    name = next(name for name in REDUCTIONS if instruction.has(name))
    ptx_type = "u32" if instruction.type == "b32" else instruction.type
    dtype = DTYPES[ptx_type]
    combine: np.ufunc = REDUCTIONS[name]
    if dtype.kind == "f":
        neutral: Any = np.nan
        combine = combine if instruction.has("NaN") else {"min": np.fmin, "max": np.fmax}[name]
        if instruction.has("NaN"):
            neutral = np.inf if name == "min" else -np.inf
    else:
        limits = np.iinfo(dtype)
        neutral = {"min": limits.max, "max": limits.min, "and": -1 if dtype.kind == "i" else limits.max}.get(name, 0)
    target, value, membermask = instruction.operands

    def function(lanes: Lanes, mask: Array | None, value: Array, members: Array) -> Array:
        table = Table(lanes, mask)
        table.check(instruction, members)
        values = np.where(table.present, table.of(value, dtype.type(neutral)), dtype.type(neutral))
        return table.back(combine.reduce(values, axis=1).astype(dtype))

    return Operation(function, ((target, ptx_type),), ((value, ptx_type), (membermask, "u32")), needs_lanes=True)


@opcode("match")
def match(instruction: Instruction) -> Operation:
    """match.any: the lanes that hold my value; match.all: all of them if all hold it, else nobody."""
    known_modifiers(instruction, "sync", "any", "all")
    targets = elements(instruction.operands[0])
    value, membermask = instruction.operands[1:]
    ptx_type = f"u{DTYPES[instruction.type].itemsize * 8}"

    def function(lanes: Lanes, mask: Array | None, value: Array, members: Array) -> Any:
        table = Table(lanes, mask)
        table.check(instruction, members)
        values = table.of(value, DTYPES[ptx_type].type(0))
        equal = (values[:, :, None] == values[:, None, :]) & table.present[:, None, :]
        if instruction.has("any"):
            answer = np.packbits(equal, axis=2, bitorder="little").view(np.uint32)[..., 0]
            return table.back(np.ascontiguousarray(answer))
        first = table.present.argmax(1)
        same = (equal[np.arange(len(first)), first] | ~table.present).all(1)
        answer = np.where(same, _ballot(table.present), np.uint32(0))
        return (table.back(answer), table.back(same)) if len(targets) == 2 else table.back(answer)

    results = tuple((target, result) for target, result in zip(targets, ("u32", "pred")))
    return Operation(function, results, ((value, ptx_type), (membermask, "u32")), needs_lanes=True)


@opcode("activemask")
def active_mask(instruction: Instruction) -> Operation:
    def function(lanes: Lanes, mask: Array | None) -> Array:
        table = Table(lanes, mask)
        return table.back(_ballot(table.present))

    return Operation(function, ((instruction.operands[0], "u32"),), (), needs_lanes=True)


@opcode("elect")
def elect(instruction: Instruction) -> Operation:
    """The lowest lane of the membermask is elected."""
    targets: tuple[Operand, ...] = elements(instruction.operands[0])

    def function(lanes: Lanes, mask: Array | None, members: Array) -> Any:
        table = Table(lanes, mask)
        table.check(instruction, members)
        leader = table.present.argmax(1).astype(np.uint32)
        elected = np.arange(WARP)[None, :] == leader[:, None]
        return table.back(leader), table.back(elected)

    results = tuple((target, result) for target, result in zip(targets, ("u32", "pred")))
    return Operation(function, results, ((instruction.operands[1], "u32"),), needs_lanes=True)


@opcode("bar", "barrier")
def warp_barrier(instruction: Instruction) -> Operation:
    """bar.warp.sync (barriers of a CTA end a block and never come here)."""
    known_modifiers(instruction, "warp", "sync")
    check: Callable[..., None] = lambda lanes, mask, members: Table(lanes, mask).check(instruction, members)  # noqa: E731
    return Operation(check, (), ((instruction.operands[0], "u32"),), needs_lanes=True)
