"""The parts of ``benchmarks/run.py``; not installed with fastcalib."""
