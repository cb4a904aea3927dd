"""Kernels of a few lines of PTX, one thread for each element, to look at one instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tests.emulator import Launch, load
from tests.emulator.machine import Options

HEADER = ".version 8.7\n.target sm_90\n.address_size 64\n"
REGISTERS = """.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<64>; .reg .b64 %d<64>; .reg .b128 %q<8>;"""
NUMPY = {
    **{f"{letter}{bits}": f"u{bits // 8}" for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    "f16": "f2",
    "f32": "f4",
    "f64": "f8",
    "bf16": "u2",
    "f16x2": "u4",
    "bf16x2": "u4",
    "e4m3x2": "u2",
    "e5m2x2": "u2",
    "u16x2": "u4",
    "s16x2": "u4",
}
FAMILY = {1: "h", 2: "h", 4: "r", 8: "d"}


def tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor with a NumPy array's bytes, in memory aligned as torch aligns it."""
    array = np.ascontiguousarray(array)
    result = torch.zeros(max(array.nbytes, 1), dtype=torch.uint8)
    result.numpy()[: array.nbytes] = array.reshape(-1).view(np.uint8)
    return result


def kernel(body: str, parameters: int, *, shared: int = 0, more: str = "") -> str:
    """PTX of ``kernel(p0, p1, ...)``: parameters in %d0, %d1, ...; %r0 tid.x, %r1 ctaid.x, %r2 the thread's number."""
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(parameters))
    memory = f".shared .align 16 .b8 buffer[{shared}];" if shared else ""
    start = "mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.u32 %r2, %r1, %r3, %r0;"
    inside = "\n".join((REGISTERS, memory, loads, start, body, "ret;"))
    return f"{HEADER}\n{more}\n.visible .entry kernel({names})\n{{\n{inside}\n}}\n"


def launch(ptx: str, arguments: Sequence[Any], *, grid: int = 1, block: int = 32, **options: Any) -> Launch:
    """Arguments: tensors, or integers."""
    return load(ptx).launch("kernel", (grid,), (block,), arguments, options=Options(**options))


def apply(
    code: str, inputs: Sequence[tuple[str, np.ndarray]], outputs: Sequence[str], block: int = 64, **options: Any
) -> list[np.ndarray]:
    """Run ``code`` for each element.

    It finds its inputs in %a, %b, %c, ... and leaves its results in %x, %y (declared with the types given).
    """
    count = len(inputs[0][1])
    body, declared = [], []
    for position, (ptx_type, _) in enumerate(inputs):
        name, size = "abcde"[position], np.dtype(NUMPY[ptx_type]).itemsize
        declared.append(f".reg .b{max(16, 8 * size)} %{name};")
        body += [f"mad.wide.u32 %d20, %r2, {size}, %d{position};", f"ld.global.b{8 * size} %{name}, [%d20];"]
    for position, ptx_type in enumerate(outputs):
        declared.append(f".reg .b{max(16, 8 * np.dtype(NUMPY[ptx_type]).itemsize)} %{'xyz'[position]};")
    body.append(code)
    for position, ptx_type in enumerate(outputs):
        size = np.dtype(NUMPY[ptx_type]).itemsize
        body += [f"mad.wide.u32 %d20, %r2, {size}, %d{len(inputs) + position};"]
        body += [f"st.global.b{8 * size} [%d20], %{'xyz'[position]};"]
    guard = f"setp.ge.u32 %p15, %r2, {count};\n@%p15 ret;\n"
    given = [tensor(np.asarray(values, NUMPY[ptx_type])) for ptx_type, values in inputs]
    results = [torch.zeros(count * np.dtype(NUMPY[ptx_type]).itemsize, dtype=torch.uint8) for ptx_type in outputs]
    ptx = kernel("\n".join(declared) + "\n" + guard + "\n".join(body), len(given) + len(results))
    launch(ptx, [*given, *results], grid=-(-count // block), block=block, **options)
    return [result.numpy().view(NUMPY[ptx_type]) for result, ptx_type in zip(results, outputs)]


def pairs(values: Sequence[Any], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Every value with every value."""
    array = np.array(values, dtype)
    return np.repeat(array, len(array)), np.tile(array, len(array))
