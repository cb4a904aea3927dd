"""Compiles ``ceilings.cpp`` and calls it: the pure read, the in-place read + write and the copies of this machine."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).resolve().parent.parent / "ceilings.cpp"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


class CeilingsUnavailable(RuntimeError):
    """No C++ compiler, or it failed; the message says which."""


def find_compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first of c++, g++, clang++ on the path."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def compiler_version() -> str:
    """First line of the compiler's ``--version``, or "none"."""
    compiler = find_compiler()
    if compiler is None:
        return "none"
    out = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return out.splitlines()[0] if out else "unknown"


def build(folder: Path | None = None) -> Path:
    """Compiles ``ceilings.cpp`` into ``folder`` (default ``build/benchmarks``) unless this very source is there.

    Raises:
        CeilingsUnavailable: no compiler, or the compiler's own message.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CeilingsUnavailable("no C++ compiler found (tried $CXX, c++, g++, clang++): install one, e.g. g++")
    folder = folder or SOURCE.parent.parent / "build" / "benchmarks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="fastcalib-bench-"))
    key = SOURCE.read_bytes() + repr((compiler_version(), FLAGS, _cpu_flags())).encode()
    library = folder / f"ceilings-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.so")  # two processes may build at once
        run = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(partial)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise CeilingsUnavailable(f"{compiler} failed on ceilings.cpp: {run.stderr.strip()[-500:]}")
        partial.replace(library)
    return library


def _cpu_flags() -> str:
    """Instruction-set flags, so that a cached ``-march=native`` build never runs on another kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class Ceilings:
    """The compiled functions. Each method returns a no-argument callable to be timed.

    Args:
        threads: how many threads every call uses.
        folder: where the compiled library is cached.
    """

    def __init__(self, threads: int, folder: Path | None = None) -> None:
        self.threads = threads
        lib = ctypes.CDLL(str(build(folder)))
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        lib.ceiling_read.argtypes = (pointer, i64, i32, i32, i32)
        lib.ceiling_read.restype = ctypes.c_double
        lib.ceiling_readwrite.argtypes = (pointer, i64, i32, ctypes.c_uint32)
        lib.ceiling_readwrite.restype = None
        lib.ceiling_copy.argtypes = (pointer, pointer, i64, i32, i32)
        lib.ceiling_copy.restype = None
        lib.ceiling_arithmetic.argtypes = (i64, i32, i32, i32)
        lib.ceiling_arithmetic.restype = ctypes.c_double
        self._lib = lib
        self.has_nontemporal = bool(lib.ceiling_has_nontemporal())

    def read(self, x: Tensor, *, best: bool = False) -> Callable[[], float]:
        """Sum of a contiguous float32 or bfloat16 array: one plain stream per thread, or (best) four, prefetched."""
        if x.dtype not in DTYPE_CODES or not x.is_contiguous():
            raise CeilingsUnavailable(f"read: needs a contiguous float32 or bfloat16 array, got {x.dtype}")
        function, code, threads = self._lib.ceiling_read, DTYPE_CODES[x.dtype], self.threads
        return lambda: function(x.data_ptr(), x.numel(), threads, code, int(best))

    def arithmetic(self, x: Tensor, kind: str) -> Callable[[], float]:
        """The arithmetic of as many elements as ``x`` has, from the first-level cache, whatever memory allows.

        Args:
            x: only its size and dtype count.
            kind: "statistics" (all sums of one temperature), "logsumexp" (one sum), "gradient", or "eight powers"
                (all sums of eight temperatures with evenly spaced inverses; float32 only).
        """
        if kind == "eight powers" and x.dtype != torch.float32:
            raise CeilingsUnavailable(f"arithmetic: eight powers are for float32, got {x.dtype}")
        function, code = self._lib.ceiling_arithmetic, DTYPE_CODES[x.dtype]
        number = ("statistics", "logsumexp", "gradient", "eight powers").index(kind)
        return lambda: function(x.numel(), self.threads, code, number)

    def readwrite(self, x: Tensor) -> Callable[[], None]:
        """Read and write of every word of ``x`` where it is; the contents stay."""
        function, nbytes, threads = self._lib.ceiling_readwrite, x.numel() * x.element_size(), self.threads
        return lambda: function(x.data_ptr(), nbytes, threads, 0)

    def copy(self, dst: Tensor, src: Tensor, *, nontemporal: bool = True) -> Callable[[], None]:
        """Copy of ``src`` over ``dst`` (both contiguous, the same size)."""
        function, nbytes, threads = self._lib.ceiling_copy, src.numel() * src.element_size(), self.threads
        return lambda: function(dst.data_ptr(), src.data_ptr(), nbytes, threads, int(nontemporal))
