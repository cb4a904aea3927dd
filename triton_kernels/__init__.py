"""Triton kernels of fastcalib, one file per op. Not yet run on a GPU: tests/test_triton_emulated.py says what was run.

The kernels know pointers and sizes; fastcalib/ops/_gpu.py is their only caller. Importing this package imports no
Triton.

This folder is installed as ``fastcalib.triton_kernels`` (setup.py maps it) and must never be importable as a top-level
``triton_kernels``: that is the name of another project's package, and code that looks for it would find this one. Hence
relative imports only in here, and no ``sys.path`` entry that contains this folder.

Example:
    >>> import fastcalib.triton_kernels
    >>> fastcalib.triton_kernels.__name__
    'fastcalib.triton_kernels'
"""
