"""A launcher compiled by nvcc, against the stand-in for libcudart: no driver, no GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.emulator import EmulatorError, cudart

NVCC = cudart.find_nvcc()
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="needs nvcc: set NVCC, or install nvidia-cuda-nvcc and its companions"),
    pytest.mark.skipif(not (os.environ.get("CC") or shutil.which("cc")), reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., cudart.Library]:
    def compiled(*options: str, sm: int = 90) -> cudart.Library:
        return cudart.compile(
            [Path(__file__).with_name("lse.cu")], tmp_path_factory.mktemp("cu"), sm=sm, options=options
        )

    return compiled


@pytest.fixture(scope="module")
def library(build: Callable[..., cudart.Library]) -> cudart.Library:
    return build()


def test_a_launcher_runs(library: cudart.Library) -> None:
    x = (torch.randn(4, 32000) * 3).bfloat16()
    with library.run() as run:
        out = torch.empty(4)
        assert run.call("launch_lse", x, out, 4, 32000, 32000, None, names=("x", "out")) == 0
    # exp2f and log2f of CUDA's library err by 2 ulp; sums of 125 terms a thread.
    torch.testing.assert_close(out, torch.logsumexp(x.float(), 1), rtol=1e-6, atol=0)
    (launch,) = run.launches
    assert launch.grid == (4, 1, 1) and launch.block == (256, 1, 1) and "lse_kernel" in launch.kernel
    assert launch.counters.buffers["x"].loaded == launch.counters.buffers["x"].loaded_once == x.nbytes
    assert launch.counters.load_widths == {128: x.nbytes // 16}


def test_faults_reach_the_caller(library: cudart.Library) -> None:
    x, out = torch.randn(2, 1001).bfloat16(), torch.zeros(2)
    with library.run() as run, pytest.raises(EmulatorError, match="misaligned read of 16 bytes at x"):
        run.call("launch_lse", x, out, 2, 1001, 1001, None, names=("x", "out"))
    with library.run() as run:
        with pytest.raises(EmulatorError, match="out-of-bounds write of 4 bytes at out"):
            run.call("launch_lse", x[:, :992].clone(), out[:1].clone(), 2, 992, 992, None, names=("x", "out"))
        assert run.launches == []


def test_runtime_calls_structures_and_shared_memory_limits(library: cudart.Library) -> None:
    values = torch.randint(0, 15000, (2000,), dtype=torch.int32)
    with library.run() as run:
        bins = torch.empty(15000, dtype=torch.int32)
        assert run.call("launch_histogram", values, bins, 2000, 15000, 0, None) == cudart.INVALID_VALUE  # 60 KB unasked
        assert run.call("launch_histogram", values, bins, 2000, 15000, 1, None) == 0
        assert run.call("launch_histogram", values, bins, 2000, 1 << 20, 1, None) == -1  # more than the device has
    assert torch.equal(bins.long(), torch.bincount(values, minlength=15000))


def test_a_missing_barrier_in_cuda(build: Callable[..., cudart.Library]) -> None:
    values, bins = torch.randint(0, 200, (1000,), dtype=torch.int32), torch.zeros(200, dtype=torch.int32)
    with (
        build("-DWITHOUT_BARRIER", sm=80).run(sm=80) as run,
        pytest.raises(EmulatorError, match="race on shared memory"),
    ):
        run.call("launch_histogram", values, bins, 1000, 200, 0, None)
