"""Runs the PTX of compiled kernels on a CPU, strictly: for tests of GPU kernels where there is no GPU.

`triton` runs Triton kernels, `cudart` the launches of a compiled CUDA C++ launcher, ``load(ptx).launch(...)`` a
kernel of any PTX text. A launch that reads or writes what it must not, or races, raises `EmulatorError`; its counters
say what it moved and computed. Nothing here has been compared with a real GPU.
"""

from . import cudart
from .errors import EmulatorError, Unsupported
from .loader import Launch, LoadedModule, load
from .machine import Counters, Options
from .triton_driver import Run, triton

__all__ = [
    "Counters",
    "EmulatorError",
    "Launch",
    "LoadedModule",
    "Options",
    "Run",
    "Unsupported",
    "cudart",
    "load",
    "triton",
]
