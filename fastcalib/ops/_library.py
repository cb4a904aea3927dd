"""The torch.library namespace that every operation registers in."""

from __future__ import annotations

from torch.library import Library

LIBRARY = Library("fastcalib", "DEF")
