"""Atomic operations on global and shared memory.

PTX ISA, "Parallel Synchronization and Communication Instructions: atom, red". Lanes that meet at one address take
turns, in an order drawn from the launch's ``shuffle_seed`` (ascending without one): a kernel whose result depends on
it gives another result for another seed. Scopes are not told apart; .release, .acquire and .acq_rel order accesses
for the race detector (races.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from ..errors import Unsupported
from ..formats import DTYPES, Array, bf16_to_f32, f32_to_bf16, flush
from ..lanes import Lanes
from ..parser import Address, Instruction
from ..races import ATOMIC
from .floating import maximum, minimum
from .memory_access import (
    active_lanes,
    by_space,
    check_modifiers,
    merged_bytes,
    pick,
    race_check,
    shared_race_check,
    space_of,
)
from .moves import join
from .registry import Operation, elements, opcode

Combine = Callable[..., Array]

INTEGER: dict[str, Combine] = {
    "add": lambda old, b: old + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, b: b,
    "cas": lambda old, b, c: np.where(old == b, c, old),
    "inc": lambda old, b: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - old.dtype.type(1)),
}
FLOAT: dict[str, Combine] = {"add": lambda old, b: old + b, "min": minimum, "max": maximum, "exch": INTEGER["exch"]}


def _combine(instruction: Instruction, name: str) -> Combine:
    """On register contents of the instruction's type."""
    ptx_type = instruction.type
    if ptx_type in ("f16", "f64"):
        return FLOAT[name]
    if ptx_type == "f32":  # atom.add.f32 on global memory flushes subnormals, on shared memory it does not
        return (
            (lambda old, b: flush(flush(old) + flush(b)))
            if name == "add" and instruction.has("global")
            else FLOAT[name]
        )
    if ptx_type == "bf16":
        return lambda old, b: f32_to_bf16(FLOAT[name](bf16_to_f32(old), bf16_to_f32(b)))
    if ptx_type in ("f16x2", "bf16x2"):
        one: Combine = lambda old, b: old + b  # noqa: E731

        def packed(old: Array, b: Array) -> Array:
            pairs = zip(
                np.atleast_1d(old).view(np.uint16).reshape(-1, 2).T, np.atleast_1d(b).view(np.uint16).reshape(-1, 2).T
            )
            if ptx_type == "f16x2":
                halves = [one(x.copy().view(np.float16), y.copy().view(np.float16)).view(np.uint16) for x, y in pairs]
            else:
                halves = [f32_to_bf16(one(bf16_to_f32(x), bf16_to_f32(y))) for x, y in pairs]
            return join(tuple(halves), np.dtype(np.uint32))

        return packed
    return INTEGER[name]


def take_turns(memory: Array, words: Array, values: tuple[Array, ...], combine: Combine, order: Array) -> Array:
    """Apply the lanes one after the other where they meet, all addresses at once; returns what each lane found."""
    sequence = order[np.argsort(words[order], kind="stable")]
    sorted_words = words[sequence]
    starts = np.flatnonzero(np.r_[True, sorted_words[1:] != sorted_words[:-1]])
    rank = np.arange(len(sequence)) - np.repeat(starts, np.diff(np.r_[starts, len(sequence)]))
    found = np.zeros(len(words), memory.dtype)
    by_rank = np.argsort(rank, kind="stable")
    edges = np.flatnonzero(np.r_[True, np.diff(rank[by_rank]) > 0, True])
    for begin, end in itertools.pairwise(edges):
        turn = sequence[by_rank[begin:end]]
        old = memory[words[turn]]
        found[turn] = old
        memory[words[turn]] = combine(old, *(value[turn] for value in values))
    return found


