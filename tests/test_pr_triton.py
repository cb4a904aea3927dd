"""The Triton kernels of ``pr_divergence`` on the emulated device (tests/emulator), against float64.

Strict as in test_triton_emulated.py: out of bounds, misaligned, racing or uninitialised accesses fail. Nothing here has
been compared with a real GPU.
"""

from __future__ import annotations

import pytest
import torch

import fastcalib

from . import cases
from .test_pr_divergence import INF, LAMBDAS, check, check_gradient, pair
from .test_triton_emulated import assert_same_bits, device  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    "dtype, v, count",
    [
        (torch.bfloat16, 2_049, 0),
        (torch.float32, 36, 11),
        pytest.param(torch.bfloat16, 33_000, 0, marks=pytest.mark.prove),
        *(
            pytest.param(dtype, v, count, marks=pytest.mark.prove)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for v in (1, 31, 1_000, 2_049)
            for count in (1, 2, 9, 64)
        ),
    ],
    ids=cases.dtype_id,
)
def test_values_and_gradients(device, dtype, v, count):  # noqa: F811
    student, teacher = pair(2, v, dtype, seed=v)
    if v > 30:
        student[0, 3:20], teacher[1, 10:30] = -INF, -INF
    lam = fastcalib.angles(count).tolist() if count > 1 else LAMBDAS if count == 0 else [0.7]
    check(student, teacher, lam, "triton", f"V={v}", 0.7, 1.3)
    if v > 30:
        student, teacher = pair(2, v, dtype, seed=v)
    check_gradient(student, teacher, lam, "triton", f"V={v}", 0.7, 1.3)


def test_hostile_undefined_ignored_and_padded_rows(device):  # noqa: F811
    rows = {k: r for k, r in cases.defined_rows(36, torch.float32).items() if "finfo.min" not in k}
    hostile = torch.stack(list(rows.values()))
    check(hostile, hostile.roll(1, 0), LAMBDAS, "triton", "hostile")
    bad = torch.stack([*cases.undefined_rows(36, torch.float32).values(), rows["random"], rows["random"]])
    good = torch.stack([rows["random"]] * len(bad)) + 0.1 * torch.randn(36)
    ignored = torch.zeros(len(bad), dtype=torch.bool)
    ignored[2] = ignored[-1] = True
    x = torch.cat([bad, torch.full((len(bad), 3), torch.nan)], 1).requires_grad_()
    y = good.clone().requires_grad_()
    d = fastcalib.pr_divergence(x, y, LAMBDAS, vocab_size=36, ignored=ignored, backend="triton")
    want = fastcalib.pr_divergence(bad, good, LAMBDAS, ignored=ignored, backend="eager")
    torch.testing.assert_close(d.alpha, want.alpha, rtol=4e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(d.beta, want.beta, rtol=4e-6, atol=1e-30, equal_nan=True)
    d.alpha.sum().backward()
    for i, name in enumerate([*cases.undefined_rows(36, torch.float32), "random", "ignored"]):
        g = x.grad[i]
        assert (g[36:] == 0).all(), name
        if ignored[i] or name == "all -inf":
            assert (g == 0).all() and (y.grad[i] == 0).all(), name
        elif name == "random":
            assert g.isfinite().all() and (g != 0).any()
        else:
            assert g[:36].isnan().all() and y.grad[i].isnan().all(), name


def test_ties_and_bits(device):  # noqa: F811
    student, teacher = pair(3, 2_049, torch.bfloat16)
    d = fastcalib.pr_divergence(teacher, teacher, [0.5, 1.0, 2.0], backend="triton")
    torch.testing.assert_close(d.alpha, torch.tensor([[0.5, 1.0, 1.0]] * 3), rtol=4e-6, atol=0)

    def run(rows):
        x, y = (z[rows].clone().requires_grad_() for z in (student, teacher))
        d = fastcalib.pr_divergence(x, y, LAMBDAS, backend="triton")
        return [*d, *torch.autograd.grad(d.alpha.sum() + d.beta.sum(), (x, y))]

    together = run(slice(0, 3))
    for r in (0, 2):
        assert_same_bits(run(slice(r, r + 1)), [x[r : r + 1] for x in together], f"row {r} alone")


@pytest.mark.prove
def test_bytes(device):  # noqa: F811
    """Two reads of each row forward, one read and one write backward."""
    student, teacher = pair(2, 33_000, torch.bfloat16)
    x = student.clone().requires_grad_()
    d = fastcalib.pr_divergence(x, teacher, [0.5, 1.0, 2.0], backend="triton")
    (counters,) = [run.counters for run in device.launches if run.kernel == "_pair_segments"]
    assert counters.buffers["x"].loaded == counters.buffers["teacher"].loaded == student.nbytes
    d.alpha.sum().backward()
    (counters,) = [run.counters for run in device.launches if run.kernel == "_pair_gradient"]
    assert counters.buffers["x"].loaded == counters.buffers["out_q"].stored == student.nbytes
