"""Codes of the cutoff rules, shared with csrc/cpu/cutoffs.h."""

from __future__ import annotations

from enum import IntEnum


class Rule(IntEnum):
    """What a rule compares; its one number travels beside it."""

    NONE = 0
    TOP_K = 1
    TOP_P = 2
    MIN_P = 3
    EPSILON = 4
    ETA = 5
    TOP_N_SIGMA = 6
    SIZE_ORACLE = 7
