"""Launches of a compiled CUDA C++ launcher, run here.

    library = cudart.compile(["ranks.cu"], folder, sm=90)
    with library.run() as run:
        assert run.call("launch_ranks", logits, out, rows, columns, None) == 0
    run.launches[-1].counters

The launcher is real host code, linked against a stand-in for libcudart (cudart_stub.c) whose kernel launches come
back to Python and run the module's PTX; buffers are CPU tensors. ptxas and the code it makes are not part of it;
nothing has been compared with a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .loader import Launch, LoadedModule, load
from .machine import Options
from .uninitialised import Uninitialised

STUB = Path(__file__).with_name("cudart_stub.c")
ORDINARY_SHARED = 49152  # a kernel that needs more must ask by cudaFuncSetAttribute
INVALID_VALUE, FAULT = 1, 719

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int,
)


def find_nvcc() -> Path | None:
    """$NVCC, the PyPI package nvidia-cuda-nvcc of this interpreter, or nvcc on the PATH; None where there is none."""
    if os.environ.get("NVCC"):
        return Path(os.environ["NVCC"])
    with contextlib.suppress(ModuleNotFoundError, ValueError):
        spec = importlib.util.find_spec("nvidia.cu13")
        for folder in spec.submodule_search_locations or () if spec else ():
            if (Path(folder) / "bin" / "nvcc").exists():
                return Path(folder) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    return Path(found) if found else None


def _execute(command: Sequence[str | Path]) -> None:
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{finished.stdout}{finished.stderr}")


@functools.cache
def stub() -> Path:
    """The stand-in for libcudart, compiled once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="cudart-stub-"))
    library = folder / "libcudart_stub.so"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler for the stand-in of libcudart: install one or set CC")
    _execute([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, STUB])
    return library


def compile(
    sources: Sequence[str | Path],
    folder: str | Path,
    *,
    sm: int = 90,
    nvcc: str | Path | None = None,
    options: Sequence[str] = (),
) -> Library:
    """Compile .cu files into a launcher library against the stub, and keep their PTX. ``folder`` receives both."""
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("no nvcc: set NVCC, or install nvidia-cuda-nvcc with its companions")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"launchers_sm{sm}.so"
    kept = folder / f"kept_sm{sm}"
    kept.mkdir(exist_ok=True)
    _execute(
        [
            nvcc,
            "-std=c++17",
            "-O3",
            f"-gencode=arch=compute_{sm},code=compute_{sm}",  # PTX alone: ptxas has nothing to do here
            "--shared",
            "-cudart=none",
            "-Xcompiler=-fPIC",
            "--keep",
            f"--keep-dir={kept}",
            *options,
            "-o",
            library,
            *sources,
            stub(),
            f"-Xlinker=-rpath={stub().parent}",
        ]
    )
    return Library(library, [_ptx_of(kept, Path(source)) for source in sources])


def _ptx_of(kept: Path, source: Path) -> str:
    """nvcc names the file after the source, with the architecture added where it likes."""
    for candidate in (kept / f"{source.stem}.ptx", *sorted(kept.glob(f"{source.stem}.compute_*.ptx"))):
        if candidate.exists():
            return candidate.read_text()
    raise FileNotFoundError(f"nvcc kept no PTX of {source} in {kept}")


class Library:
    """A launcher library and the PTX of its kernels."""

    def __init__(self, path: str | Path, ptx: Sequence[str]) -> None:
        self.path = Path(path)
        self.runtime = ctypes.CDLL(str(stub()), mode=ctypes.RTLD_GLOBAL)
        self.functions = ctypes.CDLL(str(self.path))
        self.modules = [load(text) for text in ptx]

    def module_of(self, kernel: str) -> LoadedModule:
        for module in self.modules:
            if kernel in module.module.kernels:
                return module
        raise KeyError(f"kernel {kernel} is launched, but none of the PTX files has it")

    @contextlib.contextmanager
    def run(
        self, *, multiprocessors: int = 132, l2_bytes: int = 50 << 20, sm: int = 90, **options: Any
    ) -> Iterator[CudaRun]:
        """Launches inside the block run here, with `machine.Options`; ``multiprocessors`` and ``l2_bytes`` are what a
        device says of itself."""
        run = CudaRun(self, Options(**options))
        shared = {80: 166912, 86: 101376, 89: 101376, 120: 101376}.get(sm, 232448)
        self.runtime.stub_set_device(multiprocessors, sm // 10, sm % 10, shared, l2_bytes)
        callback = _Callback(run.launched)
        self.runtime.stub_set_callback(callback)
        try:
            with run.uninitialised.watching():
                yield run
        finally:
            self.runtime.stub_set_callback(_Callback(0))
        run.check()


class CudaRun:
    """What happens inside one ``with library.run()``."""

    def __init__(self, library: Library, options: Options) -> None:
        self.library, self.options = library, options
        self.launches: list[Launch] = []
        self.uninitialised = Uninitialised()
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.error: BaseException | None = None

    def pointer(self, tensor: torch.Tensor, name: str = "") -> ctypes.c_void_p:
        """Make a tensor known to the launches from here on; its address for a launcher's argument."""
        if not any(known is tensor for _, known in self.tensors):
            self.tensors.append((name or f"tensor {len(self.tensors)} {tuple(tensor.shape)}", tensor))
        return ctypes.c_void_p(tensor.data_ptr())

    def call(self, function: str, *arguments: Any, names: Sequence[str] = ()) -> int:
        """Call a launcher: tensors as pointers, ints as 64-bit integers (right for narrower parameters too), floats
        as float.

        Anything else is passed as ctypes says (``ctypes.c_double(...)``). A fault of the emulation is raised here.
        """
        converted: list[Any] = []
        for position, argument in enumerate(arguments):
            name = names[position] if position < len(names) else ""
            if isinstance(argument, torch.Tensor):
                converted.append(self.pointer(argument, name))
            elif isinstance(argument, float):
                converted.append(ctypes.c_float(argument))
            elif isinstance(argument, int):
                converted.append(ctypes.c_int64(argument))
            else:
                converted.append(argument)
        status = int(getattr(self.library.functions, function)(*converted))
        self.check()
        return status

    def check(self) -> None:
        """Raise what went wrong in a launch: an exception cannot pass through the launcher's own code."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def launched(self, kernel: bytes, extents: Any, shared: int, arguments: Any, shared_limit: int) -> int:
        """The stub's callback."""
        try:
            return self._launch(kernel.decode(), extents, shared, arguments, shared_limit)
        except Exception as error:  # ctypes would print it and go on
            self.error = self.error or error
            return FAULT

    def _launch(self, kernel: str, extents: Any, shared: int, arguments: Any, shared_limit: int) -> int:
        module = self.library.module_of(kernel)
        program = module.program(kernel)
        if program.kernel.shared_bytes + shared > max(ORDINARY_SHARED, program.kernel.shared_bytes + shared_limit):
            return INVALID_VALUE
        values: list[int | bytes] = []
        for position, variable in enumerate(program.kernel.parameters.values()):
            raw = ctypes.string_at(arguments[position], variable.size)
            values.append(int.from_bytes(raw, "little") if variable.size <= 8 else raw)
        launch = module.launch(
            kernel,
            extents[0:3],
            extents[3:6],
            values,
            dynamic_shared=shared,
            options=self.options,
            uninitialised=self.uninitialised,
            known=self.tensors,
        )
        self.launches.append(launch)
        return 0
