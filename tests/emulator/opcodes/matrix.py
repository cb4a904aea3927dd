"""Matrix fragments of a warp.

PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: ldmatrix, stmatrix, mma.sync" with the fragment layouts
of m16n8k4, k8 and k16. Products are summed in float64 and rounded once: tensor cores sum in another order with fewer
bits, so a test must allow for that. wgmma and tcgen05 are not implemented.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..formats import Array, bf16_to_f32, halves, pack
from ..lanes import WARP, Lanes
from ..parser import Address, Instruction
from .memory_access import Access
from .registry import Operation, elements, known_modifiers, opcode
from .warp import ALL, Table

LANE = np.arange(WARP)
GROUP, MEMBER = LANE // 4, LANE % 4


def _rows(instruction: Instruction, name: str) -> Access:
    return Access(Instruction(name, ("shared", "b128"), [], None, instruction.line, instruction.text))


def _matrices(instruction: Instruction) -> int:
    known_modifiers(instruction, "sync", "aligned", "m8n8", "x1", "x2", "x4", "num", "trans", "shared", "shared::cta")
    if not instruction.has("m8n8") or not instruction.has("b16"):
        raise Unsupported(f"{instruction}: only .m8n8 of .b16")
    return next(count for count in (1, 2, 4) if instruction.has(f"x{count}"))


def _warps(instruction: Instruction, lanes: Lanes, mask: Array | None) -> int:
    """These instructions are .aligned: every lane of each warp takes part."""
    Table(lanes, mask).check(instruction, ALL)
    if not lanes.square() or (mask is not None and not np.all(mask)):
        raise lanes.machine.fail(f"{instruction}: a warp is not complete")
    return lanes.count // WARP


@opcode("ldmatrix")
def load_matrix(instruction: Instruction) -> Operation:
    """Lane 8i + r names row r of matrix i; each lane receives two elements of row lane / 4 (.trans: of that column)."""
    count = _matrices(instruction)
    access = _rows(instruction, "ld")
    address = instruction.operands[1]
    assert isinstance(address, Address)
    transposed = instruction.has("trans")

    def function(lanes: Lanes, mask: Array | None, address: Array) -> Any:
        warps = _warps(instruction, lanes, mask)
        rows = access.load(lanes, lanes.lane < 8 * count, address)
        matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(warps, WARP, 8)[:, : 8 * count]
        matrices = matrices.reshape(warps, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        low, high = matrices[:, :, GROUP, 2 * MEMBER], matrices[:, :, GROUP, 2 * MEMBER + 1]
        registers = pack(low, high)  # [warp, matrix, lane]
        parts = tuple(np.ascontiguousarray(registers[:, i]).reshape(-1) for i in range(count))
        return parts[0] if count == 1 else parts

    results = tuple((target, "b32") for target in elements(instruction.operands[0]))
    return Operation(function, results, ((address, "u64"),), needs_lanes=True)


@opcode("stmatrix")
def store_matrix(instruction: Instruction) -> Operation:
    count = _matrices(instruction)
    access = _rows(instruction, "st")
    address = instruction.operands[0]
    assert isinstance(address, Address)
    transposed = instruction.has("trans")

    def function(lanes: Lanes, mask: Array | None, address: Array, *registers: Array) -> None:
        warps = _warps(instruction, lanes, mask)
        matrices = np.zeros((warps, 4, 8, 8), np.uint16)
        for i, register in enumerate(registers):
            low, high = halves(lanes.spread(register).reshape(warps, WARP))
            matrices[:, i, GROUP, 2 * MEMBER], matrices[:, i, GROUP, 2 * MEMBER + 1] = low, high
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        rows = matrices.reshape(-1, 8).view(np.complex128)[:, 0]
        access.store(lanes, lanes.lane < 8 * count, address, rows)

    values = tuple((value, "b32") for value in elements(instruction.operands[1]))
    return Operation(function, (), ((address, "u64"), *values), needs_lanes=True)


def _numbers(register: Array, ptx_type: str) -> tuple[Array, ...]:
    """The elements of one register as float64."""
    if ptx_type == "tf32":  # hardware ignores the low 13 bits
        return ((register & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64),)
    if ptx_type == "f32":
        return (register.view(np.float32).astype(np.float64),)
    low, high = halves(register)
    if ptx_type == "bf16":
        return tuple(bf16_to_f32(part).astype(np.float64) for part in (low, high))
    return tuple(part.view(np.float16).astype(np.float64) for part in (low, high))


def fragment(registers: list[Array], ptx_type: str, rows: int, columns: int, by_column: bool) -> Array:
    """[warp, rows, columns] from one register for each lane: element k of a register lies k columns further.

    Registers go first down the rows (8 further each), then along the columns. B is the same picture turned around.
    """
    warps = len(registers[0])
    result = np.zeros((warps, rows, columns))
    values = [_numbers(register, ptx_type) for register in registers]
    width = len(values[0])  # elements in a register, side by side
    down = rows // 8
    for number, parts in enumerate(values):
        row = GROUP + 8 * (number % down)
        for k, part in enumerate(parts):
            result[:, row, width * MEMBER + k + 4 * width * (number // down)] = part
    return result.swapaxes(1, 2) if by_column else result


@opcode("mma")
def multiply(instruction: Instruction) -> Operation:
    known_modifiers(instruction, "sync", "aligned", "m16n8k4", "m16n8k8", "m16n8k16", "row", "col")
    shape = next((m for m in instruction.modifiers if m.startswith("m16n8")), None)
    types = [m for m in instruction.modifiers if m in ("f32", "f16", "bf16", "tf32")]
    if shape is None or len(types) != 4 or not (instruction.has("row") and instruction.has("col")):
        raise Unsupported(f"{instruction}: this matrix product is not implemented")
    result_type, a_type, b_type, sum_type = types
    depth = int(shape[6:])
    d, a, b, c = (elements(operand) for operand in instruction.operands)

    def function(lanes: Lanes, mask: Array | None, *registers: Array) -> tuple[Array, ...]:
        warps = _warps(instruction, lanes, mask)
        table = [lanes.spread(register).reshape(warps, WARP) for register in registers]
        left = fragment(table[: len(a)], a_type, 16, depth, False)
        right = fragment(table[len(a) : len(a) + len(b)], b_type, 8, depth, True)
        product = left @ right
        accumulator = table[len(a) + len(b) :]
        if sum_type == "f32":
            for i, register in enumerate(accumulator):
                product[:, GROUP + 8 * (i // 2), 2 * MEMBER + i % 2] += register.view(np.float32).astype(np.float64)
        else:
            product += fragment(accumulator, "f16", 16, 8, False)
        if result_type == "f32":
            rounded = product.astype(np.float32)
            return tuple(
                np.ascontiguousarray(rounded[:, GROUP + 8 * (i // 2), 2 * MEMBER + i % 2]).reshape(-1) for i in range(4)
            )
        rounded = product.astype(np.float16).view(np.uint16)
        return tuple(
            pack(rounded[:, GROUP + 8 * i, 2 * MEMBER], rounded[:, GROUP + 8 * i, 2 * MEMBER + 1]).reshape(-1)
            for i in range(2)
        )

    results = tuple((target, "f32" if result_type == "f32" else "b32") for target in d)
    arguments = tuple((operand, "b32") for operand in (*a, *b, *c))
    return Operation(function, results, arguments, needs_lanes=True)
