"""Machine code as cuobjdump prints it (SASS): instructions, loops, and the loop in which a kernel spends its time.

The main loop is the one that moves most from and to global memory in an iteration, among those that are not merely
around another such loop. Counts are of the text: of one iteration, not of executions.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.M)
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
_USAGE = re.compile(r"^ ?Function (\S+):\s*\n.*?REG:(\d+) STACK:(\d+) SHARED:(\d+)", re.M)


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # such as LDG.E.128
    target: int | None = None  # of a branch or a call
    predicated: bool = False

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def jumps(self) -> bool:
        return self.kind in ("BRA", "CALL")

    @property
    def ends(self) -> bool:
        """Whether the next instruction is not reached from here."""
        return not self.predicated and self.kind in ("BRA", "EXIT", "RET")


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
    for address, guard, name, operands in _LINE.findall(text):
        jump = name.partition(".")[0] in ("BRA", "CALL")
        target = re.search(r"(0x[0-9a-f]+)\s*$", operands) if jump else None
        # A condition stands before the instruction or, of BRA.U and BRA.DIV, before the target.
        predicated = bool(guard) or (jump and "," in operands) or bool(re.match(r"\s*!?U?P\w+\s+0x", operands))
        out.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None, predicated))
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
    """None where no loop touches global memory. Where matrices are multiplied, the innermost loop that does.

    A loop that runs once is dissolved by compilers, and CUDA C++ that takes one segment a block has none: what stands
    in no loop at all is the main part where it has more 128-bit loads than any loop.
    """
    bodies = loops(code)
    inside = {i.address for body in bodies.values() for i in body}
    straight = count([i for i in code if i.address not in inside])
    counts = {span: count(body) for span, body in bodies.items()}
    if multiplying := [found for found in counts.values() if found.products]:
        return min(multiplying, key=lambda found: found.instructions)
    most = innermost({span: found for span, found in counts.items() if found.loads})
    if straight.loads.get("128", 0) > (most.loads.get("128", 0) if most else 0):
        return straight
    return most


def loops(code: list[Instruction]) -> dict[tuple[int, int], list[Instruction]]:
    """The natural loops: what can come back to an instruction that all of it was reached through.

    A backward branch alone is none: compilers put what seldom happens at the end of the text (lanes of a warp that
    parted, say), and that jumps back into the middle. The keys are the addresses of
    the first instruction and of the one that goes back. A branch to itself, as
    at the end of the code, is no loop.
    """
    at = {instruction.address: number for number, instruction in enumerate(code)}
    starts = {0} | {number + 1 for number, i in enumerate(code) if i.jumps or i.ends}
    starts = sorted((starts | {at[i.target] for i in code if i.target in at}) - {len(code)})
    block_of = {start: block for block, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    after: list[set[int]] = []
    for end in ends:
        last = code[end - 1]
        successors = {block_of[at[last.target]]} if last.target in at else set()
        if end < len(code) and not last.ends:
            successors.add(block_of[end])
        after.append(successors)
    before: list[set[int]] = [set() for _ in starts]
    for block, successors in enumerate(after):
        for successor in successors:
            before[successor].add(block)
    passed = _dominators(after, before)
    out: dict[tuple[int, int], list[Instruction]] = {}
    for block, successors in enumerate(after):
        for head in successors & passed[block]:
            if head == block and ends[block] - starts[block] == 1:
                continue
            body, todo = {head}, [block]
            while todo:
                inside = todo.pop()
                if inside not in body:
                    body.add(inside)
                    todo += before[inside]
            out[code[starts[head]].address, code[ends[block] - 1].address] = [
                i for number in sorted(body) for i in code[starts[number] : ends[number]]
            ]
    return out


def _dominators(after: list[set[int]], before: list[set[int]]) -> list[set[int]]:
    """For each block those that every way to it from block 0 leads through, and itself; none if there is no way."""
    order, todo = [0], [0]
    while todo:
        for successor in sorted(after[todo.pop()] - {*order}):
            order.append(successor)
            todo.append(successor)
    reached = {*order}
    passed = [set(reached) if block in reached else set() for block in range(len(after))]
    passed[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            now = {block} | set.intersection(*(passed[b] for b in before[block] & reached))
            changed |= now != passed[block]
            passed[block] = now
    return passed


def _carries(inner: Counts, outer: Counts) -> bool:
    """Whether what the outer loop moves is moved by the inner one."""
    wide = inner.loads.get("128", 0)
    return 2 * inner.load_bytes >= outer.load_bytes or (wide > 0 and wide == outer.loads.get("128", 0))


def innermost(loops: dict[tuple[int, int], Counts]) -> Counts | None:
    """The loop with most 128-bit loads, then bytes loaded, then fewest instructions; not one around another such."""

    def is_around(outer: tuple[int, int]) -> bool:
        return any(
            outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]
            and _carries(loops[inner], loops[outer])
            for inner in loops
        )  # fmt: skip

    candidates = [counts for span, counts in loops.items() if not is_around(span)]
    return max(candidates, key=lambda c: (c.loads.get("128", 0), c.load_bytes, -c.instructions), default=None)
