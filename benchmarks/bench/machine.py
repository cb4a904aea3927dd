"""What the figures were taken on: no host names, no paths."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .ceilings import compiler_version


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches() -> str:
    parts = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            parts.append(f"L{level} {size}")
    return ", ".join(parts) or "unknown"


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return "unknown"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _isa() -> str:
    best = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {best}"


def fastcalib_facts() -> dict[str, str]:
    """Version, live backends and the instruction set of the C++ kernels; "not available" where it does not import."""
    try:
        import fastcalib
    except Exception as error:  # the benchmark must still time the others
        return {"version": f"not available: {error}", "backend": "none", "isa": "none", "commit": _commit()}
    facts = {"version": getattr(fastcalib, "__version__", "unknown"), "commit": _commit()}
    try:
        live = [name for name, (ok, _) in fastcalib.backends().items() if ok]
        facts["backend"] = "cpp" if "cpp" in live else "eager"
    except Exception as error:
        facts["backend"] = f"unknown: {error}"
    try:
        from fastcalib import _C  # type: ignore[attr-defined, unused-ignore]

        facts["isa"], facts["kernel_compiler"] = _C.isa(), _C.compiler()
    except Exception:
        facts["isa"] = "none"
    return facts


def _commit() -> str:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "unknown"
    return out or "unknown"


def describe(threads: int) -> dict[str, Any]:
    """Everything about the machine and the software that a reader of the figures needs, as text and numbers."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "caches": _caches(),
        "memory_gib": round(_memory_gib(), 1),
        "isa": _isa(),
        "transparent_huge_pages": _huge_pages(),
        "system": f"{platform.system()} {platform.machine()}, {'-'.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": compiler_version(),
        "fastcalib": fastcalib_facts(),
        "date": datetime.date.today().isoformat(),
    }
