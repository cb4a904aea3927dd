"""What nvcc made of the CUDA C++ kernels: registers, stack, spills, 128-bit accesses and exponentials, from the machine
code inside the built extension (``make build-cuda``). Nothing is run; cuobjdump comes with Triton's wheel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import fastcalib

from . import sass
from .sass import Counts

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class CudaKernel:
    target: str
    kernel: str
    registers: int
    stack: int  # bytes
    shared: int  # bytes, static
    code: Counts
    loop: Counts | None


def extension() -> Path | None:
    """The file of fastcalib._C, if it was built with the CUDA kernels."""
    module = getattr(fastcalib, "_C", None)
    return Path(module.__file__) if getattr(module, "cuda_targets", str)() else None


def table(targets: tuple[str, ...] = TARGETS) -> list[CudaKernel]:
    """Every kernel of the extension for each target it holds machine code for."""
    path = extension()
    if path is None:
        raise FileNotFoundError("fastcalib._C has no CUDA kernels: `make build-cuda` builds them, without a GPU")
    out = []
    for target in targets:
        codes = sass.functions(sass.tool("cuobjdump", "-sass", "-arch", target, str(path)))
        usage = sass.usage(sass.tool("cuobjdump", "-res-usage", "-arch", target, str(path)))
        names = readable(list(codes))
        for mangled, code in codes.items():
            registers, stack, shared = usage[mangled]
            out.append(
                CudaKernel(
                    target, names[mangled], registers, stack, shared, sass.count(code), sass.main_loop(code)
                )
            )  # fmt: skip
    return out


def readable(mangled: list[str]) -> dict[str, str]:
    """``sweep_kernel<BFloat16, true, false>`` of a mangled name; the mangled name where there is no c++filt."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return {name: name for name in mangled}
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return {name: _short(line) for name, line in zip(mangled, done.stdout.splitlines())}


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|fastcalib::|cuda::|^void ", "", name)
    return re.sub(r"\((?!.*>).*\)$", "", name).replace("bool)", "")
