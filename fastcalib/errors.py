"""Errors that end a command with one sentence instead of a traceback."""

from __future__ import annotations

import importlib.util


class UserError(RuntimeError):
    """Something the person at the keyboard can put right; the message says how."""


def require(*packages: str) -> None:
    """UserError naming the pip command if a package is missing (nothing is imported)."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"this needs {', '.join(missing)}: run\n    pip install {' '.join(missing)}\n"
            'or everything at once: pip install "fastcalib[report]"'
        )
