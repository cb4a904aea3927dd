"""One launch of a kernel: parameters, memory, options, counters and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import EmulatorError
from .executor import Batch
from .lanes import WARP, Lanes
from .memory import GlobalMemory, Traffic
from .parser import Instruction
from .program import Program
from .races import Races

MAX_REPORTS = 20


@dataclass
class Options:
    """How to run: ``strict`` raises at the end of a launch with reports, ``races`` looks for them.

    ``shuffle_seed`` runs the CTAs in another order; ``approx_ulp`` perturbs approximate instructions
    (opcodes/approximate.py).
    """

    strict: bool = True
    races: bool = True
    shuffle_seed: int | None = None
    approx_ulp: float = 0.0
    strict_views: bool = True
    batch_lanes: int = 16384
    max_steps: int = 2_000_000


@dataclass
class Counters:
    """What a launch did. Instructions are counted for each thread that issues them, its guard true or not."""

    buffers: dict[str, Traffic] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)  # by class, see program.opcode_class
    opcodes: Counter[str] = field(default_factory=Counter)  # by name: "ex2", "shfl"
    load_widths: Counter[int] = field(default_factory=Counter)  # bits of a global load -> loads by threads
    store_widths: Counter[int] = field(default_factory=Counter)
    shared_loaded: int = 0  # bytes
    shared_stored: int = 0
    barriers: int = 0  # of a CTA, once each

    @property
    def ex2(self) -> int:
        return self.opcodes["ex2"]

    @property
    def total_instructions(self) -> int:
        return sum(self.instructions.values())

    @property
    def loaded(self) -> int:
        return sum(traffic.loaded for traffic in self.buffers.values())

    @property
    def stored(self) -> int:
        return sum(traffic.stored for traffic in self.buffers.values())

    @property
    def dram_loaded(self) -> int:
        return sum(traffic.loaded_once for traffic in self.buffers.values())

    @property
    def dram_stored(self) -> int:
        return sum(traffic.stored_once for traffic in self.buffers.values())

    def per_element(self, elements: int) -> dict[str, float]:
        """Instructions and ex2 for each of so many elements."""
        figures = {name: count / elements for name, count in sorted(self.instructions.items())}
        return {**figures, "total": self.total_instructions / elements, "ex2": self.ex2 / elements}


Extent = tuple[int, int, int]


class Machine:
    """State of one launch that all its CTAs share."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        grid: Extent,
        block: Extent,
        parameters: np.ndarray,
        dynamic_shared: int,
        options: Options,
    ) -> None:
        self.program, self.memory, self.grid, self.block, self.options = program, memory, grid, block, options
        self.kernel = program.kernel
        self.parameters = parameters
        self.dynamic_shared = dynamic_shared
        self.shared_bytes = self.kernel.shared_bytes + dynamic_shared
        self.approx_ulp = options.approx_ulp
        self.counters = Counters()
        self.reports: list[str] = []
        self._seen: set[tuple[str, int]] = set()
        self._suppressed = 0
        self.threads = block[0] * block[1] * block[2]
        self.ctas = grid[0] * grid[1] * grid[2]
        self.warps_per_cta = -(-self.threads // WARP)
        self.races: Races | None = (
            Races(self, self.ctas * self.warps_per_cta, self.warps_per_cta) if options.races else None
        )

    def report(self, kind: str, instruction: Instruction | None, message: str) -> None:
        """One report for each kind of fault and instruction: the first."""
        key = (kind, instruction.line if instruction else -1)
        if key in self._seen:
            return
        self._seen.add(key)
        place = f"{self.kernel.name} {instruction}" if instruction else self.kernel.name
        if len(self.reports) < MAX_REPORTS:
            self.reports.append(f"{place}: {message}")
        else:
            self._suppressed += 1

    def name_thread(self, lanes: Lanes, lane: int) -> str:
        thread = int(lanes.thread[lane])
        cta = int(lanes.part(lanes.batch.cta_in_grid)[lane])
        return f"block {_coordinates(cta, self.grid)} thread {_coordinates(thread, self.block)}"

    def name_warp(self, unit: int) -> str:
        cta, warp = divmod(unit, self.warps_per_cta)
        return f"block {_coordinates(cta, self.grid)} warp {warp}"

    def fail(self, message: str) -> EmulatorError:
        """A fault after which nothing can go on, with what was found before."""
        return EmulatorError([*self.reports, f"{self.kernel.name}: {message}"])

    def run(self) -> Counters:
        order = np.arange(self.ctas)
        if self.options.shuffle_seed is not None:
            np.random.default_rng(self.options.shuffle_seed).shuffle(order)
        per_batch = max(1, self.options.batch_lanes // self.threads)
        if self.threads:
            with np.errstate(all="ignore"):
                for start in range(0, self.ctas, per_batch):
                    Batch(self, order[start : start + per_batch]).run()
        for buffer in self.memory.allocations:
            buffer.finish()
            if not buffer.internal:
                self.counters.buffers[buffer.name] = buffer.traffic
        if self._suppressed:
            self.reports.append(f"{self.kernel.name}: and {self._suppressed} more")
        if self.options.strict and self.reports:
            raise EmulatorError(self.reports)
        return self.counters


def _coordinates(linear: int, extents: Extent) -> tuple[int, int, int]:
    return (linear % extents[0], linear // extents[0] % extents[1], linear // extents[0] // extents[1])


def parameter_block(program: Program, values: Sequence[int | float | bytes]) -> np.ndarray:
    """Kernel arguments as bytes of the parameter space; missing trailing ones are zero (Triton's scratch pointers)."""
    kernel = program.kernel
    block = np.zeros(kernel.parameter_bytes + 16, np.uint8)
    for variable, value in zip(kernel.parameters.values(), values):
        if isinstance(value, bytes):
            encoded = value
        elif isinstance(value, float):
            encoded = np.array(value, f"f{variable.size}").tobytes()
        else:
            encoded = (int(value) & ((1 << 8 * variable.size) - 1)).to_bytes(variable.size, "little")
        block[variable.offset : variable.offset + variable.size] = np.frombuffer(encoded[: variable.size], np.uint8)
    return block
