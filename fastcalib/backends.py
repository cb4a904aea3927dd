"""Which implementation runs, and why the others do not."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

BACKENDS = ("eager", "cpp", "triton", "cuda")

# Process-wide on purpose: torch.compile guards on a plain global, it cannot see through a context variable.
_forced: str = "auto"
_warned = False

_C: ModuleType | None
try:
    _C, _C_error = importlib.import_module("fastcalib._C"), ""
except ImportError as error:  # a pure-Python install, or a build for another interpreter
    _C, _C_error = None, str(error)


def extension() -> ModuleType:
    """The C++ module; RuntimeError with the reason when it is not there."""
    if _C is None:
        raise RuntimeError(f"backend 'cpp' is not available: {_why_no_extension()}")
    return _C


def _why_no_extension() -> str:
    return (
        f"the C++ extension fastcalib._C could not be imported ({_C_error}); "
        "reinstall with a C++20 compiler present and FASTCALIB_FORCE_EXT=1 to see the build error"
    )


def backends() -> dict[str, tuple[bool, str]]:
    """Every backend with whether it is live and, in words, why or why not.

    Example:
        >>> import fastcalib
        >>> fastcalib.backends()["eager"][0]
        True
    """
    gpu = "torch sees a CUDA device" if torch.cuda.is_available() else "torch sees no CUDA device"
    cpp = (False, _why_no_extension()) if _C is None else (True, f"C++ kernels for the CPU, instruction set {_C.isa()}")
    return {
        "eager": (True, "plain PyTorch, the reference; any device"),
        "cpp": cpp,
        "triton": (False, f"no Triton kernels in this version ({gpu})"),
        "cuda": (False, f"no CUDA kernels in this version ({gpu})"),
    }


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Use one backend for every call inside that says ``backend="auto"``. Process-wide, not per thread.

    Raises:
        ValueError: for a name that is no backend.
        RuntimeError: for a backend that is not live, with the reason.

    Example:
        >>> import torch, fastcalib
        >>> with fastcalib.use_backend("eager"):
        ...     fastcalib.statistics(torch.zeros(1, 4)).max_prob.item()
        0.25
    """
    global _forced
    previous = _forced
    if backend != "auto":
        _check_live(backend)
    _forced = backend
    try:
        yield
    finally:
        _forced = previous


def _check_live(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {BACKENDS}, got {backend!r}')
    if backend == "eager" or (backend == "cpp" and _C is not None):
        return  # without a call into the extension, which torch.compile cannot trace
    live, why = backends()[backend]
    if not live:
        raise RuntimeError(f"backend {backend!r} is not available: {why}")


def resolve(backend: str, device: torch.device) -> str:
    """The backend that a call with this argument and device runs on."""
    global _warned
    if backend == "auto":
        backend = _forced
    if backend == "auto":
        if device.type == "cpu" and _C is not None:
            return "cpp"
        if not _warned and not torch.compiler.is_compiling():
            _warned = True
            why = _why_no_extension() if device.type == "cpu" else f"there are no kernels for device {device} yet"
            if not os.environ.get("FASTCALIB_QUIET"):
                warnings.warn(f"fastcalib runs on the slow 'eager' backend: {why}", RuntimeWarning, stacklevel=4)
        return "eager"
    _check_live(backend)
    if backend == "cpp" and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"backend 'cpp' runs on CPU tensors, the logits are on {device}")
    return backend
