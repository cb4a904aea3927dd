"""Machine code as cuobjdump prints it (SASS): instructions, loops, and the loop in which a kernel spends its time.

A loop is what lies between a backward branch and its target. The main loop is the one that moves most from and to
global memory in an iteration, among those that are not merely around another such loop. Counts are of the text: of one
iteration, not of executions.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.M)
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
_USAGE = re.compile(r"^ ?Function (\S+):\s*\n.*?REG:(\d+) STACK:(\d+) SHARED:(\d+)", re.M)


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # such as LDG.E.128
    target: int | None = None  # of a branch

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]


# HMMA, HGMMA (wgmma), UTCHMMA (tcgen05)
_PRODUCT = re.compile(r"(?:UTC)?[A-Z]?G?MMA|UTC\w+MMA")


@dataclass(frozen=True)
class Counts:
    """Of some stretch of code. Widths are in bits."""

    loads: dict[str, int]
    stores: dict[str, int]
    ex2: int
    spills: int  # loads and stores of local memory
    instructions: int
    products: int = 0  # instructions of the tensor cores

    @property
    def load_bytes(self) -> int:
        return sum(int(width) // 8 * number for width, number in self.loads.items())

    @property
    def wide(self) -> bool:
        """Whether its global loads and stores move most bytes 128 bits at a time."""
        every = Counter(self.loads)
        every.update(self.stores)
        total = sum(int(width) * number for width, number in every.items())
        return total > 0 and 2 * 128 * every["128"] > total


def tool(name: str, *arguments: str) -> str:
    """What a tool of Triton's wheel prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[str, list[Instruction]]:
    """The kernels of ``cuobjdump -sass`` by their mangled names."""
    starts = [*_FUNCTION.finditer(text)]
    ends = [*(start.start() for start in starts[1:]), len(text)]
    return {start[1]: [*_instructions(text[start.end() : end])] for start, end in zip(starts, ends)}


def _instructions(text: str) -> list[Instruction]:
    out = []
    for address, name, operands in _LINE.findall(text):
        target = re.search(r"(0x[0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        out.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None))
    return out


def usage(text: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of stack and static shared memory of each kernel of ``cuobjdump -res-usage``."""
    return {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in _USAGE.findall(text)}


def width_of(name: str) -> str:
    parts = name.split(".")
    for width in ("128", "64"):
        if width in parts:
            return width
    return "16" if {"U16", "S16"} & {*parts} else "8" if {"U8", "S8"} & {*parts} else "32"


def count(code: list[Instruction]) -> Counts:
    return Counts(
        loads=dict(Counter(width_of(i.name) for i in code if i.kind == "LDG")),
        stores=dict(Counter(width_of(i.name) for i in code if i.kind == "STG")),
        ex2=sum(i.name.startswith("MUFU.EX2") for i in code),
        spills=sum(i.kind in ("LDL", "STL") for i in code),
        instructions=sum(i.kind != "NOP" for i in code),
        products=sum(bool(_PRODUCT.fullmatch(i.kind)) for i in code),
    )


def main_loop(code: list[Instruction]) -> Counts | None:
    """The innermost loop that multiplies matrices, if any does; else that over the logits, None where no loop touches
    global memory. A branch to itself, as at the end of the code, is no loop."""
    spans = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    loops = {span: count([i for i in code if span[0] <= i.address <= span[1]]) for span in spans}
    if multiplying := [counts for counts in loops.values() if counts.products]:
        return min(multiplying, key=lambda counts: counts.instructions)
    return innermost({span: counts for span, counts in loops.items() if counts.loads})


def innermost(loops: dict[tuple[int, int], Counts]) -> Counts | None:
    """The loop with most 128-bit loads, then bytes loaded, then fewest instructions; not one around another such."""

    def is_around(outer: tuple[int, int]) -> bool:
        return any(
            outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]
            and 2 * loops[inner].load_bytes >= loops[outer].load_bytes
            for inner in loops
        )  # fmt: skip

    candidates = [counts for span, counts in loops.items() if not is_around(span)]
    return max(candidates, key=lambda c: (c.loads.get("128", 0), c.load_bytes, -c.instructions), default=None)
