"""The CUDA C++ kernels on a CPU: real launchers and bindings, linked against a stand-in for the CUDA runtime, run the
PTX that nvcc makes of csrc/cuda in the emulator.

    with emulated_cuda.backend(90) as run:
        fastcalib.statistics(logits, backend="cuda")

What ptxas makes of the PTX is not part of it, and nothing here has been compared with a GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from fastcalib.ops import _cuda

from .emulator import cudart

backends = importlib.import_module("fastcalib.backends")  # the package has a function of that name
ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
MODULE = "_cuda_emulated"
ENTRY = f'#include "cuda/bindings.h"\nPYBIND11_MODULE({MODULE}, m) {{ fastcalib::cuda::bind(m); }}\n'


def why_not() -> str:
    """What is missing; empty where everything is there."""
    if cudart.find_nvcc() is None:
        return "no nvcc: `make build-cuda` installs one (271 MB)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return "" if _compiler() else "no C++ compiler"


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Of the processes that share the tests one compiles; the others wait for what it makes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def build(sm: int) -> tuple[cudart.Library, ModuleType]:
    """Compiled once for a state of the sources, into build/emulated-cuda."""
    nvcc, compiler = cudart.find_nvcc(), _compiler()
    assert nvcc is not None and compiler is not None
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    state = hashlib.sha256(f"{sm} {nvcc} {sys.version}".encode())
    for path in (*sorted((CSRC / "cuda").iterdir()), CSRC / "row_state.h", CSRC / "cpu" / "api.h"):
        state.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "emulated-cuda" / f"sm{sm}"
    library = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    stamp = folder / "state"
    with _one_at_a_time(folder.with_suffix(".lock")):
        if not stamp.exists() or stamp.read_text() != state.hexdigest():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _compile(folder, library, sources, nvcc, compiler, sm)
            stamp.write_text(state.hexdigest())
    # The stand-in is loaded by Library, for all to see, before the module that needs it.
    launchers = cudart.Library(library, [(folder / f"{source.stem}.ptx").read_text() for source in sources])
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(library))
    spec = importlib.util.spec_from_file_location(MODULE, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return launchers, module


def _compile(folder: Path, library: Path, sources: list[Path], nvcc: Path, compiler: str, sm: int) -> None:
    import pybind11

    target = f"-gencode=arch=compute_{sm},code=compute_{sm}"  # PTX alone: ptxas has nothing to do here
    for source in sources:
        kept = folder / "kept" / source.stem
        kept.mkdir(parents=True)
        _run(
            *(nvcc, "-c", "-std=c++20", "-O3", "-fmad=false", target, "-Xcompiler=-fPIC,-O0"),
            *("--keep", f"--keep-dir={kept}", source, "-o", folder / f"{source.stem}.o"),
        )
        (ptx,) = kept.glob("*.ptx")
        shutil.copy(ptx, folder / f"{source.stem}.ptx")
    entry = folder / "entry.cpp"
    entry.write_text(ENTRY)
    includes = [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    _run(
        *(compiler, "-shared", "-fPIC", "-O0", "-std=c++20", "-fvisibility=hidden", *includes, entry),
        *(CSRC / "cuda" / "bindings.cpp", *objects, "-o", library),
    )
    shutil.rmtree(folder / "kept")


@contextlib.contextmanager
def backend(sm: int, **options: Any) -> Iterator[cudart.CudaRun]:
    """Inside, ``backend="cuda"`` takes CPU tensors, and fastcalib/ops/_cuda.py runs in the emulator."""
    library, module = build(sm)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(library.run(sm=sm, **options))
        stack.enter_context(mock.patch.object(_cuda, "_module", lambda: module))
        launch, scratch = _cuda._launch, _cuda._scratch

        def known_launch(name: str, *arguments: Any) -> None:
            """The emulator must be told what memory a launch may touch: the tensors of this call and nothing else."""
            run.tensors.clear()
            for position, argument in enumerate(arguments):
                if isinstance(argument, torch.Tensor) and argument.numel():  # an empty one has the address of a null
                    run.pointer(argument, f"{name} {position}" if position else "logits")
            try:
                launch(name, *arguments)
            except RuntimeError:
                run.check()  # what the emulator found, rather than the launcher's error code
                raise
            finally:
                run.tensors.clear()
            run.check()

        def known_scratch(size: int, device: torch.device) -> torch.Tensor:
            memory = scratch(size, device)
            run.pointer(memory, "workspace")
            return memory

        stack.enter_context(mock.patch.object(_cuda, "_launch", known_launch))
        stack.enter_context(mock.patch.object(_cuda, "_scratch", known_scratch))
        stack.enter_context(mock.patch.object(backends, "_on_cpu", ("cuda",)))
        yield run
