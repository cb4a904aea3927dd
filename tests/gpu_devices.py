"""The device that tests written for a GPU run on: a GPU, an emulated one, or a stand-in made of the CPU's kernels.

Streams, graphs, the allocator, other devices and the ban on waiting are methods of `Device`, so that a body can run
where there is no GPU: on the stand-in each of them is the plainest thing that has the same result. That shows that
a test runs and that what is right passes it; of a GPU it shows nothing. Not yet run on a GPU.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from .cases import random_logits
from .gpu import like_layout

backends_module = importlib.import_module("fastcalib.backends")  # the package has a function of that name

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Device:
    """Where a test's tensors live and which kernels work on them."""

    device: torch.device
    backend: str
    emulated: bool = False
    large: ClassVar[tuple[int, int]] = (256, 128_256)  # rows and columns of logits far larger than any scratch memory
    far: ClassVar[tuple[int, int]] = (16_500, 131_072)  # more than 2^31 elements
    compiler: ClassVar[str] = "inductor"

    def put(self, tensor: Tensor) -> Tensor:
        """A copy there, in the same memory layout; a leaf that requires a gradient if the original does."""
        return like_layout(tensor.detach(), self.device).requires_grad_(tensor.requires_grad)

    def logits(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        return self.put(random_logits(*shape, dtype=dtype, seed=seed))

    def ids(self, high: int, *shape: int, seed: int = 0) -> Tensor:
        return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @property
    def checks_ids(self) -> bool:
        """Whether a bad id raises unasked: a look at it would wait for a GPU."""
        return False

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Inside, work goes to another stream, after all that was given to the current one, which then waits for it."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def keep_busy(self) -> None:
        """Some 30 ms during which what comes after on this stream has to wait."""
        torch.cuda._sleep(50_000_000)

    def capture(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Results in memory of a graph's own, and what runs the graph again."""
        with self.side_stream():  # compiles and allocates, which a capture must not
            for _ in range(3):
                function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
        return results, graph.replay

    @contextmanager
    def waiting_is_an_error(self) -> Iterator[None]:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def another(self) -> torch.device | None:
        """A device that is not the current one."""
        count, current = torch.cuda.device_count(), torch.cuda.current_device()
        return torch.device("cuda", (current + 1) % count) if count > 1 else None

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self, function: Callable[[], object]) -> int:
        """The most bytes that were allocated beyond what was there before and what is still there after."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        start = torch.cuda.memory_allocated(self.device)
        result = function()
        torch.cuda.synchronize(self.device)
        kept = torch.cuda.memory_allocated(self.device) - start
        del result
        return torch.cuda.max_memory_allocated(self.device) - start - kept


class StandIn(Device):
    """The CPU, with its own kernels."""

    large = (64, 80_000)
    far = (40, 4_099)
    compiler = "aot_eager"

    @property
    def checks_ids(self) -> bool:
        return True

    def side_stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def keep_busy(self) -> None:
        pass

    def capture(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        results = tuple(t.clone() for t in function())

        def replay() -> None:
            for kept, made in zip(results, function()):
                kept.copy_(made)

        return results, replay

    def waiting_is_an_error(self) -> AbstractContextManager[None]:
        return nullcontext()

    def another(self) -> torch.device:
        return self.device

    def free_bytes(self) -> int:
        return 1 << 40

    def peak(self, function: Callable[[], object]) -> int:
        """From what torch's profiler says of its allocator; memory that a kernel takes by itself is not seen."""
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = function()
        changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(changes, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        del result
        return most - now


@contextmanager
def emulated(sm: int) -> Iterator[None]:
    """Triton kernels take CPU tensors: they run in the emulator."""
    from . import emulator

    with emulator.triton(sm=sm, ptxas=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends_module, "_on_cpu", ("triton",))
        yield


@contextmanager
def open_device(name: str) -> Iterator[Device]:
    """ "triton" or "cuda" on the current GPU; "emulated-sm90" and "emulated-cuda-sm90": Triton's and CUDA kernels on
    CPU tensors, the latter where there is an nvcc; "stand-in": the CPU's kernels."""
    if name == "stand-in":
        yield StandIn(torch.device("cpu"), "cpp")
        return
    if name.startswith("emulated-cuda-sm"):
        from . import emulated_cuda

        if why := emulated_cuda.why_not():
            pytest.skip(why)
        with emulated_cuda.backend(int(name.removeprefix("emulated-cuda-sm"))), pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends_module, "_why_no_cuda", lambda: "")  # for use_backend
            yield Device(torch.device("cpu"), "cuda", emulated=True)
        return
    if name.startswith("emulated-sm"):
        with emulated(int(name.removeprefix("emulated-sm"))):
            yield Device(torch.device("cpu"), "triton", emulated=True)
        return
    yield Device(torch.device("cuda", torch.cuda.current_device()), name)
