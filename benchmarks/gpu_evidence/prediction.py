"""How long a job would take on an H100 SXM if it met its nearest ceiling: a prediction, not a measurement.

    time >= bytes / 3.35 TB/s                                          memory
    time >= instructions / (132 SMs x 4 schedulers x 32 lanes x clock)  every scheduler issues one warp a cycle
    time >= ex2 / (132 SMs x 16 a cycle x clock)                        special function units

The clock is taken as 1.7 GHz: below the 1.98 GHz that the data sheet's peak figures imply, since a chip under load does
not hold it. Bytes are a range: from what memory must deliver at the least (each byte once a launch, second looks served
by the 50 MB of L2) to all that was asked for. Instructions are those of the PTX; what ptxas makes of them may be more
or fewer. Nothing else is modelled: latency, launches (some 3 microseconds each), the tail of the grid, atomics that
meet, lanes of a warp that part.
"""

from __future__ import annotations

from dataclasses import dataclass

from .counting import Row

BANDWIDTH = 3.35e12  # bytes a second
PROCESSORS, SCHEDULERS, LANES = 132, 4, 32
SPECIAL = 16  # ex2 each cycle and multiprocessor
CLOCK = 1.7e9
ISSUE = PROCESSORS * SCHEDULERS * LANES * CLOCK
EX2 = PROCESSORS * SPECIAL * CLOCK


@dataclass(frozen=True)
class Prediction:
    """Milliseconds by each ceiling."""

    memory: float
    asked: float
    instructions: float
    ex2: float

    @property
    def least(self) -> float:
        return max(self.memory, self.instructions, self.ex2)

    @property
    def most(self) -> float:
        return max(self.asked, self.instructions, self.ex2)

    @property
    def limit(self) -> str:
        """Which ceiling is met, with the fewest bytes."""
        return max(("memory", "instructions", "ex2"), key=lambda name: getattr(self, name))


def predict(row: Row, logits: int, size: int) -> Prediction:
    """For so many logits of so many bytes each, at a row's counts for each logit."""
    milli = 1e3 * logits
    return Prediction(
        memory=milli * row.memory * size / BANDWIDTH,
        asked=milli * row.asked * size / BANDWIDTH,
        instructions=milli * row.instructions / ISSUE,
        ex2=milli * row.ex2 / EX2,
    )


def budget(size: int) -> tuple[float, float]:
    """ex2 and instructions for each logit that one read leaves before memory is no longer the ceiling."""
    rate = BANDWIDTH / size
    return EX2 / rate, ISSUE / rate


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor of a target has. CUDA C++ Programming Guide, table of compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes, with 1 KiB of each block taken by the system
    registers: int = 65536


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_89": Limits(48, 24, 100 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
    "sm_100": Limits(64, 32, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
}


def warps_resident(target: str, registers: int, warps: int, shared: int) -> int:
    """Warps that fit a multiprocessor at a time: registers come 256 to a warp, in multiples of 8 to a thread."""
    limits = LIMITS[target]
    of_a_warp = 32 * -(-registers // 8) * 8
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // of_a_warp // warps,
        limits.shared // (shared + 1024),
    )
    return blocks * warps
