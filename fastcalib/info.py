"""What ``fastcalib info`` shows: enough to explain a slow run or to file a good bug report."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

# setup.py writes it when it installs the package without its C++ extension.
_NOTE = Path(__file__).with_name("_extension_missing.txt")
_OPENMP_RUNTIMES = ("libgomp", "libomp", "libiomp")


def collect() -> dict[str, Any]:
    """Facts about this installation, ready for ``json.dumps``.

    Returns:
        ``versions`` (name -> version or None), ``python``, ``platform``, ``extension`` (``loaded``, ``path``, the
        ``isa`` chosen, the ``isas`` this machine can run, ``compiler``, ``openmp``, the ``cuda`` targets compiled in;
        or ``why_missing``), ``backends`` (name -> ``live``, ``why``, ``operations``), ``threads`` (``torch``, ``cpus``)
        and ``openmp_runtimes`` (the shared libraries loaded; more than one means more than one pool of threads).

    Example:
        >>> from fastcalib.info import collect
        >>> facts = collect()
        >>> facts["backends"]["eager"]["live"], facts["threads"]["torch"] >= 1
        (True, True)
    """
    from . import backends
    from .backends import OPERATIONS

    def operations(backend: str) -> list[str]:
        return [operation for operation, having in OPERATIONS.items() if backend in having]

    return {
        "versions": {name: _version(name) for name in ("fastcalib", "torch", "triton", "numpy")},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{platform.system()} {platform.machine()}",
        "extension": _extension(),
        "backends": {
            name: {"live": live, "why": why, "operations": operations(name)} for name, (live, why) in backends().items()
        },
        "threads": {"torch": torch.get_num_threads(), "cpus": _usable_cpus()},
        "openmp_runtimes": _loaded_openmp_runtimes(),
    }


def render(facts: dict[str, Any] | None = None) -> Group:
    """The facts of :func:`collect` as tables for a rich console.

    Example:
        >>> from io import StringIO
        >>> from rich.console import Console
        >>> from fastcalib.info import render
        >>> console = Console(record=True, file=StringIO())
        >>> console.print(render())
        >>> "eager" in console.export_text()
        True
    """
    facts = collect() if facts is None else facts
    extension = facts["extension"]
    about = Table.grid(padding=(0, 2))
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    for name, version in facts["versions"].items():
        about.add_row(name, version or "not installed")
    about.add_row("python", f"{facts['python']}, {facts['platform']}")
    if extension["loaded"]:
        available = ", ".join(extension["isas"])
        about.add_row("instruction set", f"{extension['isa']} (this machine runs: {available})")
        about.add_row("compiler", f"{extension['compiler']}, OpenMP {'on' if extension['openmp'] else 'off'}")
        cuda = extension["cuda"]
        about.add_row(
            "CUDA kernels",
            f"compiled in for {cuda}, not yet run on a GPU" if cuda else "not compiled in: no nvcc when it was built",
        )
        about.add_row("extension", extension["path"])
    else:
        about.add_row("extension", f"missing: {extension['why_missing']}")
    about.add_row(
        "threads", f"{facts['threads']['torch']} (torch.get_num_threads), {facts['threads']['cpus']} usable CPUs"
    )
    about.add_row("OpenMP runtimes", "\n".join(facts["openmp_runtimes"]) or "none loaded")

    live = Table(title="backends", title_justify="left", title_style="bold")
    live.add_column("name", no_wrap=True)
    live.add_column("live", no_wrap=True)
    live.add_column("why", overflow="fold")
    live.add_column("operations", overflow="fold")
    for name, backend in facts["backends"].items():
        live.add_row(
            name, "[green]yes[/]" if backend["live"] else "[red]no[/]", backend["why"], ", ".join(backend["operations"])
        )
    return Group(about, "", live)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    try:
        module = importlib.import_module("fastcalib._C")
    except ImportError as error:
        note = _NOTE.read_text(encoding="utf-8").strip() if _NOTE.is_file() else ""
        return {"loaded": False, "why_missing": note or str(error)}
    return {
        "loaded": True,
        "path": str(module.__file__),
        "isa": module.isa(),
        "isas": list(module.isas()),
        "compiler": module.compiler(),
        "openmp": module.openmp(),
        "cuda": module.cuda_targets() if hasattr(module, "cuda_targets") else "",
    }


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # fewer than os.cpu_count() in most containers
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _loaded_openmp_runtimes() -> list[str]:
    """Paths of the OpenMP libraries mapped into this process (Linux; elsewhere an empty list)."""
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text(encoding="utf-8").splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(_OPENMP_RUNTIMES))
