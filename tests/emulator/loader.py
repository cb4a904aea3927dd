"""A PTX module ready to run: parsed once, each kernel compiled once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .buffers import Buffers
from .machine import Counters, Extent, Machine, Options, parameter_block
from .memory import SPACING, allocation
from .parser import parse
from .program import Program
from .uninitialised import Uninitialised

VARIABLES = 1 << 56  # where the module's own variables lie, above every buffer


@dataclass
class Launch:
    """The record of one launch."""

    kernel: str
    grid: Extent
    block: Extent
    counters: Counters
    reports: list[str] = field(default_factory=list)


class LoadedModule:
    def __init__(self, ptx: str) -> None:
        self.module = parse(ptx)
        self.symbols = {name: VARIABLES + number * SPACING for number, name in enumerate(self.module.variables)}
        self.variables = {
            # Padded to whole aligned words; numpy memory of this size is aligned to 16 bytes only.
            name: _aligned_copy(data)
            for name, (_, data) in self.module.variables.items()
        }
        self._programs: dict[str, Program] = {}

    def program(self, kernel: str) -> Program:
        if kernel not in self._programs:
            if kernel not in self.module.kernels:
                raise KeyError(f"no kernel {kernel} in the PTX; there are {', '.join(self.module.kernels)}")
            self._programs[kernel] = Program(self.module, self.module.kernels[kernel], self.symbols)
        return self._programs[kernel]

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[torch.Tensor | int | float | bytes | None],
        *,
        names: Sequence[str] | None = None,
        dynamic_shared: int = 0,
        options: Options | None = None,
        uninitialised: Uninitialised | None = None,
        known: Sequence[tuple[str, torch.Tensor]] = (),
    ) -> Launch:
        """Run one kernel. Tensors become pointers; ``known`` are tensors that integer arguments may point into."""
        options = options or Options()
        program = self.program(kernel)
        if len(arguments) > len(program.kernel.parameters):
            raise ValueError(f"{kernel} takes {len(program.kernel.parameters)} arguments, got {len(arguments)}")
        buffers = Buffers(uninitialised or Uninitialised(), options.strict_views)
        for position, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                buffers.add(names[position] if names else f"argument {position}", argument)
        for name, tensor in known:
            buffers.add(name, tensor)
        memory = buffers.memory(program.global_granule)
        for name, address in self.symbols.items():
            data = self.variables[name]
            variable = allocation(name, data.ctypes.data, self.module.variables[name][1].size, address, 1)
            variable.constant, variable.internal = self.module.variables[name][0] == "const", True
            memory.allocations.append(variable)
            memory.bases.append(address)
        values: list[int | float | bytes] = []
        for argument, variable_size in zip(arguments, (v.size for v in program.kernel.parameters.values())):
            if isinstance(argument, torch.Tensor):
                values.append(buffers.translate(argument.data_ptr()))
            elif argument is None:
                values.append(0)
            elif known and isinstance(argument, int) and variable_size == 8:
                values.append(buffers.translate(argument))
            elif known and isinstance(argument, bytes):  # a struct: pointers lie at multiples of 8
                words = [argument[i : i + 8] for i in range(0, len(argument), 8)]
                values.append(b"".join(_translated(buffers, word) for word in words))
            else:
                values.append(argument)
        machine = Machine(
            program,
            memory,
            _three(grid),
            _three(block),
            parameter_block(program, values),
            dynamic_shared,
            options,
        )
        counters = machine.run()
        return Launch(kernel, machine.grid, machine.block, counters, machine.reports)


def _translated(buffers: Buffers, word: bytes) -> bytes:
    return word if len(word) < 8 else buffers.translate(int.from_bytes(word, "little")).to_bytes(8, "little")


def _three(extents: Sequence[int]) -> Extent:
    x, y, z = (*extents, 1, 1)[:3]
    return int(x), int(y), int(z)


def _aligned_copy(data: np.ndarray) -> np.ndarray:
    room = np.zeros(len(data) + 256, np.uint8)
    start = -room.ctypes.data % 128
    copy = room[start : start + len(data) + 128]
    copy[: len(data)] = data
    return copy


@functools.lru_cache(maxsize=512)
def load(ptx: str) -> LoadedModule:
    """The same text is parsed and compiled once in a process."""
    return LoadedModule(ptx)
