"""Runs the PTX of compiled kernels on a CPU, strictly: for tests of GPU kernels where there is no GPU.

`triton` runs Triton kernels, `launch` a kernel of any PTX text, `cudart` the launches of a compiled CUDA C++ launcher. A launch that
reads or writes what it must not, or races, raises `EmulatorError`; its counters say what it moved and computed.
"""

from .errors import EmulatorError, Unsupported
from .loader import Launch, LoadedModule, load
from .machine import Counters, Options
from .triton_driver import Run, triton

__all__ = ["Counters", "EmulatorError", "Launch", "LoadedModule", "Options", "Run", "Unsupported", "load", "triton"]
