"""triton-viz's sanitizer, which proves with z3 that no access of a kernel is out of bounds: rung 3 of the evidence.

It follows one of the kernels; what stops it at the others is told in docs/gpu-evidence.md. triton-viz patches Triton,
and z3 may never come back, so each case runs in a process of its own with a limit.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(
        importlib.util.find_spec("triton_viz") is None or importlib.util.find_spec("z3") is None,
        reason="triton-viz is not installed: pip install triton-viz==3.0",
    ),
]
LIMIT = 300  # seconds until z3 is given up
SCRIPT = Path(__file__).with_name("triton_viz_cases.py")


def run(case: str, v: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), case, str(v)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=SCRIPT.parents[1])


def test_a_planted_read_past_the_end_is_found():
    assert "in bounds" in run("sound", 100).stdout
    for case in ("planted", "outside"):
        planted = run(case, 100)
        assert "in bounds" not in planted.stdout and "Diagnostic Report" in planted.stdout + planted.stderr, case


def test_no_access_is_out_of_bounds():
    done = run("finish_compared", 36)
    assert "in bounds" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