@opcode("atom", "red")
def atomic(instruction: Instruction) -> Operation:
    names = [name for name in (*INTEGER, "popc") if instruction.has(name)]
    check_modifiers(instruction, *INTEGER, "acq_rel", "noftz", "L2::cache_hint")
    if len(names) != 1:
        raise Unsupported(f"{instruction}: which operation?")
    returns = instruction.name == "atom"
    target = instruction.operands[0] if returns else None
    address, *values = instruction.operands[1:] if returns else instruction.operands
    assert isinstance(address, Address)
    wanted = 2 if names[0] == "cas" else 1
    values = values[:wanted]  # what follows is a cache policy
    combine = _combine(instruction, names[0])
    width = next((int(m[1:]) for m in instruction.modifiers if m in ("v2", "v4", "v8")), 1)
    space = space_of(instruction)
    dtype = DTYPES[instruction.type]
    size = dtype.itemsize
    if names[0] == "add" and width > 1 and not returns:
        values = list(elements(values[0]))
    elif width > 1:
        raise Unsupported(f"{instruction}: vector atomics only as red.add")
    release, acquire = instruction.has("release", "acq_rel"), instruction.has("acquire", "acq_rel")

    def once(lanes: Lanes, active: Array | None, where: Array, given: list[Array]) -> Array:
        found = np.zeros(len(where), dtype)
        for kind, chosen, inside in by_space(space, where):
            here = chosen if active is None else active if chosen is None else active[chosen]
            part = given if chosen is None else [value[chosen] for value in given]
            got = _apply(instruction, lanes, here, kind, inside, part, combine, size, release, acquire)
            if chosen is None:
                found = got.view(dtype)
            else:
                found[chosen] = got.view(dtype)
        return found

    def function(lanes: Lanes, mask: Array | None, base: Array, *operands: Array) -> Array | None:
        active = active_lanes(lanes, mask)
        result = np.zeros(lanes.count, dtype)
        if active is not None and not len(active):
            return result if returns else None
        where = pick(lanes, base, active)
        given = [pick(lanes, operand, active) for operand in operands]
        if width > 1:
            for i, value in enumerate(given):
                once(lanes, active, where + np.uint64(i * size), [value])
            return None
        found = once(lanes, active, where, given)
        if not returns:
            return None
        result[slice(None) if active is None else active] = found
        return result

    results = ((target, instruction.type),) if target is not None else ()
    arguments = ((address, "u64"), *((value, instruction.type) for value in values))
    return Operation(function, results, arguments, needs_lanes=True)


def _apply(
    instruction: Instruction,
    lanes: Lanes,
    active: Array | None,
    space: str,
    address: Array,
    values: list[Array],
    combine: Combine,
    size: int,
    release: bool,
    acquire: bool,
) -> Array:
    machine, dtype = lanes.machine, DTYPES[instruction.type]
    found = np.zeros(len(address), dtype)
    if space == "shared":
        memory = lanes.batch.shared
        region = lanes.cta if active is None else lanes.cta[active]
        good, words = memory.resolve(instruction, lanes, active, address, region, size, "atomic operation")
        positions = np.arange(len(address)) if good is None else good
        shared_race_check(instruction, lanes, positions if active is None else active[positions], words, size, ATOMIC)
        if (memory.words("written", size)[words] == 0).any():
            machine.report("uninitialised", instruction, "atomic operation on shared memory that nobody has written")
        found[positions] = take_turns(
            memory.words("raw", size).view(dtype),
            words,
            tuple(v[positions] for v in values),
            combine,
            _order(lanes, len(words)),
        )
        return found
    if space != "global":
        raise Unsupported(f"{instruction}: atomic operation on {space} memory")
    for good, buffer, words in machine.memory.resolve(
        machine, instruction, lanes, active, address, size, "atomic operation"
    ):
        positions = np.arange(len(address)) if good is None else good
        here = positions if active is None else active[positions]
        order = _order(lanes, len(words))
        race_check(instruction, lanes, here, buffer, words, size, ATOMIC)
        if buffer.initialised is not None:
            if (buffer.words("initialised", size)[words] == 0).any():
                machine.report(
                    "uninitialised", instruction, f"atomic operation on bytes of {buffer.name} that nobody has written"
                )
            buffer.initialised[(words[:, None] * size + np.arange(size)).ravel()] = 1
        if machine.races is not None:
            machine.races.synchronise(lanes, here[order], buffer, words[order], True, release, acquire)
        part = tuple(value[positions] for value in values)
        found[positions] = take_turns(buffer.words("raw", size).view(dtype), words, part, combine, order)
        buffer.traffic.atomics += len(words)
        moved = merged_bytes(lanes, here, address[positions], size)
        buffer.traffic.loaded += moved
        buffer.traffic.stored += moved
        for which in ("loaded", "stored"):
            buffer.touch(which, words, size)
    return found


def _order(lanes: Lanes, count: int) -> Array:
    seed = lanes.machine.options.shuffle_seed
    return np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
