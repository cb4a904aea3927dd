"""The parts of ``examples/order_and_shape.py``; not installed with fastcalib."""
