"""What the emulator says when a kernel is wrong, or when it does not know an instruction."""

from __future__ import annotations


class EmulatorError(Exception):
    """A kernel did something that no GPU promises to survive; ``reports`` lists every finding of the launch."""

    def __init__(self, reports: list[str]) -> None:
        self.reports = list(reports)
        super().__init__("\n".join(reports))


class Unsupported(NotImplementedError):
    """An instruction or a directive that the emulator does not implement: never a silently wrong number."""
