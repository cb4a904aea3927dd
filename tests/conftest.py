"""Fixtures: every test of an operation runs on every live backend, for C++ on every instruction set of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastcalib
from fastcalib.backends import extension

CPP_IS_LIVE = fastcalib.backends()["cpp"][0]
CPP_BACKENDS = [f"cpp-{isa}" for isa in extension().isas()] if CPP_IS_LIVE else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, names in (("backend", ["eager", *CPP_BACKENDS]), ("cpp_backend", CPP_BACKENDS)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, indirect=True)


def _activate(name: str) -> Iterator[str]:
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
