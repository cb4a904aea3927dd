"""Fixtures: every test of an operation runs on every live backend, for C++ on every instruction set of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import fastcalib
from fastcalib.backends import extension

from . import gpu as gpu_tools
from . import gpu_devices

CPP_IS_LIVE = fastcalib.backends()["cpp"][0]
CPP_BACKENDS = [f"cpp-{isa}" for isa in extension().isas()] if CPP_IS_LIVE else []
# The grid of the kernels, which a GPU gets too where there is one: the CPU tensors of these tests are carried to it.
GPU_GRID = (
    "statistics",
    "statistics_backward",
    "ranks",
    "softmax",
    "moments",
    "edge_cases",
    "determinism",
    "properties",
)
# What of the GPU's own tests runs in the emulator where there is no GPU: seconds.
GPU_EMULATED = (
    "test_bad_ids_are_marked_and_do_no_harm",
    "test_padded_columns_take_no_part",
    "test_drop_in_cross_entropy",
)
GPU_BACKENDS = [f"gpu-{kind}" for kind in gpu_tools.LIVE]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # For other backends: FASTCALIB_TEST_BACKENDS=triton-sm90, triton-sm80 (emulated), carried-sm90 (emulated,
    # in copies of the tensors as a GPU has them), triton-interpreter, gpu-triton or gpu-cuda.
    other = os.environ.get("FASTCALIB_TEST_BACKENDS", "").split()
    here = metafunc.module.__name__.rpartition(".test_")[2]
    on_gpu = GPU_BACKENDS if here in GPU_GRID else []
    for fixture, names in (
        ("backend", other or ["eager", *CPP_BACKENDS, *on_gpu]),
        ("cpp_backend", other or [*CPP_BACKENDS, *on_gpu]),
    ):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, indirect=True)
    if "gpu" in metafunc.fixturenames:
        # FASTCALIB_TEST_GPU=emulated-sm90 (Triton) or emulated-cuda-sm90 runs the bodies that need no real GPU;
        # stand-in all of them, on the CPU's kernels, which is what test_gpu_device.py has where there is no GPU.
        live = os.environ.get("FASTCALIB_TEST_GPU", "").split() or gpu_tools.LIVE
        without = "emulated-sm90" if metafunc.function.__name__ in GPU_EMULATED else "none"
        if here == "gpu_device" and CPP_IS_LIVE:
            without = "stand-in"
        metafunc.parametrize("gpu", live or [without], indirect=True)


def _activate(name: str) -> Iterator[str]:
    if name == "triton-interpreter":
        assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 must be set before Triton is imported"
        yield "triton"
        return
    if name.startswith("triton-sm"):
        from . import emulator

        with emulator.triton(sm=int(name.removeprefix("triton-sm")), ptxas=False), gpu_tools.in_place() as backend:
            yield backend
        return
    if name.startswith("gpu-"):
        with gpu_tools.carrying("cuda", name.removeprefix("gpu-")) as backend:
            yield backend
        return
    if name.startswith("carried-sm"):
        with (
            gpu_devices.emulated(int(name.removeprefix("carried-sm"))),
            gpu_tools.carrying("cpu", "triton") as backend,
        ):
            yield backend
        return
    if not name.startswith("cpp-"):
        yield name
        return
    module = extension()
    before = module.isa()
    module.set_isa(name.removeprefix("cpp-"))
    yield "cpp"
    module.set_isa(before)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A live backend, as the argument ``backend=`` takes it."""
    yield from _activate(request.param)


@pytest.fixture
def cpp_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ backend alone, for promises that plain PyTorch does not make; skipped where it is not built."""
    yield from _activate(request.param)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[gpu_devices.Device]:
    """A GPU with one kind of kernels; skipped where there is none."""
    if request.param == "none":
        pytest.skip("torch sees no CUDA device")
    with gpu_devices.open_device(request.param) as device:
        yield device


@pytest.fixture
def real_gpu(gpu: gpu_devices.Device) -> gpu_devices.Device:
    """The same for what an emulator does not have: streams, graphs, an allocator, several devices. Or a stand-in."""
    if gpu.emulated:
        pytest.skip("needs a real GPU or a stand-in")
    return gpu


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """A fixed seed, and one thread: more give the same bits (test_determinism.py) and take longer over small work."""
    torch.manual_seed(20260)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
