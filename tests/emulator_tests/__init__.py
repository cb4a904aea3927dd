"""Tests of the emulator itself: each opcode against an independent answer, and planted bugs that it must see."""
