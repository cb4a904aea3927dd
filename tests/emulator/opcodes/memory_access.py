"""Loads and stores in every state space, vectors and .b128 included.

PTX ISA, "Data Movement and Conversion Instructions: ld, ld.global.nc, ldu, st, prefetch, prefetchu, discard,
applypriority, createpolicy, isspacep". Cache operators, eviction priorities and prefetch sizes are hints: they change
nothing here. A .volatile, .relaxed or .acquire load is strong: it does not race with atomics, and .acquire sees what
was released at its address.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..formats import DTYPES, UNSIGNED, Array
from ..lanes import Lanes
from ..memory import ONES, WORD, Allocation
from ..parser import Address, Instruction, Operand, Register
from ..races import ATOMIC, READ, WRITE, expand
from .convert import LOCAL_WINDOW, SHARED_WINDOW
from .moves import join
from .registry import Operation, elements, opcode

SPACES = ("global", "shared", "local", "param", "const")
HINTS = re.compile(
    r"ca|cg|cs|lu|cv|wb|wt|nc|L1::\w+|L2::\w+|level::\w+|weak|volatile|relaxed|acquire|release|cta|gpu|sys|cluster|unified|"
    r"v[248]|shared::cta|param::func|param::entry"
)
STRONG = ("volatile", "relaxed", "acquire", "release")


def space_of(instruction: Instruction) -> str:
    """global, shared, local, param, const or generic."""
    for modifier in instruction.modifiers:
        space = modifier.split("::")[0]
        if space in SPACES:
            return space
    return "generic"


def check_modifiers(instruction: Instruction, *more: str) -> None:
    for modifier in instruction.modifiers:
        if modifier not in DTYPES and modifier not in SPACES and modifier not in more and not HINTS.fullmatch(modifier):
            raise Unsupported(f"{instruction}: modifier .{modifier} is not implemented")


def active_lanes(lanes: Lanes, mask: Array | None) -> Array | None:
    """Positions of the lanes whose guard holds; None for all."""
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.ndim == 0:
        return None if mask else np.zeros(0, np.int64)
    return None if mask.all() else np.flatnonzero(mask)


def pick(lanes: Lanes, value: Array, active: Array | None) -> Array:
    value = lanes.spread(value)
    return value if active is None else value[active]


def by_space(space: str, address: Array) -> list[tuple[str, Array | None, Array]]:
    """Generic addresses by the window they fall in: the space, which of them (None: all), the address inside it."""
    if space != "generic":
        return [(space, None, address)]
    result: list[tuple[str, Array | None, Array]] = []
    shared, local = address >= SHARED_WINDOW, address >= LOCAL_WINDOW
    for name, chosen, window in (
        ("shared", shared, SHARED_WINDOW),
        ("local", local & ~shared, LOCAL_WINDOW),
        ("global", ~local, np.uint64(0)),
    ):
        if chosen.all():
            return [(name, None, address - window)]
        if chosen.any():
            result.append((name, np.flatnonzero(chosen), address[chosen] - window))
    return result


def _narrow(active: Array | None, chosen: Array | None) -> Array | None:
    if chosen is None:
        return active
    return chosen if active is None else active[chosen]


def merged_bytes(lanes: Lanes, active: Array | None, address: Array, size: int) -> int:
    """Bytes asked for, lanes of one warp at one address once."""
    if len(address) < 2 or bool((address[1:] > address[:-1]).all()):
        return len(address) * size
    warp = lanes.warp if active is None else lanes.warp[active]
    pairs = np.stack([warp.astype(np.uint64), address])
    return int(np.unique(pairs, axis=1).shape[1]) * size


def units_of(lanes: Lanes, active: Array | None) -> Array:
    """The number of each lane's warp over the whole grid."""
    unit = lanes.part(lanes.batch.unit)
    return unit if active is None else unit[active]


