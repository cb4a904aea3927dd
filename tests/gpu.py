"""GPU kernels under tests written for CPU tensors; gpu_devices.py has what tests written for a GPU run on.

``carrying`` lets the whole grid of the CPU tests run on a GPU unchanged: whatever the operations hand to the kernels
for accelerators goes to the device in the same memory layout, is computed there, and comes back. Not yet run on a GPU:
here the device has been the emulator's.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcalib
from fastcalib.ops import _gpu

backends_module = importlib.import_module("fastcalib.backends")  # the package has a function of that name
fused_job = importlib.import_module("fastcalib._fused_job")

KINDS = ("triton", "cuda")
LIVE = [kind for kind in KINDS if torch.cuda.is_available() and fastcalib.backends()[kind][0]]
# What the kernels fill; everything else they are given, they must leave as it was.
RESULTS = {
    "statistics_forward": ("out",),
    "statistics_backward": ("out",),
    "ranks": ("out",),
    "softmax_forward": ("out", "logsumexp"),
    "softmax_backward": ("out", "grad_temperature"),
    "statistics_with_gradient": ("out", "made"),
    "pr_divergence_forward": ("out",),
    "pr_divergence_backward": ("grad_logits", "grad_teacher", "grad_temperature"),
}
TRITON_ALONE = ("pr_divergence_forward", "pr_divergence_backward")
# Storages up to this size are compared byte by byte after a call, gaps between the rows included.
COMPARED_BYTES = 1 << 26


def _whole(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of, flat."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def like_layout(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on a device with the strides, the offset and the surroundings (also of other rows) that it has here."""
    there = _whole(tensor).to(device, copy=True)
    return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Carrier:
    """Moves the tensors of one call; what shares memory here shares it there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def put(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self.put(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        key = (value.untyped_storage().data_ptr(), value.dtype)
        if key not in self.memory or value.numel() == 0:
            here = _whole(value)
            self.memory[key] = (here, here.to(self.device, copy=True))
        there = self.memory[key][1]
        return there.as_strided(value.shape, value.stride(), value.storage_offset())

    def check_untouched(self, name: str, written: set[int]) -> None:
        """Every memory but that of the results is as it was before the call."""
        for here, there in self.memory.values():
            if here.untyped_storage().data_ptr() in written or here.nbytes > COMPARED_BYTES:
                continue
            same = torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8))
            assert same, f"{name} wrote to something it was given to read: {tuple(here.shape)} {here.dtype}"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [t for v in value for t in _tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def _carried(name: str, function: Callable[..., None], device: torch.device, kind: str) -> Callable[..., None]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        if "backend" in signature.parameters:
            arguments["backend"] = kind
        if kind == "cuda" and name in TRITON_ALONE:
            pytest.skip(f"the extension has no CUDA kernel for {name}")
        _skip_what_has_no_kernel(arguments)
        carrier = _Carrier(device)
        there = {key: carrier.put(value) for key, value in arguments.items()}
        function(**there)
        results = [pair for key in RESULTS[name] for pair in zip(_tensors(arguments[key]), _tensors(there[key]))]
        carrier.check_untouched(name, {own.untyped_storage().data_ptr() for own, _ in results})
        for own, made in results:
            own.copy_(made)

    return call


def _skip_what_has_no_kernel(arguments: dict[str, Any]) -> None:
    """Ends tests of what differs on an accelerator by design, once they come to it."""
    logits = arguments["logits"] if "logits" in arguments else arguments["grad"]
    if logits.dtype == torch.float64:
        pytest.skip("float64 has no kernels for accelerators; plain PyTorch takes it there")
    ids = arguments.get("index")
    if ids is not None and _gpu.outside(ids, arguments["vocab_size"], arguments["ignore_index"]).any():
        pytest.skip("a bad id is no error on an accelerator: test_gpu.py says what it is")


def _checked(function: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        _skip_what_has_no_kernel(signature.bind(*args, **kwargs).arguments)
        function(*args, **kwargs)

    return call


@contextmanager
def in_place() -> Iterator[str]:
    """Calls on CPU tensors with ``backend="triton"`` go to Triton's kernels where the tensors are, which an emulated
    device reads; tests of what differs on an accelerator by design end as in ``carrying``. Yields "triton"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends_module, "_on_cpu", ("triton",))
        for name in RESULTS:
            patch.setattr(_gpu, name, _checked(getattr(_gpu, name)))
        yield "triton"


@contextmanager
def carrying(device: torch.device | str, kind: str) -> Iterator[str]:
    """Calls on CPU tensors with ``backend="triton"`` run on a device with the kernels of a kind. Yields "triton"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends_module, "_on_cpu", ("triton",))
        if kind == "cuda":
            patch.setattr(fused_job, "in_one_launch", lambda *arguments: _gpu.in_one_launch(*arguments[:3], "cuda"))
        for name in RESULTS:
            patch.setattr(_gpu, name, _carried(name, getattr(_gpu, name), torch.device(device), kind))
        yield "triton"
