"""Asynchronous copies from global to shared memory by the threads themselves.

PTX ISA, "Data Movement and Conversion Instructions: cp.async, cp.async.commit_group, cp.async.wait_group,
cp.async.wait_all". The copy happens at once; what may not be read before the wait is not tracked, only the barrier
that makes it visible to other warps is.
"""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported
from ..formats import Array
from ..lanes import Lanes
from ..parser import Address, Immediate, Instruction
from .memory_access import Access, active_lanes
from .registry import Operation, opcode


@opcode("cp")
def copy(instruction: Instruction) -> Operation | None:
    modifiers = instruction.modifiers
    if "async" not in modifiers or any(m in ("bulk", "mbarrier", "reduce") for m in modifiers):
        raise Unsupported(f"{instruction}: only cp.async of 4, 8 or 16 bytes is implemented")
    if "commit_group" in modifiers or "wait_group" in modifiers or "wait_all" in modifiers:
        return None
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
        parts["st"].store(lanes, mask, into, value)

    arguments = ((target, "u64"), (source, "u64"), *((operand, "u32") for operand in rest))
    return Operation(function, (), arguments, needs_lanes=True)
