"""The parts of ``examples/coverage.py`` and ``examples/temperature.py``; not installed with fastcalib."""