def race_check(
    instruction: Instruction, lanes: Lanes, active: Array | None, buffer: Allocation, words: Array, size: int, kind: str
) -> None:
    """Of global memory. Reads are only kept in a list until somebody writes to the buffer."""
    races = lanes.machine.races
    if races is None or buffer.constant:
        return
    unit = units_of(lanes, active)
    granules = expand(words, size, buffer.granule)
    repeat = max(size // buffer.granule, 1)
    units = np.repeat(unit, repeat) if repeat > 1 else unit
    if buffer.shadow is None:
        if kind == READ:
            buffer.pending_reads.append((words, size, unit, races.clock[unit]))
            return
        buffer.start_shadow()
    assert buffer.shadow is not None
    races.check(instruction, lanes, units, buffer.shadow, granules, kind, buffer.name)


def shared_race_check(
    instruction: Instruction,
    lanes: Lanes,
    active: Array | None,
    words: Array,
    size: int,
    kind: str,
    unchanged: Array | None = None,
) -> None:
    races, batch = lanes.machine.races, lanes.batch
    if races is None or batch.shared_shadow is None:
        return
    granule = lanes.machine.program.shared_granule
    unit = units_of(lanes, active)
    repeat = max(size // granule, 1)
    if repeat > 1:
        unit = np.repeat(unit, repeat)
        unchanged = None if unchanged is None else np.repeat(unchanged, repeat)
    granules = expand(words, size, granule)
    races.check(instruction, lanes, unit, batch.shared_shadow, granules, kind, "shared memory", unchanged)


class Access:
    """One load or store instruction: what it moves (count elements of a type), and the lanes' way to memory."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.type = instruction.type
        self.count = max((int(m[1:]) for m in instruction.modifiers if re.fullmatch(r"v[248]", m)), default=1)
        self.element = DTYPES[self.type].itemsize
        self.size = self.element * self.count
        self.strong = instruction.has(*STRONG)
        self.space = space_of(instruction)
        if self.size not in (*WORD, 32):
            raise Unsupported(f"{instruction}: access of {self.size} bytes")
        self.word = min(self.size, 16)

    # --- loads

    def load(self, lanes: Lanes, mask: Array | None, address: Array) -> Any:
        active = active_lanes(lanes, mask)
        raw = np.zeros((lanes.count, self.size), np.uint8) if active is not None else None
        if active is None or len(active):
            where = pick(lanes, address, active)
            values = np.zeros(len(where), WORD[self.word]) if self.size <= 16 else np.zeros((len(where), 2), WORD[16])
            for space, chosen, inside in by_space(self.space, where):
                here = _narrow(active, chosen)
                for part in range(self.size // self.word):
                    column = values if values.ndim == 1 else values[:, part]
                    fetched = self._fetch(space, lanes, here, inside + np.uint64(16 * part))
                    if chosen is None:
                        column[...] = fetched
                    else:
                        column[chosen] = fetched
            if active is None:
                return self._unpack(values)
            assert raw is not None
            raw[active] = values.view(np.uint8).reshape(len(where), self.size)
        assert raw is not None
        return self._unpack(raw.view(WORD[self.word])[:, 0] if self.size <= 16 else raw.view(WORD[16]))

    def _unpack(self, values: Array) -> Any:
        if self.count == 1:
            return values.view(DTYPES[self.type])
        parts = values.view(_bits(self.element)).reshape(-1, self.count)
        return tuple(np.ascontiguousarray(parts.T).view(DTYPES[self.type]))

    def _fetch(self, space: str, lanes: Lanes, active: Array | None, address: Array) -> Array:
        if space == "shared":
            return self._fetch_block(lanes.batch.shared, lanes, active, address, lanes.cta)
        if space == "local":
            assert lanes.batch.local is not None
            return self._fetch_block(lanes.batch.local, lanes, active, address, lanes.everyone)
        size, machine = self.word, lanes.machine
        values = np.zeros(len(address), WORD[size])
        for chosen, buffer, words in machine.memory.resolve(
            machine, self.instruction, lanes, active, address, size, "read"
        ):
            here = _narrow(active, chosen)
            self.examine(lanes, here, buffer, words, size)
            got = buffer.words("raw", size)[words]
            if chosen is None:
                values = got
            else:
                values[chosen] = got
            if not buffer.constant:
                buffer.touch("loaded", words, size)
                asked = address if chosen is None else address[chosen]
                buffer.traffic.loaded += merged_bytes(lanes, here, asked, size)
                machine.counters.load_widths[8 * size] += len(words)
        return values

    def examine(self, lanes: Lanes, active: Array | None, buffer: Allocation, words: Array, size: int) -> None:
        """Everything that must hold of a read of global memory."""
        machine = lanes.machine
        for which, kind, message in (
            ("initialised", "uninitialised", "bytes that nobody has written"),
            ("allowed", "bounds", "bytes between the rows of the tensor"),
        ):
            if getattr(buffer, which) is None:
                continue
            bad = _differs(buffer.words(which, size)[words], ONES[size])
            if bad.any():
                offset = int(words[bad][0]) * size - (buffer.base - buffer.origin)
                text = f"read of {message}, at {buffer.name}+{offset}, {int(bad.sum())} lanes"
                machine.report(kind, self.instruction, text)
        race_check(self.instruction, lanes, active, buffer, words, size, ATOMIC if self.strong else READ)
        if self.strong and machine.races is not None:
            positions = np.arange(lanes.count) if active is None else active
            machine.races.synchronise(lanes, positions, buffer, words, False, False, self.instruction.has("acquire"))

    def _fetch_block(self, memory: Any, lanes: Lanes, active: Array | None, address: Array, regions: Array) -> Array:
        size, machine = self.word, lanes.machine
        region = regions if active is None else regions[active]
        chosen, words = memory.resolve(self.instruction, lanes, active, address, region, size, "read")
        here = _narrow(active, chosen)
        values = np.zeros(len(address), WORD[size])
        unwritten = _differs(memory.words("written", size)[words], ONES[size])
        if unwritten.any():
            offset = int(words[unwritten][0]) * size % memory.stride
            text = f"read of {memory.kind} memory that nobody has written, at offset {offset}, {unwritten.sum()} lanes"
            machine.report("uninitialised", self.instruction, text)
        if memory.kind == "shared":
            shared_race_check(self.instruction, lanes, here, words, size, READ)
            machine.counters.shared_loaded += len(words) * size
        got = memory.words("raw", size)[words]
        if chosen is None:
            return got
        values[chosen] = got
        return values

    # --- stores

    def store(self, lanes: Lanes, mask: Array | None, address: Array, *values: Array) -> None:
        active = active_lanes(lanes, mask)
        if active is not None and not len(active):
            return
        where = pick(lanes, address, active)
        parts = [pick(lanes, value, active).view(_bits(self.element)) for value in values]
        per_word = len(parts) // (self.size // self.word)
        for start in range(0, len(parts), per_word):
            group = parts[start : start + per_word]
            joined = group[0] if len(group) == 1 else join(tuple(group), WORD[self.word])
            shift = np.uint64(16 * (start // per_word))
            for space, chosen, inside in by_space(self.space, where):
                here = _narrow(active, chosen)
                self._put(space, lanes, here, inside + shift, joined if chosen is None else joined[chosen])

    def _put(self, space: str, lanes: Lanes, active: Array | None, address: Array, values: Array) -> None:
        size, machine = self.word, lanes.machine
        if space in ("shared", "local"):
            memory = lanes.batch.shared if space == "shared" else lanes.batch.local
            assert memory is not None
            regions = lanes.cta if space == "shared" else lanes.everyone
            region = regions if active is None else regions[active]
            chosen, words = memory.resolve(self.instruction, lanes, active, address, region, size, "write")
            values = values if chosen is None else values[chosen]
            if space == "shared":
                known = ~_differs(memory.words("written", size)[words], ONES[size])
                same = known & ~_differs(memory.words("raw", size)[words], values)
                shared_race_check(self.instruction, lanes, _narrow(active, chosen), words, size, WRITE, same)
                machine.counters.shared_stored += len(words) * size
            memory.words("written", size)[words] = ONES[size]
            self._write(lanes, memory.words("raw", size), words, values, f"{space} memory")
            return
        for chosen, buffer, words in machine.memory.resolve(
            machine, self.instruction, lanes, active, address, size, "write"
        ):
            here = _narrow(active, chosen)
            part = values if chosen is None else values[chosen]
            if buffer.constant:
                machine.report("bounds", self.instruction, f"write to the constant {buffer.name}")
                continue
            if buffer.allowed is not None and _differs(buffer.words("allowed", size)[words], ONES[size]).any():
                machine.report("bounds", self.instruction, f"write between the rows of the tensor {buffer.name}")
            race_check(self.instruction, lanes, here, buffer, words, size, ATOMIC if self.strong else WRITE)
            if self.strong and machine.races is not None:
                positions = np.arange(lanes.count) if here is None else here
                machine.races.synchronise(lanes, positions, buffer, words, True, self.instruction.has("release"), False)
            self._write(lanes, buffer.words("raw", size), words, part, buffer.name)
            buffer.touch("stored", words, size)
            if buffer.initialised is not None:
                buffer.words("initialised", size)[words] = ONES[size]
            asked = address if chosen is None else address[chosen]
            buffer.traffic.stored += merged_bytes(lanes, here, asked, size)
            machine.counters.store_widths[8 * size] += len(words)

    def _write(self, lanes: Lanes, memory: Array, words: Array, values: Array, place: str) -> None:
        memory[words] = values
        if len(words) > 1 and not bool((words[1:] > words[:-1]).all()):
            lost = _differs(memory[words], values)
            if lost.any():
                text = f"lanes store different values to one address of {place} in one instruction, {lost.sum()} lose"
                lanes.machine.report("conflict", self.instruction, text)


def _bits(size: int) -> np.dtype:
    return UNSIGNED.get(size, WORD[16])


def _differs(a: Array, b: Array) -> Array:
    """Bit by bit: 16-byte words must not be compared as complex numbers."""
    if a.dtype.itemsize == 16:
        left = np.ascontiguousarray(a).view(np.uint64).reshape(-1, 2)
        right = np.ascontiguousarray(np.broadcast_to(b, a.shape)).view(np.uint64).reshape(-1, 2)
        return (left != right).any(1)
    return a != b


def _address(operand: Operand) -> Address:
    assert isinstance(operand, Address)
    return operand


@opcode("ld", "ldu")
def load(instruction: Instruction) -> Operation:
    check_modifiers(instruction)
    if space_of(instruction) == "param":
        return _load_parameter(instruction)
    access = Access(instruction)
    results = tuple((element, instruction.type) for element in elements(instruction.operands[0]))
    return Operation(access.load, results, ((_address(instruction.operands[1]), "u64"),), needs_lanes=True)


def _load_parameter(instruction: Instruction) -> Operation:
    dtype = DTYPES[instruction.type]
    targets = elements(instruction.operands[0])
    address = _address(instruction.operands[1])

    def function(lanes: Lanes, mask: Array | None, offset: Array) -> Any:
        parameters = lanes.machine.parameters
        at = np.asarray(offset).astype(np.int64)
        if int(at.max()) + dtype.itemsize * len(targets) > len(parameters):
            lanes.machine.report(
                "bounds", instruction, f"read of parameter bytes at {int(at.max())} of {len(parameters)}"
            )
            return np.zeros(len(targets), dtype)[0] if len(targets) == 1 else tuple(np.zeros(len(targets), dtype))
        values = []
        for i in range(len(targets)):
            window = np.lib.stride_tricks.sliding_window_view(parameters, dtype.itemsize)[at + i * dtype.itemsize]
            values.append(np.ascontiguousarray(window).view(dtype)[..., 0])
        return values[0] if len(values) == 1 else tuple(values)

    results = tuple((target, instruction.type) for target in targets)
    return Operation(function, results, ((address, "u64"),), needs_lanes=True)


@opcode("st")
def store(instruction: Instruction) -> Operation | None:
    check_modifiers(instruction)
    if space_of(instruction) == "param":
        return None  # an argument of a call (opcodes/control.py)
    access = Access(instruction)
    values = elements(instruction.operands[1])
    arguments = ((_address(instruction.operands[0]), "u64"), *((value, instruction.type) for value in values))
    return Operation(access.store, (), arguments, needs_lanes=True)


@opcode("prefetch", "prefetchu", "discard", "applypriority")
def hint(instruction: Instruction) -> None:
    return None


@opcode("createpolicy")
def create_policy(instruction: Instruction) -> Operation:
    """A cache policy is an opaque number that only hints take."""
    function: Callable[[], Array] = lambda: np.uint64(0)  # noqa: E731
    return Operation(function, ((instruction.operands[0], "u64"),), ())


@opcode("isspacep")
def is_space(instruction: Instruction) -> Operation:
    space = space_of(instruction)
    target, source = instruction.operands
    bits = DTYPES[source.type].itemsize * 8 if isinstance(source, Register) else 64

    def function(address: Array) -> Array:
        wide = np.asarray(address).astype(np.uint64)
        shared = wide >= SHARED_WINDOW
        local = (wide >= LOCAL_WINDOW) & ~shared
        return {"shared": shared, "local": local, "global": ~shared & ~local}[space]

    return Operation(function, ((target, "pred"),), ((source, f"u{bits}"),))
