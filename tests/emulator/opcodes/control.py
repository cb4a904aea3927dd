"""Calls, fences and instructions that mean nothing here. Branches, returns and barriers end a block: see executor.py.

PTX ISA, "Control Flow Instructions: call", "Parallel Synchronization and Communication Instructions: membar, fence,
griddepcontrol", "Miscellaneous Instructions: nanosleep, pmevent, setmaxnreg, brkpt". Two functions may be called:
__assertfail ends the launch with a report, vprintf prints nothing.
"""

from __future__ import annotations

from ..errors import Unsupported
from ..formats import Array
from ..lanes import Lanes
from ..parser import Instruction
from .memory_access import active_lanes
from .registry import Operation, opcode


@opcode("call")
def call(instruction: Instruction) -> Operation | None:
    if "vprintf" in instruction.text:
        return None
    if "__assertfail" not in instruction.text:
        raise Unsupported(
            f"{instruction}: only __assertfail and vprintf can be called; compile so that functions are inlined"
        )

    def fail(lanes: Lanes, mask: Array | None) -> None:
        active = active_lanes(lanes, mask)
        if active is None or len(active):
            who = lanes.machine.name_thread(lanes, 0 if active is None else int(active[0]))
            raise lanes.machine.fail(f"{instruction}: device-side assertion failed, {who}")

    return Operation(fail, (), (), needs_lanes=True)


@opcode("membar", "fence")
def fence(instruction: Instruction) -> Operation | None:
    """A fence of the device orders what comes before with atomics that come after (races.py); others order one CTA."""
    if instruction.has("cta", "proxy", "async", "cluster") or any(
        m.startswith(("proxy", "mbarrier")) for m in instruction.modifiers
    ):
        return None

    def function(lanes: Lanes, mask: Array | None) -> None:
        active = active_lanes(lanes, mask)
        if lanes.machine.races is not None and (active is None or len(active)):
            here = lanes if active is None else Lanes(lanes.batch, lanes.everyone[active])
            lanes.machine.races.fence(here)

    return Operation(function, (), (), needs_lanes=True)


@opcode("nanosleep", "pmevent", "setmaxnreg", "griddepcontrol", "brkpt")
def nothing(instruction: Instruction) -> None:
    return None


@opcode("brx")
def indirect_branch(instruction: Instruction) -> Operation:
    raise Unsupported(f"{instruction}: indirect branches are not implemented")
