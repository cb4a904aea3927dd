"""The demo's name for the error that all commands share."""

from ..errors import UserError as DemoError
from ..errors import require

__all__ = ["DemoError", "require"]
