"""The kernel of linear_statistics in Triton's own interpreter: what it means, for tiles of every GPU, in float32.

In a process of its own, as test_triton_interpret.py. Half precision is left to the emulated device
(test_triton_linear_emulated.py): the interpreter's product of bfloat16 is not one. Its product of float32 is NumPy's
whatever the precision asked for, so TF32 is seen there alone as well.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcalib import ValidSets, linear_statistics

from . import reference
from .checks import assert_statistics
from .linear_layers import every_row, exact_layer
from .test_triton_interpret import _reductions_by_halves  # noqa: F401 (a fixture that every test here gets)

linear = importlib.import_module("fastcalib.ops.linear")
kernel = importlib.import_module("fastcalib.triton_kernels.linear_statistics")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_a_process_of_its_own starts")
T = [0.3, 1.0]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", __file__],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


# Fewer rows than a tile and more than one; columns that fill no tile; depths that fill no stage, and more than one.
@inside
@pytest.mark.parametrize(("n", "v", "d", "major"), [(1, 31, 16, 8), (66, 200, 48, 8), (3, 200, 32, 9)])
def test_every_field_is_that_of_the_logits(n, v, d, major, monkeypatch):
    monkeypatch.setattr(kernel, "on_cpu", True)
    monkeypatch.setattr(kernel, "major_override", major)
    monkeypatch.setattr(linear, "_rows_to_do", every_row)
    launches, run = [], kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args: launches.append(run(*args)))
    layer = exact_layer(n, v, d, bias=True, seed=v)
    if n > 8:  # as many of each row; some ignored, a whole row of them among others
        index = [[-100, v - 1 - r if r % 3 else -100] for r in range(n)]
        given = torch.tensor(index)
    else:
        index = [[r % v, v - 1, 7][: r % 4] for r in range(n)]
        given = ValidSets.from_lists(index)
    with torch.no_grad():
        got = linear_statistics(
            layer.hidden, layer.weight, given, T, bias=layer.bias, logit_scale=0.5, backend="triton"
        )
    assert len(launches) == 1, "this kernel, not chunks of logits"
    want = reference.statistics(layer.exact().logits(0.5).detach(), T, index)
    assert_statistics(got, want, torch.float32, f"N={n} V={v} D={d}")
