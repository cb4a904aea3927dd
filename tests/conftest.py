"""Fixtures: every test of an operation runs on every live backend, for C++ on every instruction set of the machine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

import fastcalib
from fastcalib.backends import extension

backends_module = importlib.import_module("fastcalib.backends")  # the package has a function of that name

CPP_IS_LIVE = fastcalib.backends()["cpp"][0]
CPP_BACKENDS = [f"cpp-{isa}" for isa in extension().isas()] if CPP_IS_LIVE else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # For a run over other backends: FASTCALIB_TEST_BACKENDS=triton-sm90, triton-sm80 (emulated) or triton-interpreter.
    other = os.environ.get("FASTCALIB_TEST_BACKENDS", "").split()
    for fixture, names in (("backend", other or ["eager", *CPP_BACKENDS]), ("cpp_backend", other or CPP_BACKENDS)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, indirect=True)


def _activate(name: str) -> Iterator[str]:
    if name == "triton-interpreter":
        assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 must be set before Triton is imported"
        yield "triton"
        return
    if name.startswith("triton-sm"):
        from . import emulator

        with (
            emulator.triton(sm=int(name.removeprefix("triton-sm")), ptxas=False),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(backends_module, "_on_cpu", ("triton",))
            yield "triton"
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


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """A fixed seed, and one thread: more give the same bits (test_determinism.py) and take longer over small work."""
    torch.manual_seed(20260)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
