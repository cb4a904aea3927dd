"""What ``fastcalib report`` does: one self-contained page from the tables of :mod:`fastcalib.runner.tables`."""
