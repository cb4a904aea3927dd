"""``fastcalib demo``: a calibration report of a real language model, from a few calls of the library."""

from ..errors import UserError as DemoError
from .run import DemoOptions, run_demo

__all__ = ["DemoError", "DemoOptions", "run_demo"]
