"""Which implementation runs, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

BACKENDS = ("eager", "cpp", "triton", "cuda")
# Operation -> the backends that have it. Those of a linear layer, the losses and the diagnostics are made of these.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "softmax": BACKENDS,
    "statistics": BACKENDS,
    "ranks": BACKENDS,
    "pr_divergence": ("eager", "cpp", "triton"),
    "cutoffs": BACKENDS,  # C++ has its own, the others take several calls of statistics and ranks
}

# Process-wide on purpose: torch.compile guards on a plain global, it cannot see through a context variable.
_forced: str = "auto"
_warned = False

_C: ModuleType | None
try:
    _C, _C_error = importlib.import_module("fastcalib._C"), ""
except ImportError as error:  # a pure-Python install, or a build for another interpreter
    _C, _C_error = None, str(error)

_TRITON_FOUND = importlib.util.find_spec("triton") is not None  # importing it is left to the first kernel
# GPU backends that take CPU tensors: Triton in its interpreter, and what a test emulates a device for.
_on_cpu: tuple[str, ...] = ("triton",) if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else ()


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


def cuda_extension() -> ModuleType:
    """The C++ module with its launchers of CUDA kernels; RuntimeError with the reason when they are not there."""
    if _C is None or not hasattr(_C, "cuda_statistics_forward"):
        raise RuntimeError(f"backend 'cuda' is not available: {_why_no_cuda()}")
    return _C


def _why_no_cuda() -> str:
    if getattr(_C, "cuda_statistics_forward", None) is None:
        return "no CUDA kernels in this build of the extension; build it with nvcc present"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def _why_no_triton() -> str:
    if not _TRITON_FOUND:
        return "Triton is not installed (pip install triton)"
    if not (torch.cuda.is_available() or "triton" in _on_cpu):
        return "torch sees no CUDA device"
    return ""


def backends() -> dict[str, tuple[bool, str]]:
    """Every backend with whether it is live and, in words, why or why not.

    Example:
        >>> import fastcalib
        >>> fastcalib.backends()["eager"][0]
        True
    """
    cpp = (False, _why_no_extension()) if _C is None else (True, f"C++ kernels for the CPU, instruction set {_C.isa()}")
    return {
        "eager": (True, "plain PyTorch, the reference; any device"),
        "cpp": cpp,
        "triton": (not _why_no_triton(), _why_no_triton() or "Triton kernels for GPUs, not yet run on one"),
        "cuda": (not _why_no_cuda(), _why_no_cuda() or "CUDA C++ kernels in the extension, not yet run on a GPU"),
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


def _automatic(device: torch.device, dtype: torch.dtype | None) -> tuple[str, str]:
    """The backend for a device, and why it is the slow one if it is."""
    if device.type == "cpu":
        return ("cpp", "") if _C is not None else ("eager", _why_no_extension())
    if device.type != "cuda":
        return "eager", f"there are no kernels for device {device} yet"
    if dtype == torch.float64:  # a GPU kernel would gain little: float64 arithmetic, not memory, is the limit there
        return "eager", ""
    if _TRITON_FOUND:
        return "triton", ""
    if not _why_no_cuda():
        return "cuda", ""
    return "eager", f"{_why_no_triton()}, and {_why_no_cuda()}"


def check_has(backend: str, operation: str) -> None:
    """RuntimeError for a backend without kernels for an operation, with those that have them."""
    having = OPERATIONS[operation]
    if backend in BACKENDS and backend not in having:
        raise RuntimeError(f"backend {backend!r} has no {operation}; use backend={_either(having)}")


def _either(names: tuple[str, ...]) -> str:
    quoted = [f'"{name}"' for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]])


def resolve(backend: str, device: torch.device, dtype: torch.dtype | None = None, operation: str = "statistics") -> str:
    """The backend on which a call of an operation with this argument, device and dtype of the logits runs.

    Raises:
        ValueError: for a name that is no backend.
        RuntimeError: for a backend that is not live, lacks the operation or runs on another kind of device.
    """
    global _warned
    if backend == "auto":
        backend = _forced
    if backend == "auto":
        backend, why = _automatic(device, dtype)
        if backend not in OPERATIONS[operation]:
            backend, why = "eager", f"backend {backend!r}, the one there is for {device}, has no {operation}"
        if why and not _warned and not torch.compiler.is_compiling():
            _warned = True
            if not os.environ.get("FASTCALIB_QUIET"):
                warnings.warn(f"fastcalib runs on the slow 'eager' backend: {why}", RuntimeWarning, stacklevel=4)
        return backend
    check_has(backend, operation)
    if backend in _on_cpu or (backend == "triton" and _TRITON_FOUND and device.type == "cuda"):
        return backend
    _check_live(backend)
    if backend == "cpp" and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"backend 'cpp' runs on CPU tensors, the logits are on {device}")
    if backend in ("triton", "cuda") and device.type not in ("cuda", "meta"):
        raise RuntimeError(f"backend {backend!r} runs on CUDA tensors, the logits are on {device}")
    return backend
