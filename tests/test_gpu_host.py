"""What the host does on behalf of a GPU, seen without one: never reads from the device, never copies to it and waits.

Every job runs on meta tensors, which have everything but memory, with the kernels left out. Nothing here says anything
of the kernels, or of what torch's own operations do on a GPU: test_gpu_device.py asks a real one.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastcalib.ops import _gpu

from .gpu import RESULTS
from .gpu_jobs import N, every_job

backends_module = importlib.import_module("fastcalib.backends")  # the package has a function of that name
V = 333


class NoWaiting(TorchDispatchMode):
    """Fails where torch would wait for the device: values looked at, sizes that depend on them, copies to and fro."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        given = [a for a in args if isinstance(a, torch.Tensor)]
        assert not (name in self.READS and given[0].is_meta), f"{name} reads from the device"
        devices = {a.device.type for a in given} | (
            {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
        )
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking"):
            assert len(devices) == 1, f"{name} copies between {' and '.join(sorted(devices))} and waits"
        return function(*args, **kwargs)


class NoLiterals(TorchFunctionMode):
    """Fails where Python numbers become a tensor on the device: a copy too, but one that meta tensors leave out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            device = torch.device(kwargs.get("device") or "cpu")
            assert device.type == "cpu", f"{function.__name__} copies numbers to {device} and waits"
        return function(*args, **kwargs)


@every_job
def test_the_host_never_waits_for_the_device(job, monkeypatch):
    monkeypatch.setattr(backends_module, "_on_cpu", ("triton",))
    for name in RESULTS:  # called by what is no operation of its own: fused_loss
        monkeypatch.setattr(_gpu, name, lambda *args, **kwargs: None)
    z = torch.empty(N, V, device="meta", requires_grad=True)
    target = torch.zeros(N, dtype=torch.int64, device="meta")
    job(z, target, "triton")  # the first time it may move its own arguments
    with NoLiterals(), NoWaiting():
        results = job(z, target, "triton")
    assert all(t.is_meta for t in results)


def test_waiting_is_seen():
    there = torch.zeros(3, device="meta")
    for waits in (
        lambda: torch.as_tensor(3.0, device="meta"),
        lambda: torch.tensor([1, 2]).to("meta"),
        lambda: there.copy_(torch.zeros(3)),
        lambda: there.nonzero(),
        lambda: there[0].item(),
        lambda: bool((there > 0).any()),
    ):
        with pytest.raises(AssertionError, match=r"waits|reads"), NoLiterals(), NoWaiting():
            waits()
