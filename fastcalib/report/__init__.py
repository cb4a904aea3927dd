"""What ``fastcalib report`` does: one self-contained page from the tables of :mod:`fastcalib.runner.tables`."""

from __future__ import annotations

from .page import write_report

__all__ = ["write_report"]
